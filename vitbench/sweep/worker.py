"""A process that runs cells one after the other: kept from cell to cell, killed with a cell that hangs, replaced when it dies.

Orders and answers are JSON, a line each, on its standard streams. It ends when its standard input does, so that none is left
behind by a process that was killed. `multiprocessing` is no choice here: a Dask worker may not start its children.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

from vitbench import standalone
from vitbench.measurement.child import package_environment


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
        self.process: subprocess.Popen | None = None

    def run(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to an order (`answer`), with the seconds of `starting` a process for it, 0 if there was one.

        Raises:
            WorkerDied: the process ended; the next order gets a new one.
            CellHung: no answer within `seconds`, which count from when the process was ready.
        """
        begin, starting = time.monotonic(), 0.0
        if self.process is None or self.process.poll() is not None:
            self._start(order["threads"])
            starting = time.monotonic() - begin
        process, hung = self.process, threading.Event()

        def stop() -> None:
            hung.set()
            self.close()

        timer = threading.Timer(seconds, stop)
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            timer.start()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if hung.is_set():
            raise CellHung(f"took more than {seconds:g} s and was stopped")
        if not line.endswith("\n"):
            raise WorkerDied(self._reason())
        return {**json.loads(line), "starting": starting}

    def close(self) -> None:
        """End the process, and all that it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _start(self, threads: int) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vitbench.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # so that what it starts ends with it
            env=package_environment(threads) | self.environment,
        )
        if not self.process.stdout.readline():
            raise WorkerDied(self._reason())

    def _reason(self) -> str:
        self.close()
        self.said.seek(0)
        said = self.said.read().decode(errors="replace")
        return f"the worker died: {standalone.reason(said, self.process.returncode)}"


def answer(order: dict[str, Any]) -> dict[str, Any]:
    """What a cell gave: `rows` as JSON, the `environments` that they name, `seconds`; or `error` and its `traceback`."""
    from vitbench.sweep.work import compress_and_measure, make_base

    start = time.monotonic()
    try:
        found = (make_base if order["what"] == "base" else compress_and_measure)(order["cell"])
    except Exception as error:  # whatever a cell raises is its own failure, and never that of its neighbours
        said = " ".join(str(error).split())[:500]
        return {"error": f"{type(error).__name__}: {said}", "traceback": traceback.format_exc()}
    return {**found, "seconds": time.monotonic() - start}


def main() -> None:
    """The child's side."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    orders: list[str] = []
    come = threading.Condition()

    def listen() -> None:
        for line in sys.stdin:
            with come:
                orders.append(line)
                come.notify()
        os.killpg(os.getpgid(0), signal.SIGKILL)  # whoever gave the orders is gone

    import vitbench.sweep.work  # noqa: F401  (the long imports, before the first order)

    threading.Thread(target=listen, daemon=True).start()
    print("ready", file=reply, flush=True)
    while True:
        with come:
            come.wait_for(lambda: orders)
            order = json.loads(orders.pop(0))
        print(json.dumps(answer(order)), file=reply, flush=True)


if __name__ == "__main__":
    main()
