"""Shared factors in codes: fitted to outputs, near the answer, and chosen within a budget of bytes."""

import copy

import pytest
import torch

from vitbench.calibration.moments import collect_moments
from vitbench.calibration.shared import FactorShape, choose_forms, output_directions, shared_codes
from vitbench.data.batches import eval_batches
from vitbench.methods.registry import compress, make_config
from vitbench.methods.uct import UCT
from vitbench.model import artifact, vit
from vitbench.model.layers import PackedLinear, SharedFactorLinear
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate

ROUNDED = UCT(train=TrainConfig(epochs=0))


@torch.inference_mode()
def logit_error(model, original, split):
    x = torch.cat([x for x, _ in eval_batches(split, original.recipe.preprocess, 64)])
    return float((model(x) - original(x)).norm() / original(x).norm())


def test_directions_are_orthonormal_and_sorted(base, digits):
    layers = dict(vit.linear_layers(base.model, ("fc1",)))
    values, vectors = output_directions(layers, collect_moments(base.model, layers, digits))
    assert torch.allclose(vectors.T @ vectors, torch.eye(len(values), dtype=vectors.dtype), atol=1e-9)
    assert (values[:-1] >= values[1:]).all()


def test_with_the_full_rank_and_8_bits_next_to_nothing_is_lost(base, digits):
    model = copy.deepcopy(base.model)
    layers = dict(vit.linear_layers(model, ("qkv", "proj")))
    moments = collect_moments(model, layers, digits)
    forms = {"qkv": FactorShape(192, 8, 8), "proj": 8}
    coders = shared_codes(model, base.model, forms, moments, digits.calibration)
    assert [type(coder).__name__ for coder in coders] == ["SharedFactorCoder", *["RowCoder"] * 4]
    assert logit_error(model, base.model, digits.val) < 0.03
    for coder in coders:  # what will be stored is what was fitted
        for name, weight in coder.decode().items():
            assert torch.allclose(weight, model.get_submodule(name).weight, atol=1e-5)


def test_second_order_starts_nearer_than_truncation(base, digits):
    new, old = (
        compress(base.model, ROUNDED.replace(start=start), digits).model for start in ("second_order", "activations")
    )
    unaligned = compress(base.model, ROUNDED.replace(align=False), digits).model
    assert logit_error(new, base.model, digits.val) < 0.8 * logit_error(old, base.model, digits.val)
    assert logit_error(new, base.model, digits.val) < logit_error(unaligned, base.model, digits.val)


@pytest.mark.parametrize("order", ["decode_first", "cheapest"])
def test_the_order_of_the_products_changes_nothing(base, digits, order):
    reordered, other = (
        compress(base.model, ROUNDED.replace(order=each), digits).model for each in ("reordered", order)
    )
    x = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        assert torch.allclose(reordered(x), other(x), atol=1e-4)
    assert other.blocks[0].attn.qkv.order == order


def test_types_of_layers_have_forms_of_their_own(base, digits, tmp_path):
    config = ROUNDED.replace(layers=("qkv",), ranks={"qkv": 24}, latent_bits=3, dense_bits=1.58, group=8)
    small = artifact.load(artifact.save(compress(base.model, config, digits).model, tmp_path / "small"))
    block = small.blocks[0]
    assert isinstance(block.attn.qkv, SharedFactorLinear)
    assert (block.attn.qkv.rank, block.attn.qkv.down.bits, block.attn.qkv.down.group) == (24, 3, 8)
    assert (small.shared["qkv"].bits, small.shared["qkv"].group) == (4, 8)
    assert isinstance(block.mlp.fc2, PackedLinear)
    assert block.mlp.fc2.bits == 1.58
    assert set(block.mlp.fc2.dense().sign().unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_codes_without_any_factor_are_a_form_too(base, digits):
    small = compress(base.model, ROUNDED.replace(layers=(), ends_bits=None, dense_bits=2), digits).model
    assert {layer.bits for layer in small.modules() if isinstance(layer, PackedLinear)} == {2}
    assert not hasattr(small, "shared")


@pytest.mark.parametrize("target", [37_000, 50_000])
def test_a_budget_of_bytes_is_met_and_used(base, digits, tmp_path, target):
    small = compress(base.model, ROUNDED.replace(target_bytes=target), digits).model
    stored = sum(tensor.numel() * tensor.element_size() for tensor in small.half().state_dict().values())
    assert 0.8 * target < stored <= target


def test_more_bytes_mean_no_larger_error(base, digits):
    layers = vit.dense_layers_by_type(base.model, vit.LINEAR_TYPES)
    moments = collect_moments(base.model, dict(vit.linear_layers(base.model)), digits, gradients=True)
    small, large = (choose_forms(layers, moments, budget) for budget in (27_000, 10**6))
    assert set(small) == set(vit.LINEAR_TYPES)
    assert set(large.values()) == {3}, "the largest codes without factors are the most exact form"
    assert small != large


def test_ternary_weights_are_smaller_than_2_bits_and_better_in_second_order(base, digits, tmp_path):
    sizes, scores = {}, {}
    for bits in (2, 1.58):
        for rounding in ("nearest", "second_order"):
            small = compress(base.model, make_config("weight_only", {"bits": bits, "rounding": rounding}), digits).model
            path = artifact.save(small, tmp_path / f"{bits}-{rounding}")
            sizes[bits], scores[bits, rounding] = (
                artifact.size_on_disk(path),
                evaluate(artifact.load(path), digits.val).top1.mean(),
            )
    assert sizes[1.58] < sizes[2]
    assert scores[1.58, "second_order"] > scores[1.58, "nearest"]
