"""Int8 in the backends that have kernels for it, ours beside other tools' quantizers, each timed in turn with eager fp32.

    pip install -e '.[onnx,openvino,peers]'
    python benchmarks/int8_backends.py --random
    python benchmarks/int8_backends.py --model deit_tiny_patch16_224 --checkpoint FILE --dataset FOLDER --splits test=0.744

Each variant runs in a fresh process, where it takes turns with eager fp32. One process for all would not be fair: the thread
pools of torch, ONNX Runtime and OpenVINO keep polling after a call and take the cores from the next variant, and a compiler
(inductor with freezing) sets switches for the whole process. The rows go to --out.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import int8_peers as peers
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitbench as vb

IMAGES, TIME_LIMIT = 64, 1800  # digits to calibrate on; seconds of a child


def ours(backend: str) -> Callable:
    """A vitbench file in one of vitbench's backends."""
    return lambda model, x, calibration: (vb.measurement.make_call(backend, model, x), 0)


@dataclass(frozen=True)
class Variant:
    """A quantizer in a backend.

    Attributes:
        method: of its rows.
        make: `(model, x, calibration) -> (callable, bytes)`; 0 bytes stand for those of our file.
        file: the vitbench file that it starts from.
    """

    method: str
    backend: str
    make: Callable
    packages: tuple[str, ...] = ()
    file: str = "baseline"


def _ours(file: str, *names: str) -> dict[str, Variant]:
    method = FILES[file][0] if file in FILES else file
    return {
        f"{file}:{name}": Variant(method, name, ours(name), vb.measurement.BACKENDS[name].packages, file)
        for name in names
    }


# our compressed files: the method and its config
FILES = {
    "static_int8": ("static_int8", {}),
    "static_int8_attention": ("static_int8", {"attention": True}),
    "dynamic_int8": ("dynamic_int8", {}),
}
VARIANTS = {
    **_ours("baseline", "eager", "openvino", "onnxruntime"),
    **_ours("static_int8", "openvino", "openvino_bf16", "onnxruntime"),
    **_ours("static_int8_attention", "openvino", "openvino_bf16", "onnxruntime"),
    **_ours("dynamic_int8", "eager", "onnxruntime"),
    "peer_nncf:openvino": Variant("peer_nncf", "openvino", peers.nncf("f32"), ("nncf", "openvino")),
    "peer_nncf:openvino_bf16": Variant("peer_nncf", "openvino_bf16", peers.nncf("bf16"), ("nncf", "openvino")),
    "peer_onnxruntime_dynamic": Variant(
        "peer_onnxruntime_dynamic", "onnxruntime", peers.onnxruntime_dynamic, ("onnxruntime",)
    ),
    "peer_onnxruntime_static": Variant(
        "peer_onnxruntime_static", "onnxruntime", peers.onnxruntime_static, ("onnxruntime",)
    ),
    "peer_pt2e": Variant("peer_pt2e", "inductor", peers.pt2e, ("torchao",)),
    "peer_torch_dynamic": Variant("peer_torch_dynamic", "eager", peers.torch_dynamic, ("torch",)),
    "peer_torchao_dynamic": Variant("peer_torchao_dynamic", "inductor", peers.torchao_dynamic, ("torchao",)),
}


class FixedBatchModel(vb.measurement.BackendModel):
    """A callable for `batch` images as a model that can be scored."""

    def __init__(self, call: vb.measurement.Call, model: nn.Module, batch: int):
        nn.Module.__init__(self)
        self.recipe, self.batch = model.recipe, batch
        self.call = lambda images: call(images)  # no submodule: an exported module cannot be put in eval mode

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # as it was compiled
            return super().forward(x.clone())


def child(request_file: str, result_file: str) -> None:
    """Make one variant and time it in turn with eager fp32, batch size by batch size; score it if there are images."""
    request = json.loads(Path(request_file).read_text())
    torch.set_num_threads(request["threads"])
    warnings.simplefilter("ignore")
    base, model = vb.load(request["base"]), vb.load(request["file"])
    variant, calibration = VARIANTS[request["variant"]], load_file(request["calibration"])["x"]
    result: dict[str, Any] = {"times": [], "apart": []}
    with torch.no_grad():
        for batch in request["batches"]:
            x = calibration[:batch].clone()
            call, result["bytes"] = variant.make(model, x, calibration)
            result["apart"].append(float((call(x) - base(x)).abs().max()))
            result["times"].append(vb.base.time_alternating([lambda: call(x), lambda: base(x)], request["rounds"]))  # noqa: B023
    if request["dataset"]:
        hits = vb.evaluate(
            FixedBatchModel(call, model, batch), vb.run.open_data(request["dataset"], "", request["splits"]).test
        ).top1
        result["hits"] = [int(hit) for hit in hits]
    Path(result_file).write_text(json.dumps(result))


