"""The costs of every method in every backend on a shape: latency, bytes, memory, MACs, and the limits of the machine.

    python benchmarks/edge_shapes.py deit_tiny_patch16_224 --out results/runs/edge-deit-tiny
    python benchmarks/edge_shapes.py deit_small_patch16_224 --out results/runs/edge-deit-small
    python benchmarks/edge_shapes.py deit_base_patch16_224 --rounds 10 --out results/runs/edge-deit-base

Weights are random: size and speed do not depend on them, accuracy is not measured. Every method has its default config, but it
is not trained (diffq, which learns its bits, for one short epoch), and a search tries 2 policies. The same command resumes after a
stop. Each backend is one process for each batch size (or --starts processes), in which all models take turns with eager fp32
and with fp32 in that backend. The last output is `table.md` in the results folder.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vitbench as vb

BACKENDS = ("eager", "torch_compile", "onnxruntime", "openvino", "openvino_bf16")
UNTRAINED = {"train": {"epochs": 0}}
CONFIGS: dict[str, dict[str, Any]] = {
    "diffq": {"train": {"epochs": 1, "batch_size": 8}},
    "multidimensional": UNTRAINED | {"search": {"evaluations": 2, "first": 2}},
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help="a model's name; `vitbench list models` has them")
    parser.add_argument("--out", required=True, metavar="DIR", help="results folder")
    parser.add_argument("--methods", nargs="+", default=list(vb.METHODS), metavar="NAME", help="default: all")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), metavar="NAME", help=f"default: {BACKENDS}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--starts", type=int, default=1, help="processes that share the rounds (default: 1)")
    options = parser.parse_args()
    try:
        for backend in options.backends:
            vb.measurement.require_backend(backend)
        for name in options.methods:
            vb.base.one_of("method", name, vb.METHODS)
        run = vb.Run(options.out)
        models = make(options.shape, options.methods, run)
        measure(models, run, options)
    except vb.InputError as error:
        print(f"edge_shapes.py: {error}", file=sys.stderr)
        return 2
    vb.cli.print_results(run.folder)
    (run.folder / "table.md").write_text(vb.edge.backend_table(run.rows()))
    print(f"table: {run.folder / 'table.md'}")
    return 0


def make(shape: str, names: list[str], run: vb.Run) -> dict[str, Path]:
    """Save each method's model, if it does not exist yet; returns the folders."""
    data = vb.load_data("digits", val=16, test=16, calibration=64)
    paths = {name: run.models / name for name in ("baseline", *names)}
    if not (paths["baseline"] / vb.model.RECIPE).is_file():
        vb.save(vb.create_model(shape, num_classes=len(data.classes)), paths["baseline"])
    base = vb.load(paths["baseline"])
    small = dataclasses.replace(data, train=data.calibration)  # enough for the one epoch of diffq
    for name in names:
        if not (paths[name] / vb.model.RECIPE).is_file():
            start = time.monotonic()
            default = UNTRAINED if "train" in vb.METHODS[name].config.model_fields else {}
            vb.save(vb.compress(base, [vb.make_config(name, CONFIGS.get(name, default))], small).model, paths[name])
            print(f"{name}: made in {time.monotonic() - start:.0f} s", flush=True)
    return paths


def measure(models: dict[str, Path], run: vb.Run, options: argparse.Namespace) -> None:
    """Measure all models."""
    data = vb.load_data("digits")
    for path in models.values():
        vb.measure(
            path, data, run, what=("size", "memory", "roofline"), batches=options.batches, threads=options.threads
        )
    for backend in options.backends:
        for batch in options.batches:
            start = time.monotonic()
            _compare(models, data, run, backend, batch, options)
            print(f"{backend}, batch {batch}: {time.monotonic() - start:.0f} s", flush=True)
        if vb.measurement.BACKENDS[backend].runs_without_torch:
            for path in models.values():
                vb.measure(path, data, run, what=("memory",), backend=backend, threads=options.threads)


def _compare(models: dict[str, Path], data: vb.ImageData, run: vb.Run, backend: str, batch: int, options: Any) -> None:
    """Time all models in turn, and append their rows."""
    base, references = models["baseline"], list(dict.fromkeys((backend, "eager")))
    sha = vb.model.read_manifest(base).sha256[:12]
    timed = {"threads": options.threads, "device": vb.rows.device_name(backend), "backend": backend}
    timed |= vb.measurement.shared_rounds(options.rounds, options.starts)
    timed |= {"batch": batch, "versus": f"baseline:{sha}"}
    rows_by_path = {path: list(_empty_rows(path, data, timed, references)) for path in models.values()}
    done = run.finished_keys()
    if all(row.compute_key() in done for rows in rows_by_path.values() for row in rows):
        return
    reasons = {
        path: vb.measurement.unsupported_reason(backend, vb.model.read_manifest(path).recipe) for path in rows_by_path
    }
    supported = [path for path, reason in reasons.items() if not reason]
    entries = [*((str(base), reference) for reference in references), *((str(path), backend) for path in supported)]
    (timings,) = vb.measurement.compare_latency(entries, [batch], options.threads, options.rounds, options.starts)
    baseline_times = [timing.times for timing in timings[: len(references)]]
    timing_by_path = dict(zip(supported, timings[len(references) :], strict=True))
    for path, rows in rows_by_path.items():
        timing = timing_by_path.get(path, reasons[path])
        if isinstance(timing, str):
            status = {"status": "skipped" if reasons[path] else "failed", "error": timing, "value": None, "source": ""}
            run.append(row.replace(**status) for row in rows)
        else:
            run.append(
                _filled(rows, vb.measurement.latency_values(backend, timing, baseline_times, starts=options.starts))
            )


def _empty_rows(path: Path, data: vb.ImageData, timed: dict[str, Any], references: list[str]) -> Iterator[vb.Row]:
    manifest = vb.model.read_manifest(path)
    row_fields = vb.measurement.model_row_fields(manifest.recipe, data) | {"value": 0, "source": "measured"}
    for metric, unit, context in vb.measurement.latency_metrics(timed, references):
        yield vb.Row(**row_fields, metric=metric, unit=unit, context={**context, "artifact": manifest.sha256[:12]})


def _filled(rows: list[vb.Row], values: Iterator[vb.measurement.Measurement]) -> Iterator[vb.Row]:
    for row, value in zip(rows, values, strict=True):
        yield row.replace(**value.fields())


if __name__ == "__main__":
    sys.exit(main())
