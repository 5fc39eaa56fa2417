"""Schedules of token merging within a budget: equal multiply-accumulates, what calibration finds, and what is refused."""

import copy
import itertools

import numpy as np
import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.measurement.cost import count_macs
from vitbench.methods.registry import compress, make_config
from vitbench.methods.token_merging import TokenMerging
from vitbench.model import artifact, blocks, tokens, vit
from vitbench.removal.merge_schedule import MergeBudget, calibrated, constant, decreasing


@pytest.fixture(scope="module")
def model():
    made = vit.create_model("deit_tiny_patch16_224", img_size=112, num_classes=10, depth=4, seed=1)
    return made.requires_grad_(False)


@pytest.mark.parametrize("matching", ["cosine", "ward"])
@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
def test_the_multiply_accumulates_are_those_that_were_asked_for(model, matching, schedule):
    dense = count_macs(model)
    for keep in (0.9, 0.7, 0.6):
        small = compress(model, TokenMerging(keep=keep, schedule=schedule, matching=matching)).model
        assert count_macs(small) == vit.analytic_macs(small)
        assert keep - 0.015 < count_macs(small) / dense <= keep
    assert not isinstance(compress(model, TokenMerging(keep=1.0)).model.blocks, tokens.TokenBlocks)


@pytest.mark.parametrize("matching", ["cosine", "ward"])
def test_a_calibrated_schedule_keeps_the_budget_and_is_saved(base, digits, tmp_path, matching):
    config = TokenMerging(keep=0.8, schedule="calibrated", matching=matching, samples=16)
    small = compress(base.model, config, digits).model
    assert 0.7 < count_macs(small) / count_macs(base.model) <= 0.8
    loaded, x = artifact.load(artifact.save(small, tmp_path / "small")), torch.randn(2, 3, 8, 8)
    assert torch.allclose(loaded(x), small(x), atol=1e-5)
    assert loaded.recipe.methods[-1].images, "the recipe says on which images"
    as_many = compress(
        base.model, TokenMerging(r=2, schedule="calibrated", matching=matching, samples=16), digits
    ).model
    assert count_macs(as_many) <= count_macs(compress(base.model, TokenMerging(r=2, matching=matching)).model)


def test_calibration_never_ends_behind_the_uniform_schedules(base, digits):
    for reduction, keep in itertools.product(tokens.MERGING, (0.9, 0.7)):
        budget = MergeBudget(base.model, reduction)
        pairs, losses = calibrated(base.model, budget, keep * budget.dense, digits, 32)
        assert budget.macs(pairs) <= keep * budget.dense
        assert min(losses.values()) <= min(losses["constant"], losses["decreasing"])
        assert not isinstance(base.model.blocks, tokens.TokenBlocks), "the model is as it was"


def test_the_found_schedule_costs_least_of_all_that_keep_as_much(model):
    budget, costs = MergeBudget(model, "merge"), np.array([4.0, 1.0, 0.3, 0.0])
    pairs = budget.cheapest(costs, 0.85 * budget.dense, power=2.0, growth=0.0)

    def cost(schedule):
        left, total = budget.tokens - budget.prefix, 0.0
        for each, count in zip(costs, schedule, strict=True):
            total, left = total + each * (count / left) ** 2, left - count
        return total

    macs = budget.macs(pairs)
    assert macs <= 0.85 * budget.dense
    assert pairs == sorted(pairs), "what costs more merges less"
    for other in itertools.product(*(range(max(0, count - 3), count + 4) for count in pairs)):
        if budget.macs(other) <= macs and other[-1] <= (budget.tokens - budget.prefix - sum(other[:-1])) // 2:
            assert cost(other) >= cost(pairs) - 1e-12


def test_a_last_block_that_only_the_class_token_leaves_merges_for_nothing(model):
    half = [0, 0, 0, 24]
    merged = copy.deepcopy(model)
    blocks.reduce_tokens(merged, "merge", [None, None, None, 50 - half[-1]])
    x = torch.randn(2, 3, 112, 112)
    assert torch.allclose(merged(x), model(x), atol=1e-4)


