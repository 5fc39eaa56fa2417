"""The one row schema and its append-only store, `records.jsonl`: one JSON object a metric.

A row that exists is complete; one that was interrupted does not exist. The `key` says what was measured, so work
whose key is there already is not done again.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
import pydantic
from filelock import FileLock
from pydantic import Field, model_validator

from vitbench.configs import Config, explain
from vitbench.errors import InputError

SCHEMA_VERSION = 1
IDENTITY = ("model", "dataset", "data_fingerprint", "method", "config", "seed", "metric", "context")
GROUPS = ("accuracy", "size", "weights", "outputs", "latency", "memory")  # of metrics, as `measure` takes them
DEVICE_GROUPS = ("startup", "limit", "energy", "roofline")  # only if asked for
CONTEXT_COLUMNS = ("backend", "versus_backend", "batch", "threads", "device", "split", "versus")


class Row(Config):
    """One metric of one model.

    Attributes:
        key: hash of what was measured: model, data, method, config, seed, metric and context.
        time: when, in UTC.
        status: ok, failed (then `error` says why), or skipped (then `error` says why it cannot be had).
        dataset, data_fingerprint: the image set and the hash of its content and splits.
        method: `baseline` for the uncompressed model; names joined by + for a combination.
        config: where the weights came from and each method's config.
        value, unit: top1 and top5 are fractions, latency is in ms, bytes and peak_rss in bytes.
        source: `measured`, `modelled` or `estimated`, and by what.
        low, high: 95 % interval, where there is one.
        context: backend, batch, threads, device, artifact (the start of the weights file's SHA-256), ...
        samples: raw values, where there are some.
        hits: of an accuracy, which images were answered right, in the split's order (see `statistics.pack_hits`).
        env_id: names a file in `environments/` beside the records.
        commit: of this package's source.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    key: str = ""
    time: str = ""
    status: Literal["ok", "failed", "skipped"] = "ok"
    error: str = ""
    model: str
    dataset: str
    data_fingerprint: str
    method: str
    config: dict[str, Any] = {}
    seed: int = 0
    metric: str
    value: float | None = None
    unit: str = ""
    source: str = ""
    low: float | None = None
    high: float | None = None
    context: dict[str, Any] = {}
    samples: list[float] | None = None
    hits: str = Field(default="", pattern=r"^[0-9a-f]*$")
    env_id: str = Field(default="", pattern=r"^[0-9a-f]*$")
    commit: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status == "ok" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(f"an ok row needs a finite value, {self.metric} has {self.value}")
        if self.status == "ok" and not self.source.startswith(("measured", "modelled", "estimated")):
            raise ValueError(f"source = {self.source!r}: it starts with measured, modelled or estimated")
        if self.status != "ok" and not self.error:
            raise ValueError(f"a {self.status} row needs an error")
        return self

    def stamped(self, env_id: str = "", commit: str = "") -> "Row":
        """The row with its key, the time, and where it was made."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return self.having(key=self.identity(), time=now, env_id=env_id or self.env_id, commit=commit or self.commit)

    def identity(self) -> str:
        """The key of this row: 16 hex digits of the hash of what it is about."""
        facts = self.model_dump(mode="json", include=set(IDENTITY))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def append_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """Add rows to a records file, all of them or none; a row whose key is there as ok already is left out.

    Several processes may write at once. Returns how many rows were added.

    Raises:
        InputError: the file cannot be written (the rows before stay as they were) or ends in a torn line.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            text = path.read_bytes() if path.exists() else b""
            if text and not text.endswith(b"\n"):
                raise InputError(_torn(path, text.count(b"\n") + 1, "it has no end"))
            done = set(re.findall(rb'"key":"([0-9a-f]+)"[^\n]*?"status":"ok"', text))
            new = [row if row.key else row.stamped() for row in rows]
            new = [row for row in new if row.key.encode() not in done]
            lines = "".join(row.model_dump_json() + "\n" for row in new)
            _append(path, lines.encode(), len(text))
    except OSError as error:
        raise InputError(
            f"records {str(path)!r} cannot be written ({error.strerror}); give a folder with free space that you own"
        ) from None
    return len(new)


def _append(path: Path, lines: bytes, size: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = 0
        while written < len(lines):
            written += os.write(handle, lines[written:])
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)  # a full disk: take back the part that went in
        raise
    finally:
        os.close(handle)


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a records file, or of the `records.jsonl` in a folder; every line is checked against the schema."""
    path = records_file(path)
    if not path.is_file():
        raise InputError(
            f"no records at {str(path)!r}; give a results folder or its records.jsonl (`vitbench run` makes one)"
        )
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(Row.model_validate_json(line))
            except pydantic.ValidationError as error:
                raise InputError(_torn(path, number, explain(error, Row))) from None
    return rows


def records_file(path: str | Path) -> Path:
    """The records file of a results folder; a file stands for itself."""
    path = Path(path).expanduser()
    return path / "records.jsonl" if path.is_dir() else path


def load_records(path: str | Path, *, latest: bool = True) -> pd.DataFrame:
    """Rows as a tidy DataFrame: the schema's fields as columns, with batch, threads, ... taken out of `context` too.

    latest: of rows about the same thing (a model that was made anew and measured again) keep only the last.
    """
    frame = pd.DataFrame([row.model_dump() for row in read_rows(path)], columns=list(Row.model_fields))
    for name in CONTEXT_COLUMNS:
        frame[name] = [context.get(name) for context in frame["context"]]
    return latest_rows(frame) if latest else frame


def latest_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The last row about each thing; which artifact it was measured on does not make it another thing."""

    def thing(row: pd.Series) -> str:
        context = {key: value for key, value in row["context"].items() if key != "artifact"}
        return json.dumps([row[name] for name in IDENTITY if name != "context"] + [context], sort_keys=True)

    things = frame.apply(thing, axis=1) if len(frame) else pd.Series(dtype=str)
    return frame[~things.duplicated(keep="last")].reset_index(drop=True)


def _torn(path: Path, number: int, why: str) -> str:
    return (
        f"line {number} of {str(path)!r} is not a whole row ({why[:200]}); the {number - 1} rows before it are good: "
        f"keep them with `head -n {number - 1}` into a new file, or take that line out"
    )
