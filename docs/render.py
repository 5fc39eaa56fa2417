"""Make the pages whose numbers come from rows: `python -m docs.render`; with `--check` it only compares.

The template `docs/pages/NAME.j2` makes the page NAME. A template takes its numbers from rows (see `docs.results` and
`docs.tables`). A sentence that interprets them stands in a `claim` with its condition: if the rows no longer support it, the
page cannot be made.
"""

import argparse
import difflib
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from docs import tables
from docs.figures import drawn_from
from docs.results import Results, found_in, points

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent / "pages"
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class ClaimError(AssertionError):
    """A sentence of a page that the rows do not support."""


def claim(condition: Any, text: str = "", caller: Callable[[], str] | None = None) -> str:
    """The text, or what `{% call claim(condition) %}` surrounds, if the condition holds.

    Raises:
        ClaimError: the condition does not hold.
    """
    sentence = caller() if caller else text
    if not condition:
        raise ClaimError(f"the rows no longer support this: {' '.join(sentence.split())!r}")
    return sentence


class Pages:
    """All templates, and the results for their numbers.

    Args:
        reference: the folder of results folders, by default the committed one.
    """

    def __init__(self, reference: Path = ROOT / "results" / "reference"):
        self.reference = reference
        self.rows = cache(lambda name: Results(reference / name))
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            autoescape=False,
        )
        self.environment.filters |= {
            "fixed": lambda number, digits=2: f"{number:.{digits}f}",
            "signed": lambda number, digits=2: f"{number:+.{digits}f}",
            "number": lambda number, form: f"{number:{form}}",
            "word": lambda number: WORDS[number],
            "both": lambda numbers, digits=2: " to ".join(
                f"{bound:.{digits}f}" for bound in (min(numbers), max(numbers))
            ),
        }
        self.environment.globals |= {
            "claim": claim,
            "points": points,
            "rows": self.rows,
            "together": lambda names: Results(*(reference / name for name in names)),
            "runs": lambda: [self.rows(name) for name in self.folders(rows=True)],
            "found": lambda name: found_in(reference / name),
            "folders": self.folders,
            "command": self.command,
            "all": all,
            "any": any,
            "min": min,
            "max": max,
            "abs": abs,
            "drawn_from": drawn_from,
            **tables.TABLES,
        }

    def names(self) -> list[str]:
        """The pages, as paths below the project's folder."""
        return sorted(str(path.relative_to(TEMPLATES).with_suffix("")) for path in TEMPLATES.rglob("*.j2"))

    def render(self, name: str) -> str:
        """A page's text."""
        return self.environment.get_template(f"{name}.j2").render()

    def folders(self, rows: bool = False) -> list[str]:
        """All folders of results, or only those with rows."""
        folders = sorted(path for path in self.reference.iterdir() if path.is_dir())
        return [path.name for path in folders if not rows or (path / "records.jsonl").is_file()]

    def command(self, name: str) -> str:
        """How the rows of a folder were made, from its `command.md`."""
        return (self.reference / name / "command.md").read_text().strip()


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or with `--check` print the differences of a new rendering; the status is then 1."""
    parser = argparse.ArgumentParser(prog="python -m docs.render", description="Make the pages from rows.")
    parser.add_argument("--check", action="store_true", help="write nothing, and show what would change")
    check, pages, status = parser.parse_args(arguments).check, Pages(), 0
    for name in pages.names():
        try:
            text = pages.render(name)
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".j2")]
            location = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else name
            print(f"{location}: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
            continue
        path = ROOT / name
        old = path.read_text() if path.is_file() else ""
        if text == old:
            continue
        if check:
            status = 1
            lines = (part.splitlines(keepends=True) for part in (old, text))
            sys.stdout.writelines(difflib.unified_diff(*lines, name, f"{name}, rendered"))
        else:
            path.write_text(text)
            print(f"{name} is new")
    return status


if __name__ == "__main__":
    sys.exit(main())