def in_child(threads: int, **request: Any) -> dict[str, Any]:
    """The result of `child` in a fresh process with `threads` threads."""
    env = vb.base.thread_environment(threads)
    with tempfile.TemporaryDirectory() as folder:
        request_file, result_file = Path(folder, "task.json"), Path(folder, "answer.json")
        request_file.write_text(json.dumps({"threads": threads, **request}))
        command = [sys.executable, __file__, "--child", str(request_file), str(result_file)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
        if done.returncode or not result_file.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:500])
        return json.loads(result_file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="default: deit_small_patch16_224")
    parser.add_argument("--checkpoint", default="", metavar="FILE", help="weights of the model")
    parser.add_argument("--random", action="store_true", help="random weights: to measure size and speed only")
    parser.add_argument("--dataset", default="", help="images to calibrate on and to score; without: digits, no scores")
    parser.add_argument("--splits", nargs="+", default=[], metavar="KEY=VALUE", help="how to cut them: test=0.744")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="results/runs/int8-backends", help="results folder to add rows to")
    args = parser.parse_args()
    try:
        compare(args)
    except vb.InputError as error:
        raise SystemExit(f"error: {error}") from None


def compare(args: argparse.Namespace) -> None:
    """Make the files, then measure each variant, append its rows, and print its line of the table."""
    if bool(args.checkpoint) == args.random:
        raise vb.InputError("give --checkpoint, or --random for size and speed only")
    for name in args.only:
        vb.base.one_of("variant", name, VARIANTS)
    torch.set_num_threads(args.threads)
    run, splits = vb.Run(args.out), dict(vb.run.parse_setting(text) for text in args.splits)
    data = vb.run.open_data(args.dataset, "", splits) if args.dataset else None
    if not data:
        print(f"no data set: calibrated on {IMAGES} digits, which say nothing about accuracy")
    calibration_data = data or vb.run.open_data("digits", "", {"calibration": IMAGES})
    base = vb.create_model(args.model, checkpoint=args.checkpoint)
    scored = data if data and not args.random else None
    if scored and base.recipe.architecture.num_classes != len(data.classes):
        raise vb.InputError(
            f"the model has {base.recipe.architecture.num_classes} outputs and {data.name} {len(data.classes)} classes; "
            "give the images that it was made for, or --random"
        )
    files = {"baseline": vb.save(base, run.models / "baseline")}
    for file, (method, config) in FILES.items():
        if any(VARIANTS[name].file == file for name in args.only):
            config = config | ({"compensation": not args.random} if method == "static_int8" else {})
            files[file] = vb.save(
                vb.compress(base, vb.make_config(method, config), calibration_data).model, run.models / file
            )
    images = torch.cat(
        [x for x, _ in vb.data.eval_batches(calibration_data.require_split("calibration"), base.recipe.preprocess)]
    )
    images = images[: len(images) // max(args.batches) * max(args.batches)].contiguous()
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder, "calibration.safetensors")
        save_file({"x": images}, calibration)
        request = {"base": str(files["baseline"]), "calibration": str(calibration), "batches": args.batches}
        request |= {"rounds": args.rounds, "dataset": args.dataset if scored else "", "splits": splits}
        for name in args.only:
            rows = _empty_rows(VARIANTS[name], files, len(images), args, scored)
            if {row.compute_key() for row in rows} <= run.finished_keys():
                print(f"{name:28} is in {args.out} already")
            else:
                run.append(_measure(name, rows, files[VARIANTS[name].file], args.threads, request))


def _measure(name: str, rows: list[vb.Row], file: Path, threads: int, request: dict[str, Any]) -> list[vb.Row]:
    """The rows with their values, or with the reason why there are none; prints a line of the table."""
    status, error = "skipped", _missing_reason(VARIANTS[name])
    if not error:
        try:
            result = in_child(threads, variant=name, file=str(file), **request)
        except (RuntimeError, subprocess.TimeoutExpired) as failure:
            status, error = "failed", str(failure)
    if error:
        print(f"{name:28} {status}: {error}", flush=True)
        return [row.replace(status=status, error=error, value=None, source="") for row in rows]
    result["bytes"] = result["bytes"] or vb.size_on_disk(file)
    print(f"{name:28} {_line(request['batches'], result)}", flush=True)
    return [row.replace(**fields) for row, fields in zip(rows, _values(result), strict=True)]


