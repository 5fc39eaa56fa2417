"""Ctrl-C and SIGTERM: the first one ends the work in order and within seconds, a second one at once."""

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
GRACE_SECONDS = 3.0  # for ending in order
SAME_SECONDS = 0.5  # signals this close are one: some senders tell a process and then its group
TEXT = "\nvitbench: stopped; what was finished is kept, and the same command goes on from there"


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; `status` is the exit status that says so."""

    def __init__(self, number: int):
        self.status = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block the first signal raises `Interrupted`; one that is not heeded ends the process and its children.

    A thread sees the signals too, so that long work outside of Python cannot put off the end.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    came: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise Interrupted(number)

    def in_forked_child() -> None:  # such as one that loads images: it ends with this process
        if not over:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    over = False
    os.register_at_fork(after_in_child=in_forked_child)
    # also where they are ignored, as in a script's background: whoever sends one means it
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    before_wake = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(woken,), daemon=True).start()
    try:
        yield
        if came:  # and something on the way took no notice
            raise Interrupted(came[0])
    except Exception as error:  # such as of a child that was ended
        if came:
            raise Interrupted(came[0]) from error
        raise
    finally:
        over = True
        if not came:  # else the thread sees to it that the process ends
            signal.set_wakeup_fd(before_wake)
            for number, usual in before.items():
                signal.signal(number, usual)
            os.write(wake, b"\0")
            os.close(wake)


def _watch(woken: int) -> None:
    """After the first signal wait for the end, and make it where it does not come or is asked for again."""
    import psutil  # noqa: F401  (now, and not when there is no time)

    while (number := os.read(woken, 1)[0]) not in SIGNALS:
        if number == 0:
            os.close(woken)
            return
    time.sleep(SAME_SECONDS)
    until = time.monotonic() + GRACE_SECONDS - SAME_SECONDS
    os.set_blocking(woken, False)
    with contextlib.suppress(BlockingIOError):
        os.read(woken, 4096)
    while (left := until - time.monotonic()) > 0:
        if select.select([woken], [], [], left)[0] and os.read(woken, 1)[0] in SIGNALS:
            break
    end(128 + number)


def end(status: int) -> NoReturn:
    """Say how to go on, and end this process and all that it started; what was imported is not taken down, which takes seconds."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    with contextlib.suppress(OSError):
        os.write(2, f"{TEXT}\n".encode())
    os._exit(status)
