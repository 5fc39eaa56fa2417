"""Folders whose images are listed in a table: metadata.csv, .jsonl or .parquet with a `file_name` and a label column."""

from pathlib import Path

from vitbench.base.errors import InputError, one_of
from vitbench.data.folders import SPLITS, images_below
from vitbench.data.labels import Column
from vitbench.data.parquet import LABEL_NAMES

FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME = "file_name"


def listing(root: Path) -> Path | None:
    """The table of images of `root`, if it has one."""
    return next((root / file for file in FILES if (root / file).is_file()), None)


def read_listing(table: Path, label: str) -> dict[str, tuple[list[Path], Column, int]] | None:
    """Of each split the images that the table lists, their labels, and how many images it does not list.

    Splits are the first folders of the names, if all of them have a split's name. None if the table has no label column.

    Raises:
        InputError: a table that cannot be read, a name that is no image file below the table's folder.
    """
    import pandas as pd

    readers = {".csv": pd.read_csv, ".jsonl": lambda path: pd.read_json(path, lines=True), ".parquet": pd.read_parquet}
    try:
        rows = readers[table.suffix](table)
    except (ValueError, OSError) as error:  # pandas' and Arrow's errors are kinds of ValueError
        raise InputError(
            f"{table} cannot be read ({' '.join(str(error).split())[:160]}); correct it or move it away"
        ) from None
    if NAME not in rows:
        raise InputError(f"{table} has no column {NAME!r}; its columns are {', '.join(map(str, rows))}")
    column = (
        one_of("label column", label, map(str, rows))
        if label
        else next((key for key in LABEL_NAMES if key in rows), "")
    )
    if not column:
        return None
    root = table.parent.resolve()
    paths = [_path(root, name, table, i) for i, name in enumerate(rows[NAME].tolist())]
    tops = [path.relative_to(root).parts[0] for path in paths]
    is_split = all(top.lower() in SPLITS and path.parent != root for top, path in zip(tops, paths, strict=True))
    splits = [SPLITS[top.lower()] if is_split else "train" for top in tops]
    values = [None if value is pd.NA else value for value in rows[column].tolist()]
    unlisted = sum(not hidden for _, hidden in images_below(root)) - len(set(paths))
    found = {}
    for i, split in enumerate(dict.fromkeys(splits)):
        rows_of = [row for row, each in enumerate(splits) if each == split]
        some = Column(str(table), [values[row] for row in rows_of], rows=rows_of)
        found[split] = [paths[row] for row in rows_of], some, 0 if i else unlisted
    return found


def _path(root: Path, name: object, table: Path, row: int) -> Path:
    if isinstance(name, str) and ".." not in Path(name).parts:
        path = root / name  # which is `name` itself where that is absolute
        if path.is_relative_to(root) and path.is_file():
            return path
    raise InputError(
        f"{table}, row {row} (the first is 0): {name!r} is no file below {str(root)!r}; allowed: a path from there on"
    )
