"""A folder to copy to a device: exported models and a script that measures them with numpy and a runtime alone; and its answers back."""

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
# rows that hold wherever a model runs go along with it
ANYWHERE = {"top1", "top5", "cross_entropy", "params", "macs", "int8_macs", "bytes", "bytes_predicted"}
TEXT = f"""Measure these models on this device:

    python3 -m pip install numpy {{packages}}
    python3 {SCRIPT}

It writes {ANSWERS} here. Copy that file back beside the bundle, and read it with

    vitbench adopt THIS_FOLDER --out RESULTS_FOLDER
"""


class Entry(Config):
    """One exported model of a bundle: what it is, its files, and what its answer has to be near."""

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
    """What a device found for one entry."""

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
    run_by: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1,),
    rows: str | Path = "",
) -> Path:
    """Export saved models into the folder `out`, with a script that measures them where PyTorch is not installed.

    Args:
        models: folders written by `save`; the first whose method is "baseline" is what the others are timed against.
        data: its calibration images are what is answered; without, random numbers.
        run_by: backends that need no PyTorch, onnxruntime and openvino.
        batches: images a call, each with a file of its own.
        rows: a results folder; its rows of accuracy, bytes and MACs of these models go along.

    Raises:
        InputError: nothing to export, a backend that needs PyTorch, or a folder that holds something else or cannot be written.
    """
    check_target(out, KIND)
    able = [name for name, backend in backends.BACKENDS.items() if backend.runs_without_torch]
    for backend in run_by:
        if backend not in able:
            raise InputError(f"a bundle runs without PyTorch, {backend!r} does not; allowed: {', '.join(able)}")
        backends.require_backend(backend)
    if not models or min(batches, default=0) < 1:
        raise InputError("give at least one saved model, and batches of 1 image or more")
    manifests = {Path(path): artifact.read_manifest(path) for path in models}
    out = Path(out).expanduser()
    with atomic_folder(out, KIND) as folder:
        entries = [
            _export(folder, number, path, backend, batch, data)
            for number, path in enumerate(progress.progress_bar(list(manifests), "exporting", unit="model"))
            for backend in run_by
            for batch in batches
        ]
        entries = [_against(entry, entries) for entry in entries]
        kept = _kept_rows(rows, {entry.artifact for entry in entries}) if rows else []
        if kept:
            append_rows(folder / ROWS, kept)
            Path(f"{folder / ROWS}.lock").unlink(missing_ok=True)
        for name, source in SHIPPED.items():
            write_bytes(folder / name, source.read_bytes())
        write_text(folder / README, TEXT.format(packages=" ".join(dict.fromkeys(run_by))))
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
        name = digest(files)
        made = Manifest(schema_version=SCHEMA_VERSION, id=name, models=entries, files=files)
        write_text(folder / MANIFEST, json.dumps(made.to_dict(), indent=1) + "\n")
    return out


def _export(folder: Path, number: int, path: Path, backend: str, batch: int, data: ImageData | None) -> Entry:
    """Write one model for one backend and batch size; where the backend has no form of it, the entry says so."""
    model = artifact.load(path)
    recipe, sha = model.recipe, artifact.read_manifest(path).sha256[:12]
    stem = f"{number:02}-{recipe.method.replace('+', '-')}-{backend}-b{batch}"
    facts = {"name": stem, "backend": backend, "batch": batch, "about": model_row_fields(recipe, data), "artifact": sha}
    if why := backends.unsupported_reason(backend, recipe):
        return Entry(**facts, error=why)
    x = _images(recipe.preprocess, batch, data)
    images, logits = folder / f"{stem}.images.npy", folder / f"{stem}.logits.npy"
    with torch.inference_mode():
        wanted = model(x)
    file = backends.BACKENDS[backend].export(model, x, folder / stem)
    size = sum(part.stat().st_size for part in folder.glob(f"{stem}.*"))
    write_array(images, x.numpy())
    write_array(logits, wanted.numpy())
    allowed = backends.tolerance(backend, model)
    return Entry(
        **facts, file=file.name, images=images.name, logits=logits.name, tolerance=allowed, exported_bytes=size
    )


def _images(preprocess: Any, batch: int, data: ImageData | None) -> torch.Tensor:
    if data and len(data.calibration) >= batch:
        images, _ = next(iter(eval_batches(data.calibration, preprocess, batch)))
        return images.float().contiguous()
    return torch.randn(batch, 3, preprocess.size, preprocess.size, generator=torch.Generator().manual_seed(0))


