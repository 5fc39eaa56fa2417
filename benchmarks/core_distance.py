"""How latencies depend on the distance of a virtual machine's cores, which the host may move while the machine runs.

    pip install -e '.[onnx]'
    python benchmarks/core_distance.py MODELS/baseline MODELS/static_int8 --backends eager onnxruntime --minutes 5 --out DIR

A round takes about a second. It times a byte from one core to another and back, then each model in each backend at batch 1 with
one thread and with two. A round is near if its byte time is below the geometric mean of the shortest and the longest, else far.
The first model is the baseline: a ratio is the median over rounds, to eager mode with as many threads. Linux only.
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

ROUND_TRIPS = 2000  # of the byte in one measurement
PAUSE_SECONDS = 0.5  # between rounds
MIN_RATIO = 1.5  # of the longest byte time to the shortest, above which rounds are near or far


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
        journeys, times = time_rounds(
            options.models, list(dict.fromkeys(["eager", *options.backends])), 60 * options.minutes
        )
        run.append(rows(options.models[0], journeys, times))
    except vb.InputError as error:
        print(f"core_distance.py: {error}", file=sys.stderr)
        return 2
    vb.cli.print_results(run.folder)
    return 0


def journey(cores: tuple[int, int]) -> float:
    """Nanoseconds of a byte from one core to another and back, while each core polls for it."""
    byte = mmap.mmap(-1, 1)
    allowed, child = os.sched_getaffinity(0), os.fork()
    os.sched_setaffinity(0, {cores[bool(child)]})
    if not child:
        for _ in range(ROUND_TRIPS):
            while not byte[0]:
                pass
            byte[0] = 0
        os._exit(0)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(ROUND_TRIPS // 10):
            byte[0] = 1
            while byte[0]:
                pass
        best = min(best, time.perf_counter() - start)
    os.waitpid(child, 0)
    os.sched_setaffinity(0, allowed)
    return 1e9 * best / (ROUND_TRIPS // 10)


def time_rounds(models: list[Path], names: list[str], seconds: float) -> tuple[list[float], dict[tuple, list[float]]]:
    """Byte times (ns), and latencies (ms) of each (model, backend, threads), by round."""
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
            while (seconds_left := end - time.monotonic()) > 0:
                journeys.append(journey(cores))
                for key, (call, x) in calls.items():
                    torch.set_num_threads(key[2])
                    call(x)
                    start = time.perf_counter()
                    call(x)
                    times[key].append(1e3 * (time.perf_counter() - start))
                time.sleep(PAUSE_SECONDS)
                bar.update(int(seconds - seconds_left) - bar.n)
    return journeys, times


def rows(base: Path, journeys: list[float], times: dict[tuple, list[float]]) -> list[vb.Row]:
    """For near and for far cores: the byte time, median latencies, and ratios to the baseline in eager mode."""
    far = np.array(journeys) > np.sqrt(min(journeys) * max(journeys))
    rounds_by_distance = (
        {"near": ~far, "far": far} if max(journeys) > MIN_RATIO * min(journeys) else {"one": far | True}
    )
    data, device, result = vb.load_data("digits"), vb.rows.device_name("eager"), []

    def add(path: Path, metric: str, unit: str, source: str, context: dict, samples: np.ndarray) -> None:
        row_fields = vb.measurement.model_row_fields(vb.model.read_manifest(path).recipe, data) | {
            "metric": metric,
            "unit": unit,
            "context": context,
        }
        result.append(
            vb.Row(
                **row_fields,
                value=float(np.median(samples)),
                source=f"measured: {source}",
                samples=samples.round(4).tolist(),
            )
        )

    for distance, selected in rounds_by_distance.items():
        shared = {"cores": distance, "rounds": int(selected.sum()), "device": device}
        for (path, name, threads), latencies in times.items():
            context = shared | {"threads": threads, "batch": 1, "backend": name}
            context |= {"artifact": vb.model.read_manifest(path).sha256[:12]}
            model_times, base_times = np.array(latencies)[selected], np.array(times[base, "eager", threads])[selected]
            source = "median of the rounds in which the cores were there"
            add(path, "latency_p50", "ms", source, context, model_times)
            add(path, "latency_ratio", "ratio", source, context, model_times / base_times)
        source = "a byte from one core to another and back, the least of ten goes; median of the rounds"
        add(base, "core_journey", "ns", source, shared, np.array(journeys)[selected])
    return result


if __name__ == "__main__":
    sys.exit(main())
