"""Scores of a Vision Transformer's units, how they are asked for, and the choice of the best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData, Split
from vitbench.removal.cut import KeptUnits
from vitbench.training.config import TrainConfig


class Criterion(Config):
    """What units are scored by.

    Attributes:
        name: what scores, see `vitbench.removal.criteria`.
        samples: how many calibration images are looked at; all of them if there are fewer.
        normalise: of a unit's values before HSIC: "corrected", "official" or "none" (`dependence.standardize`).
        blend: the share of HSIC in the score of a neuron, the rest is the sum of |activation|, both scaled to [0, 1].
            1 is the paper's criterion; its public code has 0.1.
        redundancy: what a head loses for its mean HSIC with the block's other heads.
        gates: how the gates of the survey's method are trained.
    """

    name: Literal["magnitude", "activation", "taylor", "gates", "hsic"] = "hsic"
    samples: int = Field(default=256, ge=2)
    normalise: Literal["corrected", "official", "none"] = "corrected"
    blend: float = Field(default=1.0, ge=0, le=1)
    redundancy: float = Field(default=0.1, ge=0)
    gates: TrainConfig = TrainConfig(epochs=1, lr=1e-3, warmup_epochs=0, mixup=0.0, label_smoothing=0.0)


OFFICIAL_CRITERION = Criterion(name="hsic", samples=128, normalise="official", blend=0.1)  # the public code's choices


@dataclass(frozen=True)
class Scores:
    """Scores of one block's units: neurons (h,), heads (H,), and each head's dimensions qk and v, (H, head_dim) each."""

    neurons: Tensor
    heads: Tensor
    qk: Tensor
    v: Tensor


def scoring_images(data: ImageData, criterion: Criterion) -> Split:
    """The calibration images that a criterion looks at."""
    return data.require_split("calibration").subset(criterion.samples)


def top_units(scores: Sequence[Scores], left: Sequence[tuple[int, int, int]]) -> list[KeptUnits]:
    """The best units of each block, as many as (neurons, heads, dimensions of a head) are left."""
    kept = []
    for found, (neurons, heads, width) in zip(scores, left, strict=True):
        narrower = width < found.v.shape[1]
        inside = {which: _best(getattr(found, which), width) for which in ("qk", "v")} if narrower else {}
        kept.append(KeptUnits(_best(found.neurons, neurons), _best(found.heads, heads), **inside))
    return kept


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def by_head(values: Tensor, block: nn.Module) -> Tensor:
    """(heads x head_dim, ...) -> (heads, head_dim, ...)."""
    return values.unflatten(0, (block.attn.num_heads, block.attn.head_dim))
