"""Compare the ways to find a policy of multi-dimensional pruning: one ratio, an exact knapsack, and the Gaussian process.

    python benchmarks/solver.py results/runs/solver --test 2000

All meet one budget and are compensated alike; none is trained, and none sees the test images. The seconds are those of the whole
compression. Scores of units and moments, which all share, are computed before; each way measures its own table of latencies. The
knapsack measures losses at its first budget alone, since they depend on no budget.
Rows that exist are not measured again, so a run that was stopped goes on. What is in the cache takes no time, so a new run needs a
new cache: set VITBENCH_HOME to an empty folder.
"""

import argparse
import time

import torch

import vitbench as vb

WAYS = {
    "one ratio": {"how": "one_ratio"},
    "knapsack": {"how": "knapsack"},
    "Gaussian process, as long": {"how": "gp", "evaluations": 6, "first": 3},
    "Gaussian process": {"how": "gp"},
}


def main() -> None:
    """Prune to each budget in each way, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the results folder")
    parser.add_argument("--budgets", nargs="+", default=["macs=0.6", "macs=0.75", "latency=0.7"], help="cost=share")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--test", type=int, default=3000, help="number of test images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="images of a latency budget, and of its timing")
    parser.add_argument("--rounds", type=int, default=200, help="timed calls of each model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = vb.load_data("photographs", test=args.test)
    base = vb.baseline("deit_tiny_patch16_96", data, vb.TrainConfig(epochs=0))
    bench = vb.Bench(base, data, vb.Run(args.out), threads=args.threads, rounds=args.rounds)
    bench.measure(what=("accuracy", "size"))
    together = vb.methods.MultiDimensional(objective="cross_entropy")
    shared = vb.removal.Pruner(base.model, together, data, tokens=True)
    _ = shared.scores, shared.moments  # both are in the cache from here on
    header = ("budget", "way", "seconds", "top-1 %", "versus knapsack, points", "MACs", "time")
    print(f"| {' | '.join(header)} |", flush=True)
    for budget in args.budgets:
        cost, keep = budget.split("=")
        labels = {}
        for way in args.ways:
            batch = args.batch if cost == "latency" else 1
            config = together.replace(budget=cost, keep=float(keep), batch=batch, search=WAYS[way])
            labels[way] = compressed(bench, config)
        for way, label in labels.items():
            versus = bench.top1_difference_text(label, labels.get("knapsack", label)) if way != "knapsack" else ""
            values = {
                metric: bench.find_row(label, metric).value for metric in ("compress_seconds", "macs", "latency_ratio")
            }
            cells = (
                budget,
                way,
                f"{values['compress_seconds']:.0f}",
                bench.top1_text(label),
                versus,
                f"{values['macs'] / bench.find_row('baseline', 'macs').value:.3f}",
                f"{values['latency_ratio']:.3f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


def compressed(bench: vb.Bench, config: vb.methods.MultiDimensional) -> str:
    """Compress by `config`, with a row of the seconds if it was not done before; measure; and return the model's label."""
    start = time.monotonic()
    cached = vb.compress_cached(bench.base, config, bench.data)
    seconds = vb.run.seconds_row(cached.path, bench.data, time.monotonic() - start)
    bench.run.append([seconds])  # the first row of a model stays
    return bench.measure(config, what=("accuracy", "size", "latency"), batches=(config.batch,))


if __name__ == "__main__":
    main()
