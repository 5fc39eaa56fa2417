"""Scores of a Vision Transformer's units, the settings of their criterion, and the choice of the best units."""

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
    """The criterion that scores units.

    Attributes:
        name: the criterion, a function of `vitbench.removal.criteria`.
        samples: the number of calibration images; all of them if there are fewer.
        normalise: the form of HSIC. "cka" is its normalised form, with the median distance as the kernel's bandwidth, times the
            energy of the unit's contribution. The others are HSIC of the unit's values, normalised as `dependence.standardize` says:
            "corrected" (the paper's criterion), "official" or "none".
        blend: the share of HSIC in the score of a neuron; the rest is the sum of |activation|, and both are scaled to [0, 1].
            1 is the paper's; its public code has 0.1.
        redundancy: the weight of a head's mean HSIC with the block's other heads, which is subtracted from its score.
        gates: the training of the gates of the survey's method.
    """

    name: Literal["magnitude", "activation", "taylor", "gates", "hsic"] = "hsic"
    samples: int = Field(default=256, ge=2)
    normalise: Literal["cka", "corrected", "official", "none"] = "cka"
    blend: float = Field(default=1.0, ge=0, le=1)
    redundancy: float = Field(default=0.1, ge=0)
    gates: TrainConfig = TrainConfig(epochs=1, lr=1e-3, warmup_epochs=0, mixup=0.0, label_smoothing=0.0)


OFFICIAL_CRITERION = Criterion(
    name="hsic", samples=128, normalise="official", blend=0.1
)  # as in the paper's public code


@dataclass(frozen=True)
class Scores:
    """Scores of one block's units: neurons (h,), heads (H,), and each head's dimensions qk and v, (H, head_dim) each."""

    neurons: Tensor
    heads: Tensor
    qk: Tensor
    v: Tensor


def scoring_images(data: ImageData, criterion: Criterion) -> Split:
    """The calibration images on which a criterion scores units."""
    return data.require_split("calibration").subset(criterion.samples)


def top_units(scores: Sequence[Scores], unit_counts: Sequence[tuple[int, int, int]]) -> list[KeptUnits]:
    """The units of each block with the highest scores; `unit_counts` are its neurons, heads and dimensions of a head."""
    kept_units = []
    for block_scores, (neurons, heads, width) in zip(scores, unit_counts, strict=True):
        kept_dims = {}
        if width < block_scores.v.shape[1]:
            kept_dims = {part: _top_indices(getattr(block_scores, part), width) for part in ("qk", "v")}
        kept_units.append(
            KeptUnits(_top_indices(block_scores.neurons, neurons), _top_indices(block_scores.heads, heads), **kept_dims)
        )
    return kept_units


def _top_indices(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def by_head(values: Tensor, block: nn.Module) -> Tensor:
    """(heads x head_dim, ...) -> (heads, head_dim, ...)."""
    return values.unflatten(0, (block.attn.num_heads, block.attn.head_dim))
