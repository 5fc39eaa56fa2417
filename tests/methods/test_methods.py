"""What every registered method must keep to; a new method is covered on the day it is added."""

import copy
import functools

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.measurement.cost import count_macs
from vitbench.methods.registry import METHODS, compress, make_config
from vitbench.model import artifact
from vitbench.model.vit import set_fused_attention
from vitbench.training.loop import evaluate

EVERY = pytest.mark.parametrize("name", METHODS)


def costly(name):
    """Whether a method trains or searches in its defaults."""
    config = make_config(name).to_dict()
    return bool(config.get("train", {}).get("epochs")) or "search" in config


# for tests that compress by the defaults: what takes long is marked
MADE = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if costly(name) else name for name in METHODS]
)


@pytest.fixture(scope="module")
def usual(base, digits):
    """The model compressed by a method's defaults, made once."""
    return functools.cache(lambda name: compress(base.model, make_config(name), digits).model)


def shortened(name):
    """A method's defaults with the least work in its trainings and its search."""
    config = make_config(name).to_dict()
    if config.get("train", {}).get("epochs"):
        config["train"]["epochs"] = 1
    if "warm_steps" in config:
        config["warm_steps"] = 20
    if "search" in config:
        config["search"] |= {"evaluations": 12, "pool": 200}
    return make_config(name, config)


@EVERY
def test_identity_changes_nothing(name, base, digits):
    x = torch.randn(4, 3, 8, 8)
    same = compress(base.model, METHODS[name].identity, digits).model
    assert torch.allclose(same(x), base.model(x), atol=1e-5)


@MADE
def test_the_given_model_stays_as_it_is(name, base, usual):
    before = artifact.load(base.path).state_dict()
    usual(name)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@MADE
def test_saved_and_loaded_it_answers_the_same_and_saves_what_it_promises(name, base, usual, tmp_path):
    small = usual(name)
    path = artifact.save(small, tmp_path / name)
    loaded, tensors = artifact.load(path), small.state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in loaded.state_dict().items())
    x = torch.randn(4, 3, 8, 8)
    wanted = small(x)  # activations quantized on the fly may round the other way for a last bit
    assert torch.allclose(loaded(x), wanted, atol=2e-2 * wanted.abs().max())
    promised = {"bytes": artifact.size_on_disk, "macs": lambda path: count_macs(artifact.load(path))}[
        METHODS[name].reduces
    ]
    assert promised(path) < promised(base.path)


@MADE
def test_fused_and_written_out_attention_agree(name, usual):
    small = copy.deepcopy(usual(name))
    x = torch.randn(4, 3, 8, 8)
    fused = small(x)
    set_fused_attention(small, False)
    assert torch.allclose(small(x), fused, atol=2e-2 * fused.abs().max())


@MADE
def test_it_is_deterministic(name, base, digits, tmp_path):
    made = [compress(base.model, shortened(name), digits).model for _ in range(2)]
    paths = [artifact.save(small, tmp_path / str(i)) for i, small in enumerate(made)]
    assert artifact.read_manifest(paths[0]) == artifact.read_manifest(paths[1])


@MADE
def test_accuracy_stays_far_from_chance(name, digits, usual):
    assert evaluate(usual(name), digits.val).top1.mean() > 0.5


@EVERY
def test_the_config_goes_through_json_and_refuses_unknown_keys(name):
    config = make_config(name)
    assert make_config(name, config.to_dict()) == config
    with pytest.raises(InputError, match="unknown key 'surprise'"):
        make_config(name, {"surprise": 1})


@pytest.mark.slow
def test_a_list_of_configs_is_a_combination(base, digits):
    name = next(iter(METHODS))
    twice = compress(base.model, [METHODS[name].identity, shortened(name)], digits).model
    assert twice.recipe.method == f"{name}+{name}"


def test_unknown_methods(base):
    with pytest.raises(InputError, match="unknown method 'dynamic_int9'.*did you mean 'dynamic_int8'"):
        make_config("dynamic_int9")
    with pytest.raises(InputError, match="not a method's config"):
        compress(base.model, base.model.recipe.preprocess)
