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

from vitbench.base.processes import Channel, ChildProcess, ProcessError, failure_reason

CAN_FORK = sys.platform == "linux"  # macOS has fork too, but its own libraries do not survive it
PR_SET_PDEATHSIG = 1
IMPORT_SECONDS = 600  # for the kept process's imports, on a machine that is busy
EXIT_TIMEOUT_SECONDS, CLOSE_SECONDS = 10.0, 2.0


class ForkedProcess:
    """A child that was forked, seen from the process that asked for it."""

    def __init__(self, channel: Channel, output_file: IO[bytes]):
        self._channel, self._output_file = channel, output_file
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
        self._channel.shutdown_write()

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
            self.ended(EXIT_TIMEOUT_SECONDS)
            raise
        if self._status is None:
            raise ProcessError("the process that it was forked from ended")
        if self._status or self._result is None:
            raise ProcessError(self.failure_reason())
        return self._result

    def failure_reason(self) -> str:
        """Why it failed, in one line."""
        return failure_reason(self._output_file, self._status or 0)


class ForkServer:
    """The kept process, seen from outside. It starts at once, and its imports are waited for only when it has to fork.

    Args:
        imports: modules that the children need; none may start a thread.
        variables: its environment, for what modules read as they are imported.
    """

    def __init__(self, imports: Sequence[str], variables: dict[str, str]):
        self._lock, self._is_ready = threading.Lock(), False
        self._started: ChildProcess | None = ChildProcess("vitbench.base.forks", variables)
        self._channel = self._started.channel
        with contextlib.suppress(BrokenPipeError):  # it ended already, which `fork` explains
            self._channel.send({"imports": list(imports)})

    @classmethod
    def from_this_process(cls) -> "ForkServer":
        """A copy of this process, which has imported all and started no thread."""
        server = cls.__new__(cls)
        server._lock, server._is_ready, server._started = threading.Lock(), True, None
        parent_socket, child_socket = socketpair()
        server.pid = os.fork()
        if not server.pid:
            parent_socket.close()
            os.setpgid(0, 0)
            serve(Channel(child_socket))
        child_socket.close()
        server._channel = Channel(parent_socket)
        return server

    def alive(self) -> bool:
        if self._started:
            return self._started.alive()
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        return False

    def fork(self, module: str, arguments: dict[str, Any], variables: dict[str, str], folder: str) -> ForkedProcess:
        """A child that runs `work(**arguments)` of a module, with `variables` as its environment, in `folder`; it has begun.

        Raises:
            ProcessError: the kept process did not start, or ended.
        """
        parent_socket, child_socket = socketpair()
        output_file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the child)
        request = {"module": module, "arguments": arguments, "variables": variables, "folder": folder}
        with self._lock, child_socket:
            try:
                if self._started:
                    self._started.wait_ready()
                self._channel.send(request, files=[child_socket.fileno(), output_file.fileno()])
                child_socket.close()
                Channel(parent_socket).receive(IMPORT_SECONDS)
                self._is_ready = True
            except TimeoutError:
                self.close()
                raise ProcessError(f"the process that is forked was not ready within {IMPORT_SECONDS} s") from None
            except (OSError, EOFError):
                reason = f": {self._started.failure_reason()}" if self._started else ""
                raise ProcessError(f"the process that is forked ended{reason}") from None
        return ForkedProcess(Channel(parent_socket), output_file)

    def close(self) -> None:
        """End it and its children."""
        self._channel.shutdown_write()
        if self._started:
            if self._is_ready:  # it ends its children first
                with contextlib.suppress(TimeoutExpired):
                    self._started.process.wait(CLOSE_SECONDS)
            self._started.close()


def main(channel: Channel) -> NoReturn:
    """The kept process's side: import, then serve."""
    gc.disable()  # imports leave nothing to collect
    for name in channel.receive()["imports"]:
        importlib.import_module(name)
    serve(channel)


def serve(requests: Channel) -> NoReturn:
    """Fork for each order until the socket closes; then end what is left."""
    gc.disable()
    gc.freeze()  # what was imported is garbage for no process
    try:
        _Server(requests).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # to take down what was imported would take another second


class _Server:
    def __init__(self, requests: Channel):
        self.requests = requests
        self.children: dict[int, Channel] = {}  # by process id
        self.killed_pids: set[int] = set()
        self.wakeup_read_fd, wakeup_write_fd = os.pipe()
        os.set_blocking(wakeup_write_fd, False)
        signal.set_wakeup_fd(wakeup_write_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.wakeup_write_fd = wakeup_write_fd

    def run(self) -> None:
        while True:
            child_sockets = {
                channel.socket: pid for pid, channel in self.children.items() if pid not in self.killed_pids
            }
            ready = wait([self.requests.socket, self.wakeup_read_fd, *child_sockets])
            if self.wakeup_read_fd in ready:
                os.read(self.wakeup_read_fd, 4096)
                self._reap()
            for child_socket in (
                set(ready) & child_sockets.keys()
            ):  # nothing is sent to a child, so this is the end of who asked for it
                self._kill(child_sockets[child_socket])
            if self.requests.socket in ready:
                try:
                    request, files = self.requests.receive_with_files(2)
                except (EOFError, ConnectionError):
                    for pid in self.children:
                        self._kill(pid)
                    return
                self._fork(request, *files)

    def _fork(self, request: dict[str, Any], socket_fd: int, output_file: int) -> None:
        child, server = Channel(socket(fileno=socket_fd)), os.getpid()
        pid = os.fork()
        if not pid:
            self._run_child(request, child, output_file, server)
        os.close(output_file)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # the child does so too: whoever comes first
        self.children[pid] = child

    def _kill(self, pid: int) -> None:
        self.killed_pids.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Say of each child that ended what its exit status was."""
        for pid, channel in list(self.children.items()):
            exited_pid, status = os.waitpid(pid, os.WNOHANG)
            if exited_pid:
                del self.children[pid]
                self.killed_pids.discard(pid)
                with contextlib.suppress(OSError):  # whoever asked is gone
                    channel.send({"status": os.waitstatus_to_exitcode(status)})
                channel.close()

    def _run_child(self, request: dict[str, Any], channel: Channel, output_file: int, server: int) -> NoReturn:
        status = 1
        try:
            _die_with_parent(server)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            for other in (self.requests, *self.children.values()):
                other.close()
            os.close(self.wakeup_read_fd)
            os.close(self.wakeup_write_fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output_file, 1)
            os.dup2(output_file, 2)
            os.environ.clear()
            os.environ.update(request["variables"])
            os.chdir(request["folder"])
            gc.enable()
            channel.send("begun")
            channel.send({"result": importlib.import_module(request["module"]).work(**request["arguments"])})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # to take down what was imported would take another second


def _die_with_parent(server: int) -> None:
    """Have the system end this process when its parent is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it was killed before
        os._exit(1)
