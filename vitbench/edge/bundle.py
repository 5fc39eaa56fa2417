"""Bundles: a folder of exported models, with a script that measures them on a device without PyTorch, and the import of its results."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from vitbench.base import configs, progress, standalone
from vitbench.base.configs import Config, digest
from vitbench.base.errors import InputError
from vitbench.base.files import FolderKind, atomic_folder, check_target, write_array, write_bytes, write_text
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData
from vitbench.measurement import backends, timing
from vitbench.measurement.cost import Measurement, model_row_fields
from vitbench.measurement.fresh import MEMORY, STARTUP
from vitbench.model import artifact
from vitbench.rows.records import Row, append_rows, read_rows, records_file
from vitbench.rows.runs import Run

SCHEMA_VERSION = 1  # as in on_device.py, which imports nothing of vitbench
MANIFEST, ANSWERS, ROWS = "bundle.json", "answers.json", "rows.jsonl"
SCRIPT, README = "measure.py", "README.txt"
SHIPPED = {SCRIPT: Path(__file__).with_name("on_device.py"), "standalone.py": Path(standalone.__file__)}
KIND = FolderKind(
    "a bundle",
    MANIFEST,
    frozenset({"schema_version", "id", "models", "files"}),
    lambda content: content["files"] if isinstance(content["files"], dict) else (),
)
# metrics that do not depend on the device; their rows are copied into the bundle
DEVICE_INDEPENDENT_METRICS = {
    "top1",
    "top5",
    "cross_entropy",
    "params",
    "macs",
    "int8_macs",
    "bytes",
    "bytes_predicted",
}
TEXT = f"""Measure these models on this device:

    python3 -m pip install numpy {{packages}}
    python3 {SCRIPT}

It writes {ANSWERS} here. Copy that file back beside the bundle, and read it with

    vitbench adopt THIS_FOLDER --out RESULTS_FOLDER
