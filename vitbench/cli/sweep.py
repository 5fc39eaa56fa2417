"""run with the file of a sweep, and status."""

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from vitbench.base.errors import InputError
from vitbench.cli.common import set_nested


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    status = commands.add_parser("status", help="how far a sweep is, from another terminal or later")
    status.add_argument("folder", help="the sweep's results folder")
    status.set_defaults(command=_status)


def run(options: argparse.Namespace, values: dict[str, Any], out: Path) -> int:
    """Run the sweep whose file holds `values`, or with --dry-run print its cells and what they would take."""
    from vitbench.rows.runs import Run
    from vitbench.run.lessons import parse_setting
    from vitbench.run.sweep.drive import estimate_sweep, plan, run_sweep
    from vitbench.run.sweep.executors import check_scheduler
    from vitbench.run.sweep.grid import parse_sweep

    if options.only:
        raise InputError("--only is for notebooks; leave models, methods or seeds out of the sweep's file instead")
    check_scheduler(options.scheduler)
    for setting in options.settings:
        set_nested(values, *parse_setting(setting), setting)
    sweep, folder = parse_sweep(values), Run(out)
    sweep_plan = plan(sweep, folder)
    estimate = estimate_sweep(sweep_plan, folder)
    print(f"{len(sweep_plan.cells)} cells, {len(sweep_plan.cells) - len(sweep_plan.remaining)} of them finished before")
    if sweep_plan.remaining:
        gigabytes = (
            f"at most {estimate.bytes / 1e9:.2g} GB for models and checkpoints, {estimate.free / 1e9:.3g} GB are free"
        )
        time_text = "nothing to go by: no such cell is among the rows yet"
        if estimate.seconds is not None:
            duration = timedelta(seconds=round(estimate.seconds / options.workers))
            time_text = f"about {duration} with --workers {options.workers}, as such cells took before"
        print(f"disk: {gigabytes}\ntime: {time_text}")
    if estimate.bytes > estimate.free:
        print("vitbench: warning: there may not be enough disk for this sweep", file=sys.stderr)
    if options.workers > 1 and "latency" in sweep.measures.what:
        print("vitbench: warning: cells that run beside each other disturb each other's timings", file=sys.stderr)
    if options.dry_run:
        for cell in sweep_plan.remaining:
            print(f"  {cell.key} {cell.model.name} {cell.data.dataset} {cell.method}")
        return 0
    outcome = run_sweep(sweep_plan, folder, options.workers, options.scheduler)
    print(", ".join(f"{outcome[kind]} {kind}" for kind in ("done", "finished before", "failed")))
    print(f"rows: {folder.records} (`vitbench report {out}` makes a page of them)")
    if outcome["failed"]:
        _print_failed(folder)
    return 1 if outcome["failed"] else 0


def _print_failed(folder: Any) -> None:
    from vitbench.run.sweep.drive import latest_cell_rows

    for row in latest_cell_rows(folder.records):
        if row.status == "failed":
            trace = folder.folder / "errors" / f"{row.context['cell']}.txt"
            print(f"failed {row.model} {row.method}: {row.error}" + (f"\n       {trace}" if trace.exists() else ""))


def _status(options: argparse.Namespace) -> int:
    from vitbench.run.sweep.drive import sweep_status

    print(sweep_status(Path(options.folder)))
    return 0
