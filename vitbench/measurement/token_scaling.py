"""Time and multiply-accumulates against the number of tokens, of one attention layer and of the whole model, random weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from vitbench.base import progress
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.measurement.child import in_child, job
from vitbench.measurement.cost import count_macs, macs_of
from vitbench.measurement.timing import time_alternating, timing_lock
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
    """Measure `model` as it is and as each of `configs` makes it for square images of each side; rows that are there stay.

    All variants of a size are timed in turn in one fresh process in eager mode, where full attention is torch's fused
    kernel: first the attention layer of the first block alone (with qkv and proj), then the whole model.

    Args:
        run: where the rows go; another folder than that of a run whose rows are compared, since these are of another model.
        sides: in pixels.
        depth: blocks of the model; None: its own.

    Returns:
        The rows: `macs`, `latency_p50` (ms) and `latency_ratio`, whose context has `part` ("attention" or "model"),
        `tokens` and `depth`. A config that does not suit a size is there as skipped, with the reason.
    """
    if threads < 1 or rounds < 10 or batch < 1 or not sides or min(sides) < 1:
        raise InputError(
            f"threads = {threads}, rounds = {rounds}, batch = {batch}, sides = {tuple(sides)}: at least 1 thread, 10 rounds, "
            "batch 1, and one side of 1 pixel or more"
        )
    steps = [None, *({"method": method_of(config).name, "config": config.to_dict()} for config in configs)]
    machine = {"backend": "eager", "batch": batch, "threads": threads, "device": runs.device_name()}
    done, wanted = run.finished_keys(), set()
    for side in progress.progress_bar(sides, "tokens", unit="size"):
        shape = vit.meta_model(Architecture(name=model, num_classes=CLASSES, img_size=side, depth=depth))
        about = {
            "side": side,
            "tokens": vit.token_count(shape),
            "depth": len(shape.blocks),
            "rounds": rounds,
            **machine,
        }
        rows = [row for step in steps for row in _expected_rows(model, step, about)]
        keys = [row.compute_key() for row in rows]
        wanted |= set(keys)
        if set(keys) <= done:
            continue
        with timing_lock():
            found = in_child(
                "time_scaling", threads, model=model, steps=steps, side=side, depth=depth, batch=batch, rounds=rounds
            )
        run.append([row.replace(**fields) for row, fields in zip(rows, _values(found["variants"]), strict=True)])
    frame = run.rows()
    return frame[frame["key"].isin(wanted)].reset_index(drop=True)


def _expected_rows(model: str, step: dict[str, Any] | None, about: dict[str, Any]) -> list[Row]:
    """The rows of one variant at one size without values, in the order of `_values`."""
    same = {"model": model, "dataset": "none", "data_fingerprint": "", "method": step["method"] if step else "baseline"}
    same |= {"config": {"origin": {"start": "random"}, "methods": [step] if step else []}}
    units = {"macs": "MACs", "latency_p50": "ms", "latency_ratio": "ratio"}
    return [
        Row(**same, metric=metric, unit=unit, context={**about, "part": part}, value=0, source="measured")
        for part in PARTS
        for metric, unit in units.items()
    ]


def _values(variants: list[dict[str, Any] | str]) -> list[dict[str, Any]]:
    """Fields of the rows of all variants, the unchanged model's first."""
    values = []
    for variant in variants:
        for part in PARTS:
            if isinstance(variant, str):
                values += [{"status": "skipped", "error": variant, "value": None, "source": ""}] * 3
                continue
            own, full = variant[part]["times"], variants[0][part]["times"]
            values.append({"value": variant[part]["macs"], "source": "measured: torch FlopCounterMode / 2"})
            how = f"measured: {len(own)} calls in a fresh process after warm-up, in turn with all variants"
            values.append({"value": float(np.median(own)), "source": how, "samples": own})
            ratio, low, high = quiet_latency_ratio(own, full)
            how += "; median ratio of the quietest quarter of the rounds, bootstrap 95 %"
            values.append({"value": ratio, "low": low, "high": high, "source": how})
    return values


@job
def time_scaling(
    model: str, steps: list[dict[str, Any] | None], side: int, depth: int | None, batch: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of each call and multiply-accumulates of every variant at one size, or why it cannot be had."""
    import torch

    base = vit.create_model(model, num_classes=CLASSES, img_size=side, depth=depth).requires_grad_(False)
    variants = [_variant(base, step) for step in steps]
    able = [variant for variant in variants if not isinstance(variant, str)]
    images, x = torch.randn(batch, 3, side, side), torch.randn(batch, vit.token_count(base), base.embed_dim)
    layers = [variant.blocks[0].attn for variant in able]
    with torch.inference_mode():
        alone = time_alternating([lambda layer=layer: layer(x) for layer in layers], rounds)
        whole = time_alternating([lambda variant=variant: variant(images) for variant in able], rounds)
    found = iter(
        {
            "attention": {"times": alone[i], "macs": macs_of(layers[i], x[:1])},
            "model": {"times": whole[i], "macs": count_macs(able[i])},
        }
        for i in range(len(able))
    )
    return {"variants": [variant if isinstance(variant, str) else next(found) for variant in variants]}


def _variant(base: nn.Module, step: dict[str, Any] | None) -> nn.Module | str:
    """The model that a step makes of `base`, or why it cannot."""
    try:
        return compress(base, make_config(step["method"], step["config"]) if step else [])
    except InputError as error:
        return str(error)
