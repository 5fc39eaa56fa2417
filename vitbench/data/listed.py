"""Folders whose images are listed in a metadata.csv, .jsonl or .parquet with a `file_name` and a label column."""

from pathlib import Path

from vitbench.base.errors import InputError, one_of
from vitbench.data.folders import SPLITS, find_images
from vitbench.data.labels import Column
from vitbench.data.parquet import LABEL_NAMES

FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME = "file_name"


def find_metadata_table(root: Path) -> Path | None:
    """The metadata table of the folder `root`; None if it has none."""
    return next((root / file for file in FILES if (root / file).is_file()), None)


def read_metadata_table(table: Path, label: str) -> dict[str, tuple[list[Path], Column, int]] | None:
    """For each split the listed images, their labels, and how many images are not listed (counted in the first split).

    The first folder of each name is its split, if all first folders have a split's name; otherwise all images are
    `train`. The result is None if the table has no label column.

    Raises:
        InputError: the table cannot be read, or a name is not that of a file below the table's folder.
    """
    import pandas as pd

    readers = {".csv": pd.read_csv, ".jsonl": lambda path: pd.read_json(path, lines=True), ".parquet": pd.read_parquet}
    try:
        rows = readers[table.suffix](table)
    except (ValueError, OSError) as error:  # errors of pandas and Arrow are subclasses of ValueError
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
    first_folders = [path.relative_to(root).parts[0] for path in paths]
    is_split = all(
        top.lower() in SPLITS and path.parent != root for top, path in zip(first_folders, paths, strict=True)
    )
    splits = [SPLITS[top.lower()] if is_split else "train" for top in first_folders]
    values = [None if value is pd.NA else value for value in rows[column].tolist()]
    unlisted = sum(not hidden for _, hidden in find_images(root)) - len(set(paths))
    by_split = {}
    for i, split in enumerate(dict.fromkeys(splits)):
        rows_of = [row for row, row_split in enumerate(splits) if row_split == split]
        labels = Column(str(table), [values[row] for row in rows_of], rows=rows_of)
        by_split[split] = [paths[row] for row in rows_of], labels, 0 if i else unlisted
    return by_split


def _path(root: Path, name: object, table: Path, row: int) -> Path:
    if isinstance(name, str) and ".." not in Path(name).parts:
        path = root / name  # equals `name` if that is absolute
        if path.is_relative_to(root) and path.is_file():
            return path
    raise InputError(
        f"{table}, row {row} (the first is 0): {name!r} is no file below {str(root)!r}; allowed: a path from there on"
    )
