"""Locks between processes: the system's file locks, or a lock file if the file system has no locks."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from vitbench.base.errors import InputError
from vitbench.base.files import append_bytes, report_final_path

# errors of network file systems without a lock service
NO_LOCK_ERRNOS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def locked(path: str | Path, busy_message: str = "") -> Iterator[None]:
    """Hold the lock of the file `path` inside the block. The system releases it when the process ends in any way.

    If the file system has no locks, the file `path`.held is the lock. It names its process and machine. The lock of an
    ended process is taken over, unless that process was on another machine, where this cannot be checked.

    Args:
        busy_message: the error if another process holds the lock; "" waits for the lock instead.

    Raises:
        InputError: another process holds the lock; the message is `busy_message`.
        OSError: the folder cannot be written.
    """
    path, timeout = Path(path), 0 if busy_message else -1
    try:
        with report_final_path(path, path):
            lock = _lock_of(path)
            lock.acquire(timeout=timeout)
    except Timeout:
        lock_file = Path(lock.lock_file)
        hint = f" (if that has ended, delete {str(lock_file)!r})" if isinstance(lock, SoftFileLock) else ""
        raise InputError(busy_message + hint) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: str | Path) -> bool:
    """Whether a process holds the lock of the file `path`."""
    if not Path(path).parent.is_dir():
        return False
    try:
        with locked(path, busy_message="held"):
            return False
    except InputError:
        return True


def _lock_of(path: Path) -> FileLock | SoftFileLock:
    if _has_locks(path):
        return FileLock(path)
    return SoftFileLock(f"{path}.held")


def _has_locks(path: Path) -> bool:
    """Whether the file system of `path` has locks, tested on an unnamed file in the same folder."""
    try:
        import fcntl
    except ImportError:  # Windows has other locks, which FileLock uses
        return True
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        try:
            fcntl.flock(probe.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCK_ERRNOS:
                return False
            raise
    if not path.exists():
        append_bytes(path, b"")  # created with the umask's mode, so that others may lock it too
    return True
