"""Compare ways to merge tokens at equal multiply-accumulates: top-1 on test images, and the paired difference from all tokens.

    python benchmarks/tokens.py results/runs/tokens --splits train=2000 val=500 test=600
    python benchmarks/tokens.py results/runs/tokens-224 --dataset FOLDER --model deit_tiny_patch16_224 \\
        --checkpoint deit_tiny_patch16_224.safetensors --splits test=744 val=0 calibration=256

Rows that exist are not measured again, so a run that was stopped goes on. Nothing is trained.
"""

import argparse

import torch

import vitbench as vb

FORMS = {
    "constant": {"schedule": "constant"},  # the paper's
    "decreasing": {"schedule": "decreasing"},
    "calibrated": {"schedule": "calibrated"},
    "ward": {"matching": "ward"},
    "calibrated, ward": {"schedule": "calibrated", "matching": "ward"},
}


def main() -> None:
    """Merge to each share of the multiply-accumulates in each form, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the results folder")
    vb.cli.add_images(parser, "the images")
    parser.set_defaults(dataset="photographs")
    parser.add_argument("--model", default="deit_tiny_patch16_96")
    parser.add_argument("--checkpoint", default="", help="weights for the model")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.7, 0.6], help="shares of the MACs to keep")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--samples", type=int, default=128, help="calibration images of a calibrated schedule")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = vb.cli.load_option_data(args)
    base = vb.baseline(args.model, data, vb.TrainConfig(epochs=0), checkpoint=args.checkpoint)
    bench = vb.Bench(base, data, vb.Run(args.out), threads=args.threads)
    dense = bench.find_row(bench.measure(what=("accuracy", "size")), "macs").value
    print(f"all tokens: {bench.top1_text('baseline')}\n", flush=True)
    print(
        "| MACs to keep | form | MACs left | top-1 % [95 %] | points from all tokens |\n|---|---|---|---|---|",
        flush=True,
    )
    for keep in args.keeps:
        for form in args.forms:
            config = vb.methods.TokenMerging(keep=keep, samples=args.samples, **FORMS[form])
            label = bench.measure(config, what=("accuracy", "size"))
            left = bench.find_row(label, "macs").value / dense
            cells = (
                f"{keep:g}",
                form,
                f"{left:.4f}",
                bench.top1_text(label),
                bench.top1_difference_text(label, "baseline"),
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