def _missing_reason(variant: Variant) -> str:
    """Why a variant is not available here, or ""."""
    try:
        if variant.backend in vb.measurement.BACKENDS:
            vb.measurement.require_backend(variant.backend)
    except vb.InputError as error:
        return str(error)
    missing = [name for name in variant.packages if not importlib.util.find_spec(name)]
    return f"not installed: {', '.join(missing)}; pip install 'vitbench[onnx,openvino,peers]'" if missing else ""


def _empty_rows(variant: Variant, files: dict[str, Path], images: int, args, data: vb.ImageData | None) -> list[vb.Row]:
    """The variant's rows without values, in the order of `_values`."""
    manifest, base = (vb.model.read_manifest(files[name]) for name in (variant.file, "baseline"))
    row_fields = vb.measurement.model_row_fields(manifest.recipe, data) | {
        "method": variant.method,
        "value": 0,
        "source": "measured",
    }
    context = {"artifact": manifest.sha256[:12]}
    if variant.method.startswith("peer_"):
        row_fields["config"]["methods"] = [
            {"method": variant.method, "config": {"images": images, **_versions(variant)}}
        ]
        context["backend"] = variant.backend
    rows = [vb.Row(**row_fields, metric="bytes", unit="bytes", context=context)]
    timed = {"backend": variant.backend, "threads": args.threads, "rounds": args.rounds}
    timed |= {"device": vb.rows.device_name(), "versus": f"baseline:{base.sha256[:12]}"}
    timed |= {"artifact": context["artifact"]} | ({} if variant.backend == "eager" else {"versus_backend": "eager"})
    for batch in args.batches:
        for metric, unit in (("latency_p50", "ms"), ("latency_ratio", "ratio")):
            rows.append(vb.Row(**row_fields, metric=metric, unit=unit, context={**timed, "batch": batch}))
    if data:
        scored = {
            "split": "test",
            "images": len(data.test),
            "cut": data.origin["test"],
            "artifact": context["artifact"],
        }
        scored |= {"scoring_batch": args.batches[-1]}  # dynamic ranges are taken over it
        scored |= {} if variant.backend == "eager" else {"backend": variant.backend}
        rows.append(vb.Row(**row_fields, metric="top1", unit="fraction", context=scored))
    return rows


def _versions(variant: Variant) -> dict[str, str]:
    return {name: version(name) for name in variant.packages if importlib.util.find_spec(name)}


def _values(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields of the rows of `_empty_rows`."""
    values = [{"value": result["bytes"], "source": "measured: what is saved"}]
    for times, eager in result["times"]:
        source = f"measured: {len(times)} calls in a fresh process after warm-up, in turn with the baseline"
        ratio, low, high = vb.rows.quiet_latency_ratio(times, eager)
        values.append({"value": float(np.median(times)), "source": source, "samples": times})
        source += "; median ratio of the quietest quarter of the rounds, bootstrap 95 %"
        values.append({"value": ratio, "source": source, "low": low, "high": high, "samples": eager})
    if "hits" in result:
        hits = np.array(result["hits"], bool)
        low, high = vb.rows.wilson(hits.sum(), len(hits))
        source = "measured: test images, Wilson 95 %"
        values.append(
            {"value": float(hits.mean()), "source": source, "low": low, "high": high, "hits": vb.rows.pack_hits(hits)}
        )
    return values


def _line(batches: list[int], result: dict[str, Any]) -> str:
    parts = [f"{result['bytes'] / 1e6:6.2f} MB"]
    for batch, (times, eager), distance in zip(batches, result["times"], result["apart"], strict=True):
        ratio, low, high = vb.rows.quiet_latency_ratio(times, eager)
        parts.append(
            f"b{batch}: {np.median(times):7.1f} ms, eager {np.median(eager):7.1f}, ratio {ratio:.3f} "
            f"[{low:.3f}, {high:.3f}], logits off by {distance:.3g}"
        )
    if "hits" in result:
        parts.append(f"top1 {100 * np.mean(result['hits']):.2f} %")
    return " | ".join(parts)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        main()
    else:
        try:
            child(*sys.argv[2:])
        except Exception as error:  # an exception of a peer becomes the error of its rows
            raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
