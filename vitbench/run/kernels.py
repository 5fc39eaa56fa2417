"""Kernels of notebooks that run one after the other, forked from a process that has imported what all of them need.

Where nothing can be forked, each notebook's kernel starts and imports by itself. A kernel works in a temporary folder, and
imports nothing from the folder that the suite was started in.
"""

import atexit
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, Self

from jupyter_client import AsyncKernelManager, BlockingKernelClient

from vitbench.base.forks import CAN_FORK, ForkedProcess, ForkServer
from vitbench.base.processes import child_environment

# matplotlib reads it as it is imported; a kernel says it later, so that pyplot, which needs a kernel, is not imported before
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
IMPORTS = (
    "ipykernel.kernelapp",
    "matplotlib.figure",
    "pandas",
    "scipy.stats",
    "sklearn.datasets",
    "torch",
    "vitbench.run.cache",
    "vitbench.measurement.measuring",
)
# a kernel's own warnings are not the user's, and the folder that it works in is not on its path
OPTIONS = ("--IPKernelApp.log_level=ERROR", "--IPKernelApp.ignore_cwd=True")
STOP_SECONDS = 10.0


class Kernels:
    """Gives out kernels; to be closed, as by `with`. The process that forks them starts with the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: ForkServer | None = None
        self.stopped = False
        self._folder = tempfile.TemporaryDirectory(prefix="vitbench.", ignore_cleanup_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """End all kernels, whatever they are at; no other one is given out."""
        self.stopped = True
        if self._server:
            self._server.close()

    @contextlib.contextmanager
    def kernel(self) -> Iterator[AsyncKernelManager]:
        """A kernel that is shut down at the end."""
        variables = _variables()
        if not CAN_FORK:
            yield _Started(self._folder.name, variables, kernel_name="python3")
            return
        manager = _Forked(kernel_name="python3")
        manager.write_connection_file()
        try:
            with self._lock:
                self._server = self._server or ForkServer(IMPORTS, variables)
                if self.stopped:  # by another thread, perhaps just now
                    self._server.close()
            connection = {"connection": manager.connection_file}
            manager.process = self._server.fork(__name__, connection, variables, self._folder.name)
            try:
                yield manager
            finally:
                manager.stop()
        finally:
            manager.cleanup_connection_file()


def _variables() -> dict[str, str]:
    """The environment of a kernel; how many threads it computes with is for its notebook to say."""
    return child_environment() | INLINE


class _Started(AsyncKernelManager):
    """A kernel that nbclient starts, in `folder` and with `variables` as its environment."""

    def __init__(self, folder: str, variables: dict[str, str], **options: Any):
        super().__init__(**options)
        self._where = {"cwd": folder, "env": variables}

    async def _async_start_kernel(self, **options: Any) -> None:
        await super()._async_start_kernel(**(options | self._where))

    start_kernel = _async_start_kernel


class _Forked(AsyncKernelManager):
    """A kernel whose process is another's child."""

    process: ForkedProcess
    has_kernel = True

    async def _async_is_alive(self) -> bool:
        return not self.process.ended()

    is_alive = _async_is_alive

    def stop(self) -> None:
        """Ask it to end, and make it end if it does not."""
        if self.process.ended():
            return
        client = BlockingKernelClient()
        client.load_connection_info(self.get_connection_info())
        client.start_channels(shell=False, iopub=False, stdin=False, hb=False)
        client.shutdown()
        if not self.process.ended(STOP_SECONDS):
            self.process.kill()
            self.process.ended(STOP_SECONDS)
        client.stop_channels()


def work(connection: str) -> None:
    """The kernel's side: serve the notebook until it is shut down."""
    from ipykernel import kernelapp

    from vitbench.measurement import child

    child.fork_server_from_here()
    kernelapp.launch_new_instance(argv=["-f", connection, *OPTIONS])
    atexit._run_exitfuncs()
