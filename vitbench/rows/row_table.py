"""Rows as one tidy table, read fast: a file of a million rows takes seconds."""

import contextlib
import gc
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic_core import from_json

from vitbench.rows.records import (
    KEY_FIELDS,
    SCHEMA_VERSION,
    SOURCES,
    Row,
    lines_of,
    read_rows,
    records_file,
    split_checksum,
)

CONTEXT_COLUMNS = ("backend", "versus_backend", "batch", "threads", "device", "split", "versus")
CHUNK = 20_000  # lines that are parsed at once
MAX_CACHED_ROWS = (
    100_000  # rows of a file up to which they are kept, so that a file that grew is not read from its start again
)
FIELDS = list(Row.model_fields)
NUMBERS = ("value", "low", "high")
TEXTS = tuple(name for name, field in Row.model_fields.items() if field.annotation is str)
HEX = re.compile(r"[0-9a-f]*")


class _SlowPathNeeded(Exception):
    """Lines that are to be read one by one, to say what is wrong with which."""


def load_records(path: str | Path, *, latest: bool = True) -> pd.DataFrame:
    """Rows as a tidy DataFrame: the schema's fields as columns, with batch, threads, ... taken out of `context` too.

    Rows with the same config or context share the object.

    latest: of rows about the same thing (a model that was made anew and measured again) keep only the last.
    """
    read_file = _read(records_file(path))
    if latest and read_file.latest is None:
        read_file.latest = latest_rows(read_file.frame)
    return (read_file.latest if latest else read_file.frame).copy(deep=False)  # pandas copies what the caller changes


@dataclass
class _ReadFile:
    """What this process read of a file: its first `size` bytes, whose CRC-32 is `crc`, as `frame`."""

    size: int = 0
    crc: int = 0
    frame: pd.DataFrame | None = None
    latest: pd.DataFrame | None = None
    shared: dict[bytes, Any] = field(default_factory=dict)


_read_files: dict[Path, _ReadFile] = {}


def _read(path: Path) -> _ReadFile:
    """All rows of a file; if it begins with what this process read of it before, only the lines after that are parsed."""
    read_file = _read_files.pop(path.absolute(), _ReadFile())
    if read_file.size and not _starts_with_cached(path, read_file):
        read_file = _ReadFile()
    lines = (line for _, line in lines_of(path, read_file.size))
    try:
        columns = _columns(lines, read_file)
    except _SlowPathNeeded:
        rows = read_rows(path)
        return _ReadFile(frame=_frame({name: [getattr(row, name) for row in rows] for name in FIELDS}))
    if read_file.frame is None or read_file.frame.empty:
        read_file.frame, read_file.latest = _frame(columns), None
    elif columns["key"]:  # a part without rows would change the columns' types
        read_file.frame, read_file.latest = pd.concat([read_file.frame, _frame(columns)], ignore_index=True), None
    if len(read_file.frame) <= MAX_CACHED_ROWS:
        _read_files[path.absolute()] = read_file
    return read_file


def _starts_with_cached(path: Path, read_file: _ReadFile) -> bool:
    """Whether the file begins with what was read of it."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return zlib.crc32(file.read(read_file.size)) == read_file.crc


def _frame(columns: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(columns, columns=FIELDS).astype(dict.fromkeys(NUMBERS, float))
    return frame.assign(**{name: [context.get(name) for context in frame["context"]] for name in CONTEXT_COLUMNS})


def latest_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The last row about each thing; which artifact it was measured on does not make it another thing."""
    key_columns = frame[[name for name in KEY_FIELDS if name not in ("config", "context")]].assign(
        config=_group_ids(frame["config"]), context=_group_ids(frame["context"], ignored_key="artifact")
    )
    is_superseded = key_columns.duplicated(keep="last")
    return frame[~is_superseded].reset_index(drop=True) if is_superseded.any() else frame


