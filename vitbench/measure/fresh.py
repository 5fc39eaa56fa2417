"""A fresh process that loads a model and answers one image: its peak memory, the time to its first answer, the least it runs in."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitbench import standalone
from vitbench.measure import limits
from vitbench.measure.child import ChildError
from vitbench.measure.value import Value

MEMORY = {"peak_rss": "bytes", "import_rss": "bytes"}
STARTUP = {"cold_start": "s", "load_time": "s"}


def memory_metrics(backend: str) -> dict[str, str]:
    """Metric -> unit of what `memory` yields, in order."""
    return MEMORY | ({"peak_tensors": "bytes"} if backend == "eager" else {}) | _exported(backend)


def _exported(backend: str) -> dict[str, str]:
    from vitbench.backends import BACKENDS

    return {"exported_bytes": "bytes"} if BACKENDS[backend].file else {}


def memory(path: Path, backend: str, threads: int) -> Iterator[Value]:
    """The peak, how much of it the imports alone take; in eager the largest sum of tensors alive at once; else the export's size."""
    with ready(path, backend, threads) as (command, size):
        found = answer(command, threads)
    without = ", without PyTorch" if size else ""
    how = f"measured: peak of a fresh process{without} that loads the file and answers one image"
    yield Value("peak_rss", found["peak"], how)
    yield Value("import_rss", found["imports"], "measured: peak of the same process after its imports")
    if backend == "eager":
        tensors = "measured: largest sum of tensors alive at once in one answer, the model's included"
        yield Value("peak_tensors", found["tensors"], tensors)
    if size:
        yield Value("exported_bytes", size, f"measured: files that {backend} loads")


def startup(path: Path, backend: str, threads: int) -> Iterator[Value]:
    """Seconds from a process's start to its first answer, and those of them that loading the model takes: medians."""
    from vitbench.measure.timing import locked

    with ready(path, backend, threads) as (command, _), locked():
        answer(command, threads)  # the files are in the system's cache from here on
        found = [answer(command, threads) for _ in range(standalone.STARTS)]
    for metric, key in (("cold_start", "cold_start"), ("load_time", "load")):
        seconds = [each[key] for each in found]
        how = f"measured: median of {len(found)} fresh processes, files in the system's cache"
        yield Value(metric, float(np.median(seconds)), how, samples=seconds)


def memory_limit(path: Path, backend: str, threads: int) -> Iterator[Value]:
    """The smallest limit of memory under which the process still answers."""
    with ready(path, backend, threads) as (command, _):
        peak = answer(command, threads)["peak"]
        least = limits.smallest(command, peak, standalone.thread_environment(threads), [path])
    yield Value("memory_limit", least, f"measured: smallest {limits.kind()} in which the process still answers")


def answer(command: list[str], threads: int) -> dict[str, Any]:
    """What the fresh process says.

    Raises:
        ChildError: it failed, with its last line.
    """
    try:
        return standalone.in_fresh_process(command, threads)
    except standalone.BundleError as error:
        raise ChildError(str(error)) from None


@contextlib.contextmanager
def ready(path: Path, backend: str, threads: int) -> Iterator[tuple[list[str], int]]:
    """The command of a process that answers one image, and the bytes of what was exported for it (0: the saved model)."""
    import torch

    from vitbench import artifact
    from vitbench.backends import BACKENDS

    write = BACKENDS[backend].file
    if not write:
        yield [sys.executable, "-m", "vitbench.measure.fresh", str(path), backend, str(threads)], 0
        return
    with tempfile.TemporaryDirectory() as folder:
        model = artifact.load(path)
        size = model.recipe.preprocess.size
        x, images = torch.randn(1, 3, size, size), Path(folder, "images.npy")
        np.save(images, x.numpy())
        with torch.no_grad():
            exported = write(model, x, Path(folder, "model"))
        whole = sum(file.stat().st_size for file in Path(folder).glob("model.*"))
        yield standalone.answer_command(exported, images, threads), whole


def one_answer(path: str, backend: str, threads: int) -> dict[str, Any]:
    """As `standalone.one_answer`, of a saved model in PyTorch; in eager also the largest sum of tensors alive at once."""
    import torch

    from vitbench import artifact, backends
    from vitbench.measure.memory import peak_tensors

    torch.set_num_threads(threads)
    imports, start = standalone.peak_bytes(), time.monotonic()
    model = artifact.load(path)
    size = model.recipe.preprocess.size
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        call = backends.BACKENDS[backend].call(model, x)
        loaded = time.monotonic() - start
        call(x)
        found = {"imports": imports, "peak": standalone.peak_bytes(), "load": loaded, "answered": time.monotonic()}
        return found | ({"tensors": peak_tensors(model, x)} if backend == "eager" else {})


if __name__ == "__main__":
    print(json.dumps(one_answer(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
