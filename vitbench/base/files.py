"""Atomic files, appended lines and folders: each appears complete or not at all, and nothing that vitbench did not write is replaced."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from vitbench.base.errors import InputError
from vitbench.base.paths import check_writable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

# no space or no right, which the user can mend
UNWRITABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
TEMPORARY_NAME = re.compile(
    r"\.vitbench\.(\d+)\.[0-9a-f]{8}\.part"
)  # a temporary name, with the id of the process that writes it


def temporary_name() -> str:
    """A new temporary name, short enough to stand beside a file with the longest name there can be."""
    return f".vitbench.{os.getpid()}.{uuid.uuid4().hex[:8]}.part"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` for a library that opens its files itself; renamed when the block ends well.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`, and no part is left.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing where it points
    part = path.with_name(temporary_name())
    try:
        with report_final_path(path, part):
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # the error that ended the block says more
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a temporary file beside `path` that takes its name when the block ends well, and is removed when it does not.

    Args:
        mode: "wb" or "w" (then `encoding` is UTF-8 unless `options` say otherwise).
        options: further arguments of `open`.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`, and no part is left.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    with atomic_path(path) as part, open(part, mode.replace("w", "x"), **options) as file:  # its mode follows the umask
        yield file


@contextlib.contextmanager
def report_final_path(path: Path, part: Path) -> Iterator[None]:
    """Let an error of writing to `part`, or to a file in it, name `path` instead, and let it be an `OSError`.

    Libraries written in Rust raise errors of their own kinds, with the system's number in the text.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        elif Path(os.fsdecode(error.filename)).is_relative_to(part):
            error.filename = str(path / Path(os.fsdecode(error.filename)).relative_to(part))
        raise
    except Exception as error:
        if errno_match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(errno_match[1]), os.strerror(int(errno_match[1])), str(path)) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8 to `path`, whole or not at all."""
    with atomic_file(path, "w", newline="") as file:
        file.write(text)


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Its mode follows the umask, which safetensors alone does not."""
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        part.touch()
        mode = part.stat().st_mode & 0o777
        save_file(dict(tensors), part, metadata=metadata)
        part.chmod(mode)


def write_array(path: str | Path, array: "np.ndarray") -> None:
    """Write a .npy file, whole or not at all."""
    import numpy as np

    buffer = io.BytesIO()  # numpy's own way into a file loses the system's reason why it cannot be written
    np.save(buffer, array)
    write_bytes(path, buffer.getbuffer())


def figure_bytes(figure: "Figure", file_format: str, **options: Any) -> bytes:
    """A matplotlib figure as the content of a file of this `file_format`, "png", "svg" or "pdf"; `options` are `savefig`'s."""
    buffer = io.BytesIO()  # the writer of pictures loses the system's reason why a file cannot be written
    figure.savefig(buffer, format=file_format, **options)
    return buffer.getvalue()


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file's content, whole or not at all."""
    with open(source, "rb") as file, atomic_file(path) as target:
        shutil.copyfileobj(file, target)


def append_bytes(path: str | Path, lines: bytes) -> None:
    """Add `lines` to the end of a file, which comes into being if need be; a part that went in is taken back.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`, and what was in it is unchanged.
    """
    path = Path(path)
    with report_final_path(path, path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(handle).st_size
        try:
            written = 0
            while written < len(lines):
                written += os.write(handle, lines[written:])
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
        finally:
            os.close(handle)


def drop_partial_line(path: str | Path) -> bytes:
    """Take out a last line that was not written to its end, as a killed process leaves it; returns what was taken out."""
    path = Path(path)
    text = path.read_bytes() if path.is_file() else b""
    complete_size = text.rfind(b"\n") + 1
    if complete_size < len(text):
        os.truncate(path, complete_size)
    return text[complete_size:]


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this project writes, and by what it is known again.

    Attributes:
        name: as people say it, "a saved model".
        manifest: the file that is written last; it holds a JSON object.
        keys: what that object has.
        files: the names of the folder's other files, from that object.
    """

    name: str
    manifest: str
    keys: frozenset[str]
    files: Callable[[dict[str, Any]], Iterable[str]]

    def written_files(self, folder: Path) -> set[str]:
        """The names of the files in `folder` that this project wrote; empty if it is not of this kind."""
        try:
            content = json.loads((folder / self.manifest).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return set()
        if not isinstance(content, dict) or not content.keys() >= self.keys:
            return set()
        expected_files = {self.manifest, *self.files(content)}
        return {
            entry.name
            for entry in os.scandir(folder)
            if entry.name in expected_files and entry.is_file(follow_symlinks=False)
        }


def check_target(path: str | Path, kind: FolderKind) -> Path:
    """Where a folder of this kind would be written; links are followed, and nothing is made yet.

    Call it before any work, so that a folder that cannot be written is known then.

    Raises:
        InputError: something else is there, which writing would delete, or there is no way to write.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    try:
        if not target.is_dir():
            if os.path.lexists(target):
                raise InputError(f"{str(path)!r} is a file, and {kind.name} is a folder; give another name")
            check_writable(next(folder for folder in target.parents if os.path.lexists(folder)))
            return target
        foreign_files = _foreign_files(target, kind)
        if not foreign_files:
            check_writable(target)
            return target
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written ({error.strerror}); give a folder with free space that you own"
        ) from None
    foreign_text = repr(foreign_files[0]) + (f" and {len(foreign_files) - 1} more" if len(foreign_files) > 1 else "")
    if kind.written_files(target):
        raise InputError(
            f"{str(path)!r} holds {kind.name} and beside it {foreign_text}, which would be lost; move that away or give a new folder"
        )
    raise InputError(
        f"{str(path)!r} holds {foreign_text} and is not {kind.name}, so it is left alone; give a new or an empty folder"
    )


def _foreign_files(folder: Path, kind: FolderKind) -> list[str]:
    """Names in `folder` that this project did not write there."""
    written_files = kind.written_files(folder)
    return sorted(
        name for name in os.listdir(folder) if name not in written_files and not TEMPORARY_NAME.fullmatch(name)
    )


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: FolderKind) -> Iterator[Path]:
    """A new folder to fill with files; when the block ends well, they lie at `path`, and else nothing there has changed.

    A folder of the same kind is replaced, file by file and the manifest last: a folder that is a link, somebody's current
    one or a mount stays what it is. A new one appears with all of its files at once.

    Raises:
        InputError: as `check_target`'s.
        OSError: no space; its `filename` is the file at its final place, and no part is left.
    """
    target = check_target(path, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = (target if target.is_dir() else target.parent) / temporary_name()
    try:
        with report_final_path(target, part):
            part.mkdir()  # its mode follows the umask
            yield part
            if target.is_dir():
                _replace_files(part, check_target(target, kind), kind)
            else:
                part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _replace_files(part: Path, target: Path, kind: FolderKind) -> None:
    old = kind.written_files(target)
    new = sorted((file.name for file in part.iterdir()), key=lambda name: (name == kind.manifest, name))
    for name in new:
        os.replace(part / name, target / name)
    for name in old - set(new):
        (target / name).unlink(missing_ok=True)
    for leftover in target.iterdir():  # what a process that was killed left
        if (temporary_match := TEMPORARY_NAME.fullmatch(leftover.name)) and not psutil.pid_exists(
            int(temporary_match[1])
        ):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
