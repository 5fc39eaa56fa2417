"""Taking units and tokens out of a model by scores, and making up for them without training."""

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.calibration import moments as moments_module
from vitbench.calibration.moments import Moments
from vitbench.data.splits import ImageData
from vitbench.model import blocks, vit
from vitbench.model.recipe import Reduction
from vitbench.model.tokens import TokenBlocks, max_merged
from vitbench.removal import criteria, cut, policy
from vitbench.removal.dependence import position_scores
from vitbench.removal.policy import PolicySpace, UnitCounts
from vitbench.removal.scores import Criterion, Scores, top_units
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig

TRAIN = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


class RemovalConfig(FineTuneConfig):
    """What methods that remove units have in common.

    Attributes:
        criterion: what neurons, heads and dimensions are scored by.
        reduction: how tokens are chosen or merged (`vitbench.model.tokens`).
        token_blocks: after the attention of which blocks, counted from 0; None: at a quarter, a half and three quarters.
        compensation: the recovery without training. "mean" puts the mean of what went into the next bias, "ridge" also
            gives its part that follows from what stays to the next layer's weights (least squares), "none" does neither.
        ridge: of the least squares, in units of the kept values' mean variance.
        train, teacher: the fine-tuning that may follow.
    """

    criterion: Criterion = Criterion()
    reduction: Reduction = "cls_attention"
    token_blocks: tuple[int, ...] | None = None
    compensation: Literal["ridge", "mean", "none"] = "ridge"
    ridge: float = Field(default=1e-2, ge=0)
    train: TrainConfig = TRAIN


class Pruner:
    """A model that can be cut in many ways: scores and moments are collected once, when first needed.

    Raises:
        InputError: units or tokens that this model cannot lose, or images that are missing (see `criteria.score`).
    """

    def __init__(self, model: nn.Module, config: RemovalConfig, data: ImageData | None, *, tokens: bool):
        cut.check_prunable(model)
        self.model, self.config, self.data = model, config, data
        self.token_blocks = (
            policy.token_blocks(len(model.blocks)) if config.token_blocks is None else config.token_blocks
        )
        if tokens:
            self._check_tokens()
        self._scores: list[Scores] | None = None
        self._moments: dict[str, Moments] | None = None
        self._positions: Tensor | None = None

    def _check_tokens(self) -> None:
        model, config, name = self.model, self.config, self.model.recipe.architecture.name
        if isinstance(model.blocks, TokenBlocks):
            raise InputError(f"tokens of this {name} are reduced already; give the model from before, or tokens=0")
        if config.reduction in ("cls_attention", "hsic_cls") and getattr(model, "cls_token", None) is None:
            raise InputError(
                f"{name} has no class token, so nothing says what it attends to; take reduction=merge or hsic"
            )
        if config.reduction.startswith("hsic") and self.data is None:
            raise InputError(f"reduction={config.reduction} looks at images and no data set was given; give one")
        wrong = [index for index in self.token_blocks if not 0 <= index < len(model.blocks)]
        if wrong or not self.token_blocks:
            raise InputError(
                f"token_blocks = {self.token_blocks}: {name} has blocks 0 to {len(model.blocks) - 1}; name at least one of them"
            )

    def space(self, dimensions: Sequence[str], max_ratio: float) -> PolicySpace:
        """The policies for this model."""
        shapes = blocks.block_shapes(self.model)
        return PolicySpace(
            neurons=np.array([shape.neurons for shape in shapes]),
            heads=np.array([shape.heads for shape in shapes]),
            head_dims=np.array([shape.head_dim for shape in shapes]),
            tokens=vit.token_count(self.model),
            prefix=self.model.num_prefix_tokens,
            token_blocks=self.token_blocks,
            has_fused_token=self.config.reduction != "merge",
            dimensions=tuple(dimensions),
            max_ratio=max_ratio,
        )

    @property
    def scores(self) -> list[Scores]:
        """Of each block's units."""
        if self._scores is None:
            self._scores = criteria.score(self.model, self.data, self.config.criterion)
        return self._scores

    def with_weights(self, model: nn.Module) -> "Pruner":
        """The same for `model`, which has other weights: units keep their scores, moments are collected anew."""
        other = Pruner(model, self.config, self.data, tokens=False)
        other._scores, other._positions = self.scores, self._positions
        return other

    def prune(self, counts: UnitCounts) -> nn.Module:
        """A smaller copy of the model, with the units that score best."""
        small = copy.deepcopy(self.model)
        whole = [(shape.neurons, shape.heads, shape.head_dim) for shape in blocks.block_shapes(small)]
        if counts.units_left() != whole:
            kept = top_units(self.scores, counts.units_left())
            if self.config.compensation != "none":
                compensate(small, kept, self.moments, self.config.compensation, self.config.ridge)
            cut.remove_units(small, kept)
        self._cut_tokens(small, counts)
        return small

    @property
    def moments(self) -> dict[str, Moments]:
        """Of the inputs of fc2 and proj."""
        if self._moments is None:
            if self.data is None:
                raise InputError(
                    f"compensation={self.config.compensation} needs calibration images and no data set was given; give "
                    "one, or compensation=none"
                )
            layers = vit.linear_layers(self.model, ("proj", "fc2"))
            self._moments = moments_module.collect_moments(self.model, layers, self.data)
        return self._moments

    def _cut_tokens(self, model: nn.Module, counts: UnitCounts) -> None:
        before, after = counts.tokens_in[0], counts.tokens_out[0]
        if (after == before[0]).all() or isinstance(model.blocks, TokenBlocks):
            return
        reduction = self.config.reduction
        if reduction == "merge" and any(
            n - m > max_merged(n, model.num_prefix_tokens) for n, m in zip(before, after, strict=True)
        ):
            raise InputError(
                f"merging in pairs leaves at least half of the tokens but the first {model.num_prefix_tokens} (class and "
                f"registers), all of which stay, and {before.tolist()} should become {after.tolist()}; take a ratio below 0.5, or more token_blocks"
            )
        places = [int(m) if m < n else None for n, m in zip(before, after, strict=True)]
        self.reduce_tokens(model, places)
        blocks.record_block_shapes(model)

    def reduce_tokens(self, model: nn.Module, counts: Sequence[int | None]) -> None:
        """`blocks.reduce_tokens`, with scores of the positions where they count."""
        blocks.reduce_tokens(model, self.config.reduction, counts)
        if self.config.reduction.startswith("hsic"):
            if self._positions is None:
                self._positions = position_scores(self.model, self.data, min(self.token_blocks), self.config.criterion)
            model.blocks.scores.copy_(self._positions)


