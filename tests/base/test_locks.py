"""One writer at a time, on file systems with locks and without."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT
from vitbench.base.errors import InputError
from vitbench.base.locks import NO_LOCK_ERRNOS, is_locked, locked

HOLD = """
import sys
from vitbench.base.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
UNABLE = "import fcntl\ndef refuse(*_): raise OSError({number}, 'refused')\nfcntl.flock = refuse\n"


@pytest.fixture(params=[0, *sorted(NO_LOCK_ERRNOS)])
def number(request, monkeypatch):
    """What the file system answers to whoever asks for a lock, 0 where it has locks."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


@pytest.fixture
def holder(tmp_path, number):
    """Another process that holds the lock until it reads a line."""
    before = UNABLE.format(number=number) if number else ""
    process = subprocess.Popen(
        [sys.executable, "-c", before + HOLD, str(tmp_path / "lock")],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_holds_it_and_a_killed_holder_does_not(tmp_path, holder):
    path = tmp_path / "lock"
    assert is_locked(path)
    with pytest.raises(InputError, match="^somebody is at work"), locked(path, "somebody is at work"):
        pytest.fail("two hold one lock")
    holder.kill()
    holder.wait()
    assert not is_locked(path)
    with locked(path, "somebody is at work"):
        assert is_locked(path)
    assert not is_locked(path)


def test_who_waits_gets_it(tmp_path, holder):
    got = threading.Event()

    def wait():
        with locked(tmp_path / "lock"):
            got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.wait(0.2)
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert got.wait(10)
    waiting.join()


def test_a_lock_of_another_machine_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = tmp_path / "lock.held"
    held.write_text("1\nanother-machine\n1\n")
    with pytest.raises(InputError, match=f"at work .*delete '{held}'"), locked(tmp_path / "lock", "at work"):
        pytest.fail("two hold one lock")
    assert held.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, locked(tmp_path / "none" / "lock"):
        pytest.fail("a lock in no folder")
    assert str(tmp_path / "none") in str(caught.value.filename)
    assert not is_locked(tmp_path / "none" / "lock")
