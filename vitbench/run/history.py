"""Rows about the making of a model: its seconds, its training curves, the search for its policy."""

import math
from pathlib import Path
from typing import Any

import torch

from vitbench.data.splits import ImageData
from vitbench.measurement.cost import model_row_fields
from vitbench.methods.multidimensional import MultiDimensional
from vitbench.model import artifact, vit
from vitbench.rows import runs
from vitbench.rows.records import Row
from vitbench.run.cache import CachedModel


def seconds_row(path: Path, data: ImageData | None, seconds: float) -> Row:
    """The row of how long the last compression of the model saved at `path` took, with this process's threads."""
    manifest = artifact.read_manifest(path)
    recipe = manifest.recipe
    row_fields = model_row_fields(recipe, data)
    context = {"threads": torch.get_num_threads(), "device": runs.device_name()}
    context |= {"artifact": manifest.sha256[:12], "depth": len(vit.meta_model(recipe.architecture).blocks)}
    return Row(
        **row_fields, metric="compress_seconds", unit="s", value=seconds, source="measured: wall clock", context=context
    )


def training_rows(cached: CachedModel, data: ImageData) -> list[Row]:
    """The training curves of a model as rows: the last value, and one sample an epoch. No row for an untrained model."""
    if not cached.history:
        return []
    manifest = artifact.read_manifest(cached.path)
    row_fields, steps = (
        model_row_fields(manifest.recipe, data),
        cached.history[-1].get("steps", 0) // len(cached.history),
    )
    context = {"artifact": manifest.sha256[:12], "epochs": len(cached.history), "steps_per_epoch": steps or 1}
    rows = []
    for metric, key, unit, source in (
        ("train_loss", "loss", "nats", "measured: mean over each epoch's training batches, after augmentation"),
        ("val_top1", "val_top1", "fraction", "measured: val split after each epoch"),
    ):
        curve = [epoch[key] for epoch in cached.history]
        if all(math.isfinite(value) for value in curve):
            row = Row(
                **row_fields, metric=metric, unit=unit, value=curve[-1], samples=curve, source=source, context=context
            )
            rows.append(row)
    return rows


def search_rows(base: Path, data: ImageData, config: MultiDimensional, history: list[dict[str, Any]]) -> list[Row]:
    """A search for a policy as rows, whose samples are a number for every policy or for every block.

    `search_score` and `search_cost` hold every policy in order, and `search_policies` their ratios, concatenated.
    `policy_neurons`, `policy_heads`, `policy_head_dims` and `policy_tokens` hold what the best policy keeps of each block.

    Args:
        base: the saved model whose policy was searched.
        config: of `multidimensional`, with the search's settings.
        history: the attribute `search` of the model that `multidimensional` returns.
    """
    manifest = artifact.read_manifest(base)
    row_fields = model_row_fields(manifest.recipe, data) | {"method": "search", "seed": config.search.seed}
    row_fields["config"] |= {"methods": [{"method": "multidimensional", "config": config.to_dict()}]}
    row_fields["context"] = {"split": "val", "images": len(data.val), "artifact": manifest.sha256[:12]}
    best = max(history, key=lambda step: step["score"])
    scored = "measured: candidates cut, compensated, and scored on the val split"
    counted = "modelled: what is left of each block under the best policy"
    values = {
        "search_score": (best["score"], [step["score"] for step in history], scored),
        "search_cost": (
            best["cost"],
            [step["cost"] for step in history],
            "modelled: multiply-accumulates, or seconds of a table",
        ),
        "search_policies": (
            len(history),
            [round(r, 4) for step in history for r in step["policy"]],
            "modelled: ratios that go",
        ),
    }
    for metric, key in (("neurons", "neurons"), ("heads", "heads"), ("head_dims", "head_dims"), ("tokens", "after")):
        values[f"policy_{metric}"] = (sum(best[key]), best[key], counted)
    units = {"search_score": "fraction" if config.objective == "top1" else "nats", "search_cost": config.budget}
    return [
        Row(**row_fields, metric=metric, unit=units.get(metric, ""), value=value, samples=samples, source=source)
        for metric, (value, samples, source) in values.items()
    ]