@torch.no_grad()
def compensate(
    model: nn.Module, kept: Sequence[cut.KeptUnits], moments: dict[str, Moments], how: str, ridge: float
) -> None:
    """Let what follows the units outside `kept` do without them, in place, before they are taken out.

    With the units' values z = [z_k, z_g] (kept, gone) and the next layer W z + b:
    z_g ~ mean_g + T (z_k - mean_k), T = Cov(z_g, z_k) (Cov(z_k) + rho tr Cov(z_k) / n I)^-1, or T = 0 for "mean". Then
    W_k' = W_k + W_g T and b' = b + W_g (mean_g - T mean_k). The moments are those of the model before.
    """
    for index, (block, keep) in enumerate(zip(model.blocks, kept, strict=True)):
        stays = {"mlp.fc2": keep.neurons, "attn.proj": cut.value_rows(block.attn, keep)}
        for name, k in stays.items():
            layer, found = block.get_submodule(name), moments[f"blocks.{index}.{name}"]
            gone = torch.ones(layer.in_features, dtype=torch.bool)
            gone[k] = False
            g, weight = gone.nonzero().flatten(), layer.weight.double()
            if not len(g):
                continue
            change = weight[:, g] @ found.mean[g]
            if how == "ridge":
                covariance = found.covariance()
                own = covariance[k][:, k]
                own = own + ridge * own.trace() / len(k) * torch.eye(len(k), dtype=own.dtype)
                follows = torch.linalg.solve(own, covariance[k][:, g]).T
                layer.weight[:, k] += (weight[:, g] @ follows).float()
                change = change - weight[:, g] @ (follows @ found.mean[k])
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
            layer.bias += change.float()
