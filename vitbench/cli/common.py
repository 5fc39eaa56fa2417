"""What several commands share."""

import argparse
from pathlib import Path
from typing import Any

from vitbench.base.errors import InputError

_CUT = "how to cut the data, for example test=1.0 (every image is a test image); skip_broken=true leaves out images that cannot be read"
SET = {"nargs": "+", "default": [], "action": "extend", "metavar": "KEY=VALUE", "dest": "settings"}
SPLITS = {"nargs": "+", "default": [], "metavar": "KEY=VALUE", "help": _CUT}


def add_images(parser: argparse.ArgumentParser, what: str) -> None:
    """The options that `data_of` reads; `what` says what the images are."""
    parser.add_argument(
        "--dataset", default="digits", help=f"{what}: digits, a Hugging Face name, or a folder (default: digits)"
    )
    parser.add_argument("--dataset-name", default="", metavar="NAME", help="how rows and figures name the data set")
    parser.add_argument("--splits", **SPLITS)


def data_of(options: argparse.Namespace) -> Any:
    """The images that the options name, cut as they say."""
    from vitbench.run.lessons import parse_setting
    from vitbench.run.suite import open_data

    name = getattr(options, "dataset_name", "")
    return open_data(options.dataset, name, dict(parse_setting(text) for text in options.splits))


def put(values: dict[str, Any], key: str, value: Any, setting: str) -> None:
    """Set `key`, in which dots reach into mappings, among `values`; `setting` is what was given, for the error."""
    *outer, last = key.split(".")
    for part in outer:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {setting}: {part} was given a value of its own before; give one or the other")
    values[last] = value


def print_results(out: Path) -> None:
    """The table of a results folder, what can be said of it, and its report."""
    from vitbench.figures.report import table_text, write_report
    from vitbench.rows.comparison_table import findings
    from vitbench.rows.row_table import load_records

    rows = load_records(out)
    if not (rows["status"] == "ok").any():
        return
    print(f"\n{table_text(rows)}\n")
    for sentence in findings(rows):
        print(sentence)
    print(f"\nreport: {write_report(out)}")
