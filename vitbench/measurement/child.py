"""Jobs that must not share a process: `in_child` runs a registered job in a fresh process with fixed threads.

Where a process can be forked safely, each job is forked from a server process that has imported this package and done nothing
else. PyTorch is then imported once, not for every model that is timed. Elsewhere each job's process imports PyTorch itself.
"""

import tempfile
import threading
from collections.abc import Callable
from typing import Any

from vitbench.base import standalone
from vitbench.base.forks import CAN_FORK, ForkServer
from vitbench.base.processes import Channel, ChildProcess, ProcessError, child_environment

JOBS: dict[str, Callable[..., dict[str, Any]]] = {}
TIME_LIMIT = 1800  # seconds


class ChildError(RuntimeError):
    """The child process failed; the message is the last line that it printed."""


def job(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Register a function for `in_child`. Its arguments and its result are JSON values; paths are absolute."""
    JOBS[function.__name__] = function
    return function


def in_child(name: str, threads: int, **arguments: Any) -> dict[str, Any]:
    """Run the job `name` in a fresh process that uses `threads` threads.

    Raises:
        ChildError: the job failed, or took more than `TIME_LIMIT` seconds.
    """
    try:
        return (_forked if CAN_FORK else _started)({"name": name, "threads": threads, "arguments": arguments})
    except TimeoutError:
        raise ChildError(f"{name} took more than {TIME_LIMIT} s") from None
    except ProcessError as error:
        raise ChildError(f"{name} failed: {error}") from None


def start_fork_server(threads: int) -> None:
    """Start the server process that `in_child` forks, if it forks. Its imports take seconds and run beside other work."""
    if CAN_FORK:
        with _lock:
            _fork_server(threads)


def fork_server_from_here() -> None:
    """Fork the server process from this one, which has made all imports and started no thread."""
    global _server
    _server = ForkServer.from_this_process()


_server: ForkServer | None = None
_lock = threading.Lock()


def _forked(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a job in a forked process, with this process's current environment."""
    with _lock, tempfile.TemporaryDirectory(prefix="vitbench.") as folder:
        server, variables = _fork_server(request["threads"]), child_environment(request["threads"])
        return server.fork(__name__, request, variables, folder).result(TIME_LIMIT)


def _fork_server(threads: int) -> ForkServer:
    global _server
    if _server is None or not _server.alive():
        _server = ForkServer(["torch", "vitbench.measurement.measuring"], child_environment(threads))
    return _server


def _started(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a job in a process that is started for it alone."""
    process = ChildProcess(__name__, child_environment(request["threads"]))
    try:
        process.wait_ready()
        process.channel.send(request)
        return process.channel.receive(TIME_LIMIT)
    except (EOFError, BrokenPipeError):
        raise ProcessError(process.failure_reason()) from None
    finally:
        process.close()


def main(channel: Channel) -> None:
    """Run the one job of a started process: receive the request, send the result."""
    import vitbench.measurement.measuring  # noqa: F401  (the import registers all jobs)

    channel.send(work(**channel.receive()))


def work(name: str, threads: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a job in this process, which was forked or started for it."""
    import torch

    standalone.keep_freed_memory()
    torch.set_num_threads(threads)
    return JOBS[name](**arguments)
