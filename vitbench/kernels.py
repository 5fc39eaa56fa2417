"""Kernels of notebooks that run one after the other, forked from a process that has imported what all of them need (Linux).

Elsewhere there is none to give, and each notebook's kernel starts and imports by itself.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn, Self

from jupyter_client import AsyncKernelManager, BlockingKernelClient

SERVE = (sys.executable, "-c", "from vitbench import kernels; kernels.serve()")
# matplotlib reads it as it is imported; a kernel says it later, so that pyplot, which needs a kernel, is not imported before
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
IMPORTS = (
    "ipykernel.kernelapp",
    "matplotlib.figure",
    "pandas",
    "scipy.stats",
    "sklearn.datasets",
    "torch",
    "vitbench.cache",
    "vitbench.measurement",
)
QUIET = "--IPKernelApp.log_level=ERROR"  # a kernel's own warnings are not the user's
STOP_SECONDS = 10.0


class Kernels:
    """Gives out kernels; to be closed, as by `with`. The process that forks them starts with the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server:
            self._server.communicate()

    @contextlib.contextmanager
    def kernel(self) -> Iterator[AsyncKernelManager | None]:
        """A kernel that is shut down at the end, or None where the notebook has to start its own."""
        if sys.platform != "linux":
            yield None
            return
        manager = _Forked(kernel_name="python3")
        manager.write_connection_file()
        try:
            manager.process = self._fork(manager.connection_file)
            try:
                yield manager
            finally:
                manager.stop()
        finally:
            manager.cleanup_connection_file()

    def _fork(self, connection_file: str) -> int:
        """The pidfd of a new kernel's process."""
        with self._lock:
            self._server = self._server or subprocess.Popen(
                SERVE,
                env=os.environ | INLINE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # an interrupt from the keyboard is for the suite
            )
            try:
                self._server.stdin.write(json.dumps(connection_file).encode() + b"\n")
                self._server.stdin.flush()
                return os.pidfd_open(int(self._server.stdout.readline()))
            except (BrokenPipeError, ValueError):
                raise RuntimeError("the process that starts kernels ended") from None


class _Forked(AsyncKernelManager):
    """A kernel whose process is another's child."""

    process = -1
    has_kernel = True

    def _ended(self, seconds: float = 0.0) -> bool:
        return bool(select.select([self.process], [], [], seconds)[0])

    async def _async_is_alive(self) -> bool:
        return not self._ended()

    is_alive = _async_is_alive

    def stop(self) -> None:
        """Ask it to end, and make it end if it does not."""
        client = BlockingKernelClient()
        client.load_connection_info(self.get_connection_info())
        client.start_channels(shell=False, iopub=False, stdin=False, hb=False)
        client.shutdown()
        if not self._ended(STOP_SECONDS):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)
        client.stop_channels()
        os.close(self.process)


def serve() -> NoReturn:
    """The forking process: for each line of the standard input a kernel, whose process is named in the answer."""
    gc.disable()  # imports leave nothing to collect, and what they made is not looked at again
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    server = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever asked sees to their end
    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            _be_the_kernel(json.loads(line), server)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
    os._exit(0)  # to take down what was imported would take another second


def _be_the_kernel(connection: str, server: int) -> NoReturn:
    from ipykernel import kernelapp

    from vitbench.measurement import child

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    child.fork_ready()
    gc.enable()
    if os.getppid() == server:
        kernelapp.launch_new_instance(argv=["-f", connection, QUIET, f"--IPKernelApp.parent_handle={server}"])
    atexit._run_exitfuncs()
    os._exit(0)  # to take down what was imported would take another second
