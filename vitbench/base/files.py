"""Files and folders that appear whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a temporary file beside `path` that takes its name when the block ends well, and is removed when it does not.

    Args:
        mode: "wb" or "w" (then `encoding` is UTF-8 unless `options` say otherwise).
        options: further arguments of `open`.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`, and no part is left.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing where it points
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    part = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, mode.replace("w", "x"), **options) as file:  # its mode follows the umask
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename in (None, str(part), part):
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8 to `path`, whole or not at all."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)
