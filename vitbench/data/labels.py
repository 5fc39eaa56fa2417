"""Encode label columns as indices into the class names; an error names the row of a wrong label."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitbench.base.errors import InputError


@dataclass(frozen=True)
class Column:
    """The labels of one file or table.

    Attributes:
        source: the file or table in words, for errors.
        values: the values as they were read.
        names: the class names that whole numbers index, if the file has them (a Hugging Face ClassLabel); otherwise None.
        rows: the row of each value in the file; None if the values are all of its rows.
    """

    source: str
    values: Sequence[Any]
    names: tuple[str, ...] | None = None
    rows: Sequence[int] | None = None


def encode(splits: Mapping[str, Sequence[Column]]) -> tuple[tuple[str, ...], dict[str, np.ndarray | None]]:
    """The class names, and for each split the labels as indices into them, (N,) int64; None for a split without labels.

    Files that order their class names differently are matched by name. The result has the first file's order.
    Without class names, the classes are the sorted values: whole numbers from 0 on, names, or booleans.
    A split has no labels if all of its labels are missing or -1.

    Raises:
        InputError: a label is missing in a split that has others, or is neither a whole number in range nor a name.
    """
    labelled = {split: columns for split, columns in splits.items() if not _is_unlabelled(columns)}
    columns = [column for group in labelled.values() for column in group if len(column.values)]
    named = any(column.names is not None for column in columns)
    classes = _merge_class_names(columns) if named else _sorted_values(columns)
    labels_by_split: dict[str, np.ndarray | None] = dict.fromkeys(splits)
    for split, group in labelled.items():
        arrays = [_by_name(column, classes) if named else _by_value(column, classes) for column in group]
        labels_by_split[split] = np.concatenate(arrays)
    return classes, labels_by_split


def _is_unlabelled(columns: Sequence[Column]) -> bool:
    return all(_is_missing(value) or value == -1 for column in columns for value in column.values)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _merge_class_names(columns: Sequence[Column]) -> tuple[str, ...]:
    """The first file's class names, followed by those that only later files have."""
    orders = dict.fromkeys(column.names for column in columns)
    if None in orders and len(orders) > 2:
        nameless = next(column.source for column in columns if column.names is None)
        raise InputError(
            f"{nameless} has no class names, and the other files order theirs differently, so its numbers are ambiguous; "
            f"write all files with the same class names"
        )
    return tuple(dict.fromkeys(name for names in orders if names is not None for name in names))


def _sorted_values(columns: Sequence[Column]) -> tuple[str, ...]:
    """The values, sorted and as text. All have the type of the first value."""
    kind: type = type(columns[0].values[0]) if columns else int
    if kind not in _ALLOWED:
        kind = int
    values: set[Any] = set()
    for column in columns:
        _check(column, lambda value: _is_label(value, kind), _ALLOWED[kind])
        values.update(column.values)
    return tuple(str(value) for value in sorted(values))


_ALLOWED: dict[type, str] = {int: "whole numbers from 0 on, or names", str: "names", bool: "true or false"}


def _is_label(value: Any, kind: type) -> bool:
    if type(value) is not kind or _is_missing(value):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return not isinstance(value, int) or value >= 0


def _by_value(column: Column, classes: tuple[str, ...]) -> np.ndarray:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[str(value)] for value in column.values], dtype=np.int64)


def _by_name(column: Column, classes: tuple[str, ...]) -> np.ndarray:
    """Labels of a file with class names: whole numbers index the file's names, and a name stands for itself."""
    names = classes if column.names is None else column.names
    index = {name: i for i, name in enumerate(classes)}
    index_of_value: dict[int | str, int] = {i: index[name] for i, name in enumerate(names)}
    index_of_value |= {name: index[name] for name in names}
    allowed = f"whole numbers from 0 to {len(names) - 1}, or the class names {_first_names(names)}"
    _check(column, lambda value: type(value) in (int, str) and value in index_of_value, allowed)
    return np.array([index_of_value[value] for value in column.values], dtype=np.int64)


def _check(column: Column, is_allowed: Callable[[Any], bool], allowed: str) -> None:
    """Raise `InputError` with the first row that is not allowed."""
    wrong = [i for i, value in enumerate(column.values) if not is_allowed(value)]
    if wrong:
        value = column.values[wrong[0]]
        shown_value = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
        others_text = f", like {len(wrong) - 1} more of its {len(column.values)} rows" if len(wrong) > 1 else ""
        row = wrong[0] if column.rows is None else column.rows[wrong[0]]
        raise InputError(
            f"{column.source}, row {row} (the first is 0): the label {shown_value} ({_kind(value)}){others_text}; allowed: {allowed}; "
            f"correct such rows or take them out"
        )


def _kind(value: Any) -> str:
    if _is_missing(value):
        return "missing"
    return {int: "a whole number", float: "a float", str: "text", bool: "a boolean"}.get(
        type(value), type(value).__name__
    )


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
