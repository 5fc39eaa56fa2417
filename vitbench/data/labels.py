"""Values of label columns become indices into the class names, or one line that names the row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitbench.base.errors import InputError


@dataclass(frozen=True)
class Column:
    """The labels of one file or table.

    Attributes:
        place: what an error calls it, for example the file's path.
        values: as they were read.
        names: what a whole number stands for, where the file says so (a Hugging Face ClassLabel); else None.
        rows: of each value its row in the file; None where all rows are there.
    """

    place: str
    values: Sequence[Any]
    names: tuple[str, ...] | None = None
    rows: Sequence[int] | None = None


def encode(splits: Mapping[str, Sequence[Column]]) -> tuple[tuple[str, ...], dict[str, np.ndarray | None]]:
    """Class names, and of each split the labels (int64), each an index into them; None for a split without labels.

    Files whose class names come in different orders are matched by name; the first file's order is the result's.
    Without class names, whole numbers (from 0 on), names, or booleans are classes, sorted.
    A split has no labels if every one of them is missing or -1.

    Raises:
        InputError: a label that is missing in a split that has others, or that is no whole number in range and no name.
    """
    labelled = {split: columns for split, columns in splits.items() if not _withheld(columns)}
    columns = [column for group in labelled.values() for column in group if len(column.values)]
    named = any(column.names is not None for column in columns)
    classes = _joined_names(columns) if named else _sorted_values(columns)
    found: dict[str, np.ndarray | None] = dict.fromkeys(splits)
    for split, group in labelled.items():
        parts = [_by_name(column, classes) if named else _by_value(column, classes) for column in group]
        found[split] = np.concatenate(parts)
    return classes, found


def _withheld(columns: Sequence[Column]) -> bool:
    return all(_is_missing(value) or value == -1 for column in columns for value in column.values)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _joined_names(columns: Sequence[Column]) -> tuple[str, ...]:
    """The first file's class names, and after them those that only later files have."""
    orders = dict.fromkeys(column.names for column in columns)
    if None in orders and len(orders) > 2:
        nameless = next(column.place for column in columns if column.names is None)
        raise InputError(
            f"{nameless} has no class names, and other files beside it have them in different orders, so that its numbers "
            f"could mean either; write all files with the same class names"
        )
    return tuple(dict.fromkeys(name for names in orders if names is not None for name in names))


def _sorted_values(columns: Sequence[Column]) -> tuple[str, ...]:
    """The values that are there, as text. All are of one kind: that of the first."""
    kind = type(columns[0].values[0]) if columns else int
    if kind not in _ALLOWED:
        kind = int
    values: set[Any] = set()
    for column in columns:
        _check(column, lambda value: _is_label(value, kind), _ALLOWED[kind])
        values.update(column.values)
    return tuple(str(value) for value in sorted(values))


_ALLOWED = {int: "whole numbers from 0 on, or names", str: "names", bool: "true or false"}


def _is_label(value: Any, kind: type) -> bool:
    if type(value) is not kind or _is_missing(value):
        return False
    return not (kind is int and value < 0) and not (kind is str and not value.strip())


def _by_value(column: Column, classes: tuple[str, ...]) -> np.ndarray:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[str(value)] for value in column.values], dtype=np.int64)


def _by_name(column: Column, classes: tuple[str, ...]) -> np.ndarray:
    """Whole numbers stand for the file's own class names; a name stands for itself."""
    names = classes if column.names is None else column.names
    index = {name: i for i, name in enumerate(classes)}
    own = {**{i: index[name] for i, name in enumerate(names)}, **{name: index[name] for name in names}}
    allowed = f"whole numbers from 0 to {len(names) - 1}, or the class names {_some(names)}"
    _check(column, lambda value: type(value) in (int, str) and value in own, allowed)
    return np.array([own[value] for value in column.values], dtype=np.int64)


def _check(column: Column, allows: Any, allowed: str) -> None:
    """Raise `InputError` with the first row that is not allowed, if there is one."""
    wrong = [i for i, value in enumerate(column.values) if not allows(value)]
    if wrong:
        value = column.values[wrong[0]]
        given = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
        more = f", like {len(wrong) - 1} more of its {len(column.values)} rows" if len(wrong) > 1 else ""
        row = wrong[0] if column.rows is None else column.rows[wrong[0]]
        raise InputError(
            f"{column.place}, row {row} (the first is 0): the label {given} ({_kind(value)}){more}; allowed: {allowed}; "
            f"correct such rows or take them out"
        )


def _kind(value: Any) -> str:
    if _is_missing(value):
        return "missing"
    return {int: "a whole number", float: "a float", str: "text", bool: "a boolean"}.get(
        type(value), type(value).__name__
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
