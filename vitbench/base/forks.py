"""A server process that imports modules once and is forked for each child that needs them (Linux).

PyTorch is then imported once, and all children start from the same state.
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

CAN_FORK = sys.platform == "linux"  # macOS has fork, but its system libraries do not support it
PR_SET_PDEATHSIG = 1
IMPORT_SECONDS = 600  # for the server's imports, on a busy machine
EXIT_TIMEOUT_SECONDS, CLOSE_SECONDS = 10.0, 2.0


class ForkedProcess:
    """A forked child, as the process that requested it sees it."""

    def __init__(self, channel: Channel, output_file: IO[bytes]):
        self._channel, self._output_file = channel, output_file
        self._result: Any = None
        self._status: int | None = None
        self._ended = False
        self._lock = threading.Lock()

    def ended(self, seconds: float | None = 0.0) -> bool:
        """Whether the child has ended, or ends within `seconds`; None waits until it ends."""
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
        """Kill the child and its process group."""
        self._channel.shutdown_write()

    def result(self, seconds: float | None = None) -> Any:
        """The return value of the child's work.

        Raises:
            TimeoutError: the work took longer than `seconds`; the child is killed.
            ProcessError: the work failed.
        """
        try:
            if not self.ended(seconds):
                raise TimeoutError
        except BaseException:  # including KeyboardInterrupt
            self.kill()
            self.ended(EXIT_TIMEOUT_SECONDS)
            raise
        if self._status is None:
            raise ProcessError("the process that it was forked from ended")
        if self._status or self._result is None:
            raise ProcessError(self.failure_reason())
        return self._result

    def failure_reason(self) -> str:
        """The reason why the child failed, in one line."""
        return failure_reason(self._output_file, self._status or 0)


class ForkServer:
    """The server process, as the process that started it sees it. Only the first `fork` waits for the server's imports.

    Args:
        imports: modules that the children need; none may start a thread.
        variables: the server's environment, which modules may read when they are imported.
    """

    _pid: int  # of a server that `from_this_process` forked

    def __init__(self, imports: Sequence[str], variables: dict[str, str]):
        self._lock, self._is_ready = threading.Lock(), False
        self._process: ChildProcess | None = ChildProcess("vitbench.base.forks", variables)
        self._channel = self._process.channel
        with contextlib.suppress(BrokenPipeError):  # the server has ended already; `fork` gives the reason
            self._channel.send({"imports": list(imports)})

    @classmethod
    def from_this_process(cls) -> "ForkServer":
        """A server forked from this process, which must have imported everything and started no thread."""
        server = cls.__new__(cls)
        server._lock, server._is_ready, server._process = threading.Lock(), True, None
        parent_socket, child_socket = socketpair()
        server._pid = os.fork()
        if not server._pid:
            parent_socket.close()
            os.setpgid(0, 0)
            serve(Channel(child_socket))
        child_socket.close()
        server._channel = Channel(parent_socket)
        return server

    def alive(self) -> bool:
        """Whether the server runs."""
        if self._process:
            return self._process.alive()
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self._pid, os.WNOHANG) == (0, 0)
        return False

    def fork(self, module: str, arguments: dict[str, Any], variables: dict[str, str], folder: str) -> ForkedProcess:
        """Start a child that runs `work(**arguments)` of a module, in `folder` and with `variables` as its environment.

        Raises:
            ProcessError: the server did not start, or has ended.
        """
        parent_socket, child_socket = socketpair()
        output_file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the child)
        request = {"module": module, "arguments": arguments, "variables": variables, "folder": folder}
        with self._lock, child_socket:
            try:
                if self._process:
                    self._process.wait_ready()
                self._channel.send(request, files=[child_socket.fileno(), output_file.fileno()])
                child_socket.close()
                Channel(parent_socket).receive(IMPORT_SECONDS)
                self._is_ready = True
            except TimeoutError:
                self.close()
                raise ProcessError(f"the process that is forked was not ready within {IMPORT_SECONDS} s") from None
            except (OSError, EOFError):
                reason = f": {self._process.failure_reason()}" if self._process else ""
                raise ProcessError(f"the process that is forked ended{reason}") from None
        return ForkedProcess(Channel(parent_socket), output_file)

    def close(self) -> None:
        """End the server and its children."""
        self._channel.shutdown_write()
        if self._process:
            if self._is_ready:  # the server ends its children first
                with contextlib.suppress(TimeoutExpired):
                    self._process.process.wait(CLOSE_SECONDS)
            self._process.close()


def main(channel: Channel) -> NoReturn:
    """Run the server: import the modules, then serve requests."""
    gc.disable()  # imports leave nothing to collect
    for name in channel.receive()["imports"]:
        importlib.import_module(name)
    serve(channel)


def serve(requests: Channel) -> NoReturn:
    """Fork a child for each request until the socket closes; then kill the remaining children."""
    gc.disable()
    gc.freeze()  # the collector of a child need not visit imported objects
    try:
        _Server(requests).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # a normal exit would take a second to tear down the imported modules


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
            for child_socket, pid in child_sockets.items():
                if child_socket in ready:  # nothing is sent to a child, so its requesting process closed the socket
                    self._kill(pid)
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
            os.setpgid(pid, pid)  # the child does so too, since either may run first
        self.children[pid] = child

    def _kill(self, pid: int) -> None:
        self.killed_pids.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Report the exit status of each child that has ended."""
        for pid, channel in list(self.children.items()):
            exited_pid, status = os.waitpid(pid, os.WNOHANG)
            if exited_pid:
                del self.children[pid]
                self.killed_pids.discard(pid)
                with contextlib.suppress(OSError):  # the requesting process has ended
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
            os._exit(status)  # as in `serve`


def _die_with_parent(server: int) -> None:
    """Let the system kill this process when its parent is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # the parent was killed before the call
        os._exit(1)
