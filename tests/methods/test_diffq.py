"""Bits that are learned under noise."""

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.methods.diffq import MAX_BITS, MIN_BITS, NoiseCoder, round_bits_to_target
from vitbench.methods.registry import compress, make_config
from vitbench.model import vit
from vitbench.model.layers import PackedLinear


def coder(bits, shape=(6, 40)):
    torch.manual_seed(0)
    return NoiseCoder("layer", torch.nn.Linear(*reversed(shape)), bits)


def test_the_noise_is_as_large_as_the_rounding_error():
    noisy = coder(4.0, (64, 400)).train()
    weight = noisy.value.detach() * noisy.scale
    error = noisy.decode()["layer"].detach() - weight
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    assert float((error / step).std()) == pytest.approx(12**-0.5, rel=0.02)
    assert (error.abs() <= step / 2 * 1.001).all()


def test_more_bits_less_noise_and_the_gradient_says_so():
    noisy = coder(4.0).train()
    (noisy.decode()["layer"] - noisy.value.detach() * noisy.scale).square().sum().backward()
    assert noisy.logit_change.grad < 0, "going against the gradient gives more bits"
    assert float(noisy.regularizer({}).detach()) == pytest.approx(4.0 * 240, rel=1e-4)


@pytest.mark.parametrize("target", [2.0, 3.3, 5.0])
def test_final_bits_are_integers_that_meet_the_target(target):
    coders = [coder(bits, shape) for bits, shape in ((2.4, (6, 40)), (3.5, (12, 40)), (6.6, (3, 40)), (4.0, (9, 40)))]
    count = sum(noisy.value.numel() for noisy in coders)
    round_bits_to_target(coders, target * count)
    used = sum(noisy.final_bits * noisy.value.numel() for noisy in coders)
    assert used <= target * count
    assert all(MIN_BITS <= noisy.final_bits <= MAX_BITS for noisy in coders)
    room = target * count - used
    assert all(noisy.value.numel() > room or noisy.final_bits == MAX_BITS for noisy in coders), (
        "more bits would have fitted"
    )


def test_where_rounding_hurts_more_there_are_more_bits():
    coders = [coder(6.6), coder(2.4)]
    round_bits_to_target(coders, 4.5 * 480)
    assert coders[0].final_bits > coders[1].final_bits


@pytest.mark.slow
def test_the_model_keeps_to_the_bits_it_was_given(base, digits):
    small = compress(base.model, make_config("diffq", {"bits": 2.5, "train": {"epochs": 2}}), digits).model
    layers = {name: small.get_submodule(name) for name in vit.linear_layers(base.model)}
    assert all(isinstance(layer, PackedLinear) for layer in layers.values())
    count = sum(layer.in_features * layer.out_features for layer in layers.values())
    used = sum(layer.bits * layer.in_features * layer.out_features for layer in layers.values())
    assert 2.3 < used / count <= 2.5


def test_without_training_there_is_nothing_to_learn(base, digits):
    with pytest.raises(InputError, match="diffq learns its bits in training; give train.epochs of 1 or more"):
        compress(base.model, make_config("diffq", {"train": {"epochs": 0}}), digits)