"""


class Entry(Config):
    """One exported model of a bundle: its row fields (`about`), its files, and the expected logits with their tolerance."""

    name: str
    backend: str
    batch: int
    about: dict[str, Any]
    artifact: str
    error: str = ""
    file: str = ""
    images: str = ""
    logits: str = ""
    tolerance: float = 0.0
    versus: str = ""
    versus_artifact: str = ""
    exported_bytes: int = 0


class Manifest(Config):
    """`bundle.json`."""

    schema_version: int
    id: str
    models: list[Entry]
    files: dict[str, str]


class Result(Config):
    """The measurements of one entry on a device: ms (times), bytes (imports, peak) and seconds (load, cold_start)."""

    name: str
    error: str = ""
    apart: float = 0.0
    imports: list[float] = []
    peak: list[float] = []
    load: list[float] = []
    cold_start: list[float] = []
    times: list[float] = []
    versus_times: list[float] = []


class Answers(Config):
    """`answers.json`."""

    schema_version: int
    bundle: str
    device: dict[str, Any]
    threads: int = Field(ge=1)
    results: list[Result]


def make_bundle(
    models: Sequence[str | Path],
    out: str | Path,
    data: ImageData | None = None,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1,),
    rows: str | Path = "",
) -> Path:
    """Export saved models into the folder `out`, with a script that measures them where PyTorch is not installed.

    Args:
        models: folders written by `save`. The others are timed against the first whose method is "baseline".
        data: the models are run on its calibration images; without, on random numbers.
        runtimes: the backends that run the models; allowed are those that need no PyTorch, onnxruntime and openvino.
        batches: batch sizes, each with a file of its own.
        rows: a results folder, whose rows of accuracy, bytes and MACs of these models are copied into the bundle.

    Raises:
        InputError: no models, a backend that needs PyTorch, or a folder that is no bundle or cannot be written.
    """
    check_target(out, KIND)
    exportable_backends = [name for name, backend in backends.BACKENDS.items() if backend.runs_without_torch]
    for backend in runtimes:
        if backend not in exportable_backends:
            allowed = ", ".join(exportable_backends)
            raise InputError(f"a bundle runs without PyTorch, {backend!r} does not; allowed: {allowed}")
        backends.require_backend(backend)
    if not models or min(batches, default=0) < 1:
        raise InputError("give at least one saved model, and batches of 1 image or more")
    manifests = {Path(path): artifact.read_manifest(path) for path in models}
    out = Path(out).expanduser()
    with atomic_folder(out, KIND) as folder:
        entries = [
            _export(folder, number, path, backend, batch, data)
            for number, path in enumerate(progress.progress_bar(list(manifests), "exporting", unit="model"))
            for backend in runtimes
            for batch in batches
        ]
        entries = [_with_baseline(entry, entries) for entry in entries]
        shipped_rows = _rows_to_ship(rows, {entry.artifact for entry in entries}) if rows else []
        if shipped_rows:
            append_rows(folder / ROWS, shipped_rows)
            Path(f"{folder / ROWS}.lock").unlink(missing_ok=True)
        for name, source in SHIPPED.items():
            write_bytes(folder / name, source.read_bytes())
        write_text(folder / README, TEXT.format(packages=" ".join(dict.fromkeys(runtimes))))
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
        name = digest(files)
        manifest = Manifest(schema_version=SCHEMA_VERSION, id=name, models=entries, files=files)
        write_text(folder / MANIFEST, json.dumps(manifest.to_dict(), indent=1) + "\n")
    return out


def _export(folder: Path, number: int, path: Path, backend: str, batch: int, data: ImageData | None) -> Entry:
    """Export one model for one backend and batch size. If the backend does not support it, the entry has the reason."""
    model = artifact.load(path)
    recipe, sha = model.recipe, artifact.read_manifest(path).sha256[:12]
    stem = f"{number:02}-{recipe.method.replace('+', '-')}-{backend}-b{batch}"
    entry = Entry(name=stem, backend=backend, batch=batch, about=model_row_fields(recipe, data), artifact=sha)
    if reason := backends.unsupported_reason(backend, recipe):
        return entry.replace(error=reason)
    x = _images(recipe.preprocess, batch, data)
    images_file, logits_file = folder / f"{stem}.images.npy", folder / f"{stem}.logits.npy"
    with torch.inference_mode():
        logits = model(x)
    export = backends.BACKENDS[backend].export
    assert export is not None, "make_bundle allows backends with an export alone"
    file = export(model, x, folder / stem)
    size = sum(part.stat().st_size for part in folder.glob(f"{stem}.*"))
    write_array(images_file, x.numpy())
    write_array(logits_file, logits.numpy())
    return entry.replace(
        file=file.name,
        images=images_file.name,
        logits=logits_file.name,
        tolerance=backends.tolerance(backend, model),
        exported_bytes=size,
    )


def _images(preprocess: Any, batch: int, data: ImageData | None) -> torch.Tensor:
    if data and len(data.calibration) >= batch:
        images, _ = next(iter(eval_batches(data.calibration, preprocess, batch)))
        return images.float().contiguous()
    return torch.randn(batch, 3, preprocess.size, preprocess.size, generator=torch.Generator().manual_seed(0))


def _with_baseline(entry: Entry, entries: list[Entry]) -> Entry:
    """The entry with the name of another entry that is the baseline in the same backend and batch size, if there is one."""
    for other in entries:
        is_same_format = (other.backend, other.batch) == (entry.backend, entry.batch)
        if is_same_format and other.about["method"] == "baseline" and not other.error and other.name != entry.name:
            return entry.replace(versus=other.name, versus_artifact=other.artifact)
    return entry


def _rows_to_ship(folder: str | Path, artifacts: set[str]) -> list[Row]:
    rows = read_rows(records_file(folder))
    return [
        row for row in rows if row.metric in DEVICE_INDEPENDENT_METRICS and row.context.get("artifact") in artifacts
    ]


def import_answers(bundle: str | Path, out: str | Path, device: str = "") -> int:
    """Add the rows of a bundle's results and the rows in the bundle to the results folder `out`.

    Args:
        bundle: the folder, with `answers.json` from the device.
        device: the device's name in rows and figures; by default that of its board or processor.

    Returns:
        The number of rows from the results.

    Raises:
        InputError: no results, results of another bundle or schema version, or a folder with another device's timings.
    """
    folder, run = Path(bundle).expanduser(), Run(out)
    manifest, answers = (_read(folder / name, kind) for name, kind in ((MANIFEST, Manifest), (ANSWERS, Answers)))
    if answers.bundle != manifest.id:
        raise InputError(f"{ANSWERS} is of bundle {answers.bundle}, this is {manifest.id}; copy the right file")
    device_name = device or answers.device.get("board") or answers.device.get("cpu") or "unknown"
    _check_same_device(run, f"cpu: {device_name}")
    if (folder / ROWS).is_file():
        append_rows(run.records, read_rows(folder / ROWS))
    result_by_name = {result.name: result for result in answers.results}
    rows = [
        row
        for entry in manifest.models
        for row in _rows(
            entry, result_by_name.get(entry.name), {"threads": answers.threads, "device": f"cpu: {device_name}"}
        )
    ]
    run.append(rows, answers.device)
    return len(rows)


def _read(path: Path, kind: type[Config]) -> Any:
    if not path.is_file():
        raise InputError(f"no {path.name} in {str(path.parent)!r}; run {SCRIPT} on the device and copy {ANSWERS} back")
    content = configs.read_json(path, "file")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{str(path)!r} has schema version {version!r}, this vitbench reads {SCHEMA_VERSION}; "
            "make the bundle again and measure it again"
        )
    return kind(**content)


def _check_same_device(run: Run, device: str) -> None:
    if not run.records.exists():
        return
    others = {row.context["device"] for row in read_rows(run.records) if "device" in row.context} - {device}
    if others:
        raise InputError(
            f"{str(run.folder)!r} holds what {', '.join(sorted(others))} took and this is {device}; give another --out"
        )


def _rows(entry: Entry, result: Result | None, machine: dict[str, Any]) -> Iterator[Row]:
    """The rows of one entry; failed or skipped rows with the reason if the device has no result."""
    context = {**machine, "backend": entry.backend, "batch": entry.batch}
    context |= {"versus": f"baseline:{entry.versus_artifact}"} if entry.versus else {}
    metrics = timing.latency_metrics(context, [entry.backend])
    metrics += [(metric, unit, context) for metric, unit in {**MEMORY, **STARTUP, "exported_bytes": "bytes"}.items()]
    rows = [
        Row(
            **entry.about,
            metric=metric,
            unit=unit,
            context={**metric_context, "artifact": entry.artifact},
            value=0,
            source="measured",
        )
        for metric, unit, metric_context in metrics
    ]
    reason = entry.error or _missing_reason(entry, result)
    if reason or result is None:
        status = "skipped" if entry.error else "failed"
        yield from (row.replace(status=status, error=reason, value=None, source="") for row in rows)
    else:
        measurements = _values(entry, result)
        yield from (row.replace(**value.fields()) for row, value in zip(rows, measurements, strict=True))


def _missing_reason(entry: Entry, result: Result | None) -> str:
    """What the device's results lack of an entry, in words; "" if they are complete."""
    if result is None or result.error:
        return result.error if result else "the device has no result of it"
    needed = ("times", "peak", "imports", "cold_start", "load", *(["versus_times"] if entry.versus else []))
    missing = [key for key in needed if not getattr(result, key)]
    return f"the device's result has no {', '.join(missing)}" if missing else ""


def _values(entry: Entry, result: Result) -> Iterator[Measurement]:
    """The measurements of an entry, in the order of its rows."""
    model_timing = timing.BackendTiming(result.times, result.apart, entry.tolerance)
    yield from timing.latency_values(
        entry.backend, model_timing, [result.versus_times] if entry.versus else [], "on the device"
    )
    source = f"measured: median of {len(result.peak)} fresh processes on the device, without PyTorch"
    for metric, samples in zip(
        (*MEMORY, *STARTUP), (result.peak, result.imports, result.cold_start, result.load), strict=True
    ):
        yield Measurement(metric, float(np.median(samples)), source, samples=samples)
    yield Measurement("exported_bytes", entry.exported_bytes, f"measured: files that {entry.backend} loads")
