"""Weights and activations in few bits, trained with the rounding in place."""

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.calibration import quantizers
from vitbench.calibration.coders import FakeQuantLinear, RowCoder
from vitbench.calibration.quantizers import LearnedRange
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import PackedLinear, Rounded
from vitbench.training.coded import CodedModel
from vitbench.training.loop import evaluate


def test_a_learned_range_rounds_to_its_codes():
    quantizer, x = LearnedRange(3, -0.2, 1.2), torch.linspace(-1, 2, 50)[None]
    low, high = quantizer.bounds()
    y = quantizer(x)
    assert (float(low), float(high)) == pytest.approx((-0.2, 1.2), abs=1e-6)
    assert len(y.unique()) == 8
    inside = (x > low) & (x < high)
    assert ((y - x).abs()[inside] <= 0.1001).all()
    assert torch.allclose(Rounded(3).set_range(low, high)(x), y, atol=1e-6)


def test_what_is_cut_off_widens_the_range_and_gets_no_gradient():
    quantizer = LearnedRange(4, 0.0, 1.0)
    x = torch.tensor([[0.31, 0.52, 3.0]], requires_grad=True)
    (quantizer(x) - x.detach()).square().sum().backward()
    assert x.grad[0, 2] == 0
    assert x.grad[0, 0] != 0
    assert quantizer.factor.grad < 0, "a wider step would reach further"


def test_the_file_answers_as_the_trained_model_did(base, digits, tmp_path):
    model, x = artifact.load(base.path), torch.randn(6, 3, 8, 8)
    layers = vit.linear_layers(model)
    seen = quantizers.channel_ranges(model, layers, digits.calibration)
    found = quantizers.input_ranges(model, layers, seen, digits.calibration, bits=4)
    for name, layer in layers.items():
        vit.replace_module(model, name, FakeQuantLinear(layer, quantizers.LearnedRange(4, *found[name])))
    coded = CodedModel(model, [RowCoder(name, layer, 4) for name, layer in layers.items()]).eval()
    with torch.no_grad():
        wanted = coded(x)
        small = coded.to_packed_model("float32").requires_grad_(False).eval()
        path = artifact.save(small, tmp_path / "small")
        loaded = artifact.load(path)
        assert torch.allclose(loaded(x), wanted, atol=0.02 * float(wanted.abs().max()))
    layer = loaded.blocks[1].mlp.fc2
    assert isinstance(layer, PackedLinear)
    assert isinstance(layer.input, Rounded)
    assert layer.input.bits == 4


@pytest.mark.slow
def test_training_makes_up_for_what_two_bits_lose(base, digits):
    config = {"weight_bits": 2, "activation_bits": 2}
    rounded = compress(base.model, make_config("lsq", {**config, "train": {"epochs": 0}}), digits).model
    trained = compress(base.model, make_config("lsq", {**config, "train": {"epochs": 3}}), digits).model
    before, after, dense = (evaluate(model, digits.val).top1.mean() for model in (rounded, trained, base.model))
    assert dense - before > 0.1, "rounding alone must cost something for this to say anything"
    assert dense - after < 0.5 * (dense - before)


def test_ranges_take_next_to_nothing_on_disk(base, digits, tmp_path):
    free = {"train": {"epochs": 0}}
    sizes = [
        artifact.size_on_disk(
            artifact.save(compress(base.model, make_config(name, free), digits).model, tmp_path / name)
        )
        for name in ("weight_only", "lsq")
    ]
    assert 0 < sizes[1] - sizes[0] < 0.1 * sizes[0]


def test_no_images_no_ranges(base):
    with pytest.raises(
        InputError, match="lsq takes its first ranges from calibration images and no data set was given"
    ):
        compress(base.model, make_config("lsq", {"train": {"epochs": 0}}))
