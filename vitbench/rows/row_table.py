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

from vitbench.rows.records import IDENTITY, SCHEMA_VERSION, SOURCES, Row, lines_of, read_rows, records_file, split_check

CONTEXT_COLUMNS = ("backend", "versus_backend", "batch", "threads", "device", "split", "versus")
CHUNK = 20_000  # lines that are parsed at once
KEPT = 100_000  # rows of a file up to which they are kept, so that a file that grew is not read from its start again
FIELDS = list(Row.model_fields)
NUMBERS = ("value", "low", "high")
TEXTS = tuple(name for name, field in Row.model_fields.items() if field.annotation is str)
HEX = re.compile(r"[0-9a-f]*")


class _Unusual(Exception):
    """Lines that are to be read one by one, to say what is wrong with which."""


def load_records(path: str | Path, *, latest: bool = True) -> pd.DataFrame:
    """Rows as a tidy DataFrame: the schema's fields as columns, with batch, threads, ... taken out of `context` too.

    Rows with the same config or context share the object.

    latest: of rows about the same thing (a model that was made anew and measured again) keep only the last.
    """
    known = _read(records_file(path))
    if latest and known.latest is None:
        known.latest = latest_rows(known.frame)
    return (known.latest if latest else known.frame).copy(deep=False)  # pandas copies what the caller changes


@dataclass
class _Known:
    """What this process read of a file: its first `size` bytes, whose CRC-32 is `crc`, as `frame`."""

    size: int = 0
    crc: int = 0
    frame: pd.DataFrame | None = None
    latest: pd.DataFrame | None = None
    shared: dict[bytes, Any] = field(default_factory=dict)


_known: dict[Path, _Known] = {}


def _read(path: Path) -> _Known:
    """All rows of a file; if it begins with what this process read of it before, only the lines after that are parsed."""
    known = _known.pop(path.absolute(), _Known())
    if known.size and not _begins(path, known):
        known = _Known()
    lines = (line for _, line in lines_of(path, known.size))
    try:
        columns = _columns(lines, known)
    except _Unusual:
        rows = read_rows(path)
        return _Known(frame=_frame({name: [getattr(row, name) for row in rows] for name in FIELDS}))
    if known.frame is None or known.frame.empty:
        known.frame, known.latest = _frame(columns), None
    elif columns["key"]:  # a part without rows would change the columns' types
        known.frame, known.latest = pd.concat([known.frame, _frame(columns)], ignore_index=True), None
    if len(known.frame) <= KEPT:
        _known[path.absolute()] = known
    return known


def _begins(path: Path, known: _Known) -> bool:
    """Whether the file begins with what was read of it."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return zlib.crc32(file.read(known.size)) == known.crc


def _frame(columns: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(columns, columns=FIELDS).astype(dict.fromkeys(NUMBERS, float))
    return frame.assign(**{name: [each.get(name) for each in frame["context"]] for name in CONTEXT_COLUMNS})


def latest_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The last row about each thing; which artifact it was measured on does not make it another thing."""
    things = frame[[name for name in IDENTITY if name not in ("config", "context")]].assign(
        config=_numbered(frame["config"]), context=_numbered(frame["context"], but="artifact")
    )
    old = things.duplicated(keep="last")
    return frame[~old].reset_index(drop=True) if old.any() else frame


def _numbered(mappings: pd.Series, but: str = "") -> list[int]:
    """A number for each mapping, the same for those that are equal without the key `but`; one object is looked at once."""
    numbers: dict[str, int] = {}
    known: dict[int, int] = {}
    found = []
    for each in mappings:
        number = known.get(id(each))
        if number is None:
            text = json.dumps({name: value for name, value in each.items() if name != but}, sort_keys=True)
            number = known[id(each)] = numbers.setdefault(text, len(numbers))
        found.append(number)
    return found


def _columns(lines: Iterable[bytes], known: _Known) -> dict[str, list[Any]]:
    """The fields of further lines, checked field by field, not row by row; `known` counts their bytes."""
    columns: dict[str, list[Any]] = {name: [] for name in FIELDS}
    with _no_collection():
        while chunk := list(islice(lines, CHUNK)):
            text = b"".join(chunk)
            known.size, known.crc = known.size + len(text), zlib.crc32(text, known.crc)
            rows = _parsed(chunk, known.shared)
            if any(len(row) != len(FIELDS) for row in rows):
                raise _Unusual
            try:
                for name, column in columns.items():
                    column.extend([row[name] for row in rows])
            except KeyError:
                raise _Unusual from None
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
        text, apart = split_check(line)
        # the two mappings, of which many rows have the same, are parsed once; in a text a quote has a backslash before it
        first = text.find(b',"config":{') + 10
        third = text.rfind(b',"context":{') + 11
        second = text.rfind(b',"seed":', first, text.rfind(b',"metric":"', first, third))
        fourth = text.rfind(b',"samples":')
        if apart or not 10 < first < second < third < fourth:
            raise _Unusual
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
        raise _Unusual from None


def _check(columns: dict[str, list[Any]]) -> None:
    """What `Row` demands of its fields, of all rows at once; numbers become arrays, NaN where there is none."""
    number = {float, int, type(None)}
    kinds = dict.fromkeys((*TEXTS, "status"), {str}) | dict.fromkeys(("schema_version", "seed"), {int})
    kinds |= dict.fromkeys(NUMBERS, number) | dict.fromkeys(("config", "context"), {dict})
    kinds |= {"samples": {list, type(None)}}
    if not all(set(map(type, columns[name])) <= kind for name, kind in kinds.items()):
        raise _Unusual
    if not all(set(map(type, samples)) <= {float, int} for samples in columns["samples"] if samples):
        raise _Unusual
    if not (
        set(columns["schema_version"]) <= {SCHEMA_VERSION} and set(columns["status"]) <= {"ok", "failed", "skipped"}
    ):
        raise _Unusual
    if not all(HEX.fullmatch(text) for name in ("hits", "env_id") for text in set(columns[name])):
        raise _Unusual
    try:
        columns |= {name: np.array(columns[name], dtype=float) for name in NUMBERS}
    except OverflowError:  # a whole number that no float can be
        raise _Unusual from None
    ok = np.array([status == "ok" for status in columns["status"]], dtype=bool)
    told = all(error for error, good in zip(columns["error"], ok) if not good)
    sources = {source for source, good in zip(columns["source"], ok) if good}
    if not (told and np.isfinite(columns["value"][ok]).all() and all(source.startswith(SOURCES) for source in sources)):
        raise _Unusual
