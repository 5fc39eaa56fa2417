"""Where things are: the project's checkout, and the folder of results and of the caches that runs share."""

import os
import tempfile
from pathlib import Path

from vitbench.base.errors import InputError


def checkout() -> Path | None:
    """The source checkout that this package runs from, which holds `notebooks/`; None where it is installed without one."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "notebooks" / "profiles").is_dir() else None


def home() -> Path:
    """The folder that holds `data/` and `results/`: caches, and results whose folder is not given.

    `VITBENCH_HOME` if it is set; else the source checkout that this package runs from; else the current folder. It decides
    where data are, never which notebooks run.
    """
    if os.environ.get("VITBENCH_HOME"):
        return Path(os.environ["VITBENCH_HOME"]).expanduser().resolve()
    return checkout() or Path.cwd()


def data_cache() -> Path:
    """Downloaded and converted image sets."""
    return home() / "data" / "cache"


def model_cache() -> Path:
    """Trained baselines, each under the hash of everything that made it."""
    return home() / "results" / "cache"


def shipped(name: str) -> Path | None:
    """The folder of that name that comes with the project (photographs, a small model); None where there is none."""
    root = checkout()
    folder = root / "data" / name if root and name.isidentifier() else None
    return folder if folder and folder.is_dir() and name != "cache" else None


def writable_folder(path: str | Path, description: str) -> Path:
    """Make `path` a folder that can be written, or raise `InputError` that says why it cannot."""
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except OSError as error:
        raise InputError(
            f"{description} {str(path)!r} cannot be written ({error.strerror}); give a folder with free space that you own"
        ) from None
    return path


def check_writable(folder: Path) -> None:
    """Write a file of no name in `folder` and let it go; an `OSError` says why that cannot be."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)
