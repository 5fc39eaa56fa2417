"""Run the notebooks with papermill: the baseline first, then the methods, then the comparison; finished work is skipped."""

import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from vitbench.base import code, configs, progress
from vitbench.base.configs import digest
from vitbench.base.errors import one_of
from vitbench.base.files import write_text
from vitbench.base.locks import locked
from vitbench.base.paths import home
from vitbench.data.splits import SHIPPED, ImageData, load_data
from vitbench.rows.runs import Run
from vitbench.run.cache import create_initial_model
from vitbench.run.kernels import OPTIONS, Kernels
from vitbench.run.lessons import STAGES, Lesson, values_of
from vitbench.training.config import TrainConfig

POLL_SECONDS = 0.5
PATHS = ("dataset", "model", "checkpoint", "profiles_file")  # parameters that may name a file or a folder


@dataclass(frozen=True)
class Outcome:
    """The outcome of a lesson.

    Attributes:
        status: "done", "skipped" (finished before), "left out" or "failed".
        executed_path: its executed copy.
        error: the reason, if it was left out or failed.
    """

    lesson: Lesson
    status: str
    executed_path: Path
    error: str = ""


def open_data(dataset: str, name: str = "", splits: dict[str, Any] | None = None) -> ImageData:
    """`load_data` with the split settings as a mapping, as profiles and the command line give them."""
    allowed = ("test", "val", "calibration", "train", "label", "classes", "seed", "skip_broken")
    for key in splits or {}:
        one_of("key of splits", key, allowed)
    return load_data(dataset, name=name, **(splits or {}))


def preflight(values: dict[str, Any], lessons: Sequence[Lesson] = ()) -> ImageData:
    """Load the data and check the model against it, so that a wrong setting is found before any work.

    A parameter that `values` lacks has the first default that a lesson gives it.
    """
    for lesson in lessons:
        values = {**lesson.defaults, **values}
    data = open_data(values.get("dataset", "digits"), values.get("dataset_name", ""), values.get("splits"))
    create_initial_model(
        values.get("model", "vit_mini_patch2_8"),
        data,
        TrainConfig(**values.get("train", {})),
        pretrained=values.get("pretrained", False),
        checkpoint=values.get("checkpoint", ""),
        img_size=values.get("img_size"),
    )
    return data


def run_suite(lessons: list[Lesson], values: dict[str, Any], out: Path, workers: int = 1) -> list[Outcome]:
    """Run `lessons` with the parameters `values` into the results folder `out`.

    A lesson is skipped if its executed copy was made from the same notebook, package sources, parameters and data, and left
    out if it needs images of an empty split. A lesson that fails does not stop the others of its stage; without a baseline
    no later stage runs.
    """
    configs.check_plain_data(values, "the parameters")
    data = preflight(values, lessons)
    run = Run(out)
    os.environ["VITBENCH_HOME"] = str(home())  # the kernels use the same caches, wherever they start
    busy_message = f"another run is at work in {str(run.folder)!r}; wait for it or give another --out"
    with locked(run.folder / "suite.lock", busy_message):
        missing_splits = {
            lesson.name: [split for split in lesson.required_splits if not len(getattr(data, split))]
            for lesson in lessons
        }
        left_out = [
            Outcome(
                lesson,
                "left out",
                _executed_path(run, lesson),
                f"it needs {missing_splits[lesson.name][0]} images; {data.describe()}",
            )
            for lesson in lessons
            if missing_splits[lesson.name]
        ]
        runnable = [lesson for lesson in lessons if not missing_splits[lesson.name]]
        return left_out + _run_stages(runnable, values, run, workers, data.fingerprint)


