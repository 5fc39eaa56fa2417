"""Rows as one tidy table, read fast: a file of a million rows takes seconds."""

import json
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic_core import from_json

from vitbench.records import IDENTITY, SCHEMA_VERSION, Row, lines_of, read_rows, records_file, split_check

CONTEXT_COLUMNS = ("backend", "versus_backend", "batch", "threads", "device", "split", "versus")
CHUNK = 20_000  # lines that are parsed at once
FIELDS = list(Row.model_fields)
TEXTS = tuple(name for name, field in Row.model_fields.items() if field.annotation is str)
# a line as this package writes it: its two mappings, of which many rows have the same, are parsed once
LINE = re.compile(
    rb'(\{"schema_version":.*?,"config":)(\{.*\})(,"seed":-?\d+,"metric":.*?,"context":)(\{.*?\})(,"samples":.*\})'
)
HEX = re.compile(r"[0-9a-f]*")


class _Unusual(Exception):
    """Lines that are to be read one by one, to say what is wrong with which."""


def load_records(path: str | Path, *, latest: bool = True) -> pd.DataFrame:
    """Rows as a tidy DataFrame: the schema's fields as columns, with batch, threads, ... taken out of `context` too.

    Rows with the same config or context share the object.

    latest: of rows about the same thing (a model that was made anew and measured again) keep only the last.
    """
    path = records_file(path)
    try:
        columns = _columns(path)
    except _Unusual:
        rows = read_rows(path)
        columns = {name: [getattr(row, name) for row in rows] for name in FIELDS}
    frame = pd.DataFrame(columns, columns=FIELDS)
    for name in CONTEXT_COLUMNS:
        frame[name] = [context.get(name) for context in columns["context"]]
    return latest_rows(frame) if latest else frame


def latest_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The last row about each thing; which artifact it was measured on does not make it another thing."""
    things = frame[[name for name in IDENTITY if name not in ("config", "context")]].assign(
        config=_texts(frame["config"]), context=_texts(frame["context"], but="artifact")
    )
    return frame[~things.duplicated(keep="last")].reset_index(drop=True)


def _texts(mappings: pd.Series, but: str = "") -> list[str]:
    """Each mapping as JSON without the key `but`; one object is turned into text once."""
    known = {id(each): each for each in mappings}
    texts = {
        key: json.dumps({name: value for name, value in each.items() if name != but}, sort_keys=True)
        for key, each in known.items()
    }
    return [texts[id(each)] for each in mappings]


def _columns(path: Path) -> dict[str, list[Any]]:
    """The fields of all rows, checked field by field, not row by row."""
    columns: dict[str, list[Any]] = {name: [] for name in FIELDS}
    shared: dict[bytes, Any] = {}
    lines = lines_of(path)
    while chunk := list(islice(lines, CHUNK)):
        for row in _parsed([line for _, line in chunk], shared):
            if len(row) != len(FIELDS):
                raise _Unusual
            for name, value in zip(FIELDS, row.values(), strict=True):
                columns[name].append(value)
    _check(columns)
    return columns


def _parsed(lines: list[bytes], shared: dict[bytes, Any]) -> Iterator[dict[str, Any]]:
    texts, mappings = [], []
    for line in lines:
        text, apart = split_check(line)
        found = LINE.match(text)
        if apart or not found:
            raise _Unusual
        before, config, between, context, after = found.groups()
        for mapping in (config, context):
            if mapping not in shared:
                shared[mapping] = _json(mapping)
        texts.append(b"%bnull%bnull%b" % (before, between, after))
        mappings.append((shared[config], shared[context]))
    for row, (config, context) in zip(_json(b"[%b]" % b",".join(texts)), mappings, strict=True):
        row["config"], row["context"] = config, context
        yield row


def _json(text: bytes) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        raise _Unusual from None


def _check(columns: dict[str, list[Any]]) -> None:
    """What `Row` demands of its fields, of all rows at once."""
    good = set(columns["schema_version"]) <= {SCHEMA_VERSION} and set(columns["status"]) <= {"ok", "failed", "skipped"}
    good &= all(set(map(type, columns[name])) <= {str} for name in TEXTS)
    good &= set(map(type, columns["seed"])) <= {int}
    number = {float, int, type(None)}
    good &= all(set(map(type, columns[name])) <= number for name in ("value", "low", "high"))
    good &= all(set(map(type, columns[name])) <= {dict} for name in ("config", "context"))
    good &= set(map(type, columns["samples"])) <= {list, type(None)}
    good = good and all(HEX.fullmatch(text) for name in ("hits", "env_id") for text in set(columns[name]))
    if not good:
        raise _Unusual
    for status, value, source, error in zip(*(columns[name] for name in ("status", "value", "source", "error"))):
        ok = status == "ok"
        if ok and (
            value is None or not math.isfinite(value) or not source.startswith(("measured", "modelled", "estimated"))
        ):
            raise _Unusual
        if not ok and not error:
            raise _Unusual
