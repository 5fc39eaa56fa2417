"""run, list, report and figure: notebooks and what is made of their rows."""

import argparse
from pathlib import Path

from vitbench.base.errors import InputError
from vitbench.cli.common import add_settings, print_results


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser."""
    run = commands.add_parser("run", help="run the notebooks of a profile, or a sweep, and write the report")
    run.add_argument(
        "profile",
        help="quick, cifar10, imagenet, or a path to a YAML file: of notebook parameters, or of a sweep (it has models, "
        "datasets and methods)",
    )
    run.add_argument("--only", nargs="+", default=[], metavar="NOTEBOOK", help="only these, by name or number (05)")
    run.add_argument(
        "--notebooks",
        default="",
        metavar="DIR",
        help="run the notebooks of this folder, which are programs, with its profiles (default: the project's own)",
    )
    add_settings(
        run,
        "parameters in place of the profile's, for example dataset=FOLDER train.epochs=5, or 08.tuned.epochs=5 of lesson 08",
    )
    run.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="method notebooks, or cells of a sweep, at once (1: timings are then undisturbed)",
    )
    run.add_argument(
        "--scheduler",
        default="",
        metavar="WHO",
        help="of a sweep: dask (a cluster on this machine), slurm, pbs, sge, lsf, or tcp://HOST:PORT of a running Dask scheduler (default: processes of this machine)",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="of a sweep: say how many cells, how long and how much disk"
    )
    run.add_argument("--out", default="", metavar="DIR", help="results folder (default: results/runs/PROFILE)")
    run.set_defaults(command=_run)

    list_parser = commands.add_parser("list", help="show notebooks, profiles, methods, models, devices, or figures")
    list_parser.add_argument(
        "what",
        nargs="?",
        choices=("notebooks", "profiles", "methods", "models", "devices", "figures"),
        help="default: notebooks, profiles and methods",
    )
    list_parser.set_defaults(command=_list)

    report = commands.add_parser("report", help="write report.html from the rows of results folders")
    report.add_argument(
        "folders", nargs="+", help="a results folder, or its records.jsonl; rows of several are one table"
    )
    report.add_argument("--out", default="", metavar="DIR", help="folder for the page (default: the results folder)")
    report.set_defaults(command=_report)

    figure = commands.add_parser("figure", help="draw one figure from the rows of results folders")
    figure.add_argument("name", help="what to draw; `list figures` names them")
    figure.add_argument(
        "--rows",
        nargs="+",
        required=True,
        metavar="DIR",
        help="results folders; all rows of the last one's model count",
    )
    figure.add_argument("--out", required=True, metavar="FILE", help="file to write: .png, .svg or .pdf")
    figure.add_argument(
        "--format", default="", choices=("pdf", "svg", "png"), help="kind of the file, if --out has no such ending"
    )
    figure.add_argument(
        "--width",
        type=float,
        metavar="INCHES",
        help="width in print (default: the figure's own); below 5 it is laid out for one column of a paper",
    )
    figure.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="METHOD_OR_LABEL",
        help="the models to show beside the baseline, by method or by a label of the rows or of the figure",
    )
    figure.add_argument(
        "--label",
        nargs="+",
        default=[],
        action="extend",
        metavar="OLD=NEW",
        dest="names",
        help="what to write instead of a method's name or of a label",
    )
    figure.add_argument("--no-title", action="store_true", help="leave out the title, for a figure with a caption")
    figure.add_argument("--batch", type=int, default=1, help="batch size of the times (default: 1)")
    figure.add_argument("--style", default="", metavar="FILE", help="a matplotlib style file of your own")
    figure.set_defaults(command=_figure)


def _run(options: argparse.Namespace) -> int:
    from vitbench.base import paths
    from vitbench.cli import sweep
    from vitbench.run import lessons, suite
    from vitbench.run.sweep.grid import read_sweep_file

    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: give a whole number of 1 or more")
    out = Path(options.out) if options.out else paths.home() / "results" / "runs" / Path(options.profile).stem
    if (sweep_settings := read_sweep_file(options.profile)) is not None:
        if options.notebooks:
            raise InputError("--notebooks is for profiles; a sweep runs no notebook")
        return sweep.run(options, sweep_settings, out.resolve())
    if options.scheduler or options.dry_run:
        raise InputError("--scheduler and --dry-run are for sweeps; give a YAML file with models, datasets and methods")
    known_lessons = lessons.find_lessons(options.notebooks)
    selected = lessons.choose(known_lessons, options.only)
    values = lessons.read_profile(options.profile, options.settings, known_lessons, options.notebooks)
    outcomes = suite.run_suite(selected, values, out.resolve(), options.workers)
    for outcome in outcomes:
        print(f"{outcome.status:8} {outcome.lesson.name}" + (f": {outcome.error}" if outcome.error else ""))
        if outcome.status == "failed" and outcome.executed_path.exists():
            print(f"         {outcome.executed_path}")
    if (out / "records.jsonl").exists():
        print_results(out)
    not_run = [lesson.name for lesson in selected if lesson.name not in {outcome.lesson.name for outcome in outcomes}]
    if not_run:
        print(f"not run, because the baseline failed: {', '.join(not_run)}")
    return 1 if not_run or any(outcome.status == "failed" for outcome in outcomes) else 0


def _list(options: argparse.Namespace) -> int:
    from vitbench.edge.model import load_profiles
    from vitbench.methods.registry import METHODS
    from vitbench.model.names import model_names
    from vitbench.run import lessons

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
            summary = (method.handler.__doc__ or "").partition("\n")[0]  # python -OO leaves none
            print(f"  {name:24} {summary}\n  {'':24} {values}")
    if options.what == "devices":
        for kind, group in (("devices", load_profiles().devices), ("links", load_profiles().links)):
            print(f"{kind}:")
            for name, profile in group.items():
                print(f"  {name:24} {profile.title}")
    if options.what == "figures":
        from vitbench.figures.gallery import GALLERY

        for name, (title, _) in GALLERY.items():
            print(f"{name:24} {title}")
    if options.what == "models":
        print("\n".join(model_names()))
    return 0


def _report(options: argparse.Namespace) -> int:
    from vitbench.figures.report import write_report

    print(write_report(*options.folders, out=options.out))
    return 0


def _figure(options: argparse.Namespace) -> int:
    from vitbench.figures.gallery import draw, load_folders

    out = _with_format(options.out, options.format)
    others = draw(
        options.name,
        load_folders(options.rows),
        out,
        batch=options.batch,
        style_file=options.style,
        width=options.width,
        title=not options.no_title,
        only=options.only,
        names=dict(_renaming(text) for text in options.names),
    )
    print(out + (f" ({others} rows of other models or images are not in it)" if others else ""))
    return 0


def _with_format(out: str, kind: str) -> str:
    """The path of a figure, with the ending of the kind that was asked for."""
    ending = Path(out).suffix
    if not kind or ending == f".{kind}":
        return out
    if ending in (".pdf", ".svg", ".png"):
        raise InputError(f"--out {out!r} ends in {ending!r} and --format is {kind}; give one of them")
    return f"{out}.{kind}"


def _renaming(text: str) -> tuple[str, str]:
    """A method or label, and what to call it, from OLD=NEW; labels may have = inside brackets, so the last = divides."""
    old, equals, new = text.rpartition("=")
    if not (equals and old and new):
        raise InputError(f"--label {text!r} is not OLD=NEW, such as --label weight_only=ours")
    return old, new
