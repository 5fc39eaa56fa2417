"""Policies and their budgets; expected improvement, maximised; the search against chance; killed and resumed."""

import numpy as np
import pytest

from vitbench.base.errors import InputError
from vitbench.base.store import Journal
from vitbench.removal import policy, search
from vitbench.removal.policy import (
    DIMENSIONS,
    PAPER_DIMENSIONS,
    PolicySpace,
    budget,
    mac_cost,
    single_ratio_policies,
    single_ratio_policy,
)
from vitbench.removal.search import SearchConfig, expected_improvement

SPACE = PolicySpace(np.full(12, 768), np.full(12, 6), np.full(12, 32), 65, 1, policy.token_blocks(12), max_ratio=0.6)
COST = mac_cost(192, "cls_attention", 1)
LIMITS = budget(SPACE, COST, 0.6, 0.02)


def toy_score(ratios):
    """Blocks differ in what they can do without, tokens are dear: a surface with one good region."""
    need = np.concatenate([np.linspace(2, 0.2, 12), np.linspace(0.5, 1.5, 12), np.zeros(12), [12.0]])
    return -float((need * np.square(SPACE.removed_fractions(ratios)[0])).sum())


def test_tokens_go_at_a_quarter_a_half_and_three_quarters():
    assert policy.token_blocks(12) == (3, 6, 9)
    assert policy.token_blocks(4) == (1, 2, 3)
    assert policy.token_blocks(2) == (0, 1)


def test_what_a_policy_leaves_is_rounded_down_with_one_fused_token():
    space = PolicySpace(np.full(12, 1536), np.full(12, 6), np.full(12, 64), 197, 1, (3, 6, 9))
    ratios = np.array([0.25] * 12 + [0.2] * 12 + [0.0] * 12 + [0.488])
    counts = space.counts(ratios)
    assert set(counts.neurons[0]) == {1152}
    assert set(counts.heads[0]) == {4}  # any ratio above 0 takes at least one of six heads
    assert sorted(set(counts.tokens_out[0]), reverse=True) == [197, 101, 52, 27]  # as the released policy's
    assert space.removed_fractions(ratios)[0, 12] == pytest.approx(1 / 3)


@pytest.mark.parametrize("dimensions", [DIMENSIONS, PAPER_DIMENSIONS, ("neurons",), ("neurons", "tokens")])
def test_sampled_and_neighbouring_policies_meet_the_budget(dimensions):
    space = PolicySpace(
        SPACE.neurons, SPACE.heads, SPACE.head_dims, 65, 1, SPACE.token_blocks, dimensions=dimensions, max_ratio=0.9
    )
    rng, limits = np.random.default_rng(0), budget(space, COST, 0.7, 0.02)
    sampled = space.scale_to_budget(space.sample(rng, 500), COST, *limits)
    assert len(sampled) > 100
    perturbed = space.scale_to_budget(space.perturb(rng, sampled[:3], 500), COST, *limits)
    for each in (sampled, perturbed, single_ratio_policy(space, COST, *limits)[None]):
        costs = COST(space.counts(each))
        assert ((limits[0] <= costs) & (costs <= limits[1])).all()
        assert each.min() >= 0
        assert each.max() <= 0.9
        assert not each[:, ~space.prunable].any()


def test_a_budget_that_no_policy_meets_is_refused():
    with pytest.raises(
        InputError, match=r"no policy keeps 0.1 of the cost: with 0.6 of all neurons, heads, tokens removed"
    ):
        budget(SPACE, COST, 0.1, 0.02)
    coarse = PolicySpace(
        np.full(1, 64), np.full(1, 2), np.full(1, 32), 17, 1, (0,), dimensions=("heads",), max_ratio=0.5
    )
    cost = mac_cost(64, "cls_attention", 1)
    with pytest.raises(InputError, match="the steps are too coarse"):
        search.search(coarse, cost, (0.9 * cost(coarse.counts(np.zeros(4)))[0],) * 2, toy_score, SearchConfig())


