"""Where things are: the project's checkout, and the folder of results and of the caches that runs share."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vitbench.errors import InputError


def checkout() -> Path | None:
    """The source checkout that this package runs from, which holds `notebooks/`; None where it is installed without one."""
    root = Path(__file__).resolve().parents[1]
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


def writable_folder(path: str | Path, what: str) -> Path:
    """Make `path` a folder that can be written, or raise `InputError` that says why it cannot."""
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise InputError(
            f"{what} {str(path)!r} cannot be written ({error.strerror}); give a folder with free space that you own"
        ) from None
    return path


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to fill; it takes the name `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
        os.replace(fresh, path)
        if old:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
