"""mine: from a model, a folder of images and a budget to a file that is within it."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vitbench.base.errors import InputError
from vitbench.cli.common import add_splits, add_weights

if TYPE_CHECKING:
    from vitbench.rows.runs import Run
    from vitbench.run.mined import Mined

PICTURE = "yours"


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "mine",
        help="try methods on your model and your images for some minutes, and keep the best file within a budget",
        description="Val images choose, test images report. The same command goes on where it stopped.",
    )
    parser.add_argument(
        "model", help="a folder with a saved model, or a model's name with --checkpoint or --pretrained"
    )
    parser.add_argument("dataset", metavar="folder", help="your images: a folder, with a sub-folder for each class")
    parser.add_argument(
        "--budget",
        required=True,
        metavar="LIMIT",
        help="2MB, 500kB, 300Mmacs, 10ms, or a share of the model's own: 0.25bytes, 0.5macs, 0.8latency",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long new models are started (default: 10)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=3,
        metavar="N",
        help="of each training, if time is left; 0 trains nothing (default: 3)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the trainings (default: 0)")
    parser.add_argument(
        "--out", default="", metavar="DIR", help="results folder (default: results/runs/mine-MODEL-FOLDER)"
    )
    add_splits(parser)
    add_weights(parser)
    parser.add_argument("--threads", type=int, default=2, help="of the timed process (default: 2)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each model (default: 20)")
    parser.set_defaults(command=_mine)


def _mine(options: argparse.Namespace) -> int:
    from vitbench.base.files import write_text
    from vitbench.base.paths import home
    from vitbench.figures.report import write_report
    from vitbench.rows.runs import Run
    from vitbench.run import mined as texts, mining
    from vitbench.run.lessons import parse_setting

    texts.parse_budget(options.budget)
    name = f"mine-{Path(options.model).name}-{Path(options.dataset).name}"
    run = Run(options.out or home() / "results" / "runs" / name)
    data, splits = mining.load_images(options.dataset, splits=dict(parse_setting(text) for text in options.splits))
    mined = mining.mine(
        options.model,
        data,
        options.budget,
        run,
        minutes=options.minutes,
        epochs=options.epochs,
        seed=options.seed,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        img_size=options.img_size,
        threads=options.threads,
        rounds=options.rounds,
    )
    lines = texts.findings(mined, run, data)
    lines += ["", "again:", f"  {_own_command(options, run.folder)}"]
    if mined.best is not None:
        lines += ["", "this model alone:", f"  {_compress_command(options, mined, run.folder, splits)}", ""]
        lines += [f"file:    {run.folder / 'best'}"]
    if mined.models:
        lines += [f"picture: {_draw(run, mined)}", f"report:  {write_report(run.folder)}"]
    write_text(run.folder / "mine.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    if mined.best is None:
        raise InputError(texts.nothing_within(mined))
    return 0


def _draw(run: "Run", mined: "Mined") -> Path:
    """Draw accuracy against the budget's cost."""
    import matplotlib.pyplot as plt

    from vitbench.figures.accuracy_cost import tradeoff
    from vitbench.figures.drawing import save_figure
    from vitbench.run.mined import METRICS

    chosen = mined.best.label if mined.best else ""
    figure, rows = tradeoff(run.rows(), METRICS[mined.cost], limit=mined.limit, chosen=chosen)
    alt = "Accuracy of your model and of those made from it against the cost that the budget limits; what is above it is shaded."
    save_figure(figure, run.figures, PICTURE, rows, alt=alt)
    plt.close(figure)
    return run.figures / f"{PICTURE}.png"


def _own_command(options: argparse.Namespace, folder: Path) -> str:
    """The command with all settings."""
    words = ["vitbench", "mine", options.model, options.dataset, "--budget", options.budget]
    for name in ("minutes", "epochs", "seed", "threads", "rounds"):
        words += [f"--{name}", f"{getattr(options, name):g}"]
    words += ["--out", str(folder)]
    words += ["--splits", *options.splits] if options.splits else []
    words += ["--checkpoint", options.checkpoint] if options.checkpoint else []
    words += ["--pretrained"] if options.pretrained else []
    words += ["--img-size", str(options.img_size)] if options.img_size else []
    return shlex.join(words)


def _compress_command(options: argparse.Namespace, mined: "Mined", folder: Path, splits: dict) -> str:
    """The command that makes the best model from the folder `base`."""
    from vitbench.methods.registry import method_of
    from vitbench.run.mined import settings_text

    assert mined.best is not None
    words = ["vitbench", "compress", str(folder / "base"), "--method", method_of(mined.best.config).name]
    if settings := settings_text(mined.best.config):
        words += ["--set", *settings]
    words += ["--dataset", options.dataset]
    words += ["--splits", *(f"{key}={json.dumps(value)}" for key, value in splits.items())] if splits else []
    return shlex.join([*words, "--out", str(folder / "again")])
