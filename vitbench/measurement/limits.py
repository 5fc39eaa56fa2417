"""Memory limits: run a command under a real limit, find the smallest one, and count the bytes of live tensors."""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitbench.base.errors import InputError
from vitbench.base.processes import PYTHON

CGROUPS = Path("/sys/fs/cgroup")
RELATIVE_PRECISION = 0.02  # of the smallest limit
COMMAND_TIMEOUT_SECONDS = 120  # a command that swaps without end counts as failed


def limit_kind() -> str:
    """How memory is limited on this system, in words; "" if it cannot be."""
    if _controller():
        return "memory cgroup (pages of files that the system holds anyway are not counted)"
    return "ulimit -d (heap and private pages)" if os.name == "posix" and sys.platform != "darwin" else ""


def unsupported_reason() -> str:
    """Why no limit can be set; "" if one can."""
    return "" if limit_kind() else f"{sys.platform} has neither memory cgroups nor an effective limit of data"


def runs_within(command: list[str], limit: int, env: dict[str, str], files: Iterable[Path] = ()) -> bool:
    """Whether the command succeeds within `limit` bytes. The system's cache of `files` is dropped first.

    Raises:
        InputError: the limit is too small to start Python.
    """
    if not _succeeds_within([*PYTHON, "-c", "pass"], limit, env):
        raise InputError(f"a memory limit of {limit:,} bytes is too small to start Python; give some tens of megabytes")
    _drop_cached(files)
    return _succeeds_within(command, limit, env)


def smallest_limit(command: list[str], peak: int, env: dict[str, str], files: Iterable[Path] = ()) -> int:
    """The smallest limit in bytes within which the command succeeds, to 2 %, by bisection below and above `peak`.

    Raises:
        InputError: the command fails under every limit.
    """
    files, low, high = list(files), 0, peak
    _drop_cached(files)
    while not _succeeds_within(command, high, env):
        low, high = high, 2 * high
        if high > 64 * peak:
            raise InputError(f"the command fails in {high:,} bytes too, so the limit is not the cause")
    while high - low > RELATIVE_PRECISION * high:
        middle = (low + high) // 2
        _drop_cached(files)
        low, high = (low, middle) if _succeeds_within(command, middle, env) else (middle, high)
    return high


def _succeeds_within(command: list[str], limit: int, env: dict[str, str]) -> bool:
    with _memory_limit(limit) as prefix, tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(
                [*prefix, *command],
                timeout=COMMAND_TIMEOUT_SECONDS,
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
            )
        except (subprocess.TimeoutExpired, OSError):
            return False
    return process.returncode == 0


@contextlib.contextmanager
def _memory_limit(limit: int) -> Iterator[list[str]]:
    """The words before a command that run it within `limit` bytes: a shell enters the group, then becomes the command."""
    controller = _controller()
    if not controller:
        yield ["sh", "-c", f'ulimit -d {limit // 1024} && exec "$@"', "sh"]
        return
    root, name = controller
    group = Path(tempfile.mkdtemp(prefix="vitbench.", dir=root))
    try:
        _write(group / name, limit)
        yield ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh"]
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


@functools.cache
def _controller() -> tuple[Path, str] | None:
    """The folder in which memory groups can be created, and the file with a group's limit; None if there is none."""
    for root, name in ((CGROUPS, "memory.max"), (CGROUPS / "memory", "memory.limit_in_bytes")):
        try:
            group = Path(tempfile.mkdtemp(prefix="vitbench.", dir=root))
        except OSError:
            continue
        try:
            _write(group / name, 2**30)
            return root, name
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
    return None


def _write(file: Path, value: int) -> None:
    with open(file, "r+") as stream:  # "r+" does not create the file in a folder that is no control group
        stream.write(str(value))


def _drop_cached(files: Iterable[Path]) -> None:
    """Drop the files from the system's cache, so that the process that reads them is charged for them."""
    for path in files:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file() and hasattr(os, "posix_fadvise"):
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())  # pages that are not yet on the disk are not dropped
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_tensors(model: nn.Module, x: Tensor) -> int:
    """The most bytes of live tensors during one inference on `x`, with the model's own tensors.

    Results of operators are counted, the buffers inside a kernel are not.
    """
    resident = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()
    }
    with LiveTensors() as live:
        model(x)
    return sum(resident.values()) + x.untyped_storage().nbytes() + live.peak


class LiveTensors(TorchDispatchMode):
    """Follows the storages that operators allocate, and the largest sum of those that are live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live_storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        input_storages = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in input_storages:  # the storage of a view is counted already
                    self.live_storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live_storages = {key: pair for key, pair in self.live_storages.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live_storages.values()))
        return result
