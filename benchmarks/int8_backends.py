"""Int8 in the backends that have kernels for it, ours beside others' quantizers, each timed in turn with eager fp32.

    pip install -e '.[onnx,openvino,peers]'
    python benchmarks/int8_backends.py --random
    python benchmarks/int8_backends.py --model deit_tiny_patch16_224 --checkpoint FILE --dataset FOLDER --splits test=0.744

A variant has a fresh process of its own, where it takes turns with eager fp32. All in one process would not be fair:
the thread pools of torch, ONNX Runtime and OpenVINO wait busily after a call and take the cores from whoever comes next,
and what compiles a model (inductor with freezing) sets switches for the whole process. The rows go to --out.
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
    """Whose rows it gives, what runs it, and `(model, x, calibration) -> (callable, bytes)`; bytes 0: those of our file.

    `file` names the vitbench file that it starts from.
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


class Answers(vb.measurement.BackendModel):
    """A callable made for `batch` images as a model that can be scored."""

    def __init__(self, call: vb.measurement.Call, model: nn.Module, batch: int):
        nn.Module.__init__(self)
        self.recipe, self.batch = model.recipe, batch
        self.call = lambda images: call(
            images
        )  # not a module's part: an exported module refuses to be put in eval mode

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # as it was compiled
            return super().forward(x.clone())


def child(task: str, answer: str) -> None:
    """Make one variant and time it in turn with eager fp32, batch size by batch size; score it if there are images."""
    order = json.loads(Path(task).read_text())
    torch.set_num_threads(order["threads"])
    warnings.simplefilter("ignore")
    base, model = vb.load(order["base"]), vb.load(order["file"])
    variant, calibration = VARIANTS[order["variant"]], load_file(order["calibration"])["x"]
    found: dict[str, Any] = {"times": [], "apart": []}
    with torch.no_grad():
        for batch in order["batches"]:
            x = calibration[:batch].clone()
            call, found["bytes"] = variant.make(model, x, calibration)
            found["apart"].append(float((call(x) - base(x)).abs().max()))
            found["times"].append(vb.base.time_alternating([lambda: call(x), lambda: base(x)], order["rounds"]))  # noqa: B023
    if order["dataset"]:
        hits = vb.evaluate(
            Answers(call, model, batch), vb.run.open_data(order["dataset"], "", order["splits"]).test
        ).top1
        found["hits"] = [int(hit) for hit in hits]
    Path(answer).write_text(json.dumps(found))


def in_child(threads: int, **order: Any) -> dict[str, Any]:
    """What `child` finds, in a fresh process with so many threads."""
    env = vb.base.thread_environment(threads)
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder, "task.json"), Path(folder, "answer.json")
        task.write_text(json.dumps({"threads": threads, **order}))
        command = [sys.executable, __file__, "--child", str(task), str(answer)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
        if done.returncode or not answer.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:500])
        return json.loads(answer.read_text())


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
    """Make the files, then measure variant after variant, each with rows of its own and a line of the table."""
    if bool(args.checkpoint) == args.random:
        raise vb.InputError("give --checkpoint, or --random for size and speed only")
    for name in args.only:
        vb.base.one_of("variant", name, VARIANTS)
    torch.set_num_threads(args.threads)
    run, splits = vb.Run(args.out), dict(vb.run.parse_setting(text) for text in args.splits)
    data = vb.run.open_data(args.dataset, "", splits) if args.dataset else None
    if not data:
        print(f"no data set: calibrated on {IMAGES} digits, which say nothing about accuracy")
    seen = data or vb.run.open_data("digits", "", {"calibration": IMAGES})
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
            files[file] = vb.save(vb.compress(base, vb.make_config(method, config), seen), run.models / file)
    images = torch.cat([x for x, _ in vb.data.eval_batches(seen.require_split("calibration"), base.recipe.preprocess)])
    images = images[: len(images) // max(args.batches) * max(args.batches)].contiguous()
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder, "calibration.safetensors")
        save_file({"x": images}, calibration)
        order = {"base": str(files["baseline"]), "calibration": str(calibration), "batches": args.batches}
        order |= {"rounds": args.rounds, "dataset": args.dataset if scored else "", "splits": splits}
        for name in args.only:
            rows = _slots(VARIANTS[name], files, len(images), args, scored)
            if {row.compute_key() for row in rows} <= run.finished_keys():
                print(f"{name:28} is in {args.out} already")
            else:
                run.append(_measured(name, rows, files[VARIANTS[name].file], args.threads, order))


