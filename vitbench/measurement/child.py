"""Work that must not share a process: `in_child` runs a registered job in a process of its own with fixed threads.

Where a process can be forked safely (Linux), a kept one that has imported this package and done nothing else is forked for
each job, so that PyTorch is imported once and not for every model that is timed. Elsewhere each job imports anew.
"""

import contextlib
import gc
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

from vitbench import standalone

JOBS: dict[str, Callable[..., dict[str, Any]]] = {}
TIME_LIMIT = 1800  # seconds
STATUS = struct.Struct("q")
SERVE = (sys.executable, "-c", "import gc; gc.disable(); from vitbench.measurement import child; child.serve()")
START = (sys.executable, "-c", "import sys; from vitbench.measurement import child; child.main(*sys.argv[1:])")


class ChildError(RuntimeError):
    """The child process failed; the message is the last line it said."""


def job(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make a function callable by name in a child process; arguments and result are JSON."""
    JOBS[function.__name__] = function
    return function


def in_child(name: str, threads: int, **arguments: Any) -> dict[str, Any]:
    """Run the job `name` in a fresh process that uses `threads` threads."""
    with tempfile.TemporaryDirectory() as folder:
        files = {key: str(Path(folder, key)) for key in ("task", "answer", "said")}
        Path(files["task"]).write_text(json.dumps({"job": name, "threads": threads, "arguments": arguments}))
        try:
            status = (_forked if sys.platform == "linux" else _started)(threads, files)
        except TimeoutError:
            raise ChildError(f"{name} took more than {TIME_LIMIT} s") from None
        if status or not Path(files["answer"]).exists():
            said = Path(files["said"])
            why = standalone.reason(said.read_text(errors="replace") if said.exists() else "", status)
            raise ChildError(f"{name} failed: {why}")
        return json.loads(Path(files["answer"]).read_text())


def make_ready(threads: int) -> None:
    """Have `in_child` begin its imports, where it will fork: they take seconds, in which there may be other work to do."""
    if sys.platform == "linux":
        with _busy:
            _ready(threads)


def fork_ready() -> None:
    """`make_ready` for a process that has imported all and started no thread: the kept process is forked from it."""
    global _forker
    (orders, ordering), (answering, answers) = os.pipe(), os.pipe()
    process = os.fork()
    if process:
        os.close(orders)
        os.close(answers)
        _forker = _Forker(os.fdopen(ordering, "wb", 0), os.fdopen(answering, "rb", 0), process)
        return
    os.dup2(orders, 0)
    os.dup2(answers, 1)
    for pipe in (orders, ordering, answering, answers):
        os.close(pipe)
    os.setpgid(0, 0)
    serve()


def package_environment(threads: int) -> dict[str, str]:
    """This process's environment for one that imports this same package and uses `threads` threads."""
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    return standalone.thread_environment(threads) | {"PYTHONPATH": path}


def _started(threads: int, files: dict[str, str]) -> int:
    """The exit status of a process that was started for this job."""
    with open(files["said"], "w") as said:
        try:
            command = [*START, files["task"], files["answer"]]
            return subprocess.run(
                command, env=package_environment(threads), stdout=said, stderr=said, timeout=TIME_LIMIT
            ).returncode
        except subprocess.TimeoutExpired:
            raise TimeoutError from None


class _Forker:
    """A kept process that forks: it is sent a job a line, and answers with the status that the job's process ended with."""

    def __init__(self, orders: IO[bytes], answers: IO[bytes], process: int, started: subprocess.Popen | None = None):
        self.orders, self.answers, self.process = orders, answers, os.pidfd_open(process)
        self.started = started  # kept, for a Popen that is forgotten complains

    def ended(self, seconds: float | None = 0.0) -> bool:
        """Whether it has, or does within so many seconds (None: it is waited for)."""
        return bool(select.select([self.process], [], [], seconds)[0])

    def run(self, order: dict[str, Any]) -> int:
        try:
            self.orders.write(json.dumps(order).encode() + b"\n")
            if not select.select([self.answers], [], [], TIME_LIMIT)[0]:
                raise TimeoutError
            status = self.answers.read(STATUS.size)
        except BrokenPipeError:
            status = b""
        except BaseException:  # out of time, or interrupted: it ends the job with itself, and the next job gets another
            self.orders.close()
            self.ended(None)
            raise
        if len(status) < STATUS.size:
            raise ChildError("the process that starts the measured ones ended")
        return STATUS.unpack(status)[0]


_forker: _Forker | None = None
_busy = threading.Lock()


def _forked(threads: int, files: dict[str, str]) -> int:
    """The exit status of a process that was forked for this job, with this process's environment and folder as they are now."""
    order = {"files": files, "environment": package_environment(threads), "folder": os.getcwd()}
    with _busy:
        return _ready(threads).run(order)


def _ready(threads: int) -> _Forker:
    global _forker
    if _forker is None or _forker.ended():
        started = subprocess.Popen(
            SERVE,
            env=package_environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # an interrupt from the keyboard is for this process alone, which then ends the other
        )
        _forker = _Forker(started.stdin, started.stdout, started.pid, started)
    return _forker


def main(task: str, answer: str) -> None:
    """A process's side of a job."""
    import torch

    standalone.keep_memory()
    order = json.loads(Path(task).read_text())
    torch.set_num_threads(order["threads"])
    Path(answer).write_text(json.dumps(JOBS[order["job"]](**order["arguments"])))


def serve() -> NoReturn:
    """The kept process's side: fork for each line of the standard input, until that ends."""
    gc.freeze()  # what was imported is garbage for no process
    with contextlib.suppress(BrokenPipeError):
        _fork_for_orders()
    os._exit(0)  # to take down what was imported would take another second


def _fork_for_orders() -> None:
    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            _be_the_child(json.loads(line))
        ended = os.pidfd_open(child)
        if ended not in select.select([sys.stdin, ended], [], [])[0]:  # whoever asked has gone
            os.kill(child, signal.SIGKILL)
            return
        os.close(ended)
        os.write(1, STATUS.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def _be_the_child(order: dict[str, Any]) -> NoReturn:
    status = 1
    gc.enable()
    try:
        said = os.open(order["files"]["said"], os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        main(order["files"]["task"], order["files"]["answer"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
