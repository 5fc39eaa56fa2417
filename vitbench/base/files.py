"""Write files, appended lines and folders atomically, and replace only files that vitbench wrote."""

import contextlib
import errno
import functools
import io
import json
import os
import re
import shutil
import time
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

# no space or no permission, which the user can correct
UNWRITABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
TEMPORARY_NAME = re.compile(
    r"\.vitbench\.(\d+)\.[0-9a-f]{8}\.part"
)  # a temporary name, with the id of the process that writes it

LEFTOVER_SECONDS = 3600  # a temporary file of this age, without its process, is what a killed process left


def temporary_name() -> str:
    """A new temporary name. It is short, since it must also fit beside a file whose name has the greatest length."""
    return f".vitbench.{os.getpid()}.{uuid.uuid4().hex[:8]}.part"


@functools.cache
def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that killed processes left in `folder`; a process looks once at each folder.

    They are old and their process is gone: in a shared folder, a process of another machine may still write a young one.
    """
    with contextlib.suppress(OSError):  # the write that follows reports what is wrong
        for name in os.listdir(folder):
            match = TEMPORARY_NAME.fullmatch(name)
            if not match or psutil.pid_exists(int(match[1])):
                continue
            leftover = folder / name
            with contextlib.suppress(OSError):
                if time.time() - leftover.lstat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a library that opens files itself; renamed to `path` if the block succeeds.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`, and no temporary file is left.
    """
    path = Path(os.path.realpath(path))  # a link is kept, and its target replaced
    remove_leftovers(path.parent)
    part = path.with_name(temporary_name())
    try:
        with report_final_path(path, part):
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # the error that ended the block is more useful
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a temporary file beside `path`; renamed to `path` if the block succeeds, removed otherwise.

    Args:
        mode: "wb" or "w".
        options: further arguments of `open`; `encoding` is UTF-8 by default.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`, and no temporary file is left.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    with atomic_path(path) as part, open(part, mode.replace("w", "x"), **options) as file:  # its mode follows the umask
        yield file


@contextlib.contextmanager
def report_final_path(path: Path, part: Path) -> Iterator[None]:
    """Make errors of writing to `part`, or to a file in it, an `OSError` that names `path`.

    Libraries written in Rust raise errors of their own types, with the system's errno in the text.
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
    """Write `text` in UTF-8 to `path`, atomically."""
    with atomic_file(path, "w", newline="") as file:
        file.write(text)


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, atomically."""
    with atomic_file(path) as file:
        file.write(content)


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. Its mode follows the umask, which safetensors ignores."""
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        part.touch()
        mode = part.stat().st_mode & 0o777
        save_file(dict(tensors), part, metadata=metadata)
        part.chmod(mode)


def write_array(path: str | Path, array: "np.ndarray") -> None:
    """Write a .npy file, atomically."""
    import numpy as np

    buffer = io.BytesIO()  # if numpy writes the file, its error lacks the system's reason
    np.save(buffer, array)
    write_bytes(path, buffer.getbuffer())


def figure_bytes(figure: "Figure", file_format: str, **options: Any) -> bytes:
    """A matplotlib figure as the content of a "png", "svg" or "pdf" file; `options` are those of `savefig`."""
    buffer = io.BytesIO()  # if the image library writes the file, its error lacks the system's reason
    figure.savefig(buffer, format=file_format, **options)
    return buffer.getvalue()


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file's content, atomically."""
    with open(source, "rb") as file, atomic_file(path) as target:
        shutil.copyfileobj(file, target)


def append_bytes(path: str | Path, lines: bytes) -> None:
    """Append `lines` to a file, which is created if it is missing. If writing fails, what was appended is removed.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`, and its content is unchanged.
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
    """Remove an incomplete last line, which a killed process may leave, and return it."""
    path = Path(path)
    text = path.read_bytes() if path.is_file() else b""
    complete_size = text.rfind(b"\n") + 1
    if complete_size < len(text):
        os.truncate(path, complete_size)
    return text[complete_size:]


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this project writes, with what identifies it.

    Attributes:
        name: the kind in words, such as "a saved model".
        manifest: the name of the file that is written last, which holds a JSON object.
        keys: keys that this object must have.
        files: gives the names of the folder's other files from this object.
    """

    name: str
    manifest: str
    keys: frozenset[str]
    files: Callable[[dict[str, Any]], Iterable[str]]

    def written_files(self, folder: Path) -> set[str]:
        """The names of the files in `folder` that this project wrote; empty if the folder is not of this kind."""
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
    """The path at which a folder of this kind can be written, with links resolved; nothing is created.

    Call it before long work, so that the work does not end in this error.

    Raises:
        InputError: the path holds files that vitbench did not write, or it cannot be written.
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
    """The names of files in `folder` that this project did not write."""
    written_files = kind.written_files(folder)
    return sorted(
        name for name in os.listdir(folder) if name not in written_files and not TEMPORARY_NAME.fullmatch(name)
    )


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: FolderKind) -> Iterator[Path]:
    """A temporary folder to write files to. If the block succeeds, they are moved to `path`; otherwise `path` is unchanged.

    A new folder is renamed, so it appears with all of its files at once. In an existing folder of the same kind the files
    are replaced one by one, the manifest last, since the folder may be a link, a mount or a process's current folder.

    Raises:
        InputError: as in `check_target`.
        OSError: a file cannot be written; its `filename` is the final path, and no temporary file is left.
    """
    target = check_target(path, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = (target if target.is_dir() else target.parent) / temporary_name()
    remove_leftovers(part.parent)
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
