"""Child processes: nothing of the user's folder runs in them, nothing that is printed confuses them, and none is left."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from vitbench.base import processes
from vitbench.base.forks import CAN_FORK, ForkServer
from vitbench.base.processes import PACKAGE, ChildProcess, ProcessError, child_environment
from vitbench.data import batches
from vitbench.measurement import child

JOB = """
import os, sys, time

def work(what):
    print("a library prints")
    if what == "sleep":
        time.sleep(60)
    if what == "fail":
        raise ValueError("of no use")
    if what == "die":
        os.kill(os.getpid(), 9)
    return {"folder": os.getcwd(), "path": sys.path, "input": sys.stdin.read()}

def main(channel):
    channel.send(work(channel.receive()))
"""
ASK = """
import json, os, sys, tempfile
os.environ["PYTHONPATH"] += ":"  # an empty entry is the current folder
from vitbench.base.forks import CAN_FORK, ForkServer
from vitbench.base.processes import ChildProcess, child_environment
variables = child_environment(1)
variables["PYTHONPATH"] += ":" + sys.argv[1]
started = ChildProcess("job", variables)
started.wait_ready()
started.channel.send("look")
found = [started.channel.receive(60)]
started.close()
if CAN_FORK:
    server = ForkServer(["job"], variables)
    found.append(server.fork("job", {"what": "look"}, variables, tempfile.gettempdir()).result(60))
    server.close()
open(sys.argv[2], "w").write(json.dumps(found))
"""
HOSTILE = "import pathlib; pathlib.Path({!r}).touch(); raise SystemExit('the wrong file')"


@pytest.fixture
def jobs(tmp_path):
    """The environment of a child that can import `job`."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "job.py").write_text(JOB)
    variables = child_environment(1)
    variables["PYTHONPATH"] += os.pathsep + str(folder)
    return variables


@pytest.fixture
def server(jobs):
    if not CAN_FORK:
        pytest.skip("nothing is forked here")
    server = ForkServer(["job"], jobs)
    yield lambda what: server.fork("job", {"what": what}, jobs, os.sep)
    server.close()


SITES = {
    "one that prints": "print('modules of this cluster are loaded')",
    "no pidfd_open": "import os\nif hasattr(os, 'pidfd_open'): del os.pidfd_open",
    "a system without pidfds": "import os\ndef no(*_): raise OSError(38, 'no')\nos.pidfd_open = no",
}


CLOSED = (">&-", "2>&-", "<&- >&- 2>&-")  # standard streams, in a shell's words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "closed"), [("", ""), *((site, "") for site in SITES), *(("", each) for each in CLOSED)]
)
def test_what_a_child_inherits_does_not_reach_its_answer(tmp_path, jobs, site, closed):
    here, sites, answer = tmp_path / "here", tmp_path / "sites", tmp_path / "answer.json"
    here.mkdir()
    sites.mkdir()
    for name in ("vitbench", "job", "json", "torch", "socket"):
        (here / f"{name}.py").write_text(HOSTILE.format(str(tmp_path / "ran")))
    (sites / "sitecustomize.py").write_text(SITES.get(site, ""))
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    path = os.pathsep.join([str(ROOT), str(sites)])
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-P", script, tmp_path / "jobs", answer]
    done = subprocess.run(command, cwd=here, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert not (tmp_path / "ran").exists(), "a file of the current folder ran"
    for found in json.loads(answer.read_text()):
        assert found["input"] == ""
        assert found["folder"] != str(here)
        assert not {str(here), ""} & set(found["path"])


@pytest.mark.slow
def test_a_job_runs_nothing_of_the_current_folder(tmp_path, monkeypatch):
    for name in ("vitbench", "torch"):
        (tmp_path / f"{name}.py").write_text(HOSTILE.format(str(tmp_path / "ran")))
    monkeypatch.chdir(tmp_path)
    order = {"name": "time_models", "threads": 1}
    order["arguments"] = {"models": [], "batch": 1, "rounds": 1, "exported": ""}
    assert child._started(order) == {"timed": []}
    assert not (tmp_path / "ran").exists()


def test_a_child_that_does_not_start_says_why_in_one_line(tmp_path, jobs):
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nprint('no licence here', file=sys.stderr)\nos._exit(3)")
    variables = jobs | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{jobs['PYTHONPATH']}"}
    with pytest.raises(ProcessError, match="did not start: no licence here$"):
        ChildProcess("job", variables).wait_ready()
    if CAN_FORK:
        with pytest.raises(ProcessError, match="no licence here$"):
            ForkServer(["job"], variables).fork("job", {"what": "look"}, variables, os.sep)
        with pytest.raises(ProcessError, match="No module named 'no_such_module'"):
            ForkServer(["no_such_module"], jobs).fork("job", {"what": "look"}, jobs, os.sep)


def test_a_child_of_another_package_is_refused(tmp_path, jobs):
    shutil.copytree(PACKAGE, tmp_path / "vitbench", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.raises(ProcessError, match="the child imported vitbench from"):
        ChildProcess("job", jobs | {"PYTHONPATH": str(tmp_path)}).wait_ready()


@pytest.mark.parametrize(
    ("what", "message"), [("fail", "ValueError: of no use"), ("die", "ended by signal 9 .out of memory")]
)
def test_a_forked_child_says_why_it_failed(server, what, message):
    with pytest.raises(ProcessError, match=message):
        server(what).result(60)


def test_a_child_that_takes_too_long_is_gone(server):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    forked = server("sleep")
    (sleeper,) = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        forked.result(0.2)
    assert forked.ended()
    assert not sleeper.is_running()
    assert time.monotonic() - start < 5
    assert server("look").result(60)["folder"] == os.sep


@pytest.mark.parametrize(("free", "count"), [(0, 0), (299, 0), (300, 1), (599, 1), (600, 2), (10**9, 2)])
def test_as_many_processes_load_images_as_shared_memory_has_room_for(monkeypatch, free, count):
    usage = shutil.disk_usage(os.sep)
    monkeypatch.setattr(batches, "CAN_FORK", True)
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert batches.worker_count(100) == count


def test_only_forked_processes_load_images(monkeypatch):
    monkeypatch.setattr(batches, "CAN_FORK", False)
    assert batches.worker_count(1) == 0


def test_standard_streams_that_are_closed_are_opened():
    code = "import sys\nfrom vitbench.base.processes import open_standard_streams\nopen_standard_streams()\nprint('to nobody')\nsys.exit(7)"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 7
    assert processes.open_standard_streams() is None
