"""Photographs with the predictions of two models: what compression changes, on single images."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from vitbench.base.errors import InputError
from vitbench.figures.drawing import COLOURS, style


def changed_answers(
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    classes: Sequence[str],
    *,
    count: int = 8,
    names: tuple[str, str] = ("before", "after"),
) -> tuple[Figure, str]:
    """Photographs that one of two models gets right and the other wrong: newly wrong ones first, then newly right ones.

    Args:
        images: (N, H, W, 3) uint8, or a sequence of such pictures.
        labels: the right classes, (N,) int.
        before, after: probabilities of the classes, (N, classes), of the two models.
        count: how many photographs at most, of both kinds together.
        names: what to call the two models.

    Returns:
        The figure, and a sentence that says how many predictions changed, for its alternative text.

    Raises:
        InputError: probabilities of another number of images or classes.
    """
    for name, probabilities in zip(names, (before, after), strict=True):
        if probabilities.shape != (len(labels), len(classes)):
            raise InputError(
                f"the probabilities of {name!r} have the shape {probabilities.shape}; give ({len(labels)}, {len(classes)})"
            )
    first, second = before.argmax(1), after.argmax(1)
    lost = np.flatnonzero((first == labels) & (second != labels))
    gained = np.flatnonzero((first != labels) & (second == labels))
    lost = lost[np.argsort(-after[lost, second[lost]], kind="stable")]  # the surest errors first
    gained = gained[np.argsort(-before[gained, first[gained]], kind="stable")]
    gained_count = min(
        len(gained), max(count // 4, count - len(lost))
    )  # at least a quarter shows gains, if there are any
    shown = [*lost[: count - gained_count], *gained[:gained_count]]
    sentence = (
        f"of {len(labels):,} photographs {len(lost):,} are right with {names[0]} and wrong with {names[1]}, "
        f"{len(gained):,} the other way round"
    )
    with style():
        columns = min(4, max(1, len(shown)))
        rows = max(1, -(-len(shown) // columns))
        figure, panels = plt.subplots(rows, columns, figsize=(1.75 * columns, 2.05 * rows + 0.5), squeeze=False)
        for axes in panels.flat:
            axes.axis("off")
        for axes, i in zip(panels.flat, shown, strict=False):
            axes.imshow(np.asarray(images[i]), interpolation="bicubic")
            lines = [classes[labels[i]]]
            lines += [
                f"{name}: {classes[p.argmax()]} {100 * p.max():.0f} %"
                for name, p in zip(names, (before[i], after[i]), strict=True)
            ]
            axes.set_title("\n".join(lines), fontsize=8, color=COLOURS[1] if i in lost else COLOURS[5])
        if not shown:
            panels[0, 0].text(0, 0.5, "no prediction changed", fontsize=8)
        title = textwrap.fill(sentence[0].upper() + sentence[1:], 24 * columns)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure, sentence
