"""A method that is asked for a budget keeps within it and reduces no more than it must."""

import pytest

from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.measurement.cost import count_macs
from vitbench.methods.registry import METHODS, compress, make_config
from vitbench.model import artifact
from vitbench.run.combinations import fit_budget

ABLE = [name for name, method in METHODS.items() if method.operating_points]
QUICK = {"train": {"epochs": 0}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLE)
def test_operating_points_cost_less_and_less(name, base, digits, tmp_path):
    """A budget measures costs, so two neighbouring points may cost the same; none may cost more than the one before it."""
    points = METHODS[name].operating_points(base.model)
    assert len(points) > 3
    spent = []
    quick = QUICK if "train" in METHODS[name].config.model_fields else {}
    own = {"start": "weights"} if name == "uct" else {"compensation": "none"} if name == "pruning" else {}
    for point in (points[0], points[len(points) // 2], points[-1]):
        small = compress(base.model, make_config(name, quick | own | point), digits).model
        spent.append(
            count_macs(small)
            if METHODS[name].reduces == "macs"
            else artifact.size_on_disk(artifact.save(small, tmp_path / str(len(spent))))
        )
    assert spent[0] > spent[1] > spent[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"),
    [("uct", 0.1), ("mixed_rank", 0.6), ("pruning", 0.3), ("weight_only", 0.15), ("distillation", 0.6)],
)
def test_bytes(name, share, base, digits, tmp_path):
    config = fit_budget(base.model, name, digits, target=share, settings=QUICK)
    points, size = METHODS[name].operating_points(base.model), artifact.size_on_disk(base.path)
    small = compress(base.model, config, digits).model
    assert artifact.size_on_disk(artifact.save(small, tmp_path / "small")) <= share * size
    chosen = next(i for i, point in enumerate(points) if point.items() <= config.to_dict().items())
    if chosen:
        dearer = compress(base.model, make_config(name, QUICK | points[chosen - 1]), digits).model
        assert artifact.size_on_disk(artifact.save(dearer, tmp_path / "dearer")) + 512 > share * size


def test_macs_as_a_share_or_a_number(base, digits):
    dense = count_macs(base.model)
    for target in (0.7, 0.7 * dense):
        small = compress(
            base.model, fit_budget(base.model, "token_merging", digits, cost="macs", target=target), digits
        ).model
        assert 0.5 * dense < count_macs(small) <= 0.7 * dense


@pytest.mark.slow
def test_latency_in_turn_with_the_model_itself(base, digits):
    config = fit_budget(base.model, "distillation", digits, cost="latency", target=0.6, settings=QUICK, rounds=10)
    assert 1 <= config.depth < len(base.model.blocks)


@pytest.mark.parametrize(
    ("name", "cost", "target", "message"),
    [
        ("dynamic_int8", "bytes", 0.5, "no setting that a budget could choose"),
        ("uct", "bits", 0.5, "unknown cost 'bits'"),
        ("uct", "bytes", 0.0, "give a share"),
        ("uct", "latency", 2.0, r"in \(0, 1\]"),
        ("uct", "bytes", 0.001, "cannot get to bytes"),
        ("weight_only", "macs", 0.5, "cannot get to macs"),
    ],
)
def test_unreachable_budgets(name, cost, target, message, base, digits):
    with pytest.raises(InputError, match=message):
        fit_budget(base.model, name, digits, cost=cost, target=target, settings=QUICK)


def test_what_the_budget_finds_cannot_be_set(base, digits):
    with pytest.raises(InputError, match="the budget chooses keep"):
        fit_budget(base.model, "mixed_rank", digits, target=0.5, settings={"keep": 0.5})


@pytest.mark.slow
def test_from_the_command_line(base, tmp_path, capsys):
    out = tmp_path / "small"
    given = ["compress", str(base.path), "--method", "weight_only", "--out", str(out)]
    assert main([*given, "--budget", "bytes=0.15"]) == 0
    assert artifact.size_on_disk(out) <= 0.15 * artifact.size_on_disk(base.path)
    assert artifact.read_manifest(out).recipe.methods[0].config["bits"] < 5
    for budget, message in (("bytes=much", "not a number"), ("weight=0.5", "unknown cost"), ("0.5", "give key=value")):
        assert main([*given, "--budget", budget]) == 2
        assert message in capsys.readouterr().err
    assert main(["compress", str(base.path), "--out", str(out), "--budget", "bytes=0.5"]) == 2
    assert "give one --method" in capsys.readouterr().err
