"""measure: measure a saved model."""

import argparse
from pathlib import Path

from vitbench.cli.common import add_images, load_option_data, print_results
from vitbench.measurement.measures import Measures
from vitbench.rows.records import DEVICE_GROUPS, GROUPS

DEFAULTS = Measures()


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("measure", help="measure a saved model and add its rows to a results folder")
    parser.add_argument("model", help="a folder with a saved model")
    add_images(parser, "test images")
    parser.add_argument(
        "--versus", default="", metavar="DIR", help="a saved baseline to take turns with in the timings"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=list(DEFAULTS.batches), help="batch sizes to time (default: 1 8)"
    )
    parser.add_argument("--threads", type=int, default=DEFAULTS.threads, help="of the timed process (default: 2)")
    parser.add_argument("--rounds", type=int, default=DEFAULTS.rounds, help="timed calls of each model (default: 60)")
    parser.add_argument(
        "--starts",
        type=int,
        default=DEFAULTS.starts,
        help="fresh processes that share the rounds, so that no single one decides (default: 1)",
    )
    runners = (
        "what runs it: eager, cuda, torch_compile, onnxruntime, openvino, openvino_bf16 or executorch (default: eager)"
    )
    parser.add_argument("--backend", default=DEFAULTS.backend, help=runners)
    parser.add_argument(
        "--versus-backend",
        nargs="+",
        default=[""],
        help="what runs the baseline, several for a ratio to each (default: the same)",
    )
    parser.add_argument(
        "--what",
        nargs="+",
        default=list(DEFAULTS.what),
        metavar="GROUP",
        help=f"which of {', '.join(GROUPS)} (default: these), {', '.join(DEVICE_GROUPS)} to measure",
    )
    parser.add_argument(
        "--power",
        type=float,
        default=DEFAULTS.power,
        metavar="WATTS",
        help="what the device draws, to estimate energy without a counter",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="results folder to add the rows to")
    parser.add_argument(
        "--within",
        type=float,
        default=DEFAULTS.within,
        metavar="BYTES",
        help="with --what limit: only whether it runs in so much memory",
    )
    parser.set_defaults(command=_measure)


def _measure(options: argparse.Namespace) -> int:
    from vitbench.measurement import backends
    from vitbench.measurement.measuring import measure
    from vitbench.model import artifact
    from vitbench.rows.runs import Run

    measures = Measures(
        what=options.what,
        backend=options.backend,
        versus_backend=options.versus_backend,
        batches=options.batches,
        rounds=options.rounds,
        starts=options.starts,
        threads=options.threads,
        power=options.power,
        within=int(options.within),
    )
    for backend in (measures.backend, *measures.versus_backends):
        backends.require_backend(backend)
    for model in filter(None, (options.model, options.versus)):
        artifact.read_manifest(model)
    data = load_option_data(options)
    measure(options.model, data, Run(options.out), measures, versus=options.versus)
    print_results(Path(options.out))
    return 0