def test_expected_improvement_equals_its_integral_and_is_maximised():
    rng = np.random.default_rng(0)
    for mean, std, best in ((0.0, 1.0, 0.5), (1.0, 0.2, 0.9), (-1.0, 2.0, 1.0)):
        drawn = np.maximum(0, mean + std * rng.standard_normal(400_000) - best).mean()
        found = expected_improvement(np.array([mean]), np.array([std]), best)[0]
        assert found == pytest.approx(drawn, abs=4e-3)
    sure = expected_improvement(np.array([2.0, 0.0]), np.zeros(2), 1.0)
    assert sure.tolist() == [1.0, 0.0]  # with std 0 the improvement is certain
    wide, narrow = expected_improvement(np.zeros(2), np.array([2.0, 0.1]), 1.0)
    assert wide > narrow


@pytest.mark.slow
def test_the_search_beats_chance_at_equal_evaluations():
    best = {
        how: [
            search.search(SPACE, COST, LIMITS, toy_score, SearchConfig(how=how, evaluations=40, seed=seed)).scores.max()
            for seed in range(5)
        ]
        for how in ("gp", "random")
    }
    gains = np.subtract(best["gp"], best["random"])
    assert gains.mean() > 0.1
    assert (gains > 0).sum() >= 4


def test_the_first_policies_are_random_searchs_and_the_seed_decides_all():
    runs = [
        search.search(SPACE, COST, LIMITS, toy_score, SearchConfig(how=how, evaluations=count, first=5, seed=3))
        for how, count in (("gp", 8), ("gp", 8), ("random", 5))
    ]
    assert np.array_equal(runs[0].policies, runs[1].policies)
    assert np.array_equal(runs[0].policies[:5], runs[2].policies)
    assert toy_score(runs[0].best) == runs[0].scores.max()


def test_a_search_starts_from_one_ratio_for_each_set_of_dimensions():
    starts = single_ratio_policies(SPACE, COST, *LIMITS)
    found = search.search(SPACE, COST, LIMITS, toy_score, SearchConfig(how="random", evaluations=12, first=10))
    assert np.array_equal(found.policies[: len(starts)], starts)
    assert np.array_equal(starts[0], single_ratio_policy(SPACE, COST, *LIMITS))
    cut = [
        {name for name in PAPER_DIMENSIONS if each[SPACE.expand_dimensions(np.isin(DIMENSIONS, [name]))].any()}
        for each in starts
    ]
    assert cut[0] == set(PAPER_DIMENSIONS)
    assert {"tokens"} in cut
    assert {"heads"} not in cut  # alone they cannot meet the budget
    assert found.scores.max() >= max(toy_score(each) for each in starts)


def test_a_killed_search_goes_on_without_scoring_again(tmp_path):
    config, calls = SearchConfig(evaluations=12, first=5), []
    journal = Journal(tmp_path / "search.jsonl", "searches")

    def dying(ratios):
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(1)
        return toy_score(ratios)

    with pytest.raises(KeyboardInterrupt):
        search.search(SPACE, COST, LIMITS, dying, config, journal)
    with open(journal.path, "a") as file:
        file.write('[["0.1 0.2", -0.')  # killed while it wrote
    again = []
    found = search.search(SPACE, COST, LIMITS, lambda ratios: again.append(1) or toy_score(ratios), config, journal)
    whole = search.search(SPACE, COST, LIMITS, toy_score, config)
    assert len(again) == 4
    assert np.array_equal(found.policies, whole.policies)
    assert np.array_equal(found.scores, whole.scores)


@pytest.mark.slow
def test_a_note_with_one_flipped_bit_is_named_and_scored_again(tmp_path, capsys):
    config, journal = SearchConfig(evaluations=8, first=4), Journal(tmp_path / "search.jsonl", "searches")
    whole = search.search(SPACE, COST, LIMITS, toy_score, config, journal)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    for place in range(5, len(lines[2]) - 1, 7):
        harmed = bytearray(lines[2])
        harmed[place] ^= 2
        journal.path.write_bytes(b"".join([*lines[:2], harmed, *lines[3:]]))
        again = []
        found = search.search(SPACE, COST, LIMITS, lambda ratios: again.append(1) or toy_score(ratios), config, journal)  # noqa: B023
        assert len(again) == 1, f"byte {place} of the note"
        assert np.array_equal(found.scores, whole.scores)
        assert "1 of the notes of searches in" in capsys.readouterr().out
