"""The schema of rows and their append-only store, `records.jsonl`, with one JSON object for each metric.

A row that exists is complete; an interrupted row does not exist. The `key` is the hash of what was measured, and work
whose key exists is not repeated.
"""

import math
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
from pydantic import Field, model_validator

from vitbench.base.configs import Config, digest, format_validation_error
from vitbench.base.errors import InputError
from vitbench.base.files import append_bytes
from vitbench.base.locks import locked

SCHEMA_VERSION: Literal[1] = 1
SOURCES = ("measured", "modelled", "estimated")  # first words of a source
KEY_FIELDS = ("model", "dataset", "data_fingerprint", "method", "config", "seed", "metric", "context")
GROUPS = ("accuracy", "size", "weights", "outputs", "latency", "memory")  # of metrics, as `measure` takes them
DEVICE_GROUPS = ("startup", "limit", "energy", "roofline")  # measured only on request


class Row(Config):
    """One metric of one model.

    Attributes:
        key: hash of what was measured: model, data, method, config, seed, metric and context.
        time: the time of the measurement, in UTC.
        status: ok, failed, or skipped (not available); `error` is the reason of the last two.
        dataset, data_fingerprint: the image set and the hash of its content and splits.
        method: `baseline` for the uncompressed model; names joined by + for a combination.
        config: the origin of the weights, and each method's config.
        value, unit: top1 and top5 are fractions, latency is in ms, bytes and peak_rss in bytes.
        source: `measured`, `modelled` or `estimated`, and how.
        low, high: the 95 % interval, if there is one.
        context: backend, batch, threads, device, artifact (the start of the weights file's SHA-256), ...
        samples: raw values, if there are any.
        hits: for top1, the images that were classified correctly, in the split's order (see `statistics.pack_hits`).
        env_id: the name of a file in `environments/` beside the records.
        commit: the commit of this package's source.
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
    value: float | None = Field(default=None, strict=True)
    unit: str = ""
    source: str = ""
    low: float | None = Field(default=None, strict=True)
    high: float | None = Field(default=None, strict=True)
    context: dict[str, Any] = {}
    samples: list[float] | None = None
    hits: str = Field(default="", pattern=r"^[0-9a-f]*$")
    env_id: str = Field(default="", pattern=r"^[0-9a-f]*$")
    commit: str = ""

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.status == "ok" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(f"an ok row needs a finite value, {self.metric} has {self.value}")
        if self.status == "ok" and not self.source.startswith(SOURCES):
            raise ValueError(f"source = {self.source!r} does not start with measured, modelled or estimated")
        if self.status != "ok" and not self.error:
            raise ValueError(f"a {self.status} row needs an error")
        return self

    def with_provenance(self, env_id: str = "", commit: str = "") -> "Row":
        """A copy with its key, the time, the environment and the commit."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return self.replace(
            key=self.compute_key(), time=now, env_id=env_id or self.env_id, commit=commit or self.commit
        )

    def compute_key(self) -> str:
        """The key of this row: 16 hex digits of the hash of what was measured."""
        key_values = self.model_dump(mode="json", include=set(KEY_FIELDS))
        return digest(key_values)


def append_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """Append rows to a records file atomically, except rows whose key has an ok row already.

    Several processes may write at once. An incomplete line of a killed writer is moved to `records.jsonl.torn`.
    Returns the number of rows that were appended.

    Raises:
        InputError: the file cannot be written; its previous rows are unchanged.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(f"{path}.lock"):
            done = _ok_keys(path)
            new = [row if row.key else row.with_provenance() for row in rows]
            new = [row for row in new if row.key.encode() not in done]
            append_bytes(path, b"".join(map(_line, new)))
    except OSError as error:
        raise InputError(
            f"records {str(path)!r} cannot be written ({error.strerror}); give a folder with free space that you own"
        ) from None
    return len(new)


# file -> how far this process has read it (bytes), the last bytes before that offset, the keys of its ok rows
_read_state: dict[Path, tuple[int, bytes, set[bytes]]] = {}


def _ok_keys(path: Path) -> set[bytes]:
    """The keys of a file's ok rows. If the file has grown since the last call, only its new part is read."""
    offset, last_bytes, keys = _read_state.get(path.absolute(), (0, b"", set()))
    if not path.exists():
        return set()
    with open(path, "rb") as file:
        file.seek(max(0, offset - len(last_bytes)))
        if file.read(len(last_bytes)) != last_bytes:  # the file was replaced
            offset, keys = 0, set()
            file.seek(0)
        text = file.read()
    complete_size = text.rfind(b"\n") + 1
    if complete_size < len(text):
        append_bytes(f"{path}.torn", text[complete_size:] + b"\n")
        os.truncate(path, offset + complete_size)
    if complete_size:
        last_bytes = text[max(0, complete_size - 100) : complete_size]
    keys |= set(re.findall(rb'"key":"([0-9a-f]+)"[^\n]*?"status":"ok"', text[:complete_size]))
    _read_state[path.absolute()] = offset + complete_size, last_bytes, keys
    return keys


def _line(row: Row) -> bytes:
    """A row as a line of the file, with a checksum, so that a damaged number is not read as another one."""
    text = row.model_dump_json().encode()[:-1]
    return text + b',"check":"%08x"}\n' % zlib.crc32(text)


def read_rows(path: str | Path, containing: str = "") -> list[Row]:
    """All rows of a records file, or of the `records.jsonl` in a folder; each line is checked against the schema.

    Args:
        containing: read only lines that contain this text.

    Raises:
        InputError: there are no records, or a line is damaged.
    """
    path = records_file(path)
    return [_row(path, number, line) for number, line in lines_of(path) if containing.encode() in line]


def lines_of(path: Path, after: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines of a records file after its first `after` bytes, numbered from 1; an incomplete last line is left out."""
    if not path.is_file():
        raise InputError(
            f"no records at {str(path)!r}; give a results folder or its records.jsonl (`vitbench run` makes one)"
        )
    with open(path, "rb") as lines:
        lines.seek(after)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                warnings.warn(f"the last line of {str(path)!r} is incomplete and is left out", stacklevel=2)
                return
            yield number, line


def _row(path: Path, number: int, line: bytes) -> Row:
    text, is_damaged = split_checksum(line)
    if is_damaged:
        raise InputError(_damaged_line_message(path, number, "its checksum does not match: it was changed"))
    try:
        return Row.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise InputError(_damaged_line_message(path, number, format_validation_error(error, Row))) from None


def split_checksum(line: bytes) -> tuple[bytes, bool]:
    """A line without its checksum, and whether the checksum does not match; lines of older versions have none."""
    text, mark, check = line.rstrip().rpartition(b',"check":"')
    if not mark or len(check) != 10:
        return line, False
    return text + b"}", check[:8] != b"%08x" % zlib.crc32(text)


def records_file(path: str | Path) -> Path:
    """The records file of a results folder; a path of a file is returned unchanged."""
    path = Path(path).expanduser()
    return path / "records.jsonl" if path.is_dir() else path


def _damaged_line_message(path: Path, number: int, reason: str) -> str:
    return (
        f"line {number} of {str(path)!r} is not a valid row ({reason[:200]}); the {number - 1} rows before it are valid: "
        f"write them to a new file with `head -n {number - 1}`, or remove that line"
    )
