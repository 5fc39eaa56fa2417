"""Time and multiply-accumulates against the number of tokens: of one attention layer and of a model with random weights."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from vitbench.base import progress
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.base.standalone import time_alternating
from vitbench.measurement.child import in_child, job
from vitbench.measurement.cost import count_macs, macs_of
from vitbench.measurement.timing import timing_lock
from vitbench.methods.registry import compress, make_config, method_of
from vitbench.model import vit
from vitbench.model.recipe import Architecture
from vitbench.rows import runs
from vitbench.rows.records import Row
from vitbench.rows.runs import Run
from vitbench.rows.statistics import quiet_latency_ratio

PARTS = ("attention", "model")
CLASSES = 10


def measure_token_scaling(
    run: Run,
    model: str,
    configs: Sequence[Config],
    sides: Sequence[int],
    *,
    depth: int | None = None,
    batch: int = 1,
    threads: int = 2,
    rounds: int = 20,
) -> pd.DataFrame:
    """Measure `model` unchanged and compressed by each of `configs`, for square images of each side; finished rows stay.

    The calls of all variants of one size alternate in one fresh process in eager mode, where full attention is torch's
    fused kernel: first the attention layer of the first block (with qkv and proj), then the model.

    Args:
        run: where the rows go. Take another folder than that of a run whose models are compared, since this is another model.
        sides: of the images, in pixels.
        depth: blocks of the model; None for its own.

    Returns:
        The rows `macs`, `latency_p50` (ms) and `latency_ratio`. Their context has `part` ("attention" or "model"), `tokens`
        and `depth`. A config that does not suit a size has skipped rows with the reason.

    Raises:
        InputError: a setting that is not allowed.
    """
    if threads < 1 or rounds < 10 or batch < 1 or not sides or min(sides) < 1:
        raise InputError(
            f"threads = {threads}, rounds = {rounds}, batch = {batch}, sides = {tuple(sides)}: at least 1 thread, 10 rounds, "
            "batch 1, and one side of 1 pixel or more"
        )
    steps = [None, *({"method": method_of(config).name, "config": config.to_dict()} for config in configs)]
    machine = {"backend": "eager", "batch": batch, "threads": threads, "device": runs.device_name()}
    finished_keys = run.finished_keys()
    row_keys: set[str] = set()
    for side in progress.progress_bar(sides, "tokens", unit="size"):
        meta_model = vit.meta_model(Architecture(name=model, num_classes=CLASSES, img_size=side, depth=depth))
        context = {
            "side": side,
            "tokens": vit.token_count(meta_model),
            "depth": len(meta_model.blocks),
            "rounds": rounds,
            **machine,
        }
        rows = [row for step in steps for row in _expected_rows(model, step, context)]
        keys = {row.compute_key() for row in rows}
        row_keys |= keys
        if keys <= finished_keys:
            continue
        with timing_lock():
            timings = in_child(
                "time_scaling", threads, model=model, steps=steps, side=side, depth=depth, batch=batch, rounds=rounds
            )
        values = _values(timings["variants"])
        run.append([row.replace(**fields) for row, fields in zip(rows, values, strict=True)])
    frame = run.rows()
    return frame[frame["key"].isin(row_keys)].reset_index(drop=True)


def _expected_rows(model: str, step: dict[str, Any] | None, context: dict[str, Any]) -> list[Row]:
    """The rows of one variant at one size without values, in the order of `_values`."""
    units = {"macs": "MACs", "latency_p50": "ms", "latency_ratio": "ratio"}
    return [
        Row(
            model=model,
            dataset="none",
            data_fingerprint="",
            method=step["method"] if step else "baseline",
            config={"origin": {"start": "random"}, "methods": [step] if step else []},
            metric=metric,
            unit=unit,
            context={**context, "part": part},
            value=0,
            source="measured",
        )
        for part in PARTS
        for metric, unit in units.items()
    ]


def _values(variants: list[dict[str, Any] | str]) -> Iterator[dict[str, Any]]:
    """Fields of the rows of all variants; the first variant is the unchanged model."""
    full_attention = variants[0]
    assert isinstance(full_attention, dict), "the unchanged model suits every size"
    for variant in variants:
        if isinstance(variant, str):
            yield from [{"status": "skipped", "error": variant, "value": None, "source": ""}] * (3 * len(PARTS))
            continue
        for part in PARTS:
            times, full_attention_times = variant[part]["times"], full_attention[part]["times"]
            yield {"value": variant[part]["macs"], "source": "measured: torch FlopCounterMode / 2"}
            source = f"measured: {len(times)} calls in a fresh process after warm-up, in turn with all variants"
            yield {"value": float(np.median(times)), "source": source, "samples": times}
            ratio, low, high = quiet_latency_ratio(times, full_attention_times)
            source += "; median ratio of the quietest quarter of the rounds, bootstrap 95 %"
            yield {"value": ratio, "low": low, "high": high, "source": source}


@job
def time_scaling(
    model: str, steps: list[dict[str, Any] | None], side: int, depth: int | None, batch: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of each call and multiply-accumulates of every variant at one size, or the reason why it does not suit."""
    import torch

    base = vit.create_model(model, num_classes=CLASSES, img_size=side, depth=depth).requires_grad_(False)
    variants = [_variant(base, step) for step in steps]
    models = [variant for variant in variants if not isinstance(variant, str)]
    images, x = torch.randn(batch, 3, side, side), torch.randn(batch, vit.token_count(base), base.embed_dim)
    layers = [model.blocks[0].attn for model in models]
    with torch.inference_mode():
        layer_times = time_alternating([functools.partial(layer, x) for layer in layers], rounds)
        model_times = time_alternating([functools.partial(model, images) for model in models], rounds)
    results = iter(
        {
            "attention": {"times": layer_times[i], "macs": macs_of(layers[i], x[:1])},
            "model": {"times": model_times[i], "macs": count_macs(models[i])},
        }
        for i in range(len(models))
    )
    return {"variants": [variant if isinstance(variant, str) else next(results) for variant in variants]}


def _variant(base: nn.Module, step: dict[str, Any] | None) -> nn.Module | str:
    """`base` compressed by a step, or the reason why the step does not suit it."""
    try:
        return compress(base, make_config(step["method"], step["config"]) if step else []).model
    except InputError as error:
        return str(error)