def _against(entry: Entry, entries: list[Entry]) -> Entry:
    """The entry with the name of the baseline in the same backend and batch size, if there is another such model."""
    for other in entries:
        same = (other.backend, other.batch) == (entry.backend, entry.batch)
        if same and other.about["method"] == "baseline" and not other.error and other.name != entry.name:
            return entry.replace(versus=other.name, versus_artifact=other.artifact)
    return entry


def _kept_rows(folder: str | Path, artifacts: set[str]) -> list[Row]:
    rows = read_rows(records_file(folder))
    return [row for row in rows if row.metric in ANYWHERE and row.context.get("artifact") in artifacts]


def adopt(bundle: str | Path, out: str | Path, device: str = "") -> int:
    """Make rows of a bundle's answers and add them to the results folder `out`, with the rows that went along.

    Args:
        bundle: the folder, with `answers.json` from the device in it.
        device: how rows and figures name it; by default the board's or the processor's own name.

    Returns:
        How many rows the bundle gives.

    Raises:
        InputError: no answers, of another bundle or schema version, or a results folder with another device's timings.
    """
    folder, run = Path(bundle).expanduser(), Run(out)
    manifest, answers = (_read(folder / name, kind) for name, kind in ((MANIFEST, Manifest), (ANSWERS, Answers)))
    if answers.bundle != manifest.id:
        raise InputError(f"{ANSWERS} is of bundle {answers.bundle}, this is {manifest.id}; copy the right file")
    named = device or answers.device.get("board") or answers.device.get("cpu") or "unknown"
    _refuse_another(run, f"cpu: {named}")
    if (folder / ROWS).is_file():
        append_rows(run.records, read_rows(folder / ROWS))
    found = {result.name: result for result in answers.results}
    rows = [
        row
        for entry in manifest.models
        for row in _rows(entry, found.get(entry.name), {"threads": answers.threads, "device": f"cpu: {named}"})
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


def _refuse_another(run: Run, device: str) -> None:
    if not run.records.exists():
        return
    others = {row.context["device"] for row in read_rows(run.records) if "device" in row.context} - {device}
    if others:
        raise InputError(
            f"{str(run.folder)!r} holds what {', '.join(sorted(others))} took and this is {device}; give another --out"
        )


def _rows(entry: Entry, result: Result | None, machine: dict[str, Any]) -> Iterator[Row]:
    """The rows of one entry; where the device has no answer, each metric's row says why."""
    context = {**machine, "backend": entry.backend, "batch": entry.batch}
    context |= {"versus": f"baseline:{entry.versus_artifact}"} if entry.versus else {}
    slots = timing.latency_metrics(context, [entry.backend])
    slots += [(metric, unit, context) for metric, unit in {**MEMORY, **STARTUP, "exported_bytes": "bytes"}.items()]
    rows = [
        Row(
            **entry.about,
            metric=metric,
            unit=unit,
            context={**own, "artifact": entry.artifact},
            value=0,
            source="measured",
        )
        for metric, unit, own in slots
    ]
    if why := entry.error or _lacks(entry, result):
        status = "skipped" if entry.error else "failed"
        yield from (row.replace(status=status, error=why, value=None, source="") for row in rows)
    else:
        values = _values(entry, result)
        yield from (row.replace(**value.fields()) for row, value in zip(rows, values, strict=True))


def _lacks(entry: Entry, result: Result | None) -> str:
    """What the device's answers do not have of an entry, in words; "" if they are whole."""
    if result is None or result.error:
        return result.error if result else "the device's answers do not have it"
    needed = ("times", "peak", "imports", "cold_start", "load", *(["versus_times"] if entry.versus else []))
    missing = [key for key in needed if not getattr(result, key)]
    return f"the device's answers hold no {', '.join(missing)}" if missing else ""


def _values(entry: Entry, result: Result) -> Iterator[Measurement]:
    """The values of the rows, in order."""
    own = timing.BackendTiming(result.times, result.apart, entry.tolerance)
    yield from timing.latency_values(entry.backend, own, [result.versus_times] if entry.versus else [], "on the device")
    starts = f"measured: median of {len(result.peak)} fresh processes on the device, without PyTorch"
    for metric, samples in zip(
        (*MEMORY, *STARTUP), (result.peak, result.imports, result.cold_start, result.load), strict=True
    ):
        yield Measurement(metric, float(np.median(samples)), starts, samples=samples)
    yield Measurement("exported_bytes", entry.exported_bytes, f"measured: files that {entry.backend} loads")
