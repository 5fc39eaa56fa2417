"""A kept process that has imported what many children need, and is forked for each of them (Linux).

PyTorch is then imported once, and each child begins in the same state.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import wait
from socket import socket, socketpair
from subprocess import TimeoutExpired
from typing import IO, Any, NoReturn

from vitbench.base.processes import Channel, ProcessError, Started, last_words

CAN_FORK = sys.platform == "linux"  # macOS has fork too, but its own libraries do not survive it
PR_SET_PDEATHSIG = 1
IMPORT_SECONDS = 600  # for the kept process's imports, on a machine that is busy
GONE_SECONDS, CLOSE_SECONDS = 10.0, 2.0


class Forked:
    """A child that was forked, seen from the process that asked for it."""

    def __init__(self, channel: Channel, said: IO[bytes]):
        self._channel, self._said = channel, said
        self._result: Any = None
        self._status: int | None = None
        self._ended = False
        self._lock = threading.Lock()

    def ended(self, seconds: float | None = 0.0) -> bool:
        """Whether it has, or does within `seconds` (None: it is waited for)."""
        until = None if seconds is None else time.monotonic() + seconds
        with self._lock:
            while not self._ended:
                if not self._channel.readable(None if until is None else max(0.0, until - time.monotonic())):
                    return False
                try:
                    message = self._channel.receive()
                    self._result = message.get("result", self._result)
                    self._status = message.get("status")
                    self._ended = self._status is not None
                except EOFError:
                    self._ended = True
            return True

    def kill(self) -> None:
        """End it and its process group."""
        self._channel.hang_up()

    def result(self, seconds: float | None = None) -> Any:
        """What its work returned.

        Raises:
            TimeoutError: it took longer than `seconds`, and is ended.
            ProcessError: it failed.
        """
        try:
            if not self.ended(seconds):
                raise TimeoutError
        except BaseException:  # interrupted, too
            self.kill()
            self.ended(GONE_SECONDS)
            raise
        if self._status is None:
            raise ProcessError("the process that it was forked from ended")
        if self._status or self._result is None:
            raise ProcessError(self.why())
        return self._result

    def why(self) -> str:
        """Why it failed, in one line."""
        return last_words(self._said, self._status or 0)


class ForkServer:
    """The kept process, seen from outside. It starts at once, and its imports are waited for only when it has to fork.

    Args:
        imports: modules that the children need; none may start a thread.
        variables: its environment, for what modules read as they are imported.
    """

    def __init__(self, imports: Sequence[str], variables: dict[str, str]):
        self._lock, self._serves = threading.Lock(), False
        self._started: Started | None = Started("vitbench.base.forks", variables)
        self._channel = self._started.channel
        with contextlib.suppress(BrokenPipeError):  # it ended already, which `fork` explains
            self._channel.send({"imports": list(imports)})

    @classmethod
    def of_this_process(cls) -> "ForkServer":
        """A copy of this process, which has imported all and started no thread."""
        server = cls.__new__(cls)
        server._lock, server._serves, server._started = threading.Lock(), True, None
        own, other = socketpair()
        server.pid = os.fork()
        if not server.pid:
            own.close()
            os.setpgid(0, 0)
            serve(Channel(other))
        other.close()
        server._channel = Channel(own)
        return server

    def alive(self) -> bool:
        if self._started:
            return self._started.alive()
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        return False

    def fork(self, module: str, arguments: dict[str, Any], variables: dict[str, str], folder: str) -> Forked:
        """A child that runs `work(**arguments)` of a module, with `variables` as its environment, in `folder`; it has begun.

        Raises:
            ProcessError: the kept process did not start, or ended.
        """
        own, other = socketpair()
        said = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the child)
        order = {"module": module, "arguments": arguments, "variables": variables, "folder": folder}
        with self._lock, other:
            try:
                if self._started:
                    self._started.greet()
                self._channel.send(order, files=[other.fileno(), said.fileno()])
                other.close()
                Channel(own).receive(IMPORT_SECONDS)
                self._serves = True
            except TimeoutError:
                self.close()
                raise ProcessError(f"the process that is forked was not ready within {IMPORT_SECONDS} s") from None
            except (OSError, EOFError):
                reason = f": {self._started.why()}" if self._started else ""
                raise ProcessError(f"the process that is forked ended{reason}") from None
        return Forked(Channel(own), said)

    def close(self) -> None:
        """End it and its children."""
        self._channel.hang_up()
        if self._started:
            if self._serves:  # it ends its children first
                with contextlib.suppress(TimeoutExpired):
                    self._started.process.wait(CLOSE_SECONDS)
            self._started.close()


def main(channel: Channel) -> NoReturn:
    """The kept process's side: import, then serve."""
    gc.disable()  # imports leave nothing to collect
    for name in channel.receive()["imports"]:
        importlib.import_module(name)
    serve(channel)


def serve(orders: Channel) -> NoReturn:
    """Fork for each order until the socket closes; then end what is left."""
    gc.disable()
    gc.freeze()  # what was imported is garbage for no process
    try:
        _Server(orders).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # to take down what was imported would take another second


class _Server:
    def __init__(self, orders: Channel):
        self.orders = orders
        self.children: dict[int, Channel] = {}  # by process id
        self.doomed: set[int] = set()
        self.woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.wake = wake

    def run(self) -> None:
        while True:
            ends = {channel.end: pid for pid, channel in self.children.items() if pid not in self.doomed}
            ready = wait([self.orders.end, self.woken, *ends])
            if self.woken in ready:
                os.read(self.woken, 4096)
                self._bury()
            for end in set(ready) & ends.keys():  # nothing is sent to a child, so this is the end of who asked for it
                self._kill(ends[end])
            if self.orders.end in ready:
                try:
                    order, files = self.orders.receive_with_files(2)
                except (EOFError, ConnectionError):
                    for pid in self.children:
                        self._kill(pid)
                    return
                self._fork(order, *files)

    def _fork(self, order: dict[str, Any], end: int, said: int) -> None:
        child, server = Channel(socket(fileno=end)), os.getpid()
        pid = os.fork()
        if not pid:
            self._be_the_child(order, child, said, server)
        os.close(said)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # the child does so too: whoever comes first
        self.children[pid] = child

    def _kill(self, pid: int) -> None:
        self.doomed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _bury(self) -> None:
        """Say of each child that ended what its exit status was."""
        for pid, channel in list(self.children.items()):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                del self.children[pid]
                self.doomed.discard(pid)
                with contextlib.suppress(OSError):  # whoever asked is gone
                    channel.send({"status": os.waitstatus_to_exitcode(status)})
                channel.close()

    def _be_the_child(self, order: dict[str, Any], channel: Channel, said: int, server: int) -> NoReturn:
        status = 1
        try:
            _end_with(server)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            for other in (self.orders, *self.children.values()):
                other.close()
            os.close(self.woken)
            os.close(self.wake)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ.clear()
            os.environ.update(order["variables"])
            os.chdir(order["folder"])
            gc.enable()
            channel.send("begun")
            channel.send({"result": importlib.import_module(order["module"]).work(**order["arguments"])})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # to take down what was imported would take another second


def _end_with(server: int) -> None:
    """Have the system end this process when its parent is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it was killed before
        os._exit(1)
