"""A process that runs cells one after the other: kept from cell to cell, killed with a cell that hangs, replaced when it dies.

It ends when its channel closes, so that none is left behind by a process that was killed. `multiprocessing` is no choice here:
a Dask worker may not start its children.
"""

import threading
import time
import traceback
from queue import SimpleQueue
from typing import Any

from vitbench.base.processes import Channel, ChildProcess, ProcessError, child_environment, kill_process_group


class WorkerDied(RuntimeError):
    """The process ended before it answered; the message says how."""


class CellHung(RuntimeError):
    """The cell took longer than it may, and its process was stopped."""


class Worker:
    """The process, seen from outside; it starts with the first order.

    Args:
        environment: variables it gets beside this process's own.
    """

    def __init__(self, environment: dict[str, str] | None = None):
        self.environment = environment or {}
        self.process: ChildProcess | None = None
        self._closed = False

    def run(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to an order (`answer`), with the seconds of `starting` a process for it, 0 if there was one.

        Raises:
            WorkerDied: the process ended; the next order gets a new one.
            CellHung: no answer within `seconds`, which count from when the process was ready.
        """
        begin, starting = time.monotonic(), 0.0
        try:
            if self.process is None or not self.process.alive():
                self._start(order["threads"])
                starting = time.monotonic() - begin
            self.process.channel.send(order)
            return {**self.process.channel.receive(seconds), "starting": starting}
        except TimeoutError:
            self.process.close()
            raise CellHung(f"took more than {seconds:g} s and was stopped") from None
        except (EOFError, OSError):
            raise WorkerDied(f"the worker died: {self.process.failure_reason()}") from None
        except ProcessError as error:
            raise WorkerDied(f"the worker died: {error}") from None

    def close(self) -> None:
        """End the process, and all that it started; no other one is started."""
        self._closed = True
        if self.process:
            self.process.close()

    def _start(self, threads: int) -> None:
        self.process = ChildProcess(__name__, child_environment(threads) | self.environment)
        if self._closed:  # by another thread, perhaps just now
            self.process.close()
        self.process.wait_ready()
        self.process.channel.receive()  # its long imports are done


def answer(order: dict[str, Any]) -> dict[str, Any]:
    """What a cell gave: `rows` as JSON, the `environments` that they name, `seconds`; or `error` and its `traceback`."""
    from vitbench.run.sweep.work import compress_and_measure, make_base

    start = time.monotonic()
    try:
        found = (make_base if order["what"] == "base" else compress_and_measure)(order["cell"])
    except Exception as error:  # whatever a cell raises is its own failure, and never that of its neighbours
        said = " ".join(str(error).split())[:500]
        return {"error": f"{type(error).__name__}: {said}", "traceback": traceback.format_exc()}
    return {**found, "seconds": time.monotonic() - start}


def main(channel: Channel) -> None:
    """The child's side."""
    orders: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def listen() -> None:
        while True:
            try:
                orders.put(channel.receive())
            except EOFError:  # whoever gave the orders is gone
                kill_process_group()

    import vitbench.run.sweep.work  # noqa: F401  (the long imports, before the first order)

    channel.send("ready")
    threading.Thread(target=listen, daemon=True).start()
    while True:
        channel.send(answer(orders.get()))
