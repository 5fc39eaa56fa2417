"""Measure every model of the bundle in this file's folder and write answers.json there. Only numpy and a runtime are needed.

    python3 measure.py

This file is copied into bundles and imported by no module, so `standalone` is the file beside it.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH set, Python leaves out a script's folder
from standalone import (  # noqa: E402
    PACKAGES,
    STARTS,
    BundleError,
    in_fresh_process,
    inference_command,
    keep_freed_memory,
    open_model,
    thread_environment,
    time_alternating,
)

SCHEMA_VERSION = 1
MANIFEST, ANSWERS = "bundle.json", "answers.json"


def read_bundle(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, after a check of the SHA-256 of every file.

    Raises:
        BundleError: a missing or damaged file, or another schema version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{str(folder)!r} is not a complete bundle ({error}); copy it again") from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema version {manifest.get('schema_version')!r}, this script reads {SCHEMA_VERSION}; "
            "make the bundle again with the version of vitbench that will read its results"
        )
    for name, expected_sha256 in manifest["files"].items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected_sha256:
            raise BundleError(f"{name!r} is missing or damaged; copy the bundle again")
    return manifest


def measure_bundle(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Logit distance, start, memory and times of every model of the bundle; `error` has the reason if one cannot be measured.

    In this process, each model's calls alternate with those of the baseline in the same format: two models in memory at a time.
    """
    manifest, results = read_bundle(folder), []
    keep_freed_memory()
    for entry in manifest["models"]:
        result = {"name": entry["name"]}
        try:
            if entry["error"]:  # it could not be exported
                raise BundleError(entry["error"])
            result |= _measure_entry(folder, entry, manifest["models"], threads, rounds)
        except BundleError as error:
            result["error"] = str(error)
        except Exception as error:  # one model that fails does not stop the others
            result["error"] = f"{type(error).__name__}: {error}"
        print(f"{entry['name']}: {result.get('error') or _summary(result)}", flush=True)
        results.append(result)
    header = {"schema_version": SCHEMA_VERSION, "bundle": manifest["id"], "device": device(), "threads": threads}
    return {**header, "results": results}


def _measure_entry(
    folder: Path, entry: dict[str, Any], entries: list[dict[str, Any]], threads: int, rounds: int
) -> dict[str, Any]:
    path, images = folder / entry["file"], folder / entry["images"]
    call, logit_distance = _checked_call(folder, entry, threads)
    command, variables = inference_command(path, images, threads), thread_environment(threads)
    starts = [in_fresh_process(command, variables) for _ in range(STARTS)]
    base = next((other for other in entries if other["name"] == entry["versus"]), None)
    calls = [call, *([_checked_call(folder, base, threads)[0]] if base else [])]
    times = time_alternating(calls, rounds)
    start_samples = {key: [start[key] for start in starts] for key in ("imports", "peak", "load", "cold_start")}
    return {"apart": logit_distance, **start_samples, "times": times[0], "versus_times": times[1] if base else []}


def _checked_call(folder: Path, entry: dict[str, Any], threads: int) -> tuple[Callable[[], Any], float]:
    """A call of the model with its images, and the distance of its logits from those in the bundle, relative to the largest.

    Raises:
        BundleError: the distance is above the entry's tolerance.
    """
    images, expected = (np.load(folder / entry[key], allow_pickle=False) for key in ("images", "logits"))
    model = open_model(folder / entry["file"], threads)
    logit_distance = float(abs(model(images) - expected).max() / abs(expected).max())
    if not logit_distance <= entry["tolerance"]:
        raise BundleError(
            f"its logits differ from PyTorch's by {logit_distance:.1e} of the largest; at most {entry['tolerance']} is allowed"
        )
    return lambda: model(images), logit_distance


def _summary(result: dict[str, Any]) -> str:
    peak, start = (np.median(result[key]) for key in ("peak", "cold_start"))
    return f"{np.median(result['times']):.1f} ms, {peak / 1e6:.0f} MB at the peak, first inference after {start:.2f} s"


def device() -> dict[str, Any]:
    """The machine and the versions, without a host name."""
    versions = {}
    for package in ("numpy", *PACKAGES.values()):
        if importlib.util.find_spec(package):
            versions[package] = importlib.import_module(package).__version__
    machine = {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
    return {**machine, "cpu": _cpu(), "board": _board(), "python": platform.python_version(), "packages": versions}


def _cpu() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _board() -> str:
    return _read("/proc/device-tree/model").strip("\0 \n")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the models of this bundle; write answers.json beside it.")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1), help="default: all cores, up to 4")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each model (default: 40)")
    options = parser.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    try:
        if options.threads < 1 or options.rounds < 1:
            raise BundleError("--threads and --rounds are whole numbers of 1 or more")
        answers = measure_bundle(folder, options.threads, options.rounds)
    except BundleError as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 2
    part = folder / f".{ANSWERS}.part"
    part.write_text(json.dumps(answers))
    part.replace(folder / ANSWERS)
    failed = [result for result in answers["results"] if "error" in result]
    print(f"{folder / ANSWERS}: {len(answers['results']) - len(failed)} measured, {len(failed)} could not be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
