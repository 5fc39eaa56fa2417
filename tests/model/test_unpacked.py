"""A saved model of packed weights is a start for training and other methods: the same answers, from dense weights."""

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact
from vitbench.model.layers import RUNTIME_LAYERS
from vitbench.model.unpacked import load_unpacked
from vitbench.run.cache import baseline
from vitbench.training.config import TrainConfig

UNTRAINED = TrainConfig(epochs=0)


@pytest.fixture(scope="module")
def packed(micro, tmp_path_factory):
    return artifact.save(
        compress(micro, make_config("weight_only", {"bits": 8})).model, tmp_path_factory.mktemp("packed") / "eight_bits"
    )


def test_it_answers_as_the_packed_model_and_is_dense(packed):
    model, images = load_unpacked(packed), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), artifact.load(packed)(images), rtol=1e-5, atol=1e-5)
    assert not any(type(module).__name__ in RUNTIME_LAYERS for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_its_recipe_is_an_uncompressed_models_that_names_the_file(packed, tmp_path):
    model = load_unpacked(packed)
    assert model.recipe.method == "baseline"
    assert model.recipe.origin["start"] == f"eight_bits:{artifact.read_manifest(packed).sha256[:12]}"
    assert set(model.recipe.origin) == {"start", "head"}, "how the file was trained is no training of this model"
    again = artifact.load(artifact.save(model, tmp_path / "dense"))
    assert again.recipe.layers == {}
    assert artifact.weights_hash(again) == artifact.weights_hash(model)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mixed_rank", {"keep": 0.5}),
        ("pruning", {"neurons": 0.5}),  # dense layers alone, and no longer the baseline's
        ("simulated_integer", {}),  # packed weights, and roundings before them
    ],
)
def test_a_model_of_another_method_is_refused(micro, few_digits, tmp_path, method, settings):
    path = artifact.save(compress(micro, make_config(method, settings), few_digits).model, tmp_path / "model")
    with pytest.raises(InputError, match=f"made by {method}, and only packed weights become dense again"):
        load_unpacked(path)


def test_a_baseline_starts_from_it(packed, few_digits):
    base = baseline(str(packed), few_digits, UNTRAINED)
    assert base.model.recipe.origin["start"].startswith("eight_bits:")
    trained = baseline(str(packed), few_digits, TrainConfig(epochs=1, batch_size=32, mixup=0.0))
    assert artifact.weights_hash(trained.model) != artifact.weights_hash(base.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, "has weights of its own"),
        ({"checkpoint": "other.safetensors"}, "has weights of its own"),
        ({"img_size": 16}, "takes images of 8 pixels"),
    ],
)
def test_what_does_not_go_with_it_is_refused(packed, few_digits, options, message):
    with pytest.raises(InputError, match=message):
        baseline(str(packed), few_digits, UNTRAINED, **options)
