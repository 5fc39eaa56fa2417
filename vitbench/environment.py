"""What a row was made on: machine, versions, source. Captured once a process, kept once by its hash."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch


@functools.cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    target = folder / f"{name}.json"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{name}.{os.getpid()}"
        part.write_text(json.dumps(facts, indent=1) + "\n")
        part.replace(target)
    return name


@functools.cache
def commit() -> str:
    """The commit of the source that this package runs from, with "+changes" if files differ from it; else its version."""
    source = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(source))
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {importlib.metadata.version('vitbench')}"
