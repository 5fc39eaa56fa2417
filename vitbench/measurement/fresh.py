"""A fresh process that loads a model and classifies one image: peak memory, time to the first inference, memory limit."""

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
FEWEST_STARTS, MAX_SECONDS = 3, 10.0  # fewer starts than `standalone.STARTS` if they take longer


def memory_metrics(backend: str) -> dict[str, str]:
    """The unit of each metric that `memory` yields, in order."""
    optional = {"peak_tensors": backend == "eager", "exported_bytes": backends.BACKENDS[backend].runs_without_torch}
    return MEMORY | {metric: "bytes" for metric, is_present in optional.items() if is_present}


def memory(path: Path, backend: str, threads: int) -> Iterator[Measurement]:
    """Bytes: the peak and that of the imports alone; in eager, the largest sum of live tensors; of an export, its files."""
    with prepared_command(path, backend, threads) as (command, files):
        result = run_inference(command, threads)
        size = sum(file.stat().st_size for file in files)
    runs_without_torch = backends.BACKENDS[backend].runs_without_torch
    note = ", without PyTorch" if runs_without_torch else ""
    source = f"measured: peak of a fresh process{note} that loads the file and answers one image"
    yield Measurement("peak_rss", result["peak"], source)
    yield Measurement("import_rss", result["imports"], "measured: peak of the same process after its imports")
    if backend == "eager":
        tensors = "measured: largest sum of tensors alive at once in one answer, the model's included"
        yield Measurement("peak_tensors", result["tensors"], tensors)
    if runs_without_torch:
        yield Measurement("exported_bytes", size, f"measured: files that {backend} loads")


def startup(path: Path, backend: str, threads: int) -> Iterator[Measurement]:
    """Median seconds from a process's start to its first inference, and of loading the model."""
    with prepared_command(path, backend, threads) as (command, files), timing_lock():
        for file in files:
            file.read_bytes()  # puts it into the system's cache, where the imported packages already are
        results: list[dict[str, Any]] = []
        start = time.monotonic()
        while len(results) < standalone.STARTS and (
            len(results) < FEWEST_STARTS or time.monotonic() - start < MAX_SECONDS
        ):
            results.append(run_inference(command, threads))
    for metric, key in (("cold_start", "cold_start"), ("load_time", "load")):
        seconds = [result[key] for result in results]
        source = f"measured: median of {len(results)} fresh processes, files in the system's cache"
        yield Measurement(metric, float(np.median(seconds)), source, samples=seconds)


def memory_limit(path: Path, backend: str, threads: int) -> Iterator[Measurement]:
    """The smallest memory limit in bytes under which one inference still succeeds."""
    with prepared_command(path, backend, threads) as (command, files):
        peak = run_inference(command, threads)["peak"]
        smallest_limit = limits.smallest_limit(command, peak, child_environment(threads), files)
    yield Measurement(
        "memory_limit", smallest_limit, f"measured: smallest {limits.limit_kind()} in which the process still answers"
    )


def answers_within(path: Path, backend: str, threads: int, limit: int) -> Iterator[Measurement]:
    """Whether one inference succeeds within a memory limit of `limit` bytes: 1 or 0.

    Raises:
        InputError: the limit is too small to start Python.
    """
    with prepared_command(path, backend, threads) as (command, files):
        fits = limits.runs_within(command, limit, child_environment(threads), files)
    yield Measurement("answers_within", float(fits), f"measured: one answer under a {limits.limit_kind()}")


def run_inference(command: list[str], threads: int) -> dict[str, Any]:
    """The result of one inference in a fresh process, as `standalone.measure_one_inference` gives it.

    Raises:
        ChildError: the process failed; the message is its last line.
    """
    try:
        return standalone.in_fresh_process(command, child_environment(threads))
    except standalone.BundleError as error:
        raise ChildError(str(error)) from None


@contextlib.contextmanager
def prepared_command(path: Path, backend: str, threads: int) -> Iterator[tuple[list[str], list[Path]]]:
    """The command of a process that runs one inference, and the files that it loads: exported ones or the saved model's."""
    export = backends.BACKENDS[backend].export
    if not (export and backends.BACKENDS[backend].runs_without_torch):
        command = [*PYTHON, "-m", "vitbench.measurement.fresh", os.path.abspath(path), backend, str(threads)]
        yield command, list(path.iterdir())
        return
    with tempfile.TemporaryDirectory() as folder:
        model = artifact.load(path)
        size = model.recipe.preprocess.size
        x, images = torch.randn(1, 3, size, size), Path(folder, "images.npy")
        write_array(images, x.numpy())
        with torch.no_grad():
            exported = export(model, x, Path(folder, "model"))
        yield standalone.inference_command(exported, images, threads), list(Path(folder).glob("model.*"))


def measure_one_inference(path: str, backend: str, threads: int) -> dict[str, Any]:
    """`standalone.measure_one_inference` of a saved model in PyTorch; in eager also the largest sum of live tensors, `tensors`."""
    torch.set_num_threads(threads)
    imports, start = standalone.peak_bytes(), time.monotonic()
    model = artifact.load(path)
    size = model.recipe.preprocess.size
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        call = backends.make_call(backend, model, x)
        loaded = time.monotonic() - start
        call(x)
        result = {"imports": imports, "peak": standalone.peak_bytes(), "load": loaded, "answered": time.monotonic()}
        return result | ({"tensors": peak_tensors(model, x)} if backend == "eager" else {})


if __name__ == "__main__":
    path, backend, threads, *output_arguments = sys.argv[1:]  # the last are "--to" and a file
    result = measure_one_inference(path, backend, int(threads))
    standalone.write_result(result, output_arguments[-1] if output_arguments else "")
    os._exit(0)  # a normal exit would take another second to tear down the imported modules