def _run_stages(
    lessons: list[Lesson], values: dict[str, Any], run: Run, workers: int, fingerprint: str
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    sources = code.PACKAGE_SOURCES.digest_all()
    upstream_keys = ""
    expected = sum(60 * lesson.minutes for lesson in lessons)
    with (
        progress.progress_bar(None, "notebooks", expected, bar_format=progress.TIME_ONLY) as bar,
        Kernels() as kernels,
    ):
        for stage in STAGES:
            stage_lessons = [lesson for lesson in lessons if lesson.stage == stage]
            if stage != "baseline" and any(
                outcome.status == "failed" and outcome.lesson.stage == "baseline" for outcome in outcomes
            ):
                break
            keys = {lesson.name: _key(lesson, values, sources, fingerprint, upstream_keys) for lesson in stage_lessons}
            outcomes += _run_stage(stage_lessons, keys, values, run, workers, bar, kernels)
            upstream_keys += "".join(keys.values())  # a comparison depends on all measured lessons
    return outcomes


def _run_stage(
    lessons: list[Lesson],
    keys: dict[str, str],
    values: dict[str, Any],
    run: Run,
    workers: int,
    bar: Any,
    kernels: Kernels,
) -> list[Outcome]:
    outcomes, pending_lessons = [], []
    for lesson in lessons:
        if _finished_key(_executed_path(run, lesson)) == keys[lesson.name]:
            outcomes.append(Outcome(lesson, "skipped", _executed_path(run, lesson)))
            bar.update(60 * lesson.minutes)
        else:
            pending_lessons.append(lesson)
    if not pending_lessons:
        return outcomes
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        running = {
            pool.submit(_run_one, lesson, keys[lesson.name], values, run, kernels): lesson for lesson in pending_lessons
        }
        outcomes += _watch(running, run, bar)
    except BaseException:  # interrupted: pending lessons do not start, and running ones end with their kernels
        pool.shutdown(wait=False, cancel_futures=True)
        kernels.stop()
        raise
    finally:
        pool.shutdown()
    return outcomes


def _watch(running: dict[Future, Lesson], run: Run, bar: Any) -> list[Outcome]:
    """Advance the bar with the finished cells until every future is done."""
    shown_fraction = dict.fromkeys((lesson.name for lesson in running.values()), 0.0)
    pending = set(running)
    while pending:
        _, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        busy = []
        for future, lesson in running.items():
            fraction = 1.0 if future.done() else _fraction_done(_executed_path(run, lesson, running=True), lesson)
            if fraction > shown_fraction[lesson.name]:
                bar.update(min(60 * lesson.minutes * (fraction - shown_fraction[lesson.name]), bar.total - bar.n))
                shown_fraction[lesson.name] = fraction
            if future.running():
                busy.append(lesson.name)
        bar.set_postfix_str(", ".join(busy), refresh=sys.stdout.isatty())
    return [future.result() for future in running]


def _run_one(lesson: Lesson, key: str, values: dict[str, Any], run: Run, kernels: Kernels) -> Outcome:
    import papermill

    _make_papermill_atomic(str(run.notebooks))
    partial_path, final_path = _executed_path(run, lesson, running=True), _executed_path(run, lesson)
    partial_path.parent.mkdir(parents=True, exist_ok=True)
    parameters = values_of(lesson, values)
    parameters |= _absolute(parameters) | {"out": str(run.folder.absolute())}
    error, start, started_at = "", time.monotonic(), time.time()
    try:
        with kernels.kernel() as kernel:
            papermill.execute_notebook(
                str(lesson.path),
                str(partial_path),
                parameters,
                progress_bar=False,
                kernel_name="python3",
                km=kernel,
                extra_arguments=list(OPTIONS),
            )
    except papermill.PapermillExecutionError as failure:
        error = (
            f"cell {failure.cell_index} (In [{failure.exec_count}]): {failure.ename}: {failure.evalue}".splitlines()[0]
        )
    except Exception as failure:  # a kernel that died or did not start
        error = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else 'no message'}"
    if kernels.stopped:
        partial_path.unlink(missing_ok=True)
        return Outcome(lesson, "failed", final_path, "interrupted")
    if partial_path.exists():
        notebook = nbformat.read(partial_path, as_version=4)
        partial_path.unlink()
        error = error or _missing_figures_reason(notebook, lesson, run, started_at)
        notebook.metadata["vitbench"] = {
            **notebook.metadata.get("vitbench", {}),
            "seconds": round(time.monotonic() - start, 1),
        }
        if not error:
            notebook.metadata["vitbench"]["run_key"] = key
        try:
            write_text(final_path, nbformat.writes(notebook) + "\n")
        except OSError as failure:
            error = error or f"{str(final_path)!r} cannot be written ({failure.strerror}); free some space"
    return Outcome(lesson, "failed" if error else "done", final_path, error)


@functools.cache
def _make_papermill_atomic(folder: str) -> None:
    """Let papermill write its copies below `folder` atomically: a full disk would leave half a notebook."""
    from papermill.iorw import LocalHandler, papermill_io

    class AtomicHandler(LocalHandler):
        def write(self, buf: str, path: str) -> None:
            write_text(path, buf)

    papermill_io.register(folder, AtomicHandler())


def _absolute(parameters: dict[str, Any]) -> dict[str, str]:
    """The absolute paths of the parameters that name an existing file or folder: a kernel works in another folder."""
    path_parameters = {
        name: parameters[name] for name in PATHS if parameters.get(name) and parameters[name] not in SHIPPED
    }
    path_by_name = {name: Path(value).expanduser() for name, value in path_parameters.items()}
    return {name: str(path.absolute()) for name, path in path_by_name.items() if path.exists()}


def _missing_figures_reason(notebook: nbformat.NotebookNode, lesson: Lesson, run: Run, started_at: float) -> str:
    """Why an executed copy fails if it shows fewer figures than it saved under its number; "" if it shows all."""
    number = lesson.name.split("_")[0]
    saved = [file for file in run.figures.glob(f"{number}_*.png") if file.stat().st_mtime >= started_at]
    kinds = [
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
        if kind in ("image/png", "image/svg+xml", "application/vnd.jupyter.widget-view+json")
    ]
    if len(kinds) >= len(saved):
        return ""
    return (
        f"it saved {len(saved)} figures and shows {len(kinds)}: its kernel does not draw inline; call "
        "vb.setup_notebook(globals()) after the parameters, and choose no other backend later"
    )


def _executed_path(run: Run, lesson: Lesson, running: bool = False) -> Path:
    return run.notebooks / f"{lesson.name}{'.running' if running else ''}.ipynb"


def _fraction_done(partial: Path, lesson: Lesson) -> float:
    try:
        cells = json.loads(partial.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # not written yet, or being written
        return 0.0
    done = sum(
        cell["metadata"].get("papermill", {}).get("status") == "completed"
        for cell in cells
        if cell["cell_type"] == "code"
    )
    return min(1.0, done / max(1, lesson.cells + 1))  # papermill adds a cell with the parameters


def _finished_key(copy: Path) -> str:
    try:
        return json.loads(copy.read_text(encoding="utf-8"))["metadata"].get("vitbench", {}).get("run_key", "")
    except (OSError, ValueError):
        return ""


def _key(lesson: Lesson, values: dict[str, Any], sources: str, fingerprint: str, upstream_keys: str) -> str:
    key_inputs = [
        lesson.path.read_text(encoding="utf-8"),
        values_of(lesson, values),
        sources,
        fingerprint,
        upstream_keys if lesson.stage == "comparison" else "",
    ]
    return digest(key_inputs)
