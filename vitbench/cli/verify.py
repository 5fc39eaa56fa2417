"""verify."""

import argparse

from vitbench.cli.common import add_images, data_of


def add(commands: argparse._SubParsersAction) -> None:
    """Make the command known."""
    again = commands.add_parser("verify", help="make models of a results folder again and compare the numbers")
    again.add_argument("folder", help="a results folder, or its records.jsonl")
    add_images(again, "the images of the rows")
    again.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="only models of these methods")
    again.add_argument(
        "--models", type=int, default=4, help="how many, spread over those there are; 0: all (default: 4)"
    )
    again.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help="of top1, macs, params, bytes (default: all)"
    )
    again.add_argument(
        "--checkpoint", default="", metavar="FILE", help="the weights that the rows' baselines start from"
    )
    again.add_argument("--img-size", type=int, metavar="N", help="input height and width, where not the model's own")
    again.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from vitbench.rows.row_table import load_records
    from vitbench.run.verification import METRICS, verify

    checks = verify(
        load_records(options.folder),
        data_of(options),
        only=options.only,
        models=options.models,
        metrics=options.metrics or tuple(METRICS),
        checkpoint=options.checkpoint,
        img_size=options.img_size,
    )
    for check in checks:
        row = check.row
        verdict = "within" if check.within else "OUTSIDE"
        wanted = (
            f"{row['value']:.6g} [{row['low']:.6g}, {row['high']:.6g}]"
            if row["metric"] == "top1"
            else f"{row['value']:,.0f}"
        )
        found = f"{check.found:.6g}" if row["metric"] == "top1" else f"{check.found:,.0f}"
        print(f"{verdict:8} {row['key']} {row['method']:32} {row['metric']:8} row {wanted}, here {found}")
    outside = sum(not check.within for check in checks)
    print(
        f"{len(checks) - outside} of {len(checks)} rows within tolerance ({'; '.join(f'{name}: {how}' for name, how in METRICS.items())})"
    )
    return 1 if outside else 0
