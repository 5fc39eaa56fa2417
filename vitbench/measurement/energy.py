"""Energy of one inference: from counters of the processor or the graphics card, or estimated from a stated power."""

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from vitbench.measurement.child import in_child, job
from vitbench.measurement.cost import Measurement
from vitbench.measurement.timing import timing_lock

POWERCAP = Path("/sys/class/powercap")
SECONDS = 5.0  # counters advance about every ms, so the energy of calls of some ms is counted over many of them


class Meter(Protocol):
    """An energy counter: `read` gives its counts, `joules_between` the energy between two readings."""

    source: str

    def read(self) -> list[float]: ...

    def joules_between(self, before: list[float], after: list[float]) -> float: ...


class Rapl:
    """The energy counters of the processor packages in Linux's powercap. They count microjoules and wrap around."""

    def __init__(self, zones: list[Path]):
        self.zones = zones
        self.ranges = [float((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self.source = f"RAPL counters of {len(zones)} processor package(s)"

    def read(self) -> list[float]:
        """Microjoules of each package."""
        return [float((zone / "energy_uj").read_text()) for zone in self.zones]

    def joules_between(self, before: list[float], after: list[float]) -> float:
        """Joules between two readings, if no counter wrapped around more than once."""
        counts = zip(before, after, self.ranges, strict=True)
        return sum((new - old) % (top + 1) if new < old else new - old for old, new, top in counts) / 1e6


class Nvml:
    """The energy counter of an NVIDIA graphics card, in millijoules since the driver was loaded."""

    source = "NVML counter of the graphics card"

    def __init__(self, library: Any, card: Any):
        self.library, self.card = library, card

    def read(self) -> list[float]:
        """Millijoules of the card."""
        return [float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.card))]

    def joules_between(self, before: list[float], after: list[float]) -> float:
        """Joules between two readings."""
        return sum(new - old for old, new in zip(before, after, strict=True)) / 1e3


def meter(backend: str) -> Meter | None:
    """The counter of the device that runs the backend; None if this process may read none."""
    return _nvml() if backend == "cuda" else _rapl()


def _rapl() -> Rapl | None:
    with contextlib.suppress(OSError, ValueError):
        # packages alone: a package's count includes its parts, and the platform's counter includes the packages
        names = {zone: (zone / "name").read_text() for zone in sorted(POWERCAP.glob("*-rapl:*"))}
        rapl = Rapl([zone for zone, name in names.items() if name.startswith("package")])
        return rapl if rapl.read() else None
    return None


def _nvml() -> Nvml | None:
    if not importlib.util.find_spec("pynvml"):
        return None
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        nvml = Nvml(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
        nvml.read()
        return nvml
    return None


def unsupported_reason(backend: str, power: float) -> str:
    """Why energy is not available; "" if it can be counted or estimated."""
    if power > 0 or meter(backend):
        return ""
    where = "the package pynvml" if backend == "cuda" else POWERCAP
    return (
        f"no energy counter: {where} has none that may be read; "
        "give power=WATTS (what the device draws while it computes) for an estimate"
    )


def energy(path: Path, backend: str, threads: int, power: float) -> Iterator[Measurement]:
    """Joules of one image at batch 1, idle draw included: from a counter, or `power` (W) times the time."""
    with timing_lock():
        readings = in_child("count_joules", threads, path=os.path.abspath(path), backend=backend)
    if readings["source"]:
        source = f"measured: {readings['source']}, idle draw included, over {readings['answers']} answers"
        yield Measurement("energy", readings["joules"] / readings["answers"], source)
    else:
        source = f"estimated: a stated {power:g} W times the measured time of {readings['answers']} answers"
        yield Measurement("energy", power * readings["seconds"] / readings["answers"], source)


@job
def count_joules(path: str, backend: str) -> dict[str, Any]:
    """Joules, seconds and calls of a model that is called with one image for `SECONDS`."""
    import torch

    from vitbench.measurement import backends
    from vitbench.model import artifact

    model = artifact.load(path)
    size = model.recipe.preprocess.size
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        call = backends.prepare(backend, model, x)
        for _ in range(3):
            call(x)
        counter, answers = meter(backend), 0
        first_reading, start = counter.read() if counter else [], time.perf_counter()
        while (seconds := time.perf_counter() - start) < SECONDS:
            call(x)
            answers += 1
        joules = counter.joules_between(first_reading, counter.read()) if counter else 0.0
    return {"joules": joules, "seconds": seconds, "answers": answers, "source": counter.source if counter else ""}
