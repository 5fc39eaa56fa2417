"""Work that must not share a process: `in_child` runs a registered job in a fresh interpreter with fixed threads."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitbench import standalone

JOBS: dict[str, Callable[..., dict[str, Any]]] = {}
TIME_LIMIT = 1800


class ChildError(RuntimeError):
    """The child process failed; the message is the last line it said."""


def job(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make a function callable by name in a child process; arguments and result are JSON."""
    JOBS[function.__name__] = function
    return function


def in_child(name: str, threads: int, **arguments: Any) -> dict[str, Any]:
    """Run the job `name` in a fresh process that uses `threads` threads."""
    env = package_environment(threads)
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder, "task.json"), Path(folder, "answer.json")
        task.write_text(json.dumps({"job": name, "threads": threads, "arguments": arguments}))
        command = [sys.executable, "-m", "vitbench.measure.child", str(task), str(answer)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise ChildError(f"{name} took more than {TIME_LIMIT} s") from None
        if done.returncode or not answer.exists():
            raise ChildError(f"{name} failed: {standalone.reason(done.stderr, done.returncode)}")
        return json.loads(answer.read_text())


def package_environment(threads: int) -> dict[str, str]:
    """This process's environment for one that imports this same package and uses `threads` threads."""
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    return standalone.thread_environment(threads) | {"PYTHONPATH": path}


def main(task: str, answer: str) -> None:
    """The child's side."""
    import torch

    import vitbench.measure  # noqa: F401  (registers the jobs)
    from vitbench.measure.child import JOBS as jobs  # this file runs as __main__; the jobs registered in its import

    order = json.loads(Path(task).read_text())
    torch.set_num_threads(order["threads"])
    Path(answer).write_text(json.dumps(jobs[order["job"]](**order["arguments"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
