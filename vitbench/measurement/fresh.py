"""A fresh process that loads a model and answers one image: its peak memory, the time to its first answer, the least it runs in."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitbench.base import standalone
from vitbench.base.files import write_array
from vitbench.base.processes import PYTHON, child_environment
from vitbench.measurement import backends, limits
from vitbench.measurement.child import ChildError
from vitbench.measurement.cost import Measurement
from vitbench.measurement.limits import peak_tensors
from vitbench.measurement.timing import timing_lock
from vitbench.model import artifact

MEMORY = {"peak_rss": "bytes", "import_rss": "bytes"}
STARTUP = {"cold_start": "s", "load_time": "s"}
FEWEST_STARTS, MAX_SECONDS = 3, 10.0  # of starts: fewer than `standalone.STARTS` where they take longer


def memory_metrics(backend: str) -> dict[str, str]:
    """Metric -> unit of what `memory` yields, in order."""
    more = {"peak_tensors": backend == "eager", "exported_bytes": backends.BACKENDS[backend].runs_without_torch}
    return MEMORY | {metric: "bytes" for metric, there in more.items() if there}


def memory(path: Path, backend: str, threads: int) -> Iterator[Measurement]:
    """The peak, how much of it the imports alone take; in eager the largest sum of tensors alive at once; else the export's size."""
    with prepared_command(path, backend, threads) as (command, files):
        found = run_inference(command, threads)
        size = sum(file.stat().st_size for file in files)
    alone = backends.BACKENDS[backend].runs_without_torch
    without = ", without PyTorch" if alone else ""
    how = f"measured: peak of a fresh process{without} that loads the file and answers one image"
    yield Measurement("peak_rss", found["peak"], how)
    yield Measurement("import_rss", found["imports"], "measured: peak of the same process after its imports")
    if backend == "eager":
        tensors = "measured: largest sum of tensors alive at once in one answer, the model's included"
        yield Measurement("peak_tensors", found["tensors"], tensors)
    if alone:
        yield Measurement("exported_bytes", size, f"measured: files that {backend} loads")


def startup(path: Path, backend: str, threads: int) -> Iterator[Measurement]:
    """Seconds from a process's start to its first answer, and those of them that loading the model takes: medians."""
    with prepared_command(path, backend, threads) as (command, files), timing_lock():
        for file in files:
            file.read_bytes()  # the system's cache has it from here on, as it has the packages, which this process imported
        found, start = [], time.monotonic()
        while len(found) < standalone.STARTS and (len(found) < FEWEST_STARTS or time.monotonic() - start < MAX_SECONDS):
            found.append(run_inference(command, threads))
    for metric, key in (("cold_start", "cold_start"), ("load_time", "load")):
        seconds = [each[key] for each in found]
        how = f"measured: median of {len(found)} fresh processes, files in the system's cache"
        yield Measurement(metric, float(np.median(seconds)), how, samples=seconds)


def memory_limit(path: Path, backend: str, threads: int) -> Iterator[Measurement]:
    """The smallest limit of memory under which the process still answers."""
    with prepared_command(path, backend, threads) as (command, files):
        peak = run_inference(command, threads)["peak"]
        least = limits.smallest_limit(command, peak, child_environment(threads), files)
    yield Measurement(
        "memory_limit", least, f"measured: smallest {limits.limit_kind()} in which the process still answers"
    )


def answers_within(path: Path, backend: str, threads: int, limit: int) -> Iterator[Measurement]:
    """Whether the process answers in so many bytes: 1 or 0.

    Raises:
        InputError: not even the interpreter starts in so little.
    """
    with prepared_command(path, backend, threads) as (command, files):
        found = limits.runs_within(command, limit, child_environment(threads), files)
    yield Measurement("answers_within", float(found), f"measured: one answer under a {limits.limit_kind()}")


def run_inference(command: list[str], threads: int) -> dict[str, Any]:
    """What the fresh process says.

    Raises:
        ChildError: it failed, with its last line.
    """
    try:
        return standalone.in_fresh_process(command, child_environment(threads))
    except standalone.BundleError as error:
        raise ChildError(str(error)) from None


@contextlib.contextmanager
def prepared_command(path: Path, backend: str, threads: int) -> Iterator[tuple[list[str], list[Path]]]:
    """The command of a process that answers one image, and the files it loads: those exported for it, or the saved model's."""
    if not backends.BACKENDS[backend].runs_without_torch:
        command = [*PYTHON, "-m", "vitbench.measurement.fresh", os.path.abspath(path), backend, str(threads)]
        yield command, list(path.iterdir())
        return
    with tempfile.TemporaryDirectory() as folder:
        model = artifact.load(path)
        size = model.recipe.preprocess.size
        x, images = torch.randn(1, 3, size, size), Path(folder, "images.npy")
        write_array(images, x.numpy())
        with torch.no_grad():
            exported = backends.BACKENDS[backend].export(model, x, Path(folder, "model"))
        yield standalone.inference_command(exported, images, threads), list(Path(folder).glob("model.*"))


def measure_one_inference(path: str, backend: str, threads: int) -> dict[str, Any]:
    """As `standalone.measure_one_inference`, of a saved model in PyTorch; in eager also the largest sum of tensors alive at once."""
    torch.set_num_threads(threads)
    imports, start = standalone.peak_bytes(), time.monotonic()
    model = artifact.load(path)
    size = model.recipe.preprocess.size
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        call = backends.make_call(backend, model, x)
        loaded = time.monotonic() - start
        call(x)
        found = {"imports": imports, "peak": standalone.peak_bytes(), "load": loaded, "answered": time.monotonic()}
        return found | ({"tensors": peak_tensors(model, x)} if backend == "eager" else {})


if __name__ == "__main__":
    path, backend, threads, *to = sys.argv[1:]  # to: "--to" and a file
    standalone.write_result(measure_one_inference(path, backend, int(threads)), to[-1] if to else "")
    os._exit(0)  # to take down what was imported would take another second
