"""The command line: parse, call one function, print."""

import argparse
import errno
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from vitbench.errors import InputError
from vitbench.records import GROUPS

_CUT = "how to cut the data, for example test=1.0 (every image is a test image)"
_SPLITS = {"nargs": "+", "default": [], "metavar": "KEY=VALUE", "help": _CUT}


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 where a notebook failed; a wrong input prints one line and returns 2."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"vitbench: warning: {message}", file=sys.stderr)
            return options.command(options)
    except InputError as error:
        if options.debug:
            raise
        print(f"vitbench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if options.debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(
            f"vitbench: {error.filename or 'a file'} cannot be written ({error.strerror}); give a folder with free space "
            "that you own; what was finished is kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nvitbench: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitbench", description="Compress Vision Transformers, measure what it really costs, and compare."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the notebooks of a profile and write the report")
    run.add_argument("profile", help="quick, cifar10, imagenet, or a path to a YAML file of notebook parameters")
    run.add_argument("--only", nargs="+", default=[], metavar="NOTEBOOK", help="only these, by name or number (05)")
    run.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        dest="settings",
        help="parameters in place of the profile's, for example dataset=FOLDER train.epochs=5",
    )
    run.add_argument(
        "--workers", type=int, default=1, metavar="N", help="method notebooks at once (1: timings are then undisturbed)"
    )
    run.add_argument("--out", default="", metavar="DIR", help="results folder (default: results/runs/PROFILE)")
    run.set_defaults(command=_run)

    show = commands.add_parser("list", help="show notebooks, profiles, methods, or models")
    show.add_argument(
        "what", nargs="?", choices=("notebooks", "profiles", "methods", "models"), help="default: all but models"
    )
    show.set_defaults(command=_list)

    small = commands.add_parser("compress", help="compress a model and save it")
    small.add_argument("model", help="a folder with a saved model, or a model's name with --checkpoint or --pretrained")
    small.add_argument(
        "--method",
        nargs="*",
        default=[],
        metavar="NAME",
        help="one method, or several in order; none saves the model as it is",
    )
    small.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        dest="settings",
        help="config of a method, nested keys with dots (train.epochs=5); with several methods write METHOD.KEY=VALUE",
    )
    small.add_argument("--out", required=True, metavar="DIR", help="folder to save the compressed model to")
    small.add_argument("--record", metavar="DIR", help="results folder to add a row to, with the seconds that it took")
    small.add_argument(
        "--dataset", default="", help="images for the methods that need some: digits, a hub name, a folder"
    )
    small.add_argument("--splits", **_SPLITS)
    small.add_argument("--checkpoint", default="", metavar="FILE", help="weights for a model given by name")
    small.add_argument("--pretrained", action="store_true", help="timm's weights for a model given by name")
    small.add_argument(
        "--random", action="store_true", help="random weights for a model given by name: to measure size and speed only"
    )
    small.add_argument("--img-size", type=int, metavar="N", help="input height and width of a model given by name")
    small.add_argument("--depth", type=int, metavar="N", help="blocks of a model given by name (default: its own)")
    small.add_argument("--classes", type=int, metavar="N", help="outputs of a model given by name (default: its own)")
    small.set_defaults(command=_compress)

    size = commands.add_parser("measure", help="measure a saved model and add its rows to a results folder")
    size.add_argument("model", help="a folder with a saved model")
    size.add_argument("--dataset", default="digits", help="digits, a Hugging Face name, or a folder (default: digits)")
    size.add_argument("--dataset-name", default="", metavar="NAME", help="how rows and figures name the data set")
    size.add_argument("--splits", **_SPLITS)
    size.add_argument("--versus", default="", metavar="DIR", help="a saved baseline to take turns with in the timings")
    size.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes to time (default: 1 8)")
    size.add_argument("--threads", type=int, default=2, help="of the timed process (default: 2)")
    size.add_argument("--rounds", type=int, default=60, help="timed calls of each model (default: 60)")
    runners = (
        "what runs it: eager, cuda, torch_compile, onnxruntime, openvino, openvino_bf16 or executorch (default: eager)"
    )
    size.add_argument("--backend", default="eager", help=runners)
    size.add_argument("--versus-backend", default="", help="what runs the baseline (default: the same)")
    size.add_argument(
        "--what",
        nargs="+",
        default=list(GROUPS),
        metavar="GROUP",
        help=f"which of {', '.join(GROUPS)} to measure (default: all)",
    )
    size.add_argument("--out", required=True, metavar="DIR", help="results folder to add the rows to")
    size.set_defaults(command=_measure)

    report = commands.add_parser("report", help="write report.html from the rows of a results folder")
    report.add_argument("folder", help="a results folder, or its records.jsonl")
    report.set_defaults(command=_report)
    return parser


