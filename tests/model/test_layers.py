"""Packed codes and factored layers: what is packed comes back, and both orders of multiplying agree."""

from pathlib import Path

import pytest
import torch

from vitbench.model import layers, vit
from vitbench.model.layers import (
    FactoredLinear,
    PackedConv2d,
    PackedLinear,
    SharedFactor,
    SharedFactorLinear,
    pack,
    unpack,
)
from vitbench.model.layers.factored import reordered_share


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_what_is_packed_comes_back(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count).long(), codes)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 1000])
def test_five_ternary_codes_take_a_byte_and_come_back(count):
    codes = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(count))
    packed = pack(codes, 1.58)
    assert packed.numel() == -(-count // 5)
    assert torch.equal(unpack(packed, 1.58, count).long(), codes)
    with pytest.raises(ValueError, match=r"codes of 1.58 bits must lie in \[0, 2\]"):
        pack(torch.tensor([3]), 1.58)


@pytest.mark.parametrize("bits", [1.58, 3, 5])
def test_a_packed_layer_of_many_rows_is_unpacked_in_parts(bits):
    layer, middle = PackedLinear(7, 1000, bits, bias=False), 1 if bits == 1.58 else 2 ** (bits - 1)
    codes = torch.randint(-1, 2, (1000, 7)) if bits == 1.58 else torch.randint(-middle, middle, (1000, 7))
    layer.set_codes(codes, torch.ones(1000), None)
    assert torch.equal(layer.dense(), codes.float())
    x = torch.randn(3, 7)
    assert torch.allclose(layer(x), x @ codes.float().T, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_codes_outside_the_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"lie in \[0, 7\]"):
        pack(torch.tensor([1, wrong]), 3)


def factored(order="reordered", rank=5, bits=4):
    torch.manual_seed(0)
    layer, factor = FactoredLinear(12, 9, rank, bits, "qkv", order=order), SharedFactor(rank, 9, bits)
    zero = torch.randint(0, 2**bits, (rank,))
    factor.set_codes(
        torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rank, 9)), torch.rand(9), torch.rand(rank), zero
    )
    layer.set_codes(torch.randint(0, 2**bits, (12, rank)), torch.randn(9))
    layer.bind_shared(torch.nn.ModuleDict({"qkv": factor}))
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_both_orders_give_x_times_the_dense_matrix(bits):
    x = torch.randn(2, 7, 12)
    layer = factored(bits=bits)
    wanted = torch.nn.functional.linear(x, layer.dense(), layer.bias)
    for order in ("reordered", "decode_first", "cheapest"):
        layer.order = order
        assert torch.allclose(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_cheapest_order_is_the_one_with_fewer_products():
    layer = FactoredLinear(100, 100, 72, 4, "proj", order="cheapest")
    assert layer.is_reordered(100)  # few tokens: decoding costs more than it saves
    assert not layer.is_reordered(1000)
    few, many = 163, 164  # n r (i + o) = i r o + n i o at n = 163.6
    assert layer.is_reordered(few)
    assert not layer.is_reordered(many)


def test_packed_layers_are_dense_layers_with_their_weights():
    torch.manual_seed(0)
    dense, conv = torch.nn.Linear(10, 6), torch.nn.Conv2d(3, 5, 4, stride=4)
    for old, new, x in (
        (dense, PackedLinear(10, 6, 3), torch.randn(2, 10)),
        (conv, PackedConv2d(3, 5, 4, 3), torch.randn(2, 3, 8, 8)),
    ):
        codes = torch.randint(-4, 4, old.weight.shape)
        step = torch.rand(len(codes))
        new.set_codes(codes, step, old.bias)
        old.weight.data = codes * step.view(-1, *[1] * (codes.ndim - 1))
        assert torch.allclose(new(x), old(x), atol=1e-5)
        assert new.param_count == sum(p.numel() for p in old.parameters())


def test_layers_are_known_without_the_methods():
    """Otherwise a saved model loads only where its method has been imported."""
    folder = Path(layers.__file__).parent
    front = (folder / "__init__.py").read_text(encoding="utf-8")
    for file in folder.glob("*.py"):
        if "\n@runtime_layer\n" in file.read_text(encoding="utf-8"):
            assert f"from vitbench.model.layers.{file.stem} import" in front, (
                f"import {file.stem} in {folder / '__init__.py'}"
            )


@pytest.mark.parametrize("name", layers.RUNTIME_LAYERS)
def test_every_layer_is_built_again_from_its_spec(name):
    examples = {
        "DynamicInt8Linear": lambda: layers.DynamicInt8Linear(4, 3),
        "StaticInt8Linear": lambda: layers.StaticInt8Linear(4, 3, input_step=0.02, input_zero=17),
        "StaticInt8Rounding": lambda: layers.StaticInt8Rounding(0.02, 128),
        "PackedLinear": lambda: PackedLinear(4, 3, 5, bias=False, group=2),
        "PackedConv2d": lambda: PackedConv2d(3, 2, 4, 8),
        "SharedFactor": lambda: SharedFactor(3, 4, 4),
        "SharedFactorLinear": lambda: SharedFactorLinear(6, 4, 3, 1.58, "qkv", order="decode_first"),
        "FactoredLinear": lambda: FactoredLinear(4, 3, 2, 4, "fc1", order="cheapest"),
        "LowRankLinear": lambda: layers.LowRankLinear(4, 3, 2, bias=False),
        "SplitLinear": lambda: layers.SplitLinear(4, [2, 1]),
        "Rounded": lambda: layers.Rounded(4, 6),
        "Log2Rounded": lambda: layers.Log2Rounded(3, 2**0.5),
        "RoundedNorm": lambda: layers.RoundedNorm(6, bias=False),
        "RMSNorm": lambda: layers.RMSNorm(6, eps=1e-5),
        "BiasedLinear": lambda: layers.BiasedLinear(4, 3),
        "RoundedAttention": lambda: layers.RoundedAttention(6, 2, 5, False),
        "LinearAttention": lambda: layers.LinearAttention(6, 2, 5, False),
        "NystroemAttention": lambda: layers.NystroemAttention(6, 2, 5, landmarks=4, iterations=2, prefix=1, residual=3),
        "ExactNystroemAttention": lambda: layers.ExactNystroemAttention(6, 2, 5, landmarks=4, prefix=1, residual=3),
    }
    assert name in examples, f"add a line that makes a small {name}"
    made = examples[name]()
    again = type(made)(**made.spec())
    assert again.spec() == made.spec()
    shapes = [{key: value.shape for key, value in layer.state_dict().items()} for layer in (made, again)]
    assert shapes[0] == shapes[1]


def test_the_papers_shares_of_multiply_accumulates():
    assert reordered_share(384, 277) == pytest.approx(0.962, abs=5e-4)
    assert reordered_share(768, 502) == pytest.approx(0.872, abs=5e-4)
    assert reordered_share(384, 288) == 1.0
    assert vit.LINEAR_TYPES == ("qkv", "proj", "fc1", "fc2")
