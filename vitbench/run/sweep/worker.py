"""A process that runs cells one after the other; it is killed with a cell that hangs, and replaced when it dies.

The process ends when its channel closes, so a parent that was killed leaves none behind. It is no `multiprocessing` process:
a Dask worker may not start those.
"""

import threading
import time
import traceback
from queue import SimpleQueue
from typing import Any

from vitbench.base.processes import Channel, ChildProcess, ProcessError, child_environment, kill_process_group


class WorkerDied(RuntimeError):
    """The process ended without a result; the message says why."""


class CellTimeout(RuntimeError):
    """The cell exceeded its time limit, and its process was stopped."""


class Worker:
    """The parent's side of a worker process, which starts with the first request.

    Args:
        environment: variables that the process gets in addition to this process's own.
    """

    def __init__(self, environment: dict[str, str] | None = None):
        self.environment = environment or {}
        self.process: ChildProcess | None = None
        self._closed = False

    def run(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The result of `run_request` in the process; `starting` is the seconds that its start took, 0 if it ran.

        Raises:
            WorkerDied: the process ended; the next request starts a new one.
            CellTimeout: no result within `seconds` after the process was ready.
        """
        begin, process, is_new = time.monotonic(), self.process, False
        if process is None or not process.alive():
            process, is_new = self._start(request["threads"]), True
        try:
            if is_new:
                process.wait_ready()
                process.channel.receive()  # its long imports are done
            starting = time.monotonic() - begin if is_new else 0.0
            process.channel.send(request)
            return {**process.channel.receive(seconds), "starting": starting}
        except TimeoutError:
            process.close()
            raise CellTimeout(f"took more than {seconds:g} s and was stopped") from None
        except (EOFError, OSError):
            raise WorkerDied(f"the worker died: {process.failure_reason()}") from None
        except ProcessError as error:
            raise WorkerDied(f"the worker died: {error}") from None

    def close(self) -> None:
        """End the process and its children; the worker starts no other process."""
        self._closed = True
        if self.process:
            self.process.close()

    def _start(self, threads: int) -> ChildProcess:
        self.process = process = ChildProcess(__name__, child_environment(threads) | self.environment)
        if self._closed:  # another thread may have called `close` just now
            process.close()
        return process


def run_request(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for, in the worker process.

    Args:
        request: `what` to make ("base" or "cell"), the `cell` as a dict, and the number of `threads`.

    Returns:
        `rows` as JSON, the `environments` that they name, and `seconds`; or `error` and its `traceback`.
    """
    from vitbench.run.sweep.work import compress_and_measure, make_base

    start = time.monotonic()
    try:
        result = (make_base if request["what"] == "base" else compress_and_measure)(request["cell"])
    except Exception as error:  # an exception fails this cell and no other one
        message = " ".join(str(error).split())[:500]
        return {"error": f"{type(error).__name__}: {message}", "traceback": traceback.format_exc()}
    return {**result, "seconds": time.monotonic() - start}


def main(channel: Channel) -> None:
    """The worker process: run requests until the channel closes."""
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def listen() -> None:
        while True:
            try:
                requests.put(channel.receive())
            except EOFError:  # the parent is gone
                kill_process_group()

    import vitbench.run.sweep.work  # noqa: F401  (the long imports, before the first request)

    channel.send("ready")
    threading.Thread(target=listen, daemon=True).start()
    while True:
        channel.send(run_request(requests.get()))
