"""Run an exported model and measure time and memory, without PyTorch and vitbench: numpy and ONNX Runtime or OpenVINO suffice.

A bundle for another device holds a copy of this file. `python standalone.py --answer MODEL --images FILE.npy --threads N`
runs one inference and prints its time and memory as JSON, or with `--to FILE` writes them to a file.
"""

import contextlib
import functools
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

# file suffix -> the package that runs such files, which is also the backend's name
PACKAGES = {".onnx": "onnxruntime", ".xml": "openvino"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WARMUP_CALLS, WARM_SECONDS, STABLE_RELATIVE_CHANGE = 10, 10.0, 0.05
MIN_ROUNDS, MAX_SECONDS = 20, 60.0
STARTS, TIME_LIMIT = 5, 600
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


class BundleError(ValueError):
    """A bundle, or a file in it, cannot be measured on this machine."""


def onnx_session(model: bytes | str, threads: int, optimized: str = "", portable: bool = False):
    """An ONNX Runtime session on the CPU.

    Args:
        model: the file's content or its path.
        threads: the number of threads that compute.
        optimized: the file to which the optimized graph is written, "" for none.
        portable: leave out optimizations for this machine's type of CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    options.optimized_model_filepath = optimized
    options.enable_cpu_mem_arena = False  # the arena keeps memory and saves no time
    if portable:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # its threads spin between calls, which would take cores from models that are timed alternately with it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if int8_sums_can_overflow():  # widening the codes is slower but exact
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def int8_sums_can_overflow() -> bool:
    """Whether sums of products of 8-bit codes can overflow on this CPU: an x86 without VNNI, or without a known answer."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def openvino_settings(threads: int, precision: str = "f32") -> dict[str, Any]:
    """OpenVINO's settings for exact results. By default it may compute in bf16, and round inputs of packed layers to int8."""
    exact = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return {**exact, "INFERENCE_NUM_THREADS": threads}


def open_model(path: str | Path, threads: int, precision: str = "f32") -> Callable:
    """An exported model as a function from images, (B, 3, H, W) float32, to logits, (B, classes)."""
    if _package(Path(path)) == "onnxruntime":
        session = onnx_session(str(path), threads)
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes its import fail
    import openvino

    compiled = openvino.compile_model(str(path), "CPU", openvino_settings(threads, precision))
    return lambda images: compiled(images, share_inputs=True)[0]


def _package(path: Path) -> str:
    """The package that runs a file."""
    package = PACKAGES.get(path.suffix)
    if not package:
        raise BundleError(
            f"{path.name!r} is not an exported model; allowed are files that end in {', '.join(PACKAGES)}"
        )
    if not importlib.util.find_spec(package):
        raise BundleError(f"{package} is not installed; install it with: pip install {package}")
    return package


def peak_bytes() -> int:
    """The peak RSS of this process, in bytes. On Linux it is VmHWM, since ru_maxrss includes the peak of a forking parent."""
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


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the rest of this process.

    By default it returns large blocks to the system, depending on earlier allocations. Each inference then has page
    faults, and the models that are compared in one process do not have equally many.
    """
    import ctypes

    with contextlib.suppress(OSError, TypeError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def time_alternating(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """The times of alternating calls: for each of `calls` up to `rounds` values in ms.

    All calls are warmed up first. Every second round is in reverse order. After `MIN_ROUNDS` rounds, no round starts later
    than `MAX_SECONDS`.
    """

    def call(i: int) -> float:
        start = time.perf_counter()
        calls[i]()
        return (time.perf_counter() - start) * 1000

    times: list[list[float]] = [[] for _ in calls]
    for i in range(len(calls)):
        _warm_up(functools.partial(call, i))
    start = time.monotonic()
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.monotonic() - start > MAX_SECONDS:
            break
        for i in sorted(range(len(calls)), reverse=turn % 2 == 1):
            times[i].append(call(i))
    return times


def _warm_up(call: Callable[[], float]) -> None:
    """Call until the median of `WARMUP_CALLS` calls is stable, for about `WARM_SECONDS` at most."""
    import numpy as np

    start, before = time.monotonic(), float("inf")
    while True:
        now = float(np.median([call() for _ in range(WARMUP_CALLS)]))
        if abs(now - before) <= STABLE_RELATIVE_CHANGE * now or time.monotonic() - start > WARM_SECONDS:
            return
        before = now


def measure_one_inference(path: str, images: str, threads: int) -> dict[str, Any]:
    """Load a model and run one inference in this process.

    Returns `imports` and `peak`, the peak RSS after the imports and at the end (bytes), `load` (s), and `answered`, the
    monotonic time at the end (s).
    """
    import numpy as np

    importlib.import_module(_package(Path(path)))
    imports, start = peak_bytes(), time.monotonic()
    call = open_model(path, threads)
    loaded = time.monotonic() - start
    call(np.load(images, allow_pickle=False))
    return {"imports": imports, "peak": peak_bytes(), "load": loaded, "answered": time.monotonic()}


def inference_command(path: Path, images: Path, threads: int) -> list[str]:
    """The command that prints `measure_one_inference` in a fresh process."""
    script, model, inputs = (os.path.abspath(file) for file in (__file__, path, images))
    return [sys.executable, script, "--answer", model, "--images", inputs, "--threads", str(threads)]


def in_fresh_process(command: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """Run a command such as `inference_command`, and return its result with `cold_start`: seconds until its first logits.

    The process works in a temporary folder and imports nothing from it. Its printed output is read only if it fails.

    Args:
        command: the command, which accepts `--to FILE`.
        variables: the environment of the process.

    Raises:
        BundleError: the process failed, or took longer than `TIME_LIMIT`.
    """
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder, "answer.json")
        start = time.monotonic()
        try:
            process = subprocess.run(
                [*command, "--to", str(result_file)],
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
                cwd=folder,
                env=variables | {"PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise BundleError(f"one inference took more than {TIME_LIMIT} s") from None
        if process.returncode or not result_file.exists():
            raise BundleError(failure_reason(process.stderr, process.returncode))
        result = json.loads(result_file.read_text())
    return {**result, "cold_start": result.pop("answered") - start}


def write_result(result: dict[str, Any], output_file: str) -> None:
    """Write the result as JSON to the file `output_file`, or print it if that is ""."""
    if output_file:
        Path(output_file).write_text(json.dumps(result))
    else:
        print(json.dumps(result), flush=True)


def failure_reason(stderr: str, status: int) -> str:
    """The reason why a Python process failed: the line of the error if there is one, otherwise the last line."""
    lines = stderr.strip().splitlines()
    if status < 0:
        return f"it was ended by signal {-status}{' (out of memory?)' if status == -9 else ''}"
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported)\b", line)]
    return (errors or lines or [f"exit status {status}"])[-1]


def thread_environment(threads: int) -> dict[str, str]:
    """This process's environment, with the number of threads in the variables that libraries read."""
    return os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))


def main(arguments: list[str]) -> int:
    """`--answer FILE --images FILE --threads N`: print `measure_one_inference` as JSON, or with `--to FILE` write it there."""
    options = dict(zip(arguments[::2], arguments[1::2]))
    try:
        write_result(
            measure_one_inference(options["--answer"], options["--images"], int(options["--threads"])),
            options.get("--to", ""),
        )
    except BundleError as error:
        print(f"BundleError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
