"""Pruning of units and tokens by their scores, and compensation for what was removed, without training."""

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
from vitbench.model.tokens import MERGING, TokenBlocks, max_merged
from vitbench.removal import criteria, cut, policy
from vitbench.removal.dependence import position_scores
from vitbench.removal.policy import PolicySpace, UnitCounts
from vitbench.removal.scores import Criterion, Scores, top_units
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig

TRAIN = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


class RemovalConfig(FineTuneConfig):
    """Settings shared by the methods that remove units.

    Attributes:
        criterion: the criterion that scores neurons, heads and dimensions of heads.
        reduction: how tokens are chosen or merged (`vitbench.model.tokens`).
        token_blocks: the blocks, counted from 0, after whose attention tokens are removed; None means those at a quarter, a
            half and three quarters of the depth.
        compensation: the recovery without training. "mean" adds the removed units' mean contribution to the next layer's
            bias. "ridge" also predicts the removed units from the kept ones by ridge regression, and adds the coefficients
            to the next layer's weights. "none" does neither.
        ridge: the penalty of the regression, as a multiple of the kept units' mean variance.
        train, teacher: the optional fine-tuning.
    """

    criterion: Criterion = Criterion()
    reduction: Reduction = "cls_attention"
    token_blocks: tuple[int, ...] | None = None
    compensation: Literal["ridge", "mean", "none"] = "ridge"
    ridge: float = Field(default=1e-2, ge=0)
    train: TrainConfig = TRAIN


class Pruner:
    """Prunes copies of a model to different sizes; scores and moments are computed once, when they are first needed.

    Raises:
        InputError: units or tokens that cannot be removed from this model, or missing images (see `criteria.score`).
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
        self._position_scores: Tensor | None = None

    def _check_tokens(self) -> None:
        model, config, name = self.model, self.config, self.model.recipe.architecture.name
        if isinstance(model.blocks, TokenBlocks):
            raise InputError(
                f"tokens of this {name} are reduced already; give the model before the reduction, or tokens=0"
            )
        if config.reduction in ("cls_attention", "hsic_cls") and getattr(model, "cls_token", None) is None:
            raise InputError(
                f"{name} has no class token, whose attention scores the tokens; take reduction=merge or hsic"
            )
        if config.reduction.startswith("hsic") and self.data is None:
            raise InputError(f"reduction={config.reduction} needs images and no data set was given; give one")
        invalid_blocks = [index for index in self.token_blocks if not 0 <= index < len(model.blocks)]
        if invalid_blocks or not self.token_blocks:
            raise InputError(
                f"token_blocks = {self.token_blocks}: {name} has blocks 0 to {len(model.blocks) - 1}; name at least one of them"
            )

    def space(self, dimensions: Sequence[str], max_ratio: float) -> PolicySpace:
        """The policies for this model, with ratios up to `max_ratio` in `dimensions`."""
        shapes = blocks.block_shapes(self.model)
        return PolicySpace(
            neurons=np.array([shape.neurons for shape in shapes]),
            heads=np.array([shape.heads for shape in shapes]),
            head_dims=np.array([shape.head_dim for shape in shapes]),
            tokens=vit.token_count(self.model),
            prefix=self.model.num_prefix_tokens,
            token_blocks=self.token_blocks,
            has_fused_token=self.config.reduction not in MERGING,
            dimensions=tuple(dimensions),
            max_ratio=max_ratio,
        )

    @property
    def scores(self) -> list[Scores]:
        """The scores of each block's units."""
        if self._scores is None:
            self._scores = criteria.score(self.model, self.data, self.config.criterion)
        return self._scores

    def with_weights(self, model: nn.Module) -> "Pruner":
        """A pruner of `model`, the same model with other weights: it has these scores and collects its own moments."""
        pruner = Pruner(model, self.config, self.data, tokens=False)
        pruner._scores, pruner._position_scores = self.scores, self._position_scores
        return pruner

    def prune(self, counts: UnitCounts) -> nn.Module:
        """A smaller copy of the model, with the units of the highest scores."""
        pruned = copy.deepcopy(self.model)
        current_sizes = [(shape.neurons, shape.heads, shape.head_dim) for shape in blocks.block_shapes(pruned)]
        if counts.units_left() != current_sizes:
            kept_units = top_units(self.scores, counts.units_left())
            if self.config.compensation != "none":
                compensate(pruned, kept_units, self.moments, self.config.compensation, self.config.ridge)
            cut.remove_units(pruned, kept_units)
        self._prune_tokens(pruned, counts)
        return pruned

    @property
    def moments(self) -> dict[str, Moments]:
        """The moments of the inputs of fc2 and proj."""
        if self._moments is None:
            if self.data is None:
                raise InputError(
                    f"compensation={self.config.compensation} needs calibration images and no data set was given; give "
                    "one, or compensation=none"
                )
            layers = vit.linear_layers(self.model, ("proj", "fc2"))
            self._moments = moments_module.collect_moments(self.model, layers, self.data)
        return self._moments

    def _prune_tokens(self, model: nn.Module, counts: UnitCounts) -> None:
        tokens_in, tokens_out = counts.tokens_in[0], counts.tokens_out[0]
        if (tokens_out == tokens_in[0]).all() or isinstance(model.blocks, TokenBlocks):
            return
        reduction = self.config.reduction
        if reduction in MERGING and any(
            n - m > max_merged(n, model.num_prefix_tokens) for n, m in zip(tokens_in, tokens_out, strict=True)
        ):
            raise InputError(
                f"merging in pairs leaves at least half of the tokens, besides the first {model.num_prefix_tokens} (class and "
                f"registers), and {tokens_in.tolist()} should become {tokens_out.tolist()}; take a ratio below 0.5, or more "
                "token_blocks"
            )
        token_counts = [int(m) if m < n else None for n, m in zip(tokens_in, tokens_out, strict=True)]
        self.reduce_tokens(model, token_counts)
        blocks.record_block_shapes(model)

    def reduce_tokens(self, model: nn.Module, counts: Sequence[int | None]) -> None:
        """Call `blocks.reduce_tokens`, and set the scores of the positions if the reduction uses them."""
        blocks.reduce_tokens(model, self.config.reduction, counts)
        if self.config.reduction.startswith("hsic"):
            if self._position_scores is None:
                self._position_scores = position_scores(
                    self.model, self.data, min(self.token_blocks), self.config.criterion
                )
            model.blocks.scores.copy_(self._position_scores)


