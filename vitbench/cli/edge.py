"""bundle, adopt and edge: other devices, measured and modelled."""

import argparse
from pathlib import Path

from vitbench.cli.common import add_splits, load_option_data, print_results


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    bundle = commands.add_parser("bundle", help="export models and a script that measures them without PyTorch")
    bundle.add_argument("models", nargs="+", metavar="MODEL", help="folders with saved models, the baseline among them")
    bundle.add_argument("--out", required=True, metavar="DIR", help="folder to write, to copy to the device")
    runners = "what runs them there: onnxruntime, openvino (default: onnxruntime)"
    bundle.add_argument("--backends", nargs="+", default=["onnxruntime"], metavar="NAME", help=runners)
    bundle.add_argument("--batches", type=int, nargs="+", default=[1], help="batch sizes to time (default: 1)")
    images = "images to run: digits, a Hugging Face name, a folder (default: random numbers)"
    bundle.add_argument("--dataset", default="", help=images)
    bundle.add_argument("--dataset-name", default="", metavar="NAME", help="how rows and figures name the data set")
    add_splits(bundle)
    bundle.add_argument("--rows", default="", metavar="DIR", help="results folder whose accuracies and sizes go along")
    bundle.set_defaults(command=_bundle)

    adopt = commands.add_parser("adopt", help="add a measured bundle's results to a results folder")
    adopt.add_argument("bundle", help="the bundle's folder, with answers.json from the device")
    adopt.add_argument("--out", required=True, metavar="DIR", help="results folder of that device")
    adopt.add_argument("--name", default="", help="how to name the device (default: its own name)")
    adopt.set_defaults(command=_adopt)

    edge = commands.add_parser("edge", help="model what the measured models cost on other devices")
    edge.add_argument("folder", help="a results folder with bytes, MACs and memory of models")
    edge.add_argument(
        "--devices", nargs="+", default=[], metavar="NAME", help="default: all; `list devices` names them"
    )
    edge.add_argument("--links", nargs="+", default=[], metavar="NAME", help="default: all")
    edge.add_argument("--profiles", default="", metavar="FILE", help="a YAML file of further devices and links")
    edge.add_argument("--memory", type=float, metavar="BYTES", help="what a model may take (default: the device's)")
    edge.add_argument(
        "--storage", type=float, metavar="BYTES", help="0: a device that keeps nothing (default: its own)"
    )
    edge.add_argument(
        "--first", action="store_true", help="the first inference after a restart, with transfer and load"
    )
    energy = "board: power x time; operations: the chip's sums and products alone (default: board)"
    edge.add_argument("--energy", choices=("board", "operations"), default="board", help=energy)
    edge.set_defaults(command=_edge)


def _bundle(options: argparse.Namespace) -> int:
    from vitbench.base.files import check_target
    from vitbench.edge.bundle import KIND, make_bundle

    check_target(options.out, KIND)
    data = load_option_data(options) if options.dataset else None
    out = make_bundle(
        options.models, options.out, data, runtimes=options.backends, batches=options.batches, rows=options.rows
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB; copy it to the device and run `python3 measure.py` in it")
    return 0


def _adopt(options: argparse.Namespace) -> int:
    from vitbench.edge.bundle import import_answers

    count = import_answers(options.bundle, options.out, options.name)
    print(f"{options.out}: {count} rows")
    print_results(Path(options.out))
    return 0


def _edge(options: argparse.Namespace) -> int:
    from vitbench.edge import rows
    from vitbench.edge.model import Deployment, load_profiles
    from vitbench.rows.runs import Run

    profiles = load_profiles(options.profiles)
    deployment = Deployment(first=options.first, memory=options.memory, storage=options.storage, energy=options.energy)
    run = Run(options.folder)
    modelled_rows = rows.modelled(run.rows(), profiles, options.devices, options.links, deployment)
    run.append(modelled_rows)
    print(rows.modelled_table(modelled_rows))
    return 0
