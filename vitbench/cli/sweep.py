"""run, of a sweep's file; and status."""

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from vitbench.base.errors import InputError
from vitbench.cli.common import put


def add(commands: argparse._SubParsersAction) -> None:
    """Make the command known."""
    status = commands.add_parser("status", help="how far a sweep is, from another terminal or later")
    status.add_argument("folder", help="the sweep's results folder")
    status.set_defaults(command=_status)


def run(options: argparse.Namespace, values: dict[str, Any], out: Path) -> int:
    """Run the sweep that `values` of its file describe, or with --dry-run say what it would take."""
    from vitbench.rows.runs import Run
    from vitbench.run.lessons import parse_setting
    from vitbench.run.sweep.drive import outlook, plan, run_sweep
    from vitbench.run.sweep.executors import check_scheduler
    from vitbench.run.sweep.grid import sweep_of

    if options.only:
        raise InputError("--only is for notebooks; leave models, methods or seeds out of the sweep's file instead")
    check_scheduler(options.scheduler)
    for setting in options.settings:
        put(values, *parse_setting(setting), setting)
    sweep, folder = sweep_of(values), Run(out)
    found = plan(sweep, folder)
    expected = outlook(found, folder)
    print(f"{len(found.cells)} cells, {len(found.cells) - len(found.left)} of them finished before")
    if found.left:
        gigabytes = (
            f"at most {expected.bytes / 1e9:.2g} GB for models and checkpoints, {expected.free / 1e9:.3g} GB are free"
        )
        known = "nothing to go by: no such cell is among the rows yet"
        if expected.seconds is not None:
            alone = timedelta(seconds=round(expected.seconds / options.workers))
            known = f"about {alone} with --workers {options.workers}, as such cells took before"
        print(f"disk: {gigabytes}\ntime: {known}")
    if expected.bytes > expected.free:
        print("vitbench: warning: there may not be enough disk for this sweep", file=sys.stderr)
    if options.workers > 1 and "latency" in sweep.measures.what:
        print("vitbench: warning: cells that run beside each other disturb each other's timings", file=sys.stderr)
    if options.dry_run:
        for cell in found.left:
            print(f"  {cell.key} {cell.model.name} {cell.data.dataset} {cell.method}")
        return 0
    outcome = run_sweep(found, folder, options.workers, options.scheduler)
    print(", ".join(f"{outcome[kind]} {kind}" for kind in ("done", "finished before", "failed")))
    print(f"rows: {folder.records} (`vitbench report {out}` makes a page of them)")
    if outcome["failed"]:
        _print_failed(folder)
    return 1 if outcome["failed"] else 0


def _print_failed(folder: Any) -> None:
    from vitbench.run.sweep.drive import latest

    for row in latest(folder.records):
        if row.status == "failed":
            trace = folder.folder / "errors" / f"{row.context['cell']}.txt"
            print(f"failed {row.model} {row.method}: {row.error}" + (f"\n       {trace}" if trace.exists() else ""))


def _status(options: argparse.Namespace) -> int:
    from vitbench.run.sweep.drive import progress_of

    print(progress_of(Path(options.folder)))
    return 0
