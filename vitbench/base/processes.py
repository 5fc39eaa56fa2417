"""Start Python child processes and exchange messages with them.

A child imports the same package as its parent and nothing from the user's folder, since its path is safe and it works in
a temporary folder. Both sides send JSON over a socket that nothing else writes to. The child's printed output goes to a
file, which is read only for the reason of a failure. A child ends when the parent's end of the socket closes.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, NoReturn

from vitbench.base import standalone
from vitbench.base.paths import home

PACKAGE = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable, "-P")
CHILD_COMMAND = "import sys; from vitbench.base.processes import child_main; child_main(*sys.argv[1:])"
END_SECONDS = 2.0
START_SECONDS = 120  # to start Python and import this package's first module, on a busy machine
SIZE = struct.Struct("!I")  # the length of a message in bytes, sent before it


class ProcessError(RuntimeError):
    """A child did not start, or ended before it sent its result; the message is the reason in one line."""


class Channel:
    """JSON messages over one end of a socket pair."""

    def __init__(self, end: socket.socket):
        self.socket = end

    def send(self, message: Any, files: Sequence[int] = ()) -> None:
        """Send a message, with open `files` given by descriptor (not on Windows)."""
        body = json.dumps(message).encode()
        head = SIZE.pack(len(body))
        if files:
            socket.send_fds(self.socket, [head], files)
            self.socket.sendall(body)
        else:
            self.socket.sendall(head + body)

    def receive(self, seconds: float | None = None) -> Any:
        """The next message.

        Raises:
            TimeoutError: none came within `seconds`.
            EOFError: the other side is closed.
        """
        if not self.readable(seconds):
            raise TimeoutError
        return json.loads(self._bytes(*SIZE.unpack(self._bytes(SIZE.size))))

    def receive_with_files(self, count: int) -> tuple[Any, list[int]]:
        """The next message and the descriptors of the `count` files that were sent with it."""
        head, files, _, _ = socket.recv_fds(self.socket, SIZE.size, count)
        head += self._bytes(SIZE.size - len(head)) if head else b""
        if not head:
            raise EOFError
        return json.loads(self._bytes(*SIZE.unpack(head))), files

    def readable(self, seconds: float | None) -> bool:
        """Whether a message has come or the other side is closed, within `seconds`; None waits for it."""
        return bool(wait([self.socket], seconds))

    def shutdown_write(self) -> None:
        """Close the socket for writing, which ends the other process. Its last messages can still be received."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def _bytes(self, count: int) -> bytes:
        parts = []
        while count:
            try:
                part = self.socket.recv(count)
            except ConnectionError:  # the other side closed with unread messages
                part = b""
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def open_standard_streams() -> None:
    """Open the standard streams that are closed, as in a service; otherwise files opened later get their descriptors."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the smallest free descriptor is this one
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def child_environment(threads: int | None = None) -> dict[str, str]:
    """The environment of a Python child that imports this same package, and nothing from the current folder.

    Args:
        threads: the number of threads of its libraries; None leaves it to them.
    """
    current_folder = os.path.realpath(os.curdir)
    entries = filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = [str(PACKAGE.parent), *(entry for entry in entries if os.path.realpath(entry) != current_folder)]
    overrides = {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", "VITBENCH_HOME": str(home())}
    return (os.environ if threads is None else standalone.thread_environment(threads)) | overrides


def failure_reason(output_file: IO[bytes], status: int) -> str:
    """The reason why a process failed, from its printed output and its exit status."""
    output_file.seek(0)
    return standalone.failure_reason(output_file.read().decode(errors="replace"), status)


class ChildProcess:
    """A new Python process in its own process group, which runs `main(channel)` of a module of this package.

    Args:
        module: the module's name.
        variables: the environment, as `child_environment` gives it.
    """

    def __init__(self, module: str, variables: dict[str, str]):
        open_standard_streams()
        self.output_file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self._folder = tempfile.TemporaryDirectory(prefix="vitbench.", ignore_cleanup_errors=True)
        parent_socket, child_socket = socket.socketpair()
        self.channel, self._is_ready = Channel(parent_socket), False
        options: dict[str, Any] = {"stdin": subprocess.PIPE}
        if sys.platform != "win32":
            options = {"stdin": subprocess.DEVNULL, "pass_fds": [child_socket.fileno()], "process_group": 0}
        with child_socket:
            self.process = subprocess.Popen(
                [*PYTHON, "-c", CHILD_COMMAND, module, str(child_socket.fileno())],
                stdout=self.output_file,
                stderr=self.output_file,
                cwd=self._folder.name,
                env=variables,
                **options,
            )
            if sys.platform == "win32":  # where a child cannot inherit socket descriptors
                self.process.communicate(child_socket.share(self.process.pid))

    def wait_ready(self) -> None:
        """Wait until the process has confirmed that it runs this package.

        Raises:
            ProcessError: it ended, or runs another copy of the package.
        """
        if self._is_ready:
            return
        try:
            package = self.channel.receive(START_SECONDS)["package"]
        except TimeoutError:
            self.close()
            raise ProcessError(f"{sys.executable} did not start within {START_SECONDS} s") from None
        except EOFError:
            raise ProcessError(f"{sys.executable} did not start: {self.failure_reason()}") from None
        if package != str(PACKAGE):
            self.close()
            raise ProcessError(f"the child imported vitbench from {package}, not from {PACKAGE}; see PYTHONPATH")
        self._is_ready = True

    def failure_reason(self) -> str:
        """The reason why the process failed, in one line. It is killed if it does not end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self.close()
        return failure_reason(self.output_file, self.process.returncode)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """Kill the process and all processes that it started."""
        self.channel.shutdown_write()
        if self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self.process.kill() if sys.platform == "win32" else os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._folder.cleanup()


def kill_process_group() -> NoReturn:
    """End this process, which is a `ChildProcess`, and its process group."""
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def child_main(module: str, socket_number: str) -> None:
    """Run in the child: send which package it imported, then run `main` of the module."""
    if sys.platform == "win32":
        child_socket = socket.fromshare(sys.stdin.buffer.read())
    else:
        child_socket = socket.socket(fileno=int(socket_number))
    child_socket.set_inheritable(False)
    channel = Channel(child_socket)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has ended
        channel.send({"package": str(PACKAGE)})
        importlib.import_module(module).main(channel)
