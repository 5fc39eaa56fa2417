"""Run a sweep and report its progress: finished cells are skipped, a failure is a row, a worker that died is replaced.

`estimate_sweep` estimates time and bytes before a sweep runs, from rows of earlier cells.
"""

import contextlib
import json
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from vitbench.base import paths, progress
from vitbench.base.errors import InputError
from vitbench.base.files import write_text
from vitbench.base.locks import is_locked, locked
from vitbench.data.splits import ImageData
from vitbench.measurement.cost import model_row_fields
from vitbench.model import vit
from vitbench.model.recipe import Recipe
from vitbench.rows.records import Row, read_rows
from vitbench.rows.runs import Run
from vitbench.run.cache import create_initial_model
from vitbench.run.sweep.executors import Workers, open_workers
from vitbench.run.sweep.grid import Cell, Sweep, cells, with_fingerprints
from vitbench.run.sweep.worker import CellTimeout

CELL_METRIC = "cell_seconds"
STATE_FILE = "sweep.json"  # read by `status`
RECONNECT_SECONDS = 120  # how long a sweep waits for a scheduler that went away
STATUS_SECONDS = 2.0  # between two writings of the state file


@dataclass(frozen=True)
class Plan:
    """A checked sweep.

    Attributes:
        row_fields: by `Cell.key`, the fields that rows of the cell's model share.
        recipes: by `Cell.base`, the recipes of the models before compression.
        done: the keys of the cells that are finished.
    """

    sweep: Sweep
    cells: list[Cell]
    row_fields: dict[str, dict[str, Any]]
    recipes: dict[str, Recipe]
    done: set[str]

    @property
    def remaining(self) -> list[Cell]:
        """The cells to run."""
        return [cell for cell in self.cells if cell.key not in self.done]


def plan(sweep: Sweep, run: Run) -> Plan:
    """Check every cell against its images and its model before any training.

    Raises:
        InputError: missing images, or a model that is unknown or does not fit them.
    """
    from vitbench.run.sweep.work import open_images

    untrained_models: dict[str, tuple[ImageData, Recipe]] = {}
    checked_cells, row_fields, recipes = [], {}, {}
    for cell in cells(sweep):
        if cell.base not in untrained_models:
            data = open_images(cell)
            start = create_initial_model(cell.model.name, data, cell.train, **cell.model.start())
            untrained_models[cell.base] = data, start.recipe
        data, recipe = untrained_models[cell.base]
        cell = with_fingerprints(cell, data, recipe)
        recipes[cell.base] = recipe
        checked_cells.append(cell)
        methods = [step.to_dict() for step in cell.steps]
        fields = model_row_fields(recipe, data)
        config = {**fields["config"], "methods": methods}
        row_fields[cell.key] = fields | {"method": cell.method, "config": config}
    done = {row.context["cell"] for row in latest_cell_rows(run.records) if row.status == "ok"}
    return Plan(sweep, checked_cells, row_fields, recipes, done)


def latest_cell_rows(records: Path) -> list[Row]:
    """The last row of each cell's outcome: its seconds, or its error."""
    if not records.exists():
        return []
    rows = [row for row in read_rows(records, containing=f'"metric":"{CELL_METRIC}"') if row.metric == CELL_METRIC]
    return list({row.context["cell"]: row for row in rows}.values())


def run_sweep(plan: Plan, run: Run, workers: int = 1, scheduler: str = "") -> Counter:
    """Run the remaining cells of a sweep; each becomes rows in `run`, one of them `cell_seconds`, done or failed.

    Returns:
        The numbers of cells done, failed, and finished before.

    Raises:
        InputError: another run of a sweep is at work in the folder, or its rows cannot be written.
    """
    busy_message = f"another sweep is at work in {str(run.folder)!r}; wait for it or give another --out"
    with locked(run.folder / "sweep.lock", busy_message):
        outcome = Counter({"finished before": len(plan.cells) - len(plan.remaining)})
        sweep_run = _SweepRun(plan, run, outcome)
        with progress.progress_bar(None, "cells", total=len(plan.cells), unit="cell") as bar:
            bar.update(outcome["finished before"])
            sweep_run.run_to_end(scheduler, workers, bar)
        return outcome


