"""The pages' figures and the folders that each is drawn from: `python -m docs.figures` draws them again from committed rows."""

from pathlib import Path

from vitbench.figures.gallery import draw, load_folders

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"
FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {  # file -> name in the gallery, folders of results
    "cifar10_224_size.png": ("size", ("cifar10-224-h200",)),
    "cifar10_methods.png": (
        "methods",
        (
            "quantization-cifar10",
            "cifar10-deit",
            "mixed-rank-cifar10",
            "multidimensional-cifar10",
            "torch-pruning-cifar10",
        ),
    ),
    "deit_base_backends.png": ("backends", ("edge-deit-base",)),
    "cifar10_equal_size.png": ("equal-size", ("equal-cifar10",)),
    "cifar10_ranks.png": ("ranks", ("equal-cifar10",)),
}


def drawn_from(file: str) -> tuple[str, ...]:
    """The folders of a figure's rows, so that a table beside the figure uses the same rows."""
    return FIGURES[file][1]


def draw_figure(file: str, folder: Path) -> Path:
    """Draw a figure into a folder; its rows become a CSV file beside it."""
    figure, folders = FIGURES[file]
    draw(figure, load_folders([REFERENCE / name for name in folders]), folder / file)
    return folder / file


if __name__ == "__main__":
    for file in FIGURES:
        print(draw_figure(file, REFERENCE / "figures"))
