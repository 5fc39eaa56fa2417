"""Rows about how a model came to be: the seconds it took, its training curves, the search for its policy."""

import math
from pathlib import Path
from typing import Any

import torch

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData
from vitbench.measurement.cost import model_row_fields
from vitbench.model import artifact, vit
from vitbench.rows import runs
from vitbench.rows.records import Row
from vitbench.run.cache import CachedModel


def seconds_row(path: Path, data: ImageData | None, seconds: float) -> Row:
    """How long the model saved at `path` took to make from the one before it, with this process's threads."""
    manifest = artifact.read_manifest(path)
    recipe = manifest.recipe
    facts = model_row_fields(recipe, data)
    context = {"threads": torch.get_num_threads(), "device": runs.device_name()}
    context |= {"artifact": manifest.sha256[:12], "depth": len(vit.meta_model(recipe.architecture).blocks)}
    return Row(
        **facts, metric="compress_seconds", unit="s", value=seconds, source="measured: wall clock", context=context
    )


def training_rows(made: CachedModel, data: ImageData) -> list[Row]:
    """The training curves of a model as rows: the last value, and one sample an epoch. None for an untrained one."""
    if not made.history:
        return []
    manifest = artifact.read_manifest(made.path)
    facts, steps = model_row_fields(manifest.recipe, data), made.history[-1].get("steps", 0) // len(made.history)
    context = {"artifact": manifest.sha256[:12], "epochs": len(made.history), "steps_per_epoch": steps or 1}
    rows = []
    for metric, key, unit, source in (
        ("train_loss", "loss", "nats", "measured: mean over each epoch's training batches, after augmentation"),
        ("val_top1", "val_top1", "fraction", "measured: val split after each epoch"),
    ):
        curve = [epoch[key] for epoch in made.history]
        if all(math.isfinite(value) for value in curve):
            row = Row(**facts, metric=metric, unit=unit, value=curve[-1], samples=curve, source=source, context=context)
            rows.append(row)
    return rows


def search_rows(base: Path, data: ImageData, config: Config, history: list[dict[str, Any]]) -> list[Row]:
    """A search for a policy as rows, each with a number for every policy or for every block as samples.

    `search_score` and `search_cost` of every policy in order, `search_policies` their ratios one after the other, and
    `policy_neurons`, `policy_heads`, `policy_head_dims`, `policy_tokens`: what the best one leaves of each block.

    Args:
        base: the saved model that was searched for.
        config: of `multidimensional`, with what the search was told.
        history: as `multidimensional` leaves it in `search`.
    """
    manifest = artifact.read_manifest(base)
    facts = model_row_fields(manifest.recipe, data) | {"method": "search", "seed": config.search.seed}
    facts["config"] |= {"methods": [{"method": "multidimensional", "config": config.to_dict()}]}
    facts["context"] = {"split": "val", "images": len(data.val), "artifact": manifest.sha256[:12]}
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
        Row(**facts, metric=metric, unit=units.get(metric, ""), value=value, samples=samples, source=source)
        for metric, (value, samples, source) in values.items()
    ]