def _run(options: argparse.Namespace) -> int:
    from vitbench import lessons, paths, suite

    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: give a whole number of 1 or more")
    known = lessons.find_lessons()
    chosen = lessons.choose(known, options.only)
    values = lessons.read_profile(options.profile, options.settings, known)
    out = Path(options.out) if options.out else paths.home() / "results" / "runs" / Path(options.profile).stem
    outcomes = suite.run_suite(chosen, values, out.resolve(), options.workers)
    for outcome in outcomes:
        print(f"{outcome.status:8} {outcome.lesson.name}" + (f": {outcome.error}" if outcome.error else ""))
        if outcome.status == "failed":
            print(f"         {outcome.copy}")
    if (out / "records.jsonl").exists():
        _print_results(out)
    left = [lesson.name for lesson in chosen if lesson.name not in {outcome.lesson.name for outcome in outcomes}]
    if left:
        print(f"not run, because the baseline failed: {', '.join(left)}")
    return 1 if left or any(outcome.status == "failed" for outcome in outcomes) else 0


def _print_results(out: Path) -> None:
    from vitbench.comparison import findings
    from vitbench.records import load_records
    from vitbench.report import table_text, write_report

    rows = load_records(out)
    if not (rows["status"] == "ok").any():
        return
    print(f"\n{table_text(rows)}\n")
    for sentence in findings(rows):
        print(sentence)
    print(f"\nreport: {write_report(out)}")


def _list(options: argparse.Namespace) -> int:
    from vitbench import lessons
    from vitbench.methods import METHODS
    from vitbench.vit import model_names

    if options.what in (None, "notebooks"):
        print("notebooks:")
        for lesson in lessons.find_lessons():
            print(f"  {lesson.name:24} {lesson.minutes:4.1f} min  {lesson.title}")
    if options.what in (None, "profiles"):
        print("profiles:")
        for name, path in lessons.profiles().items():
            print(f"  {name:24} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    if options.what in (None, "methods"):
        print("methods:")
        for name, method in METHODS.items():
            values = ", ".join(f"{key}={value}" for key, value in method.config().to_dict().items())
            print(f"  {name:24} {(method.handler.__doc__ or '').splitlines()[0]}\n  {'':24} {values}")
    if options.what == "models":
        print("\n".join(model_names()))
    return 0


def _compress(options: argparse.Namespace) -> int:
    from vitbench import artifact, methods, vit
    from vitbench.measure import seconds_row
    from vitbench.runs import Run

    configs = [methods.make_config(name, values) for name, values in _method_settings(options).items()]
    if (Path(options.model) / artifact.RECIPE).is_file():
        model = artifact.load(options.model)
    elif not (options.checkpoint or options.pretrained or options.random):
        raise InputError(
            f"{options.model!r} is not a folder with a saved model; "
            "for a model by name give --checkpoint, --pretrained or --random"
        )
    else:
        model = vit.create_model(
            options.model,
            num_classes=options.classes,
            img_size=options.img_size,
            pretrained=options.pretrained,
            checkpoint=options.checkpoint,
            depth=options.depth,
        )
    data, start = _data(options) if options.dataset else None, time.monotonic()
    small = methods.compress(model, configs, data)
    seconds = time.monotonic() - start
    path = artifact.save(small, options.out)
    if options.record:
        Run(options.record).append([seconds_row(path, data, seconds)])
    print(f"{path}: {artifact.size_on_disk(path):,} bytes, {small.recipe.method}, made in {seconds:.1f} s")
    return 0


def _method_settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    from vitbench.lessons import parse_setting

    values: dict[str, dict[str, Any]] = {name: {} for name in options.method}
    if len(values) < len(options.method):
        raise InputError(
            f"--method {' '.join(options.method)}: name each method once; compress the result again for a second time"
        )
    for setting in options.settings:
        key, value = parse_setting(setting)
        first, dot, rest = key.partition(".")
        if first in values and dot:
            name, key = first, rest
        elif len(values) == 1:
            (name,) = values
        else:
            raise InputError(
                f"--set {setting}: give METHOD.KEY=VALUE with METHOD one of those in --method ({', '.join(values) or 'none given'})"
            )
        *outer, last = key.split(".")
        place = values[name]
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {setting}: {part} was given a value of its own before; give one or the other")
        place[last] = value
    return values


def _measure(options: argparse.Namespace) -> int:
    from vitbench import artifact, backends
    from vitbench.measure import measure
    from vitbench.runs import Run

    for backend in (options.backend, options.versus_backend or options.backend):
        backends.available(backend)
    for model in filter(None, (options.model, options.versus)):
        artifact.read_manifest(model)
    data = _data(options)
    measure(
        options.model,
        data,
        Run(options.out),
        versus=options.versus,
        batches=options.batches,
        threads=options.threads,
        rounds=options.rounds,
        backend=options.backend,
        versus_backend=options.versus_backend,
        what=options.what,
    )
    _print_results(Path(options.out))
    return 0


def _data(options: argparse.Namespace) -> Any:
    from vitbench.lessons import parse_setting
    from vitbench.suite import open_data

    name = getattr(options, "dataset_name", "")
    return open_data(options.dataset, name, dict(parse_setting(text) for text in options.splits))


def _report(options: argparse.Namespace) -> int:
    from vitbench.report import write_report

    print(write_report(options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