def _measured(name: str, rows: list[vb.Row], file: Path, threads: int, order: dict[str, Any]) -> list[vb.Row]:
    """The rows with what was found, or with the reason why nothing was; prints a line of the table."""
    status, error = "skipped", _missing(VARIANTS[name])
    if not error:
        try:
            found = in_child(threads, variant=name, file=str(file), **order)
        except (RuntimeError, subprocess.TimeoutExpired) as failure:
            status, error = "failed", str(failure)
    if error:
        print(f"{name:28} {status}: {error}", flush=True)
        return [row.replace(status=status, error=error, value=None, source="") for row in rows]
    found["bytes"] = found["bytes"] or vb.size_on_disk(file)
    print(f"{name:28} {_line(order['batches'], found)}", flush=True)
    return [row.replace(**fields) for row, fields in zip(rows, _values(found), strict=True)]


def _missing(variant: Variant) -> str:
    """Why it cannot be had here, or ""."""
    try:
        if variant.backend in vb.measurement.BACKENDS:
            vb.measurement.require_backend(variant.backend)
    except vb.InputError as error:
        return str(error)
    lacking = [name for name in variant.packages if not importlib.util.find_spec(name)]
    return f"not installed: {', '.join(lacking)}; pip install 'vitbench[onnx,openvino,peers]'" if lacking else ""


def _slots(variant: Variant, files: dict[str, Path], images: int, args, data: vb.ImageData | None) -> list[vb.Row]:
    """The variant's rows without values, in the order of `_values`."""
    manifest, base = (vb.model.read_manifest(files[name]) for name in (variant.file, "baseline"))
    facts = vb.measurement.model_row_fields(manifest.recipe, data) | {
        "method": variant.method,
        "value": 0,
        "source": "measured",
    }
    own = {"artifact": manifest.sha256[:12]}
    if variant.method.startswith("peer_"):
        facts["config"]["methods"] = [{"method": variant.method, "config": {"images": images, **_versions(variant)}}]
        own["backend"] = variant.backend
    rows = [vb.Row(**facts, metric="bytes", unit="bytes", context=own)]
    timed = {"backend": variant.backend, "threads": args.threads, "rounds": args.rounds}
    timed |= {"device": vb.rows.device_name(), "versus": f"baseline:{base.sha256[:12]}"}
    timed |= {"artifact": own["artifact"]} | ({} if variant.backend == "eager" else {"versus_backend": "eager"})
    for batch in args.batches:
        for metric, unit in (("latency_p50", "ms"), ("latency_ratio", "ratio")):
            rows.append(vb.Row(**facts, metric=metric, unit=unit, context={**timed, "batch": batch}))
    if data:
        context = {"split": "test", "images": len(data.test), "cut": data.origin["test"], "artifact": own["artifact"]}
        context |= {"scoring_batch": args.batches[-1]}  # dynamic ranges are taken over it
        context |= {} if variant.backend == "eager" else {"backend": variant.backend}
        rows.append(vb.Row(**facts, metric="top1", unit="fraction", context=context))
    return rows


def _versions(variant: Variant) -> dict[str, str]:
    return {name: version(name) for name in variant.packages if importlib.util.find_spec(name)}


def _values(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields of the rows of `_slots`."""
    values = [{"value": found["bytes"], "source": "measured: what is saved"}]
    for own, eager in found["times"]:
        how = f"measured: {len(own)} calls in a fresh process after warm-up, in turn with the baseline"
        ratio, low, high = vb.rows.quiet_latency_ratio(own, eager)
        values.append({"value": float(np.median(own)), "source": how, "samples": own})
        how += "; median ratio of the quietest quarter of the rounds, bootstrap 95 %"
        values.append({"value": ratio, "source": how, "low": low, "high": high, "samples": eager})
    if "hits" in found:
        hits = np.array(found["hits"], bool)
        low, high = vb.rows.wilson(hits.sum(), len(hits))
        how = "measured: test images, Wilson 95 %"
        values.append(
            {"value": float(hits.mean()), "source": how, "low": low, "high": high, "hits": vb.rows.pack_hits(hits)}
        )
    return values


def _line(batches: list[int], found: dict[str, Any]) -> str:
    parts = [f"{found['bytes'] / 1e6:6.2f} MB"]
    for batch, (own, eager), apart in zip(batches, found["times"], found["apart"], strict=True):
        ratio, low, high = vb.rows.quiet_latency_ratio(own, eager)
        parts.append(
            f"b{batch}: {np.median(own):7.1f} ms, eager {np.median(eager):7.1f}, ratio {ratio:.3f} "
            f"[{low:.3f}, {high:.3f}], logits off by {apart:.3g}"
        )
    if "hits" in found:
        parts.append(f"top1 {100 * np.mean(found['hits']):.2f} %")
    return " | ".join(parts)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        main()
    else:
        try:
            child(*sys.argv[2:])
        except Exception as error:  # whatever a peer raises becomes the one line of its rows
            raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
