"""Diagrams of ideas, which hold no numbers: `python -m docs.diagrams` draws them and puts them into the lessons.

A lesson shows a diagram where a text cell says `![alternative text](attachment:NAME.svg)`. With `--check` nothing is written,
and the exit status is 1 if a file or a lesson is outdated.
"""

import argparse
import base64
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitbench.base.files import figure_bytes, write_bytes
from vitbench.figures.drawing import FAMILY_COLOURS, NEUTRAL, style

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "diagrams"
WEIGHTS = FAMILY_COLOURS["quantization"]
ACTS = FAMILY_COLOURS["UCT"]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without axes, with a tenth of an inch for each unit."""
    figure, axes = plt.subplots(figsize=(width / 10, height / 10), layout="none")
    axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, face: str = "white") -> None:
    """A rectangle with its centre at (x, y) and a text in it; a text on a coloured face is white."""
    corner = x - width / 2, y - height / 2
    axes.add_patch(plt.Rectangle(corner, width, height, facecolor=face, edgecolor="black", linewidth=0.8))
    axes.text(x, y, text, ha="center", va="center", color="black" if face == "white" else "white", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from start to end."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": NEUTRAL, "shrinkA": 0, "shrinkB": 0})


def block() -> Figure:
    """One block of a ViT, and the parts that each family of methods changes."""
    figure, axes = canvas(90, 41)
    names = ("tokens in", "norm", "qkv", "attention", "proj", "norm", "fc1", "GELU", "fc2", "tokens out")
    widths = [0.72 * len(name) + 2.4 for name in names]
    gap = (86 - sum(widths)) / (len(names) - 1)
    centres, left = [], 2.0
    for name, width in zip(names, widths):
        centres.append(left + width / 2)
        box(axes, centres[-1], 22, width, 4.6, name, WEIGHTS if name in ("qkv", "proj", "fc1", "fc2") else "white")
        if name != names[-1]:
            arrow(axes, (left + width + 0.2, 22), (left + width + gap - 0.2, 22))
        left += width + gap
    layers = [centres[i] for i in (2, 4, 6, 8)]
    acts = [
        ("quantization: fewer bits for these weights", 36, layers),
        ("low rank: two thin matrices in place of one", 30, layers),
        ("pruning: fewer heads", 15.5, centres[2:5]),
        ("pruning: fewer neurons", 15.5, centres[6:9]),
        ("fewer or merged tokens; cheaper attention", 9.5, [centres[0], centres[3], centres[-1]]),
        ("distillation: a teacher guides the training of all of it", 3.5, [centres[0], centres[-1]]),
    ]
    for text, y, places in acts:
        axes.plot([min(places), max(places)], [y, y], color=ACTS, lw=2)
        axes.plot(places, [y] * len(places), "|", color=ACTS, ms=8, mew=2)
        axes.text((min(places) + max(places)) / 2, y + 1, text, ha="center", va="bottom", fontsize=9)
    return figure


def splits() -> Figure:
    """The four parts of a data set, and what each is for."""
    figure, axes = canvas(90, 30)
    parts = [
        (15, 29, "train", "gradients\nof every training"),
        (38.5, 16, "calibration", "statistics:\nranges, covariances"),
        (56, 17, "val", "choices:\nranks, policies, settings"),
        (79, 19, "test", "scored once, at the end;\nit chooses nothing"),
    ]
    for x, width, name, use in parts:
        box(axes, x, 23, width, 6, name, ACTS if name == "test" else WEIGHTS)
        axes.text(x, 11, use, ha="center", va="center", fontsize=9, linespacing=1.5)
        arrow(axes, (x, 19.6), (x, 14.8))
    axes.plot([0.5, 0.5, 46.5, 46.5], [27.2, 28, 28, 27.2], color=NEUTRAL, lw=0.8)
    axes.text(23.5, 28.2, "the calibration set is a part of train", ha="center", va="bottom", fontsize=8, color=NEUTRAL)
    axes.plot([67, 67], [2, 28], color=NEUTRAL, lw=0.8, ls=(0, (4, 3)))
    axes.text(33, 3.2, "what may be looked at while a model is made", ha="center", fontsize=9, style="italic")
    axes.text(79, 3.2, "what is reported", ha="center", fontsize=9, style="italic")
    return figure


def orders() -> Figure:
    """Two orders of the product of tokens with Z D: decode first, and re-ordered."""
    figure, axes = canvas(90, 34)

    def matrix(x: float, y: float, width: float, height: float, name: str, below: str, face: str = "white") -> None:
        box(axes, x, y, width, height, name, face)
        axes.text(x, y - height / 2 - 0.8, below, ha="center", va="top", fontsize=8, color=NEUTRAL)

    for left, title in ((2, "decode first: x (Z D)"), (49, "re-ordered: (x Z) D")):
        axes.text(left, 32.5, title, ha="left", va="top", fontsize=10, weight="bold")
    # decode first: Z and D become the dense weight, which x is multiplied by
    matrix(8, 20, 5, 14, "Z", "i × r,\none for each block", WEIGHTS)
    matrix(20, 20, 14, 5, "D", "r × o,\nstored once", WEIGHTS)
    matrix(36, 20, 14, 14, "W", "i × o, built")
    arrow(axes, (27.4, 20), (28.7, 20))
    axes.text(11.8, 20, "·", ha="center", va="center", fontsize=12)
    axes.text(22, 3, "i r o multiply-accumulates to build W,\nthen n i o for n tokens", ha="center", fontsize=9)
    # re-ordered: x meets Z, the short result meets D
    matrix(56, 20, 14, 7, "x", "n × i")
    matrix(68, 20, 5, 14, "Z", "i × r", WEIGHTS)
    matrix(81, 20, 14, 5, "D", "r × o", WEIGHTS)
    for x in (64.2, 72.2):
        axes.text(x, 20, "·", ha="center", va="center", fontsize=12)
    axes.plot([49, 49, 70.7, 70.7], [28, 28.8, 28.8, 28], color=ACTS, lw=1.2)
    axes.text(72, 28.4, "first: only r numbers a token", ha="left", va="center", fontsize=8, color=ACTS)
    axes.text(68, 3, "n r (i + o) multiply-accumulates;\nno dense weight is ever built", ha="center", fontsize=9)
    axes.plot([46, 46], [2, 32], color="#DDDDDD", lw=1)
    return figure


DIAGRAMS: dict[str, Callable[[], Figure]] = {"block": block, "splits": splits, "orders": orders}


def drawn(name: str) -> bytes:
    """The SVG file of a diagram; the same bytes every time."""
    with style():
        figure = DIAGRAMS[name]()
        data = figure_bytes(figure, "svg", metadata={"Date": None})
        plt.close(figure)
    return data


def outdated_files() -> Iterator[tuple[Path, bytes]]:
    """The files whose diagrams are outdated, with the content that they should have: the diagrams' own, and the lessons."""
    svgs = {f"{name}.svg": drawn(name) for name in DIAGRAMS}
    for name, data in svgs.items():
        if not (FOLDER / name).is_file() or (FOLDER / name).read_bytes() != data:
            yield FOLDER / name, data
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook, changed = nbformat.read(path, as_version=4), False
        for cell in notebook.cells:
            names = re.findall(r"\(attachment:([\w.]+)\)", cell.source) if cell.cell_type == "markdown" else []
            attachments = {name: {"image/svg+xml": base64.b64encode(svgs[name]).decode()} for name in names}
            if attachments != cell.get("attachments", {}):
                cell.attachments, changed = attachments, True
        if changed:
            yield path, (nbformat.writes(notebook) + "\n").encode()


def main() -> int:
    """Write what is outdated, or only say what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; the exit status says whether a file is outdated"
    )
    check, outdated = parser.parse_args().check, 0
    for path, data in outdated_files():
        outdated += 1
        print(path.relative_to(ROOT), "is outdated" if check else "written")
        if not check:
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, data)
    return int(check and outdated > 0)


if __name__ == "__main__":
    sys.exit(main())
