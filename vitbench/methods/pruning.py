"""Structured pruning: neurons, heads, dimensions of heads and tokens are removed, and the matrices become smaller.

The survey's row (Papa et al. 2023, arXiv 2309.02031) masks gated channels, so the model's size and speed do not change.
Here the same gates, or better criteria (`vitbench.removal.criteria`), choose the units that are removed.
"""

import dataclasses
import warnings
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.removal.criteria import COMPARABLE_ACROSS_BLOCKS
from vitbench.removal.policy import DIMENSIONS, PolicySpace
from vitbench.removal.pruner import Pruner, RemovalConfig
from vitbench.removal.scores import Criterion, Scores
from vitbench.training.compressed import Compressed
from vitbench.training.tuning import find_teacher, fine_tuned


class Pruning(RemovalConfig):
    """Settings of pruning, beside those of `RemovalConfig`.

    Attributes:
        neurons, heads, head_dims: the fraction to remove in every block; the number of kept units is rounded down.
        tokens: the fraction to remove at each of `token_blocks`.
        scope: rank units within each block ("block"), or across all blocks ("global"). "global" ranks the neurons of all blocks
            together, and likewise the heads; each block keeps at least one. Scores must be comparable across blocks, so the
            default criterion is then "taylor", an estimate of the loss. Other criteria give a warning if theirs are not.
    """

    neurons: float = Field(default=0.4, ge=0, lt=1)
    heads: float = Field(default=0.25, ge=0, lt=1)
    head_dims: float = Field(default=0.0, ge=0, lt=1)
    tokens: float = Field(default=0.0, ge=0, lt=1)
    scope: Literal["block", "global"] = "block"

    @model_validator(mode="before")
    @classmethod
    def _criterion_of_the_scope(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("scope") == "global":
            return {"criterion": Criterion(name="taylor"), **values}
        return values


def _operating_points(model: nn.Module) -> list[dict[str, float]]:
    """The same ratio for neurons and for heads' dimensions, up to one dimension in each head."""
    max_ratio = 1 - 1 / min(block.attn.head_dim for block in model.blocks)
    return [{"neurons": n / 50, "head_dims": n / 50, "heads": 0.0} for n in range(50) if n / 50 <= max_ratio]


@register(Pruning, identity=Pruning(neurons=0.0, heads=0.0), operating_points=_operating_points)
def pruning(model: nn.Module, config: Pruning, data: ImageData | None) -> Compressed:
    """Remove the units and tokens of least score, compensate, and fine-tune if `train.epochs` is above 0."""
    ratios = [getattr(config, name) for name in DIMENSIONS]
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    small = _prune(model, config, data) if any(ratios) else model
    return fine_tuned(small, config, data, teacher, title="recovering")


def _prune(model: nn.Module, config: Pruning, data: ImageData | None) -> nn.Module:
    pruner = Pruner(model, config, data, tokens=config.tokens > 0)
    space = pruner.space((), max_ratio=1.0)
    ratios = np.array([getattr(config, name) for name in DIMENSIONS])
    _check(config, space)
    counts = space.counts(space.expand_dimensions(ratios))
    if config.scope == "global":
        _warn_of_scales(config.criterion)
        global_counts = {
            name: _global_counts(pruner.scores, name, getattr(config, name)) for name in ("neurons", "heads")
        }
        counts = dataclasses.replace(counts, **global_counts)
    return pruner.prune(counts)


def _warn_of_scales(criterion: Criterion) -> None:
    if criterion.name not in COMPARABLE_ACROSS_BLOCKS:
        warnings.warn(
            f"scope=global compares units of different blocks, and scores of {criterion.name} have another scale in each block; "
            f"give scope=block, or one of the criteria {', '.join(COMPARABLE_ACROSS_BLOCKS)}",
            stacklevel=2,
        )


def _check(config: Pruning, space: PolicySpace) -> None:
    """Raise `InputError` if a ratio would remove all units of a block."""
    for name in ("neurons", "heads", "head_dims"):
        ratio, unit_counts = getattr(config, name), getattr(space, name)
        emptied_blocks = np.flatnonzero(np.floor(unit_counts * (1 - ratio) + 1e-9) < 1)
        if len(emptied_blocks) and (config.scope == "block" or name == "head_dims"):
            count = unit_counts[emptied_blocks[0]]
            raise InputError(
                f"{name} = {ratio:g} leaves block {emptied_blocks[0]} with none of its {count} {name}; give at most "
                f"{1 - 1 / count:.4g}"
            )


def _global_counts(scores: list[Scores], kind: str, ratio: float) -> np.ndarray:
    """The number of units of `kind` that each block keeps when all blocks are ranked together: (1, L)."""
    scores_by_block = [getattr(block_scores, kind) for block_scores in scores]
    all_scores = torch.cat([values - values.min() if values.min() < 0 else values for values in scores_by_block])
    keep_count = max(len(scores_by_block), int(len(all_scores) * (1 - ratio) + 1e-9))
    threshold = all_scores.topk(keep_count).values[-1]
    shifted_by_block = all_scores.split([len(values) for values in scores_by_block])
    return np.array([[max(1, int((values >= threshold).sum())) for values in shifted_by_block]])
