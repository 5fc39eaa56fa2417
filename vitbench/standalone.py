"""Run an exported model with numpy and ONNX Runtime or OpenVINO alone: answers, times, memory.

A bundle for another device holds this file as `measure.py`; it imports neither PyTorch nor anything else of vitbench.

    python measure.py                 measure every model of the bundle beside this file and write answers.json
    python measure.py --answer FILE   one answer of one exported model, in this process: what it takes, as JSON
"""

import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
MANIFEST, ANSWERS = "bundle.json", "answers.json"
# the package that runs a file with this suffix, and the name of the backend
PACKAGES = {".onnx": "onnxruntime", ".xml": "openvino"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WARM_CALLS, WARM_SECONDS, STABLE = 10, 10.0, 0.05
MIN_ROUNDS, MAX_SECONDS = 20, 60.0
STARTS, TIME_LIMIT = 5, 600


class BundleError(ValueError):
    """A bundle, or a file in it, that cannot be measured here."""


def onnx_session(model: bytes | str, threads: int, exact: bool = False, optimized: str = "", portable: bool = False):
    """An ONNX Runtime session on the CPU.

    Args:
        model: the file's content or its path.
        threads: how many compute.
        exact: for CPUs whose 8-bit instructions saturate: widen the codes, which is slower.
        optimized: where to write the graph that really runs.
        portable: leave out what suits only the kind of CPU at hand.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # of errors alone
    options.optimized_model_filepath = optimized
    options.enable_cpu_mem_arena = False  # as fast without, and it holds on to memory
    if portable:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # its threads wait busily for more work; what is timed in turn with it should not find the cores taken
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def openvino_settings(threads: int, precision: str = "f32") -> dict[str, Any]:
    """Without these a CPU with bf16 instructions would compute in bf16, and what meets packed weights be rounded to int8."""
    exact = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return {**exact, "INFERENCE_NUM_THREADS": threads}


def open_model(path: str | Path, threads: int) -> Callable:
    """An exported model as a function of an array of images (B, 3, H, W), float32, that gives logits (B, classes)."""
    if _package(Path(path)) == "onnxruntime":
        session = onnx_session(str(path), threads)
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    compiled = openvino.compile_model(str(path), "CPU", openvino_settings(threads))
    return lambda images: compiled(images, share_inputs=True)[0]


def _package(path: Path) -> str:
    """The package that runs a file."""
    package = PACKAGES.get(path.suffix)
    if not package:
        raise BundleError(f"{path.name!r} is not an exported model; known are files that end in {', '.join(PACKAGES)}")
    if not importlib.util.find_spec(package):
        raise BundleError(f"{package} is not installed here; install it with: pip install {package}")
    return package


def peak_bytes() -> int:
    """This process's own peak. Linux's VmHWM, because ru_maxrss also holds the peak of the parent it was forked from."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def turns(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of each of `rounds` calls of each of `calls`, in turn after warm-up; rather fewer than too long."""

    def call(i: int) -> float:
        start = time.perf_counter()
        calls[i]()
        return (time.perf_counter() - start) * 1000

    times: list[list[float]] = [[] for _ in calls]
    for i in range(len(calls)):
        _warm_up(lambda i=i: call(i))
    start = time.monotonic()
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.monotonic() - start > MAX_SECONDS:
            break
        for i in sorted(range(len(calls)), reverse=turn % 2 == 1):
            times[i].append(call(i))
    return times


def _warm_up(call: Callable[[], float]) -> None:
    """Call until the median of the last calls has settled, within a time limit."""
    import numpy as np

    start, before = time.monotonic(), float("inf")
    while True:
        now = float(np.median([call() for _ in range(WARM_CALLS)]))
        if abs(now - before) <= STABLE * now or time.monotonic() - start > WARM_SECONDS:
            return
        before = now


def one_answer(path: str, images: str, threads: int) -> dict[str, Any]:
    """What one answer takes in this process: bytes after the imports and at the peak, seconds to load, when it came."""
    import numpy as np

    importlib.import_module(_package(Path(path)))
    imports, start = peak_bytes(), time.monotonic()
    call = open_model(path, threads)
    loaded = time.monotonic() - start
    call(np.load(images, allow_pickle=False))
    return {"imports": imports, "peak": peak_bytes(), "load": loaded, "answered": time.monotonic()}


def answer_command(path: Path, images: Path, threads: int) -> list[str]:
    """The command that prints `one_answer` of a fresh process."""
    return [sys.executable, __file__, "--answer", str(path), "--images", str(images), "--threads", str(threads)]


def in_fresh_process(command: list[str], threads: int) -> dict[str, Any]:
    """What a command like `answer_command` prints, with `cold_start`: seconds from its start to the first answer."""
    import subprocess

    start = time.monotonic()
    try:
        done = subprocess.run(
            command, env=thread_environment(threads), capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise BundleError(f"one answer took more than {TIME_LIMIT} s") from None
    if done.returncode:
        raise BundleError(reason(done.stderr, done.returncode))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "cold_start": found.pop("answered") - start}


def reason(stderr: str, status: int) -> str:
    """Why a Python process failed: the error's own line where there is a traceback, else the last line."""
    lines = stderr.strip().splitlines()
    if status < 0:
        return f"it was ended by signal {-status}{' (out of memory?)' if status == -9 else ''}"
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported)\b", line)]
    return (errors or lines or [f"exit status {status}"])[-1]


