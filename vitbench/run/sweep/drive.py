"""Run a sweep and report its progress: finished cells are skipped, a failure is a row, a worker that died is replaced.

An outlook estimates time and bytes before it runs, from rows of earlier cells.
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
from vitbench.measurement.cost import model_row_fields
from vitbench.model import vit
from vitbench.model.recipe import Recipe
from vitbench.rows.records import Row, read_rows
from vitbench.rows.runs import Run
from vitbench.run.cache import prepare
from vitbench.run.sweep.executors import Workers, open_workers
from vitbench.run.sweep.grid import Cell, Sweep, cells, checked
from vitbench.run.sweep.worker import CellHung

METRIC = "cell_seconds"
STATE = "sweep.json"  # what `status` reads
RETURN_SECONDS = 120  # how long a scheduler that went away is waited for
BEAT_SECONDS = 2.0


@dataclass(frozen=True)
class Plan:
    """A checked sweep: its cells, what a row says of each one's model before it is compressed, and those that are done."""

    sweep: Sweep
    cells: list[Cell]
    about: dict[str, dict[str, Any]]
    recipes: dict[str, Recipe]  # of the models before compression, by `Cell.base`
    done: set[str]

    @property
    def left(self) -> list[Cell]:
        """The cells to run."""
        return [cell for cell in self.cells if cell.key not in self.done]


def plan(sweep: Sweep, run: Run) -> Plan:
    """Check every cell against its images and its model, before anything starts; nothing is trained.

    Raises:
        InputError: images that are not there, a model that is unknown or does not fit them.
    """
    from vitbench.run.sweep.work import open_images

    starts: dict[str, tuple[Any, Recipe]] = {}
    found, facts, recipes = [], {}, {}
    for cell in cells(sweep):
        if cell.base not in starts:
            data = open_images(cell)
            start = prepare(cell.model.name, data, cell.train, **cell.model.start())
            starts[cell.base] = data, start.recipe
        data, recipe = starts[cell.base]
        cell = checked(cell, data, recipe)
        recipes[cell.base] = recipe
        found.append(cell)
        methods = [step.to_dict() for step in cell.steps]
        facts[cell.key] = model_row_fields(recipe, data) | {"method": cell.method}
        facts[cell.key]["config"] = {**facts[cell.key]["config"], "methods": methods}
    done = {row.context["cell"] for row in latest(run.records) if row.status == "ok"}
    return Plan(sweep, found, facts, recipes, done)


def latest(records: Path) -> list[Row]:
    """The rows that say what became of each cell, the last of each."""
    if not records.exists():
        return []
    rows = [row for row in read_rows(records, containing=f'"metric":"{METRIC}"') if row.metric == METRIC]
    return list({row.context["cell"]: row for row in rows}.values())


def run_sweep(plan: Plan, run: Run, workers: int = 1, scheduler: str = "") -> Counter:
    """Run what is left of a sweep; every cell becomes rows in `run`, one of them `cell_seconds`, done or failed.

    Returns:
        How many cells were done, failed, and finished before.

    Raises:
        InputError: another run of a sweep is at work in the folder, or its rows cannot be written.
    """
    busy = f"another sweep is at work in {str(run.folder)!r}; wait for it or give another --out"
    with locked(run.folder / "sweep.lock", busy):
        outcome = Counter({"finished before": len(plan.cells) - len(plan.left)})
        drive = _Drive(plan, run, outcome)
        with progress.progress_bar(None, "cells", total=len(plan.cells), unit="cell") as bar:
            bar.update(outcome["finished before"])
            drive.until_done(scheduler, workers, bar)
        return outcome


