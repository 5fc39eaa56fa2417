"""Multiply-accumulates of 8-bit codes: all of a block's where attention is in codes too, so that floors are floors."""

import copy
import dataclasses

import pytest
import torch

from vitbench.measurement.cost import count_int8_macs, count_macs
from vitbench.measurement.roofline import latency_floor
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, blocks, vit
from vitbench.model.layers import Rounded, StaticInt8Rounding


@pytest.fixture(scope="module")
def model():
    return vit.create_model("vit_micro_patch2_8").requires_grad_(False)


@pytest.fixture(scope="module")
def few(digits):
    return dataclasses.replace(digits, calibration=digits.calibration.subset(16))


def static(model, few, **changes):
    return compress(model, make_config("static_int8", {"compensation": False, "range": "minmax", **changes}), few).model


def by_hand(attention):
    """4 blocks of width 32 with 17 tokens: qkv, proj, fc1 and fc2, and 2 N^2 d of the two products."""
    tokens, width = 17, 32
    return 4 * (tokens * 12 * width**2 + (2 * tokens**2 * width if attention else 0))


@pytest.mark.parametrize("attention", [False, True])
def test_products_of_codes_are_counted(model, few, tmp_path, attention):
    small = static(model, few, attention=attention)
    assert count_int8_macs(small) == by_hand(attention)
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    assert count_int8_macs(loaded) == by_hand(attention)
    outside = 16 * 12 * 32 + 32 * 10  # the patch embedding and the head
    left = count_macs(loaded) - count_int8_macs(loaded)
    assert left == outside + (0 if attention else 4 * 2 * 17**2 * 32)


def test_a_product_counts_only_if_both_sides_are_codes(model):
    rounded = copy.deepcopy(model)
    blocks.make_attention_quantizable(rounded)
    assert count_int8_macs(rounded) == 0
    attn = rounded.blocks[1].attn
    attn.q, attn.v, attn.softmax = StaticInt8Rounding(0.1, 128), StaticInt8Rounding(0.1, 128), Rounded(8)
    assert count_int8_macs(rounded) == 0
    attn.k = StaticInt8Rounding(0.1, 128)
    assert count_int8_macs(rounded) == 17**2 * 32


def test_the_floor_of_a_model_in_codes_is_below_that_of_its_halves(model, few):
    """Twice as fast in integers: a floor that left attention out would be above what the machine allows."""
    peaks = {"float_macs": 1e9, "int8_macs": 2e9, "memory_bandwidth": 1e12}
    small = static(model, few, attention=True)
    int8 = count_int8_macs(small)
    wanted = 1000 * (16 * 12 * 32 + 32 * 10 + by_hand(True) / 2) / 1e9
    assert latency_floor(count_macs(small) - int8, int8, 1, peaks, 1) == pytest.approx(wanted)
    with torch.inference_mode():
        assert count_int8_macs(compress(model, make_config("dynamic_int8")).model) == by_hand(False)
