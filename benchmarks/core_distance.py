"""What it changes that a virtual machine's cores lie near each other or far apart: the host may move them while it runs.

    pip install -e '.[onnx]'
    python benchmarks/core_distance.py MODELS/baseline MODELS/static_int8 --backends eager onnxruntime --minutes 5 --out DIR

Every second or so one round: how long a byte takes from one core to another and back, then each model in each backend, at batch 1,
with one thread and with two. Rounds are parted where the journeys are (near below the geometric mean of the least and the most).
The first model is the baseline: a ratio is a median of rounds' ratios to it, in eager mode with as many threads. Linux alone.
"""

import argparse
import itertools
import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import vitbench as vb

JOURNEYS = 2000  # there and back, a probe
PAUSE = 0.5  # seconds between rounds
APART = 1.5  # from which ratio of the longest journey to the shortest there are two places


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="saved models, the baseline first")
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="beside eager")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", required=True, metavar="DIR", help="results folder")
    options = parser.parse_args()
    try:
        if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
            raise vb.InputError("this needs Linux and two cores")
        if not options.minutes > 0:
            raise vb.InputError(f"--minutes {options.minutes:g}: give more than 0")
        run = vb.Run(options.out)
        journeys, times = measured(
            options.models, list(dict.fromkeys(["eager", *options.backends])), 60 * options.minutes
        )
        run.append(rows(options.models[0], journeys, times))
    except vb.InputError as error:
        print(f"core_distance.py: {error}", file=sys.stderr)
        return 2
    vb.cli.print_results(run.folder)
    return 0


def journey(cores: tuple[int, int]) -> float:
    """Nanoseconds that a byte takes from one core to another and back, each core waiting busily for it."""
    byte = mmap.mmap(-1, 1)
    allowed, other = os.sched_getaffinity(0), os.fork()
    os.sched_setaffinity(0, {cores[bool(other)]})
    if not other:
        for _ in range(JOURNEYS):
            while not byte[0]:
                pass
            byte[0] = 0
        os._exit(0)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(JOURNEYS // 10):
            byte[0] = 1
            while byte[0]:
                pass
        best = min(best, time.perf_counter() - start)
    os.waitpid(other, 0)
    os.sched_setaffinity(0, allowed)
    return 1e9 * best / (JOURNEYS // 10)


def measured(models: list[Path], names: list[str], seconds: float) -> tuple[list[float], dict[tuple, list[float]]]:
    """Journeys in ns, and milliseconds of each (model, backend, threads), round by round."""
    cores = tuple(sorted(os.sched_getaffinity(0))[:2])
    calls, journeys = {}, []
    with torch.inference_mode():
        for path, name, threads in itertools.product(models, names, (1, 2)):
            torch.set_num_threads(threads)
            model = vb.load(path)
            if not vb.measurement.unsupported_reason(name, model.recipe):
                size = model.recipe.preprocess.size
                x = torch.randn(1, 3, size, size)
                calls[path, name, threads] = (vb.measurement.prepare_checked(name, model, x)[0], x)
        times: dict[tuple, list[float]] = {key: [] for key in calls}
        end = time.monotonic() + seconds
        with vb.base.progress_bar(None, "rounds", int(seconds), unit="s") as bar:
            while (left := end - time.monotonic()) > 0:
                journeys.append(journey(cores))
                for key, (call, x) in calls.items():
                    torch.set_num_threads(key[2])
                    call(x)
                    start = time.perf_counter()
                    call(x)
                    times[key].append(1e3 * (time.perf_counter() - start))
                time.sleep(PAUSE)
                bar.update(int(seconds - left) - bar.n)
    return journeys, times


def rows(base: Path, journeys: list[float], times: dict[tuple, list[float]]) -> list[vb.Row]:
    """Of each place that the cores were in: the journey, medians, and ratios to the baseline in eager mode."""
    far = np.array(journeys) > np.sqrt(min(journeys) * max(journeys))
    places = {"near": ~far, "far": far} if max(journeys) > APART * min(journeys) else {"one": far | True}
    data, device, found = vb.load_data("digits"), vb.rows.device_name("eager"), []

    def add(path: Path, metric: str, unit: str, how: str, context: dict, samples: np.ndarray) -> None:
        facts = vb.measurement.model_row_fields(vb.model.read_manifest(path).recipe, data) | {
            "metric": metric,
            "unit": unit,
            "context": context,
        }
        found.append(
            vb.Row(
                **facts, value=float(np.median(samples)), source=f"measured: {how}", samples=samples.round(4).tolist()
            )
        )

    for place, chosen in places.items():
        here = {"cores": place, "rounds": int(chosen.sum()), "device": device}
        for (path, name, threads), taken in times.items():
            context = here | {"threads": threads, "batch": 1, "backend": name}
            context |= {"artifact": vb.model.read_manifest(path).sha256[:12]}
            own, other = np.array(taken)[chosen], np.array(times[base, "eager", threads])[chosen]
            how = "median of the rounds in which the cores were there"
            add(path, "latency_p50", "ms", how, context, own)
            add(path, "latency_ratio", "ratio", how, context, own / other)
        how = "a byte from one core to another and back, the least of ten goes; median of the rounds"
        add(base, "core_journey", "ns", how, here, np.array(journeys)[chosen])
    return found


if __name__ == "__main__":
    sys.exit(main())