def test_merging_resumes_at_any_block(model):
    merged = copy.deepcopy(model)
    blocks.reduce_tokens(merged, "ward", [None, None, 40, 30])
    x = vit.embed_patches(merged, torch.randn(2, 3, 112, 112))
    behind = merged.blocks[1](merged.blocks[0](x))
    assert torch.allclose(merged.blocks.resume(behind, 2), merged.blocks(x), atol=1e-5)
    assert torch.equal(merged.blocks.resume(x, 0, [None] * 4), model.blocks(x))


def ward_errors(x, sizes, attention):
    """The error of each pair of tokens, src in rows and dst in columns, by the means themselves."""
    errors = torch.zeros(len(x[1::2]), len(x[::2]))
    for (i, src), (j, dst) in itertools.product(enumerate(range(1, len(x), 2)), enumerate(range(0, len(x), 2))):
        n = sizes[[src, dst]]
        mean = (n[:, None] * x[[src, dst]]).sum(0) / n.sum()
        errors[i, j] = (n * (x[[src, dst]] - mean).square().sum(1)).sum()
        errors[i, j] *= 1 if attention is None else attention[[src, dst]].sum().sqrt()
    return errors


@pytest.mark.parametrize("attended", [False, True])
def test_ward_merges_the_pairs_whose_mean_loses_least(attended):
    torch.manual_seed(0)
    x, sizes, attention = torch.randn(1, 10, 4), torch.randint(1, 5, (1, 10)).float(), torch.rand(1, 10)
    state = tokens.TokenState(x, sizes, source=torch.arange(10)[None])
    merged = tokens.ward_matching(state, attention if attended else None, 2, 1)
    errors = ward_errors(x[0, 1:], sizes[0, 1:], attention[0, 1:] if attended else None)
    least = errors.min(1).values.argsort()[:2]
    for src in least.tolist():
        dst = int(errors[src].argmin())
        assert merged.source[0, 2 * src + 2] == merged.source[0, 2 * dst + 1]
    assert merged.x.shape[1] == 8
    assert torch.allclose((merged.x * merged.sizes[..., None]).sum(1), (x * sizes[..., None]).sum(1), atol=1e-5)


def test_ward_of_a_model_that_pools_its_tokens_is_counted_as_it_runs(tmp_path):
    pooled = vit.create_model("vit_medium_patch16_gap_240", img_size=64, num_classes=10, depth=3, seed=1)
    small = compress(pooled, TokenMerging(r=3, matching="ward")).model
    assert small.blocks.restores
    assert vit.analytic_macs(small) == count_macs(small)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(artifact.load(artifact.save(small, tmp_path / "small"))(x), small(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0.2}, r"keep = 0.2 is below 0\.\d+, the share of the multiply-accumulates that .* give 0\.\d+ to 1"),
        ({"keep": 0.2, "schedule": "decreasing"}, "keep = 0.2 is below 0"),
        ({"keep": 1.5}, "less than or equal to 1"),
        ({"keep": 0}, "greater than 0"),
        ({"keep": 0.7, "r": 2}, "r = 2 and keep = 0.7 are both given"),
        ({"r": (1, 2, 3, 4), "schedule": "calibrated"}, r"r = \(1, 2, 3, 4\) is a schedule already"),
        ({"keep": 0.7, "schedule": "calibrated"}, "needs calibration images and no data set was given"),
        ({"matching": "euclid"}, "matching = 'euclid'"),
    ],
)
def test_wrong_targets_are_refused(values, message, model):
    with pytest.raises(InputError, match=message):
        compress(model, make_config("token_merging", values))


def test_uniform_schedules_of_any_mean():
    assert sum(constant(2.5, 12)) == 30
    assert max(constant(2.5, 12)) - min(constant(2.5, 12)) == 1
    assert decreasing(2.5, 12)[0] == 5
    assert decreasing(2.5, 12) == sorted(decreasing(2.5, 12), reverse=True)
