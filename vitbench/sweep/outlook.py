"""What a sweep will take, before it runs, and how far it is, while it does."""

import json
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from vitbench import paths, vit
from vitbench.base.locks import is_locked
from vitbench.errors import InputError
from vitbench.runs import Run
from vitbench.sweep.drive import STATE, Plan, latest

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
            model = vit.skeleton(plan.recipes[cell.base].architecture)
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