def _group_ids(mappings: pd.Series, ignored_key: str = "") -> list[int]:
    """A number for each mapping, the same for those that are equal without the key `ignored_key`; one object is looked at once."""
    id_of_text: dict[str, int] = {}
    id_of_object: dict[int, int] = {}
    ids = []
    for mapping in mappings:
        group_id = id_of_object.get(id(mapping))
        if group_id is None:
            text = json.dumps({name: value for name, value in mapping.items() if name != ignored_key}, sort_keys=True)
            group_id = id_of_object[id(mapping)] = id_of_text.setdefault(text, len(id_of_text))
        ids.append(group_id)
    return ids


def _columns(lines: Iterable[bytes], read_file: _ReadFile) -> dict[str, list[Any]]:
    """The fields of further lines, checked field by field, not row by row; `read_file` counts their bytes."""
    columns: dict[str, list[Any]] = {name: [] for name in FIELDS}
    with _no_collection():
        while chunk := list(islice(lines, CHUNK)):
            text = b"".join(chunk)
            read_file.size, read_file.crc = read_file.size + len(text), zlib.crc32(text, read_file.crc)
            rows = _parsed(chunk, read_file.shared)
            if any(len(row) != len(FIELDS) for row in rows):
                raise _SlowPathNeeded
            try:
                for name, column in columns.items():
                    column.extend([row[name] for row in rows])
            except KeyError:
                raise _SlowPathNeeded from None
    _check(columns)
    return columns


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the collector of cyclic garbage, which would go through all rows again and again."""
    usual = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if usual:
            gc.enable()


def _parsed(lines: list[bytes], shared: dict[bytes, Any]) -> list[dict[str, Any]]:
    texts, mappings = [], []
    for line in lines:
        text, is_damaged = split_checksum(line)
        # the two mappings, of which many rows have the same, are parsed once; in a text a quote has a backslash before it
        first = text.find(b',"config":{') + 10
        third = text.rfind(b',"context":{') + 11
        second = text.rfind(b',"seed":', first, text.rfind(b',"metric":"', first, third))
        fourth = text.rfind(b',"samples":')
        if is_damaged or not 10 < first < second < third < fourth:
            raise _SlowPathNeeded
        config, context = text[first:second], text[third:fourth]
        for mapping in (config, context):
            if mapping not in shared:
                shared[mapping] = _json(mapping)
        texts.append(b"%bnull%bnull%b" % (text[:first], text[second:third], text[fourth:]))
        mappings.append((shared[config], shared[context]))
    rows = _json(b"[%b]" % b",".join(texts))
    for row, (config, context) in zip(rows, mappings, strict=True):
        row["config"], row["context"] = config, context
    return rows


def _json(text: bytes) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        raise _SlowPathNeeded from None


def _check(columns: dict[str, list[Any]]) -> None:
    """What `Row` demands of its fields, of all rows at once; numbers become arrays, NaN where there is none."""
    number = {float, int, type(None)}
    kinds = dict.fromkeys((*TEXTS, "status"), {str}) | dict.fromkeys(("schema_version", "seed"), {int})
    kinds |= dict.fromkeys(NUMBERS, number) | dict.fromkeys(("config", "context"), {dict})
    kinds |= {"samples": {list, type(None)}}
    if not all(set(map(type, columns[name])) <= kind for name, kind in kinds.items()):
        raise _SlowPathNeeded
    if not all(set(map(type, samples)) <= {float, int} for samples in columns["samples"] if samples):
        raise _SlowPathNeeded
    if not (
        set(columns["schema_version"]) <= {SCHEMA_VERSION} and set(columns["status"]) <= {"ok", "failed", "skipped"}
    ):
        raise _SlowPathNeeded
    if not all(HEX.fullmatch(text) for name in ("hits", "env_id") for text in set(columns[name])):
        raise _SlowPathNeeded
    try:
        columns |= {name: np.array(columns[name], dtype=float) for name in NUMBERS}
    except OverflowError:  # a whole number that no float can be
        raise _SlowPathNeeded from None
    ok = np.array([status == "ok" for status in columns["status"]], dtype=bool)
    all_have_errors = all(error for error, is_ok in zip(columns["error"], ok) if not is_ok)
    sources = {source for source, is_ok in zip(columns["source"], ok) if is_ok}
    if not (
        all_have_errors
        and np.isfinite(columns["value"][ok]).all()
        and all(source.startswith(SOURCES) for source in sources)
    ):
        raise _SlowPathNeeded