@torch.no_grad()
def compensate(
    model: nn.Module, kept_units: Sequence[cut.KeptUnits], moments: dict[str, Moments], method: str, ridge: float
) -> None:
    """Change the layers after the units outside `kept_units`, in place, so that the units can be removed.

    With the units' values z = [z_k, z_g] (kept, removed) and the next layer W z + b:
    z_g ~ mean_g + T (z_k - mean_k), T = Cov(z_g, z_k) (Cov(z_k) + rho tr Cov(z_k) / n I)^-1, or T = 0 for "mean". Then
    W_k' = W_k + W_g T and b' = b + W_g (mean_g - T mean_k). The moments are those of the unpruned model.
    """
    for index, (block, kept) in enumerate(zip(model.blocks, kept_units, strict=True)):
        kept_inputs = {"mlp.fc2": kept.neurons, "attn.proj": cut.value_rows(block.attn, kept)}
        for name, k in kept_inputs.items():
            layer, layer_moments = block.get_submodule(name), moments[f"blocks.{index}.{name}"]
            is_removed = torch.ones(layer.in_features, dtype=torch.bool)
            is_removed[k] = False
            g, weight = is_removed.nonzero().flatten(), layer.weight.double()
            if not len(g):
                continue
            change = weight[:, g] @ layer_moments.mean[g]
            if method == "ridge":
                covariance = layer_moments.covariance()
                kept_covariance = covariance[k][:, k]
                penalty = ridge * kept_covariance.trace() / len(k) * torch.eye(len(k), dtype=kept_covariance.dtype)
                regression = torch.linalg.solve(kept_covariance + penalty, covariance[k][:, g]).T
                layer.weight[:, k] += (weight[:, g] @ regression).float()
                change = change - weight[:, g] @ (regression @ layer_moments.mean[k])
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
            layer.bias += change.float()
