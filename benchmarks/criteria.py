"""Compare the criteria of pruning: top-1 on test images after a share of the neurons of every block is removed.

    python benchmarks/criteria.py results/runs/criteria --test 500

Rows that exist are not measured again, so a run that was stopped goes on. Nothing is trained.
"""

import argparse
import itertools

import vitbench as vb

CRITERIA = {
    "magnitude": vb.removal.Criterion(name="magnitude"),
    "activation": vb.removal.Criterion(name="activation"),
    "taylor": vb.removal.Criterion(name="taylor"),
    "hsic, cka": vb.removal.Criterion(name="hsic", normalise="cka"),
    "hsic, official": vb.removal.OFFICIAL_CRITERION,
    "hsic, corrected": vb.removal.Criterion(name="hsic", normalise="corrected"),
}


def main() -> None:
    """Prune at each share with each criterion, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the results folder")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4], help="of neurons to remove")
    parser.add_argument("--compensation", nargs="+", default=["none", "ridge"], choices=["none", "mean", "ridge"])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--test", type=int, default=3000, help="number of test images")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    data = vb.load_data("photographs", test=args.test)
    base = vb.baseline("deit_tiny_patch16_96", data, vb.TrainConfig(epochs=0))
    bench = vb.Bench(base, data, vb.Run(args.out), threads=args.threads)
    print(f"| criterion | compensation | {' | '.join(f'{100 * share:g} %' for share in args.shares)} |", flush=True)
    for name, compensation in itertools.product(args.criteria, args.compensation):
        cells = []
        for share in args.shares:
            config = vb.methods.Pruning(neurons=share, heads=0.0, criterion=CRITERIA[name], compensation=compensation)
            row = bench.find_row(bench.measure(config, what=("accuracy",)), "top1")
            cells.append(f"{100 * row.value:.1f}")
        print(f"| {name} | {compensation} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
