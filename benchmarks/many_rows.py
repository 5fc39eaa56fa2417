"""A records file of a million rows: the time to load, filter and draw it, and the memory.

python benchmarks/many_rows.py --rows 1000000
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import vitbench as vb

SEEDS, MODELS = 20, 100
OTHERS = (
    "top5",
    "cross_entropy",
    "params",
    "macs",
    "int8_macs",
    "bytes_predicted",
    "part_a",
    "part_b",
    "part_c",
    "part_d",
)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--file", default="", help="a records file to keep and use again")
    parser.add_argument("--out", default="", metavar="DIR", help="folder to write found.json to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(options.file or Path(folder, "records.jsonl"))
        if not file.exists():
            write(file, options.rows)

        start = time.monotonic()
        rows = vb.load_records(file)
        loaded = time.monotonic()
        experiment = vb.rows.experiment_rows(rows)
        filtered = time.monotonic()
        vb.figures.tradeoff(experiment, "bytes")[0].savefig(Path(folder, "figure.png"))
        drawn = time.monotonic()
        size = file.stat().st_size
    result = {
        "rows": options.rows,
        "MB": size / 1e6,
        "load, s": loaded - start,
        "filter, s": filtered - loaded,
        "rows that are drawn": len(experiment),
        "draw, s": drawn - filtered,
        "in all, s": drawn - start,
        "peak, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "commit": vb.rows.commit(),
        "cpu": vb.rows.cpu_name(),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        (vb.base.writable_folder(options.out, "results folder") / "found.json").write_text(
            json.dumps(result, indent=1) + "\n"
        )
    return 0


def write(file: Path, count: int) -> None:
    """Write `count` rows as a sweep does, twelve a cell: models x seeds x (a baseline and settings of a method)."""
    written, settings = 0, 1 + count // (12 * SEEDS * MODELS)
    for model in range(MODELS):
        rows = []
        for seed in range(SEEDS):
            for setting in range(settings):
                config = {
                    "group": 32,
                    "rounding": "second_order",
                    "layers": ["qkv", "proj", "fc1", "fc2"],
                    "step": setting,
                }
                steps = [{"method": "weight_only", "config": config}] if setting else []
                shared = {
                    "model": f"model_{model}",
                    "dataset": "digits",
                    "data_fingerprint": "9a6ff6b46c04c5f8",
                    "method": "weight_only" if steps else "baseline",
                    "config": {"origin": {"head": "random", "train": {"seed": seed, "epochs": 60}}, "methods": steps},
                    "seed": seed,
                    "context": {"artifact": f"{model:03}{seed:03}{setting:06}"},
                }
                accuracy = 0.95 - 0.5 / (1 + setting)
                values = {"top1": accuracy, "bytes": 1e6 - 5000.0 * setting} | dict.fromkeys(OTHERS, 1.0)
                for metric, value in values.items():
                    if written < count:
                        row = vb.Row(**shared, metric=metric, unit="one", value=value, source="measured: made up")
                        rows.append(row.with_provenance("9a4a9199a0e4", "f03b6538caec"))
                        written += 1
        vb.rows.append_rows(file, rows)


if __name__ == "__main__":
    sys.exit(main())
