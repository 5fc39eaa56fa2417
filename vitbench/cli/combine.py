"""combine: search for the best sequence of methods within a budget."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitbench.base.errors import InputError
from vitbench.cli.common import add_settings, add_splits, load_option_data, set_nested

if TYPE_CHECKING:
    from vitbench.run.combinations import CombinationSearch


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    combine = commands.add_parser(
        "combine",
        help="search for the most accurate combination of methods within a budget",
        description="Trials are scored on the val split. The same command goes on where it was stopped.",
    )
    combine.add_argument("model", help="a folder with a saved model")
    combine.add_argument("--dataset", required=True, help="images: digits, a hub name, a folder")
    add_splits(combine)
    combine.add_argument(
        "--budget", required=True, metavar="COST=LIMIT", help="bytes= or macs=: a share (0.05), or bytes or MACs"
    )
    combine.add_argument("--trials", type=int, default=40, help="models to try, those of earlier goes included (40)")
    add_settings(combine, "of the search: structures, codes, train.epochs, seed, settings.METHOD.KEY, ...")
    combine.add_argument("--out", required=True, metavar="DIR", help="folder to save the best model to")
    combine.add_argument(
        "--record", required=True, metavar="DIR", help="results folder: rows of the trials, and the journal"
    )
    combine.add_argument("--list", action=_ListPairs, help="show which method may follow which, and end")
    combine.set_defaults(command=_combine)


class _ListPairs(argparse.Action):
    """An option that prints the pairs and ends, as `--help` does, so that it needs no other argument."""

    def __init__(self, **options: Any):
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from vitbench.run.pairs import list_pairs, pairs_text

        print(pairs_text(list_pairs()))
        parser.exit()


def _combine(options: argparse.Namespace) -> int:
    from vitbench.base.files import check_target
    from vitbench.methods import registry
    from vitbench.model import artifact
    from vitbench.rows.runs import Run
    from vitbench.run.combinations import search_combinations, trial_rows

    check_target(options.out, artifact.MODEL_FOLDER)
    base, data, run = Path(options.model), load_option_data(options), Run(options.record)
    model, config = artifact.load(base), _config(options)
    search_result = search_combinations(model, data, config, run.folder / "searches")
    run.append(trial_rows(base, data, config, search_result))
    for number, trial in enumerate(search_result.trials):
        cost = "cannot be made" if trial.cost is None else f"{trial.cost:,.0f} {config.cost}"
        score = trial.error or ("above the limit" if trial.val_top1 is None else f"{100 * trial.val_top1:.2f} % on val")
        print(f"{number:4} {trial.name:36} {cost:>24}  {score[:80]}")
    best = search_result.best
    if best is None:
        raise InputError(
            f"none of {len(search_result.trials)} combinations has at most {search_result.limit:,.0f} {config.cost}; "
            "give a larger --budget, more --trials or other structures and codes"
        )
    assert best.val_top1 is not None  # the best trial is within the limit, so it was scored
    path = artifact.save(registry.compress(model, list(best.configs), data).model, options.out)
    print(f"{path}: {best.name}, {artifact.size_on_disk(path):,} bytes, {100 * best.val_top1:.2f} % on val")
    return 0


def _config(options: argparse.Namespace) -> "CombinationSearch":
    """The search that the options describe."""
    from vitbench.run.combinations import CombinationSearch
    from vitbench.run.lessons import parse_setting

    cost, target = parse_setting(options.budget)
    values = CombinationSearch().to_dict() | {"cost": cost, "target": target, "trials": options.trials}
    for setting in options.settings:
        set_nested(values, *parse_setting(setting), setting)
    return CombinationSearch(**values)
