"""Tables of students and their teachers."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from docs.results import Results
from docs.tables.common import Cells, Mean, known, table


@known
def students(results: Results) -> dict[str, str]:
    """Student and kind of distillation, in the page's words -> label of each model of seed 0."""
    labels: dict[str, str] = {}
    for label, method, steps in results.models():
        name = _student(method, steps)
        if name and all(step["config"].get("train", {}).get("seed", 0) == 0 for step in steps):
            labels.setdefault(name, label)
    return labels


def _student(method: str, steps: list[dict[str, Any]]) -> str | None:
    if method == "baseline":
        return "teacher"
    config = steps[0]["config"]
    if method.startswith("pruning"):
        training = "trained on, labels" if config["teacher"] == "none" else "distilled from the original"
        return f"pruned, {training if config['train']['epochs'] else 'not trained'}"
    if not method.startswith("distillation"):
        return None
    train, student = config["train"], config["student"] or f"{config['depth']} of the teacher's blocks"
    kind = "hard" if train["kd_labels"] == "hard" else "soft"
    for name, is_used in (
        ("features", train["feature_weight"]),
        ("attention", train["attention_weight"]),
        ("token", config["token"]),
    ):
        kind = name if is_used else kind
    kind = "alone" if config["teacher"] == "none" else kind
    return f"{student}, {kind}" + (", then int8" if "int8" in method else "")


@table
def student_by_student(results: Results) -> Iterator[Cells]:
    """A line for each student: MB, share of the teacher's bytes, top-1, points from the same student without a teacher, and its time."""
    labels = students(results)
    for name, label in labels.items():
        alone = labels.get(f"{name.split(', ')[0]}, alone")
        gained = "" if alone in (None, label) else results.points(label, alone)
        times = "1 / 1" if label == "baseline" else results.times(label)
        yield name, f"{results.mb(label):.2f}", f"{results.share(label):.2f}", results.accuracy(label), gained, times


def _plain_students(results: Results) -> list[str]:
    return [label for name, label in students(results).items() if name != "teacher" and "pruned" not in name]


@known
def best_student(results: Results) -> float:
    """The highest top-1 of a student, pruned teachers left out, in per cent."""
    return max(map(results.top1, _plain_students(results)))


@known
def largest_student(results: Results) -> float:
    """The bytes of the largest student, pruned teachers left out, over the teacher's."""
    return max(map(results.share, _plain_students(results)))


class Taught(Mean):
    """The gain in top-1 of a student with a teacher, in points, with a pair for each seed.

    Attributes:
        alone, soft: the mean top-1 without a teacher and with its soft labels, in per cent.
    """

    def __init__(self, pairs: pd.DataFrame):
        super().__init__(pairs["soft"] - pairs["alone"])
        self.alone, self.soft = float(pairs["alone"].mean()), float(pairs["soft"].mean())


@known
def taught_over_seeds(results: Results, student: str) -> Taught:
    """The gain in top-1 of a student with a teacher's soft labels over the same student without."""
    rows = results.every[(results.every["method"] == "distillation") & (results.every["metric"] == "top1")]
    names = rows["config"].map(lambda config: _student("distillation", config["methods"]))
    seeds = rows["config"].map(lambda config: config["methods"][0]["config"]["train"]["seed"])
    top1 = 100 * rows.assign(name=names, own_seed=seeds).pivot_table(index="own_seed", columns="name", values="value")
    pairs = top1[[f"{student}, alone", f"{student}, soft"]].dropna()
    return Taught(pairs.set_axis(["alone", "soft"], axis=1))
