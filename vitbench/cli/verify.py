"""verify: rebuild models from their rows and compare the numbers."""

import argparse

from vitbench.cli.common import add_images, load_option_data


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("verify", help="make models of a results folder again and compare the numbers")
    parser.add_argument("folder", help="a results folder, or its records.jsonl")
    add_images(parser, "the images of the rows")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="only models of these methods")
    parser.add_argument(
        "--models", type=int, default=4, help="how many, spread over those there are; 0: all (default: 4)"
    )
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help="of top1, macs, params, bytes (default: all)"
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="FILE", help="the weights that the rows' baselines start from"
    )
    parser.add_argument("--img-size", type=int, metavar="N", help="input height and width, where not the model's own")
    parser.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from vitbench.rows.row_table import load_records
    from vitbench.run.verification import METRICS, verify

    checks = verify(
        load_records(options.folder),
        load_option_data(options),
        only=options.only,
        models=options.models,
        metrics=options.metrics or tuple(METRICS),
        checkpoint=options.checkpoint,
        img_size=options.img_size,
    )
    for check in checks:
        row = check.row
        verdict = "within" if check.within else "OUTSIDE"
        expected = (
            f"{row['value']:.6g} [{row['low']:.6g}, {row['high']:.6g}]"
            if row["metric"] == "top1"
            else f"{row['value']:,.0f}"
        )
        measured = f"{check.measured:.6g}" if row["metric"] == "top1" else f"{check.measured:,.0f}"
        print(f"{verdict:8} {row['key']} {row['method']:32} {row['metric']:8} row {expected}, here {measured}")
    outside = sum(not check.within for check in checks)
    print(
        f"{len(checks) - outside} of {len(checks)} rows within tolerance ({'; '.join(f'{name}: {tolerance}' for name, tolerance in METRICS.items())})"
    )
    return 1 if outside else 0
