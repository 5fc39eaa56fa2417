"""Every ordered pair of methods gives the same weights whatever the cache held before."""

import itertools

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.methods.registry import METHODS, compress, make_config

pytestmark = pytest.mark.slow

ONE_EPOCH = {"epochs": 1, "batch_size": 32, "warmup_epochs": 0, "mixup": 0.0}
SMALL = {
    "diffq": {"train": ONE_EPOCH},
    "distillation": {"train": ONE_EPOCH | {"views": 1}},  # the teacher's answers are kept
    "multidimensional": {
        "search": {"evaluations": 3, "first": 2, "pool": 20},
        "keep": 0.8,
        "tolerance": 0.2,
        "criterion": {"samples": 16},
    },
    "pruning": {"criterion": {"samples": 16}},
    "token_merging": {"r": 2},
    "weight_only": {"bits": 3, "rounding": "second_order"},
}
LIKE_BEFORE = ("token_merging", "nystroem", "linear_attention")  # they leave every tensor as it was


def small_config(name):
    """A method's config that takes a moment."""
    values = SMALL.get(name, {})
    if "train" in METHODS[name].config.model_fields:
        values = {"train": {"epochs": 0}} | values
    return make_config(name, values)


def result(model, name, data):
    """The model that a method makes, or the line with which it refuses."""
    try:
        return compress(model, small_config(name), data).model
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
