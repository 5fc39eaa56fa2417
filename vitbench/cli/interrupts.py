"""Ctrl-C and SIGTERM: the first signal ends the work in order within seconds, the second at once."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 3.0  # for an end in order
SAME_SECONDS = 0.5  # signals this close count as one: some senders signal a process and then its group
STOPPED_TEXT = "\nvitbench: stopped; what was finished is kept, and the same command goes on from there"


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; `status` is the exit status for it."""

    def __init__(self, number: int):
        self.status = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block the first signal raises `Interrupted`; if the block goes on, the process and its children are killed.

    A thread receives the signals too, so that long work outside of Python cannot delay the end.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    wakeup_read_fd, wakeup_write_fd = os.pipe()
    os.set_blocking(wakeup_write_fd, False)
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise Interrupted(number)

    def in_forked_child() -> None:  # for example a worker that loads images: it ends with this process
        if not is_finished:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    is_finished = False
    os.register_at_fork(after_in_child=in_forked_child)
    # also where the shell ignores them, as in a script's background: a signal that is sent is meant
    previous_handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    previous_wakeup_fd = signal.set_wakeup_fd(wakeup_write_fd, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(wakeup_read_fd,), daemon=True).start()
    try:
        yield
        if received:  # some code caught the exception
            raise Interrupted(received[0])
    except Exception as error:  # for example because a child was killed
        if received:
            raise Interrupted(received[0]) from error
        raise
    finally:
        is_finished = True
        if not received:  # else the thread ends the process
            signal.set_wakeup_fd(previous_wakeup_fd)
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
            os.write(wakeup_write_fd, b"\0")
            os.close(wakeup_write_fd)


def _watch(wakeup_read_fd: int) -> None:
    """After the first signal wait for the end; kill the process after `GRACE_SECONDS` or at a second signal."""
    import psutil  # noqa: F401  (imported now, because later there is no time)

    while (number := os.read(wakeup_read_fd, 1)[0]) not in SIGNALS:
        if number == 0:
            os.close(wakeup_read_fd)
            return
    time.sleep(SAME_SECONDS)
    until = time.monotonic() + GRACE_SECONDS - SAME_SECONDS
    os.set_blocking(wakeup_read_fd, False)
    with contextlib.suppress(BlockingIOError):
        os.read(wakeup_read_fd, 4096)
    while (seconds_left := until - time.monotonic()) > 0:
        if select.select([wakeup_read_fd], [], [], seconds_left)[0] and os.read(wakeup_read_fd, 1)[0] in SIGNALS:
            break
    kill_and_exit(128 + number)


def kill_and_exit(status: int) -> NoReturn:
    """Print how to resume, kill all children, and exit without the interpreter's clean-up, which takes seconds."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    with contextlib.suppress(OSError):
        os.write(2, f"{STOPPED_TEXT}\n".encode())
    os._exit(status)