@dataclass
class _SweepRun:
    """The state of a running sweep."""

    plan: Plan
    run: Run
    outcome: Counter
    tries: Counter = field(default_factory=Counter)
    finished_baselines: set[str] = field(default_factory=set)  # by `Cell.base`
    worker_seconds: Counter = field(default_factory=Counter)  # of all workers, by kind
    begin: float = field(default_factory=time.monotonic)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    dashboard_link: str = ""
    last_status_time: float = 0.0

    def run_to_end(self, scheduler: str, workers: int, bar: Any) -> None:
        """Submit cells until each has an outcome; wait for a scheduler that went away."""
        remaining = {cell.key: cell for cell in self.plan.remaining}
        while remaining:
            with self._open_workers(scheduler, workers) as engine:
                if engine.dashboard_link != self.dashboard_link:
                    bar.write(f"dashboard: {engine.dashboard_link}")
                self.dashboard_link = engine.dashboard_link
                self._run_with(engine, remaining, bar)
            if remaining:
                bar.write("the scheduler went away; waiting for it")

    @contextlib.contextmanager
    def _open_workers(self, scheduler: str, workers: int) -> Iterator[Workers]:
        until = time.monotonic() + (RECONNECT_SECONDS if self.tries or self.finished_baselines else 0)
        while True:
            try:
                opened = open_workers(scheduler, workers, self.plan.sweep.resources)
                engine = opened.__enter__()
                break
            except InputError:
                if time.monotonic() > until:
                    raise
                time.sleep(1)
        try:
            yield engine
        finally:
            with contextlib.suppress(OSError, TimeoutError):  # raised by a scheduler that is gone
                opened.__exit__(None, None, None)

    def _run_with(self, engine: Workers, remaining: dict[str, Cell], bar: Any) -> None:
        """Run the remaining cells while the engine is alive, baselines first; take out those with an outcome."""
        waiting: dict[str, list[Cell]] = defaultdict(list)
        running: dict[Future, tuple[str, Cell]] = {}

        def submit(what: str, cell: Cell) -> None:
            request = {"what": what, "cell": cell.to_dict(), "threads": cell.measures.threads}
            running[engine.submit(request, self.plan.sweep.seconds)] = what, cell

        for cell in remaining.values():
            if cell.base in self.finished_baselines:
                submit("cell", cell)
            else:
                waiting[cell.base].append(cell)
        for group in waiting.values():
            submit("base", group[0])
        while running:
            done, _ = wait(running, timeout=STATUS_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                what, cell = running.pop(future)
                result = self._result(future, cell, engine)
                if result is None:  # its worker died
                    if engine.alive():
                        submit(what, cell)
                    continue
                if what == "base" and "error" not in result:
                    self.finished_baselines.add(cell.base)
                    for waiting_cell in waiting.pop(cell.base):
                        submit("cell", waiting_cell)
                    continue
                if what == "base":
                    result = result | {"error": f"its baseline: {result['error']}"}
                for ended_cell in waiting.pop(cell.base) if what == "base" else [cell]:
                    self._record(ended_cell, result)
                    del remaining[ended_cell.key]
                    bar.update(1)
            bar.set_postfix_str(f"{self.outcome['failed']} failed", refresh=sys.stdout.isatty())
            self._write_status(running)
            if not engine.alive():
                return

    def _result(self, future: Future, cell: Cell, engine: Workers) -> dict[str, Any] | None:
        """A worker's result, or why there is none as `error`; None if the request is to be submitted again."""
        try:
            result = future.result()
            self.worker_seconds.update({kind: result[kind] for kind in ("seconds", "starting") if kind in result})
            return result
        except CellTimeout as error:
            return {"error": str(error)}
        except CancelledError:  # the scheduler is gone, which is no failure of the cell
            return None
        except Exception as error:  # a worker that died; each engine raises its own exception
            if not engine.alive():
                return None
            self.tries[cell.key] += 1
            if self.tries[cell.key] <= self.plan.sweep.retries:
                return None
            return {"error": f"{' '.join(str(error).split())[:300]}; tried {self.tries[cell.key]} times"}

    def _record(self, cell: Cell, result: dict[str, Any]) -> None:
        """Append all rows of a cell at once."""
        rows = [Row(**values) for values in result.get("rows", [])]
        for environment in result.get("environments", {}).values():
            self.run.keep_environment(environment)
        error = result.get("error") or next(
            (f"{row.metric}: {row.error}" for row in rows if row.status == "failed"), ""
        )
        ended = {"status": "failed", "error": error} if error else {"value": result["seconds"]}
        cell_row = Row(
            **self.plan.row_fields[cell.key],
            **({"value": 0.0} | ended),
            metric=CELL_METRIC,
            unit="s",
            source="measured: making and measuring, in its worker",
            context={"cell": cell.key, "threads": cell.measures.threads},
        )
        self.run.append([*rows, cell_row])
        self.outcome["failed" if error else "done"] += 1
        if trace := result.get("traceback"):
            folder = self.run.folder / "errors"
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{cell.key}.txt", f"{json.dumps(cell.to_dict(), indent=1)}\n\n{trace}")

    def _write_status(self, running: dict[Future, tuple[str, Cell]]) -> None:
        """Write the state file for `status`, at most every `STATUS_SECONDS` while cells run."""
        if time.monotonic() - self.last_status_time < STATUS_SECONDS and running:
            return
        self.last_status_time = time.monotonic()
        busy = [
            f"{what} {cell.key} {cell.model.name} {cell.method}"
            for future, (what, cell) in running.items()
            if future.running()
        ]
        status = {
            "cells": [cell.key for cell in self.plan.cells],
            "since": self.started_at,
            "link": self.dashboard_link,
            "busy": busy,
            "passed": time.monotonic() - self.begin,
            "work": dict(self.worker_seconds),
        }
        write_text(self.run.folder / STATE_FILE, json.dumps(status))


CHECKPOINT_COPIES = 3  # a checkpoint holds the weights and two moments of each


@dataclass(frozen=True)
class SweepEstimate:
    """Seconds with one worker (None without rows of earlier cells), bytes to write at most, and free bytes of the disk."""

    seconds: float | None
    bytes: int
    free: int


def estimate_sweep(plan: Plan, run: Run) -> SweepEstimate:
    """Estimate the remaining cells from earlier cells of the same model and method, else of the same model."""
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in latest_cell_rows(run.records):
        if row.status == "ok" and row.value is not None:
            times[row.model, row.method].append(row.value)
            times[(row.model,)].append(row.value)
    seconds: list[float] = []
    sizes: dict[str, int] = {}
    for cell in plan.remaining:
        model_name = plan.row_fields[cell.key]["model"]
        past_seconds = times.get((model_name, cell.method)) or times.get((model_name,))
        seconds += [sum(past_seconds) / len(past_seconds)] if past_seconds else []
        if cell.base not in sizes:
            model = vit.meta_model(plan.recipes[cell.base].architecture)
            sizes[cell.base] = 4 * sum(parameter.numel() for parameter in model.parameters())
    disk = sum(sizes[cell.base] for cell in plan.remaining) + (1 + CHECKPOINT_COPIES) * sum(sizes.values())
    is_complete = len(seconds) == len(plan.remaining)
    cache = paths.writable_folder(paths.model_cache(), "model cache")
    return SweepEstimate(sum(seconds) if is_complete else None, disk, shutil.disk_usage(cache).free)


def sweep_status(folder: Path) -> str:
    """The progress of the sweep of a results folder, in a few lines of text.

    Raises:
        InputError: no sweep ran there.
    """
    state = folder / STATE_FILE
    try:
        status = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{str(folder)!r} holds no sweep; give the folder that `vitbench run SWEEP.yaml` names"
        ) from None
    rows = [row for row in latest_cell_rows(folder / "records.jsonl") if row.context["cell"] in set(status["cells"])]
    done, failed = (sum(row.status == outcome for row in rows) for outcome in ("ok", "failed"))
    remaining = len(status["cells"]) - len(rows)
    lines = [f"{len(status['cells'])} cells: {done} done, {failed} failed, {remaining} left"]
    if not is_locked(folder / "sweep.lock"):
        rerun_text = f"`vitbench run` of the same file takes up the {remaining + failed} that are not done"
        return "\n".join([*lines, "no run is at work here" + (f"; {rerun_text}" if remaining or failed else "")])
    recent = [row for row in rows if row.time >= status["since"]]
    if recent and remaining:
        passed = time.time() - datetime.fromisoformat(status["since"]).timestamp()
        lines.append(f"about {timedelta(seconds=round(remaining * passed / len(recent)))} left, as it went so far")
    lines += [f"dashboard: {status['link']}"] if status["link"] else []
    return "\n".join([*lines, *(f"at work: {busy}" for busy in status["busy"])])
