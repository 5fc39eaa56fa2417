"""Run the notebooks with papermill: the baseline first, then the methods, then the comparison; finished work is skipped."""

import functools
import json
import os
import sys
import time
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
from vitbench.data.splits import ImageData, load_data
from vitbench.rows.runs import Run
from vitbench.run.cache import prepare
from vitbench.run.kernels import OPTIONS, Kernels
from vitbench.run.lessons import STAGES, Lesson
from vitbench.training.config import TrainConfig

POLL_SECONDS = 0.5
PATHS = ("dataset", "checkpoint", "profiles_file")  # parameters that may name a file or a folder


@dataclass(frozen=True)
class Outcome:
    """What became of a lesson: done, skipped (finished before), left out or failed, and then why: `error`.

    `copy` is its executed copy.
    """

    lesson: Lesson
    status: str
    copy: Path
    error: str = ""


def open_data(dataset: str, name: str = "", splits: dict[str, Any] | None = None) -> ImageData:
    """`load_data` with the split settings as a mapping, as profiles and the command line give them."""
    allowed = ("test", "val", "calibration", "train", "label", "seed", "skip_broken")
    for key in splits or {}:
        one_of("key of splits", key, allowed)
    return load_data(dataset, name=name, **(splits or {}))


def preflight(values: dict[str, Any]) -> ImageData:
    """Load the data and check the model against it, so that a wrong setting ends before any work."""
    data = open_data(values.get("dataset", "digits"), values.get("dataset_name", ""), values.get("splits"))
    prepare(
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

    A lesson whose executed copy was made from the same notebook, package sources, parameters and data is skipped.
    A lesson that fails does not stop its neighbours, but nothing is compared or compressed without a baseline. A lesson
    that needs images of a split that is empty, as the data was cut, is left out.
    """
    configs.check_plain_data(values, "the parameters")
    data = preflight(values)
    run = Run(out)
    os.environ["VITBENCH_HOME"] = str(home())  # the kernels, wherever they start, use these caches
    busy = f"another run is at work in {str(run.folder)!r}; wait for it or give another --out"
    with locked(run.folder / "suite.lock", busy):
        lacks = {lesson.name: [split for split in lesson.needs if not len(getattr(data, split))] for lesson in lessons}
        left_out = [
            Outcome(
                lesson,
                "left out",
                _copy(run, lesson),
                f"it needs {lacks[lesson.name][0]} images; {data.describe_splits()}",
            )
            for lesson in lessons
            if lacks[lesson.name]
        ]
        able = [lesson for lesson in lessons if not lacks[lesson.name]]
        return left_out + _run_stages(able, values, run, workers, data.fingerprint)


def _run_stages(
    lessons: list[Lesson], values: dict[str, Any], run: Run, workers: int, fingerprint: str
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    sources = code.PACKAGE_SOURCES.digest_all()
    upstream = ""
    expected = sum(60 * lesson.minutes for lesson in lessons)
    with (
        progress.progress_bar(None, "notebooks", expected, bar_format=progress.TIME_ONLY) as bar,
        Kernels() as kernels,
    ):
        for stage in STAGES:
            here = [lesson for lesson in lessons if lesson.stage == stage]
            if stage != "baseline" and any(
                outcome.status == "failed" and outcome.lesson.stage == "baseline" for outcome in outcomes
            ):
                break
            keys = {lesson.name: _key(lesson, values, sources, fingerprint, upstream) for lesson in here}
            outcomes += _run_stage(here, keys, values, run, workers, bar, kernels)
            upstream += "".join(keys.values())  # what is compared depends on what was measured
    return outcomes


def _run_stage(
    lessons: list[Lesson], keys: dict[str, str], values: dict[str, Any], run: Run, workers: int, bar, kernels
) -> list[Outcome]:
    outcomes, waiting = [], []
    for lesson in lessons:
        if _finished_key(_copy(run, lesson)) == keys[lesson.name]:
            outcomes.append(Outcome(lesson, "skipped", _copy(run, lesson)))
            bar.update(60 * lesson.minutes)
        else:
            waiting.append(lesson)
    if not waiting:
        return outcomes
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        running = {pool.submit(_run_one, lesson, keys[lesson.name], values, run, kernels): lesson for lesson in waiting}
        outcomes += _watch(running, run, bar)
    except BaseException:  # interrupted: what waits is not started, and what runs ends with its kernel
        pool.shutdown(wait=False, cancel_futures=True)
        kernels.stop()
        raise
    finally:
        pool.shutdown()
    return outcomes


def _watch(running: dict[Future, Lesson], run: Run, bar) -> list[Outcome]:
    """Move the bar with the cells that are done, until every future is."""
    moved = dict.fromkeys((lesson.name for lesson in running.values()), 0.0)
    pending = set(running)
    while pending:
        _, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        busy = []
        for future, lesson in running.items():
            share = 1.0 if future.done() else _share_done(_copy(run, lesson, running=True), lesson)
            if share > moved[lesson.name]:
                bar.update(min(60 * lesson.minutes * (share - moved[lesson.name]), bar.total - bar.n))
                moved[lesson.name] = share
            if future.running():
                busy.append(lesson.name)
        bar.set_postfix_str(", ".join(busy), refresh=sys.stdout.isatty())
    return [future.result() for future in running]


def _run_one(lesson: Lesson, key: str, values: dict[str, Any], run: Run, kernels: Kernels) -> Outcome:
    import papermill

    _write_whole(str(run.notebooks))
    partial, final = _copy(run, lesson, running=True), _copy(run, lesson)
    partial.parent.mkdir(parents=True, exist_ok=True)
    parameters = {name: value for name, value in values.items() if name in lesson.parameters}
    parameters |= _absolute(parameters) | {"out": str(run.folder.absolute())}
    error, start, begun = "", time.monotonic(), time.time()
    try:
        with kernels.kernel() as kernel:
            papermill.execute_notebook(
                str(lesson.path),
                str(partial),
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
        partial.unlink(missing_ok=True)
        return Outcome(lesson, "failed", final, "interrupted")
    if partial.exists():
        notebook = nbformat.read(partial, as_version=4)
        partial.unlink()
        error = error or _lacks_figures(notebook, lesson, run, begun)
        notebook.metadata["vitbench"] = {
            **notebook.metadata.get("vitbench", {}),
            "seconds": round(time.monotonic() - start, 1),
        }
        if not error:
            notebook.metadata["vitbench"]["run_key"] = key
        try:
            write_text(final, nbformat.writes(notebook) + "\n")
        except OSError as failure:
            error = error or f"{str(final)!r} cannot be written ({failure.strerror}); free some space"
    return Outcome(lesson, "failed" if error else "done", final, error)


@functools.cache
def _write_whole(folder: str) -> None:
    """Let papermill write its copies below `folder` whole or not at all: a full disk would leave half a notebook."""
    from papermill.iorw import LocalHandler, papermill_io

    class Whole(LocalHandler):
        def write(self, buf: str, path: str) -> None:
            write_text(path, buf)

    papermill_io.register(folder, Whole())


def _absolute(parameters: dict[str, Any]) -> dict[str, str]:
    """The parameters that name a file or folder here, in full: a kernel works in a folder of its own."""
    named = {name: parameters[name] for name in PATHS if parameters.get(name) and parameters[name] != "digits"}
    found = {name: Path(value).expanduser() for name, value in named.items()}
    return {name: str(path.absolute()) for name, path in found.items() if path.exists()}


def _lacks_figures(notebook: nbformat.NotebookNode, lesson: Lesson, run: Run, begun: float) -> str:
    """Why an executed copy counts as failed: it shows fewer figures than it saved under its number; "" if it does not."""
    number = lesson.name.split("_")[0]
    saved = [file for file in run.figures.glob(f"{number}_*.png") if file.stat().st_mtime >= begun]
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
        "vb.lesson(globals()) after the parameters, and choose no other backend later"
    )


def _copy(run: Run, lesson: Lesson, running: bool = False) -> Path:
    return run.notebooks / f"{lesson.name}{'.running' if running else ''}.ipynb"


def _share_done(partial: Path, lesson: Lesson) -> float:
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


def _key(lesson: Lesson, values: dict[str, Any], sources: str, fingerprint: str, upstream: str) -> str:
    used = {name: value for name, value in values.items() if name in lesson.parameters}
    facts = [
        lesson.path.read_text(encoding="utf-8"),
        used,
        sources,
        fingerprint,
        upstream if lesson.stage == "comparison" else "",
    ]
    return digest(facts)
