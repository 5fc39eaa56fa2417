"""What several commands share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitbench.base.errors import InputError

if TYPE_CHECKING:
    from vitbench.data.splits import ImageData

SPLITS_HELP = "how to cut the data, for example test=1.0 (every image is a test image); skip_broken=true leaves out images that cannot be read"


def add_settings(parser: argparse.ArgumentParser, description: str) -> None:
    """Add `--set KEY=VALUE ...`, which may be given several times."""
    parser.add_argument(
        "--set", help=description, nargs="+", default=[], action="extend", metavar="KEY=VALUE", dest="settings"
    )


def add_splits(parser: argparse.ArgumentParser) -> None:
    """Add `--splits KEY=VALUE ...`."""
    parser.add_argument("--splits", nargs="+", default=[], metavar="KEY=VALUE", help=SPLITS_HELP)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a model given by name: its weights, and the size of its input."""
    parser.add_argument("--checkpoint", default="", metavar="FILE", help="weights for a model given by name")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights for a model given by name")
    parser.add_argument("--img-size", type=int, metavar="N", help="input height and width of a model given by name")


def add_images(parser: argparse.ArgumentParser, description: str) -> None:
    """Add the options that `load_option_data` reads; `description` is that of the images."""
    parser.add_argument(
        "--dataset", default="digits", help=f"{description}: digits, a Hugging Face name, or a folder (default: digits)"
    )
    parser.add_argument("--dataset-name", default="", metavar="NAME", help="how rows and figures name the data set")
    add_splits(parser)


def load_option_data(options: argparse.Namespace) -> "ImageData":
    """Load the images that the options name, with the splits that they give."""
    from vitbench.run.lessons import parse_setting
    from vitbench.run.suite import open_data

    name = getattr(options, "dataset_name", "")
    return open_data(options.dataset, name, dict(parse_setting(text) for text in options.splits))


def set_nested(values: dict[str, Any], key: str, value: Any, setting: str) -> None:
    """Set `values[a][b]` for the key "a.b"; `setting` is the text of the option, for the error.

    Raises:
        InputError: a part of the key was given a value that is no mapping.
    """
    *outer, last = key.split(".")
    for part in outer:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {setting}: {part} was given a value of its own before; give one or the other")
    values[last] = value


def print_results(out: Path) -> None:
    """Print the table of a results folder and the findings in it, and write its report."""
    from vitbench.figures.report import table_text, write_report
    from vitbench.rows.comparison_table import summary_sentences
    from vitbench.rows.row_table import load_records

    rows = load_records(out)
    if not (rows["status"] == "ok").any():
        return
    print(f"\n{table_text(rows)}\n")
    for sentence in summary_sentences(rows):
        print(sentence)
    print(f"\nreport: {write_report(out)}")