@dataclass
class _Drive:
    """The state of a sweep that runs."""

    plan: Plan
    run: Run
    outcome: Counter
    tries: Counter = field(default_factory=Counter)
    made: set[str] = field(default_factory=set)  # keys of baselines that are made
    work: Counter = field(default_factory=Counter)  # seconds of all workers
    begin: float = field(default_factory=time.monotonic)
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    link: str = ""
    beat: float = 0.0

    def until_done(self, scheduler: str, workers: int, bar: Any) -> None:
        """Give cells out until each has an outcome; a scheduler that went away is waited for."""
        left = {cell.key: cell for cell in self.plan.left}
        while left:
            with self._opened(scheduler, workers) as engine:
                if engine.link != self.link:
                    bar.write(f"dashboard: {engine.link}")
                self.link = engine.link
                self._through(engine, left, bar)
            if left:
                bar.write("the scheduler went away; waiting for it")

    @contextlib.contextmanager
    def _opened(self, scheduler: str, workers: int) -> Iterator[Workers]:
        until = time.monotonic() + (RETURN_SECONDS if self.tries or self.made else 0)
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
            with contextlib.suppress(OSError, TimeoutError):  # of a scheduler that is gone
                opened.__exit__(None, None, None)

    def _through(self, engine: Workers, left: dict[str, Cell], bar: Any) -> None:
        """Run what is left with one engine, or as much as it lives for. A baseline comes before its cells."""
        waiting: dict[str, list[Cell]] = defaultdict(list)
        running: dict[Future, tuple[str, Cell]] = {}

        def give(what: str, cell: Cell) -> None:
            order = {"what": what, "cell": cell.to_dict(), "threads": cell.measures.threads}
            running[engine.submit(order, self.plan.sweep.seconds)] = what, cell

        for cell in left.values():
            if cell.base in self.made:
                give("cell", cell)
            else:
                waiting[cell.base].append(cell)
        for group in waiting.values():
            give("base", group[0])
        while running:
            done, _ = wait(running, timeout=BEAT_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                what, cell = running.pop(future)
                answer = self._answer(future, cell, engine)
                if answer is None:  # its worker died: again
                    if engine.alive():
                        give(what, cell)
                    continue
                if what == "base" and "error" not in answer:
                    self.made.add(cell.base)
                    for each in waiting.pop(cell.base):
                        give("cell", each)
                    continue
                if what == "base":
                    answer = answer | {"error": f"its baseline: {answer['error']}"}
                for each in waiting.pop(cell.base) if what == "base" else [cell]:
                    self._record(each, answer)
                    del left[each.key]
                    bar.update(1)
            bar.set_postfix_str(f"{self.outcome['failed']} failed", refresh=sys.stdout.isatty())
            self._tell(running)
            if not engine.alive():
                return

    def _answer(self, future: Future, cell: Cell, engine: Workers) -> dict[str, Any] | None:
        """What a worker said, or why it said nothing; None if it is to be asked again."""
        try:
            answer = future.result()
            self.work.update({kind: answer[kind] for kind in ("seconds", "starting") if kind in answer})
            return answer
        except CellHung as error:
            return {"error": str(error)}
        except CancelledError:  # the scheduler is gone, and the cell with it; that is no failure of the cell
            return None
        except Exception as error:  # a worker that died, in whatever way an engine tells it
            if not engine.alive():
                return None
            self.tries[cell.key] += 1
            if self.tries[cell.key] <= self.plan.sweep.retries:
                return None
            return {"error": f"{' '.join(str(error).split())[:300]}; tried {self.tries[cell.key]} times"}

    def _record(self, cell: Cell, answer: dict[str, Any]) -> None:
        """All rows of a cell, at once."""
        rows = [Row(**values) for values in answer.get("rows", [])]
        for facts in answer.get("environments", {}).values():
            self.run.keep_environment(facts)
        error = answer.get("error") or next(
            (f"{row.metric}: {row.error}" for row in rows if row.status == "failed"), ""
        )
        ended = {"status": "failed", "error": error} if error else {"value": answer["seconds"]}
        note = Row(
            **self.plan.about[cell.key],
            **({"value": 0.0} | ended),
            metric=METRIC,
            unit="s",
            source="measured: making and measuring, in its worker",
            context={"cell": cell.key, "threads": cell.measures.threads},
        )
        self.run.append([*rows, note])
        self.outcome["failed" if error else "done"] += 1
        if trace := answer.get("traceback"):
            folder = self.run.folder / "errors"
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{cell.key}.txt", f"{json.dumps(cell.to_dict(), indent=1)}\n\n{trace}")

    def _tell(self, running: dict[Future, tuple[str, Cell]]) -> None:
        """Leave word for `status`, now and then."""
        if time.monotonic() - self.beat < BEAT_SECONDS and running:
            return
        self.beat = time.monotonic()
        busy = [
            f"{what} {cell.key} {cell.model.name} {cell.method}"
            for future, (what, cell) in running.items()
            if future.running()
        ]
        word = {"cells": [cell.key for cell in self.plan.cells], "since": self.since, "link": self.link, "busy": busy}
        word |= {"passed": time.monotonic() - self.begin, "work": dict(self.work)}
        write_text(self.run.folder / STATE, json.dumps(word))


TRAINING = 3  # a checkpoint holds the weights and two moments of each


@dataclass(frozen=True)
class Outlook:
    """Seconds of one worker (None: nothing to go by), bytes of disk at most, and bytes that are free."""

    seconds: float | None
    bytes: int
    free: int


def outlook(plan: Plan, run: Run) -> Outlook:
    """What is left of a sweep, by what cells of the same model and method took, else of the same model."""
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in latest(run.records):
        if row.status == "ok":
            times[row.model, row.method].append(row.value)
            times[(row.model,)].append(row.value)
    seconds: list[float] = []
    sizes: dict[str, int] = {}
    for cell in plan.left:
        about = plan.about[cell.key]
        known = times.get((about["model"], cell.method)) or times.get((about["model"],))
        seconds += [sum(known) / len(known)] if known else []
        if cell.base not in sizes:
            model = vit.meta_model(plan.recipes[cell.base].architecture)
            sizes[cell.base] = 4 * sum(parameter.numel() for parameter in model.parameters())
    disk = sum(sizes[cell.base] for cell in plan.left) + (1 + TRAINING) * sum(sizes.values())
    whole = len(seconds) == len(plan.left)
    cache = paths.writable_folder(paths.model_cache(), "model cache")
    return Outlook(sum(seconds) if whole else None, disk, shutil.disk_usage(cache).free)


def progress_of(folder: Path) -> str:
    """How far the sweep of a results folder is, in a few lines.

    Raises:
        InputError: no sweep ran there.
    """
    state = folder / STATE
    try:
        word = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{str(folder)!r} holds no sweep; give the folder that `vitbench run SWEEP.yaml` names"
        ) from None
    rows = [row for row in latest(folder / "records.jsonl") if row.context["cell"] in set(word["cells"])]
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "failed")}
    left = len(word["cells"]) - len(rows)
    lines = [f"{len(word['cells'])} cells: {counts['ok']} done, {counts['failed']} failed, {left} left"]
    if not is_locked(folder / "sweep.lock"):
        again = f"`vitbench run` of the same file takes up the {left + counts['failed']} that are not done"
        return "\n".join([*lines, "no run is at work here" + (f"; {again}" if left or counts["failed"] else "")])
    since = [row for row in rows if row.time >= word["since"]]
    if since and left:
        passed = time.time() - datetime.fromisoformat(word["since"]).timestamp()
        lines.append(f"about {timedelta(seconds=round(left * passed / len(since)))} left, as it went so far")
    lines += [f"dashboard: {word['link']}"] if word["link"] else []
    return "\n".join([*lines, *(f"at work: {busy}" for busy in word["busy"])])
