"""Every ordered pair of methods gives the same weights whatever the cache held before."""

import itertools

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.methods.registry import METHODS, compress
from vitbench.run.pairs import list_pairs, pairs_text, short_config

pytestmark = pytest.mark.slow

LIKE_BEFORE = ("token_merging", "nystroem", "linear_attention")  # they leave every tensor as it was


def result(model, name, data):
    """The model that a method makes, or the line with which it refuses."""
    try:
        return compress(model, short_config(name), data).model
    except InputError as error:
        return str(error)


def same(one, other):
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    first, second = one.state_dict(), other.state_dict()
    return (
        one.recipe == other.recipe
        and first.keys() == second.keys()
        and all(torch.equal(value, second[key]) for key, value in first.items())
    )


@pytest.mark.filterwarnings("ignore:32 calibration images give")
def test_a_pair_gives_the_same_with_an_empty_and_with_a_warm_cache(micro, few_digits, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.setenv("VITBENCH_HOME", str(tmp_path / "warm"))
        (tmp_path / "warm").mkdir()
        firsts = {
            name: result(micro, name, few_digits) for name in METHODS
        }  # these fill the cache, from the plain model
        made, differ = 0, []
        for name, second in itertools.product(METHODS, METHODS):
            if isinstance(firsts[name], str):
                continue
            monkeypatch.setenv("VITBENCH_HOME", str(tmp_path / "warm"))
            warm = result(firsts[name], second, few_digits)
            again = result(firsts[name], second, few_digits)
            (tmp_path / name / second).mkdir(parents=True)
            monkeypatch.setenv("VITBENCH_HOME", str(tmp_path / name / second))
            empty = result(firsts[name], second, few_digits)
            made += not isinstance(empty, str)
            if not (same(empty, warm) and same(empty, again)):
                differ.append(f"{name}, then {second}")
    finally:
        torch.set_num_threads(threads)
    assert not differ, "the weights depend on what the cache held"
    assert made > len(METHODS) * len(METHODS) / 3, "pairs that fit together"
    assert {name for name in LIKE_BEFORE if not isinstance(firsts[name], str)} == set(LIKE_BEFORE)


def test_the_second_of_a_pair_does_what_it_says_or_says_why_not(few_digits, capsys):
    pairs = list_pairs(few_digits)
    assert len(pairs) == len(METHODS) ** 2
    trained_again = [("distillation", "distillation")]  # a student of the same depth
    for row in pairs.itertuples():
        if not row.refused and (row.first, row.second) not in trained_again:
            assert getattr(row, METHODS[row.second].reduces) < 1, f"{row.first}, then {row.second}: nothing is smaller"
    refused = pairs.set_index(["first", "second"])["refused"]
    assert "dynamic_int8 after uct changes nothing" in refused["uct", "dynamic_int8"]
    assert not refused["token_merging", "dynamic_int8"]
    text = pairs_text(pairs)
    assert text.count("\n") >= len(pairs)
    assert "uct, then" in text
