"""The roofline of this machine (Williams et al. 2009): measured peaks of arithmetic and memory, and the latency floor of a model.

A model's products are far smaller than the matrices of the peaks, so the time of its products alone lies between the floor and its latency.
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

SIZES = (384, 768, 1536, 3072)  # sides of the square matrices; the fastest size depends on the caches
REPEATS = 8  # tries of each; the best counts
BYTES = 256 * 2**20  # of the buffer that is read, several times the size of the caches


def roofline(path: Path, batches: Sequence[int], threads: int) -> Iterator[Measurement]:
    """The latency floor and the products' time in ms at each batch size. The floor's samples are the `machine_peaks`."""
    from vitbench.measurement.cost import count_int8_macs, count_macs
    from vitbench.measurement.timing import timing_lock
    from vitbench.model import artifact

    model, peaks = artifact.load(path), machine_peaks(threads)
    int8_macs = count_int8_macs(model)
    float_macs, size = count_macs(model) - int8_macs, artifact.size_on_disk(path)
    speeds = ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in peaks.items())
    for batch in batches:
        yield Measurement(
            "latency_floor",
            latency_floor(float_macs, int8_macs, size, peaks, batch),
            f"modelled: multiply-accumulates and bytes at peaks measured here ({speeds})",
            samples=list(peaks.values()),
        )
    for batch in batches:
        with timing_lock():
            products = in_child("time_products", threads, path=os.path.abspath(path), batch=batch)
        source = (
            "measured: the linear layers' products alone, in fp32 as dense matrices of their sizes, best of some tries"
        )
        yield Measurement("products_time", products["ms"], source)


def latency_floor(float_macs: float, int8_macs: float, size: float, peaks: dict[str, float], batch: int) -> float:
    """The least ms for a batch: the longer of its products at the peaks and one read of `size` bytes of weights."""
    compute = batch * (float_macs / peaks["float_macs"] + int8_macs / peaks["int8_macs"])
    return 1000 * max(compute, size / peaks["memory_bandwidth"])


@functools.cache
def machine_peaks(threads: int) -> dict[str, float]:
    """`float_macs` and `int8_macs` per second of large matrix products, and `memory_bandwidth` of reads in bytes/s."""
    from vitbench.measurement.timing import timing_lock

    with timing_lock():
        return in_child("measure_peaks", threads)


@job
def measure_peaks() -> dict[str, Any]:
    """The peaks, each the best of some tries, so that other load on the machine changes them little."""
    import torch

    from vitbench.model.layers import DynamicInt8Linear

    best = {"float_macs": 0.0, "int8_macs": 0.0}
    with torch.inference_mode():
        for size in SIZES:
            left, right = torch.randn(size, size), torch.randn(size, size)
            linear = DynamicInt8Linear(size, size)
            linear.weight = torch.randint(-127, 128, (size, size), dtype=torch.int8)
            calls = {
                "float_macs": functools.partial(torch.matmul, left, right),
                "int8_macs": functools.partial(linear.forward, left),
            }
            best = {name: max(rate, size**3 / _best(calls[name])) for name, rate in best.items()}
        return best | {"memory_bandwidth": BYTES / _best(torch.ones(BYTES // 4).sum)}


@job
def time_products(path: str, batch: int) -> dict[str, Any]:
    """Milliseconds of all products of a batch with dense fp32 matrices of the weights' sizes, one after the other."""
    import torch

    from vitbench.model import artifact

    model = artifact.load(path)
    sizes: Counter[tuple[int, int, int]] = Counter()

    def record_shape(layer: Any, inputs: tuple[Any, ...], y: Any) -> None:
        sizes[(y.numel() // layer.out_features, layer.in_features, layer.out_features)] += 1

    for layer in model.modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            layer.register_forward_hook(record_shape)
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
