"""Structured pruning: neurons, heads, dimensions of heads and tokens are taken out, and the matrices become smaller.

The survey's row (Papa et al. 2023, arXiv 2309.02031) masks gated channels and leaves the model as large and as slow as
it was; here the same gates, or better criteria (`vitbench.removal.criteria`), choose what goes.
"""

import dataclasses
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.removal.policy import DIMENSIONS, PolicySpace
from vitbench.removal.pruner import Pruner, RemovalConfig
from vitbench.removal.scores import Scores
from vitbench.training.tuning import find_teacher, fine_tune


class Pruning(RemovalConfig):
    """Settings of pruning, beside those of `RemovalConfig`.

    Attributes:
        neurons, heads, head_dims: the share that goes in every block; counts are rounded down.
        tokens: the share that goes at each of `token_blocks`.
        scope: rank units within each block ("block"), or across all blocks ("global": neurons and heads, by their scores
            over the mean score of the kind in the model; each block keeps at least one).
    """

    neurons: float = Field(default=0.4, ge=0, lt=1)
    heads: float = Field(default=0.25, ge=0, lt=1)
    head_dims: float = Field(default=0.0, ge=0, lt=1)
    tokens: float = Field(default=0.0, ge=0, lt=1)
    scope: Literal["block", "global"] = "block"


def _shares(model: nn.Module) -> list[dict[str, float]]:
    """The same share of neurons and of heads' dimensions, of which each head keeps one."""
    most = 1 - 1 / min(block.attn.head_dim for block in model.blocks)
    return [{"neurons": n / 50, "head_dims": n / 50, "heads": 0.0} for n in range(50) if n / 50 <= most]


@register(Pruning, identity=Pruning(neurons=0.0, heads=0.0), operating_points=_shares)
def pruning(model: nn.Module, config: Pruning, data: ImageData | None) -> nn.Module:
    """Take out the units and tokens that matter least, make up for them, and train on if asked to."""
    ratios = [getattr(config, name) for name in DIMENSIONS]
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    small = _cut(model, config, data) if any(ratios) else model
    small = small.requires_grad_(bool(config.train.epochs))
    fine_tune(small, config, data, teacher, title="recovering")
    return small.cpu()


def _cut(model: nn.Module, config: Pruning, data: ImageData | None) -> nn.Module:
    pruner = Pruner(model, config, data, tokens=config.tokens > 0)
    space = pruner.space((), max_ratio=1.0)
    ratios = np.array([getattr(config, name) for name in DIMENSIONS])
    _check(config, space)
    counts = space.counts(space.expand_dimensions(ratios))
    if config.scope == "global":
        across = {name: _across(pruner.scores, name, getattr(config, name)) for name in ("neurons", "heads")}
        counts = dataclasses.replace(counts, **across)
    return pruner.prune(counts)


def _check(config: Pruning, space: PolicySpace) -> None:
    """Raise `InputError` where a ratio leaves a block with nothing."""
    for name in ("neurons", "heads", "head_dims"):
        ratio, whole = getattr(config, name), getattr(space, name)
        empty = np.flatnonzero(np.floor(whole * (1 - ratio) + 1e-9) < 1)
        if len(empty) and (config.scope == "block" or name == "head_dims"):
            count = whole[empty[0]]
            raise InputError(
                f"{name} = {ratio:g} leaves block {empty[0]} with none of its {count} {name}; take at most "
                f"{1 - 1 / count:.4g}"
            )


def _across(scores: list[Scores], kind: str, ratio: float) -> np.ndarray:
    """How many units of `kind` each block keeps when all blocks are ranked together: (1, L)."""
    each = [getattr(found, kind) for found in scores]
    pooled = torch.cat([values - values.min() if values.min() < 0 else values for values in each])
    stay = max(len(each), int(len(pooled) * (1 - ratio) + 1e-9))
    threshold = pooled.topk(stay).values[-1]
    return np.array([[max(1, int((values >= threshold).sum())) for values in pooled.split([len(v) for v in each])]])
