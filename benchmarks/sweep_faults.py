"""A sweep whose workers and scheduler are killed, and the speed of a second worker.

    python benchmarks/sweep_faults.py faults --out results/runs/sweep-faults
    python benchmarks/sweep_faults.py scaling --out results/runs/sweep-scaling

`faults` runs the 200 cells of `sweep_digits.yaml` with 4 workers, kills a random worker 20 times and the process that submits
the cells once, starts that again, and counts the rows. `scaling` runs 48 of the cells with 1 and with 2 workers, each with
empty caches, and measures what a cell costs besides its own work. Both print their result and write it to `found.json`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml

import vitbench as vb

SWEEP = Path(__file__).with_name("sweep_digits.yaml")
CELLS, KILLS = 200, 20


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("faults", "scaling"))
    parser.add_argument("--out", required=True, metavar="DIR", help="results folder, new or empty")
    parser.add_argument("--workers", type=int, default=4, help="of `faults`")
    parser.add_argument("--every", type=float, default=6.0, help="seconds between the kills of workers, on average")
    options = parser.parse_args()
    out = vb.base.writable_folder(options.out, "results folder").resolve()
    if any(out.iterdir()):
        print(f"sweep_faults.py: {out} is not empty; give a new folder", file=sys.stderr)
        return 2
    result = faults(out, options.workers, options.every) if options.what == "faults" else scaling(out)
    result |= {"commit": vb.rows.commit(), "cpu": vb.rows.cpu_name(), "cores": os.cpu_count()}
    (out / "found.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if result.get("whole", True) else 1


def faults(out: Path, workers: int, every: float) -> dict:
    """Kill workers and the sweep while it runs, resume it, and count the rows."""
    rng, killed, stop = random.Random(0), [], threading.Event()

    def kill_workers() -> None:
        while len(killed) < KILLS and not stop.wait(rng.expovariate(1 / every)):
            alive = [
                process
                for process in psutil.process_iter(["cmdline"])
                if "vitbench.run.sweep.worker" in (process.info["cmdline"] or [])
            ]
            if alive:
                victim = rng.choice(alive)
                victim.kill()
                killed.append(victim.pid)

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        process = run(out, workers, home)
        threading.Thread(target=kill_workers, daemon=True).start()
        while len(killed) < KILLS // 2 and process.poll() is None:
            time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        at_kill = len(vb.run.latest_cell_rows(out / "records.jsonl"))
        status = run(out, workers, home).wait()
        stop.set()
        again = run(out, workers, home).wait()
    rows = vb.rows.read_rows(out / "records.jsonl")
    cells = [row.context["cell"] for row in rows if row.metric == "cell_seconds" and row.status == "ok"]
    keys = [row.key for row in rows if row.status == "ok"]
    result = {
        "cells": len(set(cells)),
        "doubled": len(cells) - len(set(cells)),
        "rows": len(keys),
        "rows doubled": len(keys) - len(set(keys)),
        "failed": sum(row.status == "failed" for row in vb.run.latest_cell_rows(out / "records.jsonl")),
        "workers killed": len(killed),
        "cells done when the scheduler was killed": at_kill,
        "status of the second run, and of a third": [status, again],
        "seconds": round(time.monotonic() - start, 1),
    }
    is_complete = result["cells"] == CELLS and not result["doubled"] and not result["rows doubled"]
    return {**result, "whole": is_complete and len(killed) == KILLS and (status, again) == (0, 0)}


def scaling(out: Path) -> dict:
    """The same cells with 1 and with 2 workers: seconds, their ratio, and seconds of a cell beyond its work."""
    values = yaml.safe_load(SWEEP.read_text())
    codes = {"weight_only": {"bits": [2, 3, 4, 5, 6, 8], "rounding": ["nearest", "second_order"]}}
    ranks = {"mixed_rank": {"keep": [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9]}}
    values |= {"seeds": [0, 1], "methods": ["baseline", codes, ranks]}
    file = out / "sweep.yaml"
    file.write_text(yaml.safe_dump(values))
    by_workers: dict = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as home:
            run(out / f"with-{workers}", workers, home, file).wait()
        status = json.loads((out / f"with-{workers}" / "sweep.json").read_text())
        by_workers[f"{workers} workers"] = {
            "cells": len(status["cells"]),
            "seconds": status["passed"],
            "work, seconds of all workers": status["work"]["seconds"],
            "starting, seconds of all workers": status["work"]["starting"],
        }
    one, two = by_workers.values()
    overhead = one["seconds"] - one["work, seconds of all workers"] - one["starting, seconds of all workers"]
    running = [run["seconds"] - run["starting, seconds of all workers"] / n for n, run in enumerate((one, two), 1)]
    return {
        **by_workers,
        "throughput, 2 workers over 1": one["seconds"] / two["seconds"],
        "throughput, 2 workers over 1, without the start of workers": running[0] / running[1],
        "seconds a cell beyond its work, worker kept": overhead / one["cells"],
        "seconds to start a worker": one["starting, seconds of all workers"],
    }


def run(out: Path, workers: int, home: str, file: Path = SWEEP, *settings: str) -> subprocess.Popen:
    """Start the command, with caches of its own."""
    command = [sys.executable, "-m", "vitbench.cli", "run", str(file), "--out", str(out), "--workers", str(workers)]
    command += ["--set", *settings] if settings else []
    return subprocess.Popen(command, env=os.environ | {"VITBENCH_HOME": home}, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
