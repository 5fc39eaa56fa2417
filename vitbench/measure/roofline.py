"""What this machine could do at best: measured peaks of arithmetic and memory, and the least time that they allow a model."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vitbench.measure.child import in_child, job
from vitbench.measure.value import Value

SIZE, REPEATS = 2048, 8  # side of the matrices multiplied; tries, of which the best counts
BYTES = 256 * 2**20  # of the buffer that is read, several times a processor's caches


def roofline(path: Path, batches: Sequence[int], threads: int) -> Iterator[Value]:
    """The least milliseconds of a call at each batch size; the samples are the peaks, as `peaks` gives them."""
    from vitbench import artifact
    from vitbench.measure.cost import count_int8_macs, count_macs

    model, most = artifact.load(path), peaks(threads)
    int8 = count_int8_macs(model)
    rest, size = count_macs(model) - int8, artifact.size_on_disk(path)
    speeds = ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in most.items())
    for batch in batches:
        yield Value(
            "latency_floor",
            floor(rest, int8, size, most, batch),
            f"modelled: multiply-accumulates and bytes at peaks measured here ({speeds})",
            samples=list(most.values()),
        )


def floor(float_macs: float, int8_macs: float, size: float, most: dict[str, float], batch: int) -> float:
    """The least milliseconds for a batch: its products at their peaks, or `size` bytes of weights from memory once."""
    compute = batch * (float_macs / most["float_macs"] + int8_macs / most["int8_macs"])
    return 1000 * max(compute, size / most["memory_bandwidth"])


@functools.cache
def peaks(threads: int) -> dict[str, float]:
    """`float_macs` and `int8_macs` a second in large matrix products, `memory_bandwidth` in bytes a second read."""
    from vitbench.measure.timing import locked

    with locked():
        return in_child("measure_peaks", threads)


@job
def measure_peaks() -> dict[str, Any]:
    """The best of some tries of each: what the machine can, not what it does when others use it."""
    import torch

    from vitbench.layers import DynamicInt8Linear

    macs = SIZE**3
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    linear = DynamicInt8Linear(SIZE, SIZE)
    linear.weight = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8)
    held = torch.ones(BYTES // 4)
    with torch.inference_mode():
        return {
            "float_macs": macs / _best(lambda: left @ right),
            "int8_macs": macs / _best(lambda: linear(left)),
            "memory_bandwidth": BYTES / _best(held.sum),
        }


def _best(call: Callable[[], Any]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    seconds()
    return min(seconds() for _ in range(REPEATS))
