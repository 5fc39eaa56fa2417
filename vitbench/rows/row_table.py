"""Read rows as a tidy table, fast: a file of a million rows takes seconds."""

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
MAX_CACHED_ROWS = 100_000  # a file with at most this many rows is cached, and only its new lines are read later
FIELDS = list(Row.model_fields)
NUMBERS = ("value", "low", "high")
TEXTS = tuple(name for name, field in Row.model_fields.items() if field.annotation is str)
HEX = re.compile(r"[0-9a-f]*")


class _SlowPathNeeded(Exception):
    """The lines must be read one by one, since one of them may be damaged or written by other code."""


def load_records(path: str | Path, *, latest: bool = True) -> pd.DataFrame:
    """Rows as a tidy DataFrame: the schema's fields as columns, and batch, threads, ... from `context` as further ones.

    Rows with equal configs or contexts share one object.

    Args:
        path: a results folder or a records file.
        latest: keep only the last of rows with the same key fields, as when a model was rebuilt and measured again.

    Raises:
        InputError: there are no records, or a line is damaged.
    """
    read_file = _read(records_file(path))
    if not latest:
        return read_file.frame.copy(deep=False)  # pandas copies columns that the caller changes
    if read_file.latest is None:
        read_file.latest = latest_rows(read_file.frame)
    return read_file.latest.copy(deep=False)


@dataclass
class _ReadFile:
    """The part of a file that this process has read: its first `size` bytes, with their CRC-32, as `frame`.

    `latest` is the result of `latest_rows`, and `shared` maps the text of a config or context to its object.
    """

    size: int = 0
    crc: int = 0
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    latest: pd.DataFrame | None = None
    shared: dict[bytes, Any] = field(default_factory=dict)


_read_files: dict[Path, _ReadFile] = {}


def _read(path: Path) -> _ReadFile:
    """All rows of a file. If it starts with the part that this process has read, only the lines after it are parsed."""
    read_file = _read_files.pop(path.absolute(), _ReadFile())
    if read_file.size and not _starts_with_cached(path, read_file):
        read_file = _ReadFile()
    lines = (line for _, line in lines_of(path, read_file.size))
    try:
        columns = _columns(lines, read_file)
    except _SlowPathNeeded:
        rows = read_rows(path)
        return _ReadFile(frame=_frame({name: [getattr(row, name) for row in rows] for name in FIELDS}))
    if read_file.frame.empty:
        read_file.frame, read_file.latest = _frame(columns), None
    elif columns["key"]:  # concatenating a part without rows would change the columns' types
        read_file.frame, read_file.latest = pd.concat([read_file.frame, _frame(columns)], ignore_index=True), None
    if len(read_file.frame) <= MAX_CACHED_ROWS:
        _read_files[path.absolute()] = read_file
    return read_file


def _starts_with_cached(path: Path, read_file: _ReadFile) -> bool:
    """Whether the file starts with the part that was read before."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return zlib.crc32(file.read(read_file.size)) == read_file.crc


def _frame(columns: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(columns, columns=FIELDS).astype(dict.fromkeys(NUMBERS, float))
    return frame.assign(**{name: [context.get(name) for context in frame["context"]] for name in CONTEXT_COLUMNS})


def latest_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The last row for each combination of the key fields, where the artifact in `context` is ignored."""
    key_columns = frame[[name for name in KEY_FIELDS if name not in ("config", "context")]].assign(
        config=_group_ids(frame["config"]), context=_group_ids(frame["context"], ignored_key="artifact")
    )
    is_superseded = key_columns.duplicated(keep="last")
    return frame[~is_superseded].reset_index(drop=True) if is_superseded.any() else frame


def _group_ids(mappings: pd.Series, ignored_key: str = "") -> list[int]:
    """A number for each mapping; mappings that are equal except for `ignored_key` have the same. Each object is hashed once."""
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


def _columns(lines: Iterable[bytes], read_file: _ReadFile) -> dict[str, Any]:
    """The fields of further lines, checked for all rows at once; their bytes are added to `read_file`."""
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
    """Disable the collector of cyclic garbage, which would visit all rows again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parsed(lines: list[bytes], shared: dict[bytes, Any]) -> list[dict[str, Any]]:
    texts, mappings = [], []
    for line in lines:
        text, is_damaged = split_checksum(line)
        # equal configs and contexts are parsed once; these marks cannot be inside a string, where quotes are escaped
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


def _check(columns: dict[str, Any]) -> None:
    """Check the requirements of `Row` for all rows at once; numbers become arrays, with NaN for null."""
    types: dict[str, set[type]] = {name: {str} for name in (*TEXTS, "status")}
    types |= {
        "schema_version": {int},
        "seed": {int},
        "config": {dict},
        "context": {dict},
        "samples": {list, type(None)},
    }
    types |= {name: {float, int, type(None)} for name in NUMBERS}
    if not all(set(map(type, columns[name])) <= allowed for name, allowed in types.items()):
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
    except OverflowError:  # a whole number that is too large for a float
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
