"""A results folder: records.jsonl, environments/, models/, figures/, notebooks/ and report.html.

An environment describes where a row was made: the machine and the versions of packages. Each process captures it once, and
it is stored once, under its hash.
"""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import psutil
import torch

from vitbench.base import paths
from vitbench.base.configs import digest
from vitbench.base.errors import InputError
from vitbench.base.files import write_text
from vitbench.rows.records import Row, append_rows
from vitbench.rows.row_table import load_records
from vitbench.version import __version__

# a folder with one of these is a results folder
RESULTS_MARKERS = ("records.jsonl", "environments", "searches", "suite.lock", "sweep.lock")
# files that results would overwrite or be confused with, if another program's lie in the folder
RESERVED_NAMES = (
    "notebooks",
    "figures",
    "errors",
    "report.html",
    "sweep.json",
    "mine.txt",
    "recipe.json",
    "model.safetensors",
    "bundle.json",
)


class Run:
    """A results folder, to which rows, models and figures are added.

    Args:
        folder: an existing or new folder; "" means `results/runs/quick` in the project.

    Raises:
        InputError: the folder cannot be written, or it is not a results folder and has files that results would overwrite.
    """

    def __init__(self, folder: str | Path = ""):
        folder = Path(folder or paths.home() / "results" / "runs" / "quick").expanduser()
        _check_results_folder(folder)
        self.folder = paths.writable_folder(folder, "results folder")
        (self.folder / "environments").mkdir(exist_ok=True)  # marks it as a results folder
        self.records = self.folder / "records.jsonl"
        self.models = self.folder / "models"
        self.figures = self.folder / "figures"
        self.notebooks = self.folder / "notebooks"

    def append(self, rows: Iterable[Row], environment: dict | None = None) -> None:
        """Append rows, with the environment (by default this process's) and the commit.

        Rows with a key come from another process and are not changed; `keep_environment` stores their environment.
        """
        env_id = self.keep_environment(environment)
        append_rows(self.records, [row if row.key else row.with_provenance(env_id, commit()) for row in rows])

    def keep_environment(self, environment: dict | None = None) -> str:
        """Store an environment, by default this process's, and return its id."""
        return write_environment(self.folder / "environments", environment)

    def finished_keys(self) -> set[str]:
        """The keys of the rows that are ok or skipped."""
        if not self.records.exists():
            return set()
        rows = load_records(self.records, latest=False)
        return set(rows["key"][rows["status"] != "failed"])

    def rows(self) -> pd.DataFrame:
        """The rows as a table, as in `load_records`: the last of rows with the same key fields."""
        return load_records(self.records)


def _check_results_folder(folder: Path) -> None:
    conflicts = [name for name in RESERVED_NAMES if (folder / name).exists()]
    if conflicts and not any((folder / name).exists() for name in RESULTS_MARKERS):
        raise InputError(
            f"{str(folder)!r} holds {conflicts[0]!r} and no results, so it is left alone; give a new folder or a results folder"
        )


@functools.cache
def cpu_name() -> str:
    """The processor's name, as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(backend: str = "") -> str:
    """The device that runs a backend: the name of the graphics card for "cuda", otherwise that of the processor."""
    return f"cuda: {torch.cuda.get_device_name()}" if backend == "cuda" else f"cpu: {cpu_name()}"


@functools.cache
def current_environment() -> dict:
    """The machine and the versions of all packages, without host name, user and paths."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    packages = {
        dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "int8_engine": torch.backends.quantized.engine,
        "vnni": torch.cpu._is_vnni_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "gpus": gpus,
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def write_environment(folder: Path, environment: dict | None = None) -> str:
    """Store an environment, by default this process's, as `folder`/<id>.json; returns the id, its hash."""
    environment = current_environment() if environment is None else environment
    name = digest(environment, 12)
    target = folder / f"{name}.json"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(environment, indent=1) + "\n")
    return name


@functools.cache
def commit() -> str:
    """The commit of this package's source, with "-dirty" if files differ from it; otherwise its version.

    The source has a commit only if the package lies in its own checkout and git tracks it there. A package that is
    installed, or copied into another project, has none, even inside that project's repository.
    """
    return commit_of(Path(__file__).resolve().parents[1])


def commit_of(package: Path) -> str:
    """`commit` for the package in the folder `package`."""
    checkout = package.parent
    if not (checkout / ".git").exists() or _project(checkout) != package.name:
        return f"version {__version__}"
    clean_environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, env=clean_environment
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", str(package / "__init__.py"))
        changed = git("status", "--porcelain", "--", str(package))
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, a slow disk, a repository of another user
        return f"version {__version__}"


def _project(checkout: Path) -> str:
    """The name of the project in a folder, from its pyproject.toml; "" if there is none."""
    try:
        return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError):
        return ""
