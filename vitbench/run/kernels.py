"""Kernels for a suite of notebooks, forked from a process that has imported what they need.

Where processes cannot be forked, each kernel starts and imports by itself. A kernel works in a temporary folder and imports
nothing from the folder in which the suite was started.
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

# matplotlib reads it at import; the kernel sets the backend only later, so that pyplot, which needs a kernel, is not imported early
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
# hides the kernel's own warnings, and keeps its working folder off its path
OPTIONS = ("--IPKernelApp.log_level=ERROR", "--IPKernelApp.ignore_cwd=True")
STOP_SECONDS = 10.0


class Kernels:
    """Provides kernels; a context manager. The process that forks them starts with the first kernel."""

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
        """End all kernels at once; no further one starts."""
        self.stopped = True
        if self._server:
            self._server.close()

    @contextlib.contextmanager
    def kernel(self) -> Iterator[AsyncKernelManager]:
        """A kernel, which is shut down at the end of the block."""
        variables = _variables()
        if not CAN_FORK:
            yield _StartedKernel(self._folder.name, variables, kernel_name="python3")
            return
        manager = _ForkedKernel(kernel_name="python3")
        manager.write_connection_file()
        try:
            with self._lock:
                self._server = self._server or ForkServer(IMPORTS, variables)
                if self.stopped:  # another thread may have called `stop` just now
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
    """The environment of a kernel; its notebook sets the number of threads."""
    return child_environment() | INLINE


class _StartedKernel(AsyncKernelManager):
    """A kernel that nbclient starts, in `folder` and with `variables` as its environment."""

    def __init__(self, folder: str, variables: dict[str, str], **options: Any):
        super().__init__(**options)
        self._process_options = {"cwd": folder, "env": variables}

    async def _async_start_kernel(self, **options: Any) -> None:
        await super()._async_start_kernel(**(options | self._process_options))

    start_kernel = _async_start_kernel


class _ForkedKernel(AsyncKernelManager):
    """A kernel whose process was forked by the server, and so is no child of this process."""

    process: ForkedProcess
    has_kernel = True

    async def _async_is_alive(self) -> bool:
        return not self.process.ended()

    is_alive = _async_is_alive

    def stop(self) -> None:
        """Ask the kernel to end, and kill it after `STOP_SECONDS`."""
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
    """The kernel process: serve the notebook until the kernel is shut down."""
    from ipykernel import kernelapp

    from vitbench.measurement import child

    child.fork_server_from_here()
    kernelapp.launch_new_instance(argv=["-f", connection, *OPTIONS])
    atexit._run_exitfuncs()
