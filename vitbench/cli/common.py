"""What several commands share."""

import argparse
from pathlib import Path
from typing import Any

_CUT = "how to cut the data, for example test=1.0 (every image is a test image)"
SPLITS = {"nargs": "+", "default": [], "metavar": "KEY=VALUE", "help": _CUT}


def data_of(options: argparse.Namespace) -> Any:
    """The images that the options name, cut as they say."""
    from vitbench.lessons import parse_setting
    from vitbench.suite import open_data

    name = getattr(options, "dataset_name", "")
    return open_data(options.dataset, name, dict(parse_setting(text) for text in options.splits))


def print_results(out: Path) -> None:
    """The table of a results folder, what can be said of it, and its report."""
    from vitbench.comparison import findings
    from vitbench.records import load_records
    from vitbench.report import table_text, write_report

    rows = load_records(out)
    if not (rows["status"] == "ok").any():
        return
    print(f"\n{table_text(rows)}\n")
    for sentence in findings(rows):
        print(sentence)
    print(f"\nreport: {write_report(out)}")
