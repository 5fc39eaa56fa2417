"""What this machine could do at best: measured peaks of arithmetic and memory, and the least time that they allow a model.

Between that floor and the model's own time stand its products at their own sizes, which are far smaller than those of the peak.
"""

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vitbench.measurement.child import in_child, job
from vitbench.measurement.cost import Measurement

SIZES = (384, 768, 1536, 3072)  # sides of the matrices multiplied: which are fastest depends on the caches
REPEATS = 8  # tries of each, of which the best counts
BYTES = 256 * 2**20  # of the buffer that is read, several times a processor's caches


def roofline(path: Path, batches: Sequence[int], threads: int) -> Iterator[Measurement]:
    """The least milliseconds of a call at each batch size; the samples are the peaks, as `peaks` gives them."""
    from vitbench.measurement.cost import count_int8_macs, count_macs
    from vitbench.measurement.timing import timing_lock
    from vitbench.model import artifact

    model, peaks = artifact.load(path), machine_peaks(threads)
    int8 = count_int8_macs(model)
    rest, size = count_macs(model) - int8, artifact.size_on_disk(path)
    speeds = ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in peaks.items())
    for batch in batches:
        yield Measurement(
            "latency_floor",
            latency_floor(rest, int8, size, peaks, batch),
            f"modelled: multiply-accumulates and bytes at peaks measured here ({speeds})",
            samples=list(peaks.values()),
        )
    for batch in batches:
        with timing_lock():
            found = in_child("time_products", threads, path=os.path.abspath(path), batch=batch)
        how = (
            "measured: the linear layers' products alone, in fp32 as dense matrices of their sizes, best of some tries"
        )
        yield Measurement("products_time", found["ms"], how)


def latency_floor(float_macs: float, int8_macs: float, size: float, peaks: dict[str, float], batch: int) -> float:
    """The least milliseconds for a batch: its products at their peaks, or `size` bytes of weights from memory once."""
    compute = batch * (float_macs / peaks["float_macs"] + int8_macs / peaks["int8_macs"])
    return 1000 * max(compute, size / peaks["memory_bandwidth"])


@functools.cache
def machine_peaks(threads: int) -> dict[str, float]:
    """`float_macs` and `int8_macs` a second in large matrix products, `memory_bandwidth` in bytes a second read."""
    from vitbench.measurement.timing import timing_lock

    with timing_lock():
        return in_child("measure_peaks", threads)


@job
def measure_peaks() -> dict[str, Any]:
    """The best of some tries of each: what the machine can, not what it does when others use it."""
    import torch

    from vitbench.model.layers import DynamicInt8Linear

    found = {"float_macs": 0.0, "int8_macs": 0.0}
    with torch.inference_mode():
        for size in SIZES:
            left, right = torch.randn(size, size), torch.randn(size, size)
            linear = DynamicInt8Linear(size, size)
            linear.weight = torch.randint(-127, 128, (size, size), dtype=torch.int8)
            calls = {
                "float_macs": functools.partial(torch.matmul, left, right),
                "int8_macs": functools.partial(linear, left),
            }
            found = {name: max(peaks, size**3 / _best(calls[name])) for name, peaks in found.items()}
        return found | {"memory_bandwidth": BYTES / _best(torch.ones(BYTES // 4).sum)}


@job
def time_products(path: str, batch: int) -> dict[str, Any]:
    """Milliseconds of all products of a batch with weight matrices of these sizes, one after the other."""
    import torch

    from vitbench.model import artifact

    model, sizes = artifact.load(path), Counter()

    def note(layer: Any, inputs: tuple[Any, ...], y: Any) -> None:
        sizes[(y.numel() // layer.out_features, layer.in_features, layer.out_features)] += 1

    for layer in model.modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            layer.register_forward_hook(note)
    size, total = model.recipe.preprocess.size, 0.0
    with torch.inference_mode():
        model(torch.zeros(batch, 3, size, size))
        for (rows, inputs, outputs), count in sizes.items():
            left, right = torch.randn(rows, inputs), torch.randn(outputs, inputs)
            total += count * _best(functools.partial(torch.nn.functional.linear, left, right))
    return {"ms": 1000 * total}


def _best(call: Callable[[], Any]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    seconds()
    return min(seconds() for _ in range(REPEATS))
