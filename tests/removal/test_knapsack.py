"""The knapsack: exact against every choice, budgets and tables that are refused, losses of options, policies within a budget."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitbench.base.errors import InputError
from vitbench.data.batches import eval_batches
from vitbench.methods.multidimensional import MultiDimensional, PolicySearch
from vitbench.methods.registry import compress
from vitbench.methods.token_merging import TokenMerging
from vitbench.removal import knapsack
from vitbench.removal.policy import DIMENSIONS, PolicySpace, mac_cost
from vitbench.removal.scores import Criterion
from vitbench.removal.search import LatencyTable, SearchConfig

MAGNITUDE = Criterion(name="magnitude")
BY_KNAPSACK = MultiDimensional(
    keep=0.6, criterion=MAGNITUDE, objective="cross_entropy", most=0.7, search=SearchConfig(how="knapsack")
)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    losses = [rng.exponential(10.0 ** rng.integers(-6, 2), rng.integers(1, 5)) for _ in range(6)]
    costs = [rng.integers(-50, 2000, len(values)) for values in losses]
    least = sum(values.min() for values in costs)
    for budget in (least, least + 500, least + 2000, 10_000_000):
        chosen = knapsack.choose(losses, costs, int(budget))
        sums = {
            choice: sum(values[i] for values, i in zip(losses, choice, strict=True))
            for choice in itertools.product(*(range(len(values)) for values in losses))
            if sum(values[i] for values, i in zip(costs, choice, strict=True)) <= budget
        }
        assert sums[tuple(chosen)] == pytest.approx(min(sums.values()), rel=1e-9)


def test_large_costs_and_equal_ones_are_no_difficulty():
    losses, costs = [np.array([0.0, 1.0])] * 3, [np.array([10**9, 10**9 - 1])] * 3
    assert sum(knapsack.choose(losses, costs, 3 * 10**9 - 2)) == 2  # two units less, and not one
    assert knapsack.choose([np.zeros(2)], [np.zeros(2, int)], 0) in ([0], [1])


def test_what_is_no_table_and_no_budget_is_refused():
    losses, costs = [np.array([0.0, 1.0]), np.array([0.0, 2.0])], [np.array([5, 1]), np.array([5, 2])]
    with pytest.raises(InputError, match="cheapest options cost 3 and the budget is 2; give a budget of at least 3"):
        knapsack.choose(losses, costs, 2)
    with pytest.raises(InputError, match=r"cost of an option of part 1 is nan; give a whole number"):
        knapsack.choose(losses, [costs[0], np.array([5.0, np.nan])], 9)
    with pytest.raises(InputError, match=r"cost of an option of part 0 is 1.5; give a whole number"):
        knapsack.choose(losses, [np.array([5, 1.5]), costs[1]], 9)
    with pytest.raises(InputError, match="loss of an option of part 0 is inf; give a finite number"):
        knapsack.choose([np.array([0, np.inf]), losses[1]], costs, 9)
    with pytest.raises(InputError, match="2 parts with losses and 1 with costs have not the same options"):
        knapsack.choose(losses, costs[:1], 9)
    with pytest.raises(InputError, match="part 1 has no option"):
        knapsack.choose([losses[0], np.zeros(0)], [costs[0], np.zeros(0, int)], 9)


def test_options_are_all_heads_and_some_numbers_of_neurons():
    space = PolicySpace(np.full(2, 768), np.full(2, 3), np.full(2, 64), 37, 1, (1,), max_ratio=0.5)
    tokens, attention, mlp = knapsack.removal_options(space)
    assert tokens[[0, -1], -1].tolist() == [0, 0.5]
    assert attention[:, DIMENSIONS.index("heads")].tolist() == pytest.approx([0, 1 / 3, 0.5])
    assert space.counts(space.expand_dimensions(attention)).heads[:, 0].tolist() == [3, 2, 1]
    assert len(mlp) == knapsack.LEVELS + 1
    assert mlp[[0, -1], 0].tolist() == [0, 0.5]
    assert not mlp[:, 1:].any()
    wide = dataclasses.replace(space, max_ratio=0.95)
    heads = wide.counts(wide.expand_dimensions(knapsack.removal_options(wide)[1])).heads[:, 0]
    assert heads.tolist() == [3, 2, 1]  # each number of heads once, and never none


def test_the_loss_of_an_option_is_that_of_the_model_pruned_there_alone(base, few_digits):
    search = PolicySearch(base.model, BY_KNAPSACK, few_digits)
    space = search.space
    tokens, attention, mlp = map(space.expand_dimensions, knapsack.removal_options(space))
    losses = knapsack.option_losses(search.pruner, space)
    assert not losses.tokens[0]
    assert not losses.attention[:, 0].any()
    assert not losses.mlp[:, 0].any()
    x, _ = next(iter(eval_batches(few_digits.calibration, base.model.recipe.preprocess, 32)))

    def divergence(policy):
        with torch.inference_mode():
            logits = [model(x).log_softmax(1) for model in (search.pruner.prune(space.counts(policy)), base.model)]
        return float(F.kl_div(*logits, reduction="batchmean", log_target=True))

    assert losses.tokens[-1] == pytest.approx(divergence(tokens[-1]), rel=1e-3)
    for table, policies in ((losses.attention, attention), (losses.mlp, mlp)):
        for block in range(space.depth):
            expected = divergence(knapsack._by_block(space, policies)[block, -1])
            assert table[block, -1] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    again = knapsack.option_losses(search.pruner, space)  # from the cache
    assert np.array_equal(again.mlp, losses.mlp)


@pytest.mark.parametrize("dimensions", [("neurons", "heads"), ("neurons", "heads", "tokens"), ("neurons", "head_dims")])
def test_the_method_stays_within_the_budget(base, few_digits, dimensions):
    before = copy.deepcopy(base.model.state_dict())
    config = BY_KNAPSACK.replace(dimensions=dimensions)
    search = PolicySearch(base.model, config, few_digits)
    small = compress(base.model, config, few_digits)
    dense = float(search.cost(search.space.counts(np.zeros(search.space.size)))[0])
    (step,) = small.search
    assert 0.5 < step["cost"] / dense <= 0.6
    assert small.search == compress(base.model, config, few_digits).search
    assert all(torch.equal(value, base.model.state_dict()[name]) for name, value in before.items())


def test_scores_that_need_gradients_are_made_within_the_search(base, few_digits):
    config = BY_KNAPSACK.replace(criterion=Criterion(name="taylor", samples=17))
    assert len(compress(base.model, config, few_digits).search) == 1


def test_a_latency_budget_is_kept_by_its_table(base, few_digits, monkeypatch):
    def table(model, space, batch):  # of times that stay the same: 1 ms beside the blocks, and parts from 0.1 to 2 ms
        tokens, heads, head_dims, neurons = np.arange(1, 18), np.arange(1, 9), np.arange(1, 33), np.arange(1, 513)
        attention = 1e-4 + 1e-6 * heads[:, None, None] * head_dims[:, None] * tokens / 4
        return LatencyTable(
            tokens, heads, head_dims, neurons, attention, 1e-4 + 1e-7 * neurons[:, None] * tokens, other_seconds=1e-3
        )

    monkeypatch.setattr(LatencyTable, "measure", table)
    search = PolicySearch(base.model, BY_KNAPSACK.replace(budget="latency", keep=0.7), few_digits)
    dense = search.cost(search.space.counts(np.zeros(search.space.size)))[0]
    seconds = search.cost(search.space.counts(search.search().best))[0]
    assert 0.6 * dense < seconds <= 0.7 * dense


def test_a_budget_below_the_cheapest_policy_is_refused(base, few_digits):
    search = PolicySearch(base.model, BY_KNAPSACK, few_digits)
    with pytest.raises(
        InputError,
        match=r"no policy costs at most 1000: with 0.7 of all neurons, heads, tokens removed it is .*; give a larger keep",
    ):
        knapsack.search(search.pruner, search.space, search.cost, 1000.0, search.evaluate)


def test_a_model_with_fewer_tokens_is_refused(base, few_digits):
    merged = compress(base.model, TokenMerging(r=1), few_digits).model
    with pytest.raises(InputError, match="give the model before the reduction, or how = gp"):
        compress(merged, BY_KNAPSACK.replace(dimensions=("neurons", "heads")), few_digits)


def test_macs_of_parts_add_up():
    space = PolicySpace(np.full(4, 96), np.full(4, 4), np.full(4, 16), 17, 1, (1, 2, 3), max_ratio=0.6)
    cost, rng = mac_cost(64, "cls_attention", 1), np.random.default_rng(0)
    _, attention, mlp = map(space.expand_dimensions, knapsack.removal_options(space))
    parts = [*knapsack._by_block(space, attention), *knapsack._by_block(space, mlp)]
    token_policy = np.zeros(space.size)
    token_policy[-1] = 0.3
    costs, left = knapsack._whole_costs(space, cost, 10**6, token_policy, parts)
    chosen = [rng.integers(len(values)) for values in costs]
    policy = token_policy + sum(one[index] for one, index in zip(parts, chosen, strict=True))
    total = sum(values[index] for values, index in zip(costs, chosen, strict=True))
    assert 10**6 - left + total == cost(space.counts(policy))[0]
