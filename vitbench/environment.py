"""What a row was made on: machine, versions, source. Captured once a process, kept once by its hash."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import tomllib
from pathlib import Path

import psutil
import torch

from vitbench.base.digest import digest
from vitbench.base.files import write_text
from vitbench.version import __version__


@functools.cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(backend: str = "") -> str:
    """What runs a backend: the graphics card or the processor, by name."""
    return f"cuda: {torch.cuda.get_device_name()}" if backend == "cuda" else f"cpu: {cpu_name()}"


@functools.cache
def environment() -> dict:
    """Machine and versions; no host name, user or path."""
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


def write_environment(folder: Path, facts: dict | None = None) -> str:
    """Keep the environment, this process's or another device's `facts`, as `folder`/<id>.json; returns the id, its hash."""
    facts = environment() if facts is None else facts
    name = digest(facts, 12)
    target = folder / f"{name}.json"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(facts, indent=1) + "\n")
    return name


@functools.cache
def commit() -> str:
    """The commit of this package's own source, with "-dirty" if files differ from it; else its version.

    The source has a commit only where the package lies in its own checkout and git tracks it there. A package that is
    installed or copied into somebody else's project has none, whatever repository is around it.
    """
    return commit_of(Path(__file__).resolve().parent)


def commit_of(package: Path) -> str:
    """`commit` of the package in that folder."""
    checkout = package.parent
    if not (checkout / ".git").exists() or _project(checkout) != package.name:
        return f"version {__version__}"
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=own).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", str(package / "__init__.py"))
        changed = git("status", "--porcelain", "--", str(package))
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, a slow disk, a repository of another user
        return f"version {__version__}"


def _project(checkout: Path) -> str:
    """The name of the project that a folder holds, or nothing."""
    try:
        return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError):
        return ""
