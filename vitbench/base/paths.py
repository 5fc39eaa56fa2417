"""Paths: the project's checkout, and the folders of results and caches."""

import os
import tempfile
from pathlib import Path

from vitbench.base.errors import InputError


def checkout() -> Path | None:
    """The source checkout that this package runs from, which holds `notebooks/`; None if it is installed without one."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "notebooks" / "profiles").is_dir() else None


def home() -> Path:
    """The folder that holds `data/` and `results/`, for caches and for results without a given folder.

    It is `VITBENCH_HOME` if that is set, otherwise the source checkout of this package, otherwise the current folder.
    It does not decide which notebooks run.
    """
    if os.environ.get("VITBENCH_HOME"):
        return Path(os.environ["VITBENCH_HOME"]).expanduser().resolve()
    return checkout() or Path.cwd()


def data_cache() -> Path:
    """The folder of downloaded and converted image sets."""
    return home() / "data" / "cache"


def model_cache() -> Path:
    """The folder of trained models and other stored work, each under its key."""
    return home() / "results" / "cache"


def shipped(name: str) -> Path | None:
    """The folder `name` of the images and models that come with the source checkout; None where there is no such folder."""
    root = checkout()
    folder = root / "data" / name if root and Path(name).name == name else None
    return folder if folder and folder.is_dir() else None


def writable_folder(path: str | Path, description: str) -> Path:
    """Create the folder `path` if it is missing; raises `InputError` with the reason if it cannot be written."""
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
    """Write an unnamed file in `folder`; raises `OSError` with the reason if that fails."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)