def thread_environment(threads: int) -> dict[str, str]:
    """This process's environment with the number of threads in the variables that libraries read."""
    return os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))


def read_bundle(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle; every file in it is checked by its SHA-256."""
    import hashlib

    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{str(folder)!r} is not a whole bundle ({error}); copy it again") from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"the bundle has schema version {manifest.get('schema_version')!r}, this script reads {SCHEMA_VERSION}; "
            "make it again with the vitbench that is to read its answers"
        )
    for name, wanted in manifest["files"].items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
            raise BundleError(f"{name!r} is missing or damaged; copy the bundle again")
    return manifest


def measure_bundle(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Answers, start, memory and times of every model of the bundle; what cannot be had has its reason as `error`.

    Each model is timed in turn with the baseline in the same format, in this process, two models in memory at a time.
    """
    manifest, found = read_bundle(folder), []
    for entry in manifest["models"]:
        result = {"name": entry["name"]}
        try:
            if entry["error"]:  # it could not be exported
                raise BundleError(entry["error"])
            result |= _measure_entry(folder, entry, manifest["models"], threads, rounds)
        except BundleError as error:
            result["error"] = str(error)
        except Exception as error:  # one model that fails should not take the others with it
            result["error"] = f"{type(error).__name__}: {error}"
        print(f"{entry['name']}: {result.get('error') or _summary(result)}", flush=True)
        found.append(result)
    facts = {"schema_version": SCHEMA_VERSION, "bundle": manifest["id"], "device": device(), "threads": threads}
    return {**facts, "results": found}


def _measure_entry(
    folder: Path, entry: dict[str, Any], entries: list[dict[str, Any]], threads: int, rounds: int
) -> dict[str, Any]:
    path, images = folder / entry["file"], folder / entry["images"]
    call, apart = _checked(folder, entry, threads)
    starts = [in_fresh_process(answer_command(path, images, threads), threads) for _ in range(STARTS)]
    base = next((other for other in entries if other["name"] == entry["versus"]), None)
    calls = [call, *([_checked(folder, base, threads)[0]] if base else [])]
    times = turns(calls, rounds)
    spent = {key: [start[key] for start in starts] for key in ("imports", "peak", "load", "cold_start")}
    return {"apart": apart, **spent, "times": times[0], "versus_times": times[1] if base else []}


def _checked(folder: Path, entry: dict[str, Any], threads: int) -> tuple[Callable[[], Any], float]:
    """A call of the model with its images, and how far its answer is from the one that came with it."""
    import numpy as np

    images, wanted = (np.load(folder / entry[key], allow_pickle=False) for key in ("images", "logits"))
    model = open_model(folder / entry["file"], threads)
    apart = float(abs(model(images) - wanted).max() / abs(wanted).max())
    if not apart <= entry["tolerance"]:
        raise BundleError(
            f"its answer is {apart:.1e} of the largest logit from PyTorch's, at most {entry['tolerance']} is allowed"
        )
    return lambda: model(images), apart


def _summary(result: dict[str, Any]) -> str:
    import numpy as np

    peak, start = (np.median(result[key]) for key in ("peak", "cold_start"))
    return f"{np.median(result['times']):.1f} ms, {peak / 1e6:.0f} MB at the peak, first answer after {start:.2f} s"


def device() -> dict[str, Any]:
    """The machine and the versions, without a host name."""
    versions = {}
    for package in ("numpy", *PACKAGES.values()):
        if importlib.util.find_spec(package):
            versions[package] = importlib.import_module(package).__version__
    facts = {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
    return {**facts, "cpu": _cpu(), "board": _board(), "python": platform.python_version(), "packages": versions}


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
    import argparse

    parser = argparse.ArgumentParser(description="Measure the models of this bundle; write answers.json beside it.")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1), help="default: all cores, up to 4")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each model (default: 40)")
    parser.add_argument("--answer", metavar="FILE", help="load this exported model, answer once, print what it took")
    parser.add_argument("--images", default="", metavar="FILE", help="images for --answer, a .npy file")
    options = parser.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    try:
        if options.threads < 1 or options.rounds < 1:
            raise BundleError("--threads and --rounds are whole numbers of 1 or more")
        if options.answer:
            print(json.dumps(one_answer(options.answer, options.images, options.threads)))
            return 0
        found = measure_bundle(folder, options.threads, options.rounds)
    except BundleError as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 2
    part = folder / f".{ANSWERS}.part"
    part.write_text(json.dumps(found))
    part.replace(folder / ANSWERS)
    failed = [result for result in found["results"] if "error" in result]
    print(f"{folder / ANSWERS}: {len(found['results']) - len(failed)} measured, {len(failed)} could not be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
