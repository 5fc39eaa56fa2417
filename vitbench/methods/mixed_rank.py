"""Mixed rank: activation-aware low-rank layers, ranks by greedy allocation, and layer-wise error compensation.

Azizi, Nazemi and Pedram (2024, arXiv 2402.06004) describe three stages. They published no code, so the formulas here are
derived from the paper's text:

1. W ~ A B with the least output error on calibration images (`vitbench.calibration.factors`). The bias takes the mean of the
   error: b' = b + (W - A B) mean(x).
2. Ranks by greedy allocation (`vitbench.calibration.allocation`). Errors of different layers are compared by the second-order term
   of the model's loss, tr(Gamma dW C dW^T) ~ mean(diag Gamma) E||dW x||^2, with Gamma the second moments of the loss's gradient.
3. Compensation (`vitbench.calibration.compensation`), layer by layer, on the inputs that the compressed earlier layers produce.

None of the three trains. A short distillation may follow (`train`); rows with and without it have different configs.
"""

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.calibration import moments as moments_module
from vitbench.calibration.allocation import LayerErrors, floored_ranks, greedy_ranks, uniform_ranks
from vitbench.calibration.compensation import ErrorMoments, fit_compact_residual, layer_error_moments
from vitbench.calibration.factors import factorise
from vitbench.calibration.moments import Moments
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.layers import LowRankLinear
from vitbench.model.vit import LINEAR_TYPES
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tuned

TOKENS_PER_INPUT = 10  # calibration tokens for each input feature; with fewer, a covariance counts as unstable


class MixedRank(FineTuneConfig):
    """Settings of mixed rank.

    Attributes:
        layers: which types of linear layers may be factored.
        keep: the fraction of the budget that is kept, in (0, 1].
        budget: what `keep` is a fraction of: the weights of those layers ("params"), the model's multiply-accumulates for one
            image ("macs"), or the bytes of the model's tensors ("bytes").
        decomposition: "activation" (stage 1), or the alternatives svd, asvd and svd_llm.
        gradient_weight: how much the gradient's moments weight the errors of a layer's outputs, see
            `vitbench.calibration.factors.factorise`; 0 weights all outputs equally, as the paper does.
        allocation: "greedy" (stage 2), or the same fraction of each layer's weights ("uniform").
        scale: how greedy allocation compares layers: by "sensitivity" (to the loss), by their unscaled "error", or by "energy"
            (the error as a share of the layer's outputs).
        rank_step: ranks are multiples of it. A small model may need 1 to come near its budget.
        remainder: "spent": both allocations spend the budget up to less than a step of `rank_step`. "left", as in early versions:
            greedy allocation stops below the budget by up to a layer, and "uniform" rounds each layer's rank down, for the
            budget "params" alone.
        split_qkv: split q, k and v of every head into separate layers, each with its own rank.
        mean_correction: add the mean of the error to the bias. Covariances are then about the mean, except for layers
            without a bias.
        compensation: stage 3: "closed_form" (least squares, also for dense layers), "gradient" (Adam on a compact residual
            of the factors, as in the paper), or "none".
        propagate: compensate on the inputs that the compressed layers produce; False uses the original inputs, for comparison.
        ridge: the ridge penalty of the compensation, in units of the inputs' mean variance.
        residual_rank, residual_steps: the rank of the compact residual, which is part of the layer's rank, and Adam's steps.
        train, teacher: the short distillation.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    keep: float = Field(default=0.6, gt=0, le=1)
    budget: Literal["params", "macs", "bytes"] = "params"
    decomposition: Literal["activation", "svd", "asvd", "svd_llm"] = "activation"
    gradient_weight: float = Field(default=1.0, ge=0)
    allocation: Literal["greedy", "uniform"] = "greedy"
    scale: Literal["sensitivity", "error", "energy"] = "sensitivity"
    rank_step: int = Field(default=8, ge=1)
    remainder: Literal["spent", "left"] = "spent"
    split_qkv: bool = False
    mean_correction: bool = True
    compensation: Literal["closed_form", "gradient", "none"] = "closed_form"
    propagate: bool = True
    ridge: float = Field(default=3.0, ge=0)
    residual_rank: int = Field(default=8, ge=1)
    residual_steps: int = Field(default=200, ge=1)
    train: TrainConfig = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


def _operating_points(model: nn.Module) -> list[dict[str, float]]:
    """Values of `keep` from 1 down to the fraction at which every layer has the smallest rank."""
    layers, step = vit.linear_layers(model).values(), MixedRank().rank_step
    min_keep = step * sum(layer.in_features + layer.out_features for layer in layers)
    min_keep /= sum(layer.in_features * layer.out_features for layer in layers)
    return [{"keep": n / 50} for n in range(50, 0, -1) if n / 50 >= min_keep]


@register(MixedRank, identity=MixedRank(keep=1.0), operating_points=_operating_points)
def mixed_rank(model: nn.Module, config: MixedRank, data: ImageData | None) -> Compressed:
    """Factor the linear layers at allocated ranks, compensate the error, and fine-tune if `train.epochs` is above 0."""
    vit.dense_layers_by_type(model, config.layers)
    if config.keep == 1 or not config.layers:
        return Compressed(model)
    if data is None:
        raise InputError("mixed_rank needs calibration images and no data set was given; give one")
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    moments = _moments(model, config, data)
    layers = vit.linear_layers(model, config.layers)
    ranks = _ranks(model, config, layers, moments)
    names = [name for name in layers if name in ranks or config.compensation == "closed_form"]
    layer_errors: Iterable[tuple[str, ErrorMoments | None]]
    if config.compensation == "none":
        layer_errors = ((name, None) for name in names)
    elif config.propagate:
        layer_errors = layer_error_moments(model, copy.deepcopy(model), names, data.calibration)
    else:
        layer_errors = ((name, _zero_error_moments(layers[name], moments[name])) for name in names)
    for name, mismatch in progress.progress_bar(layer_errors, "factoring", total=len(names), unit="layer"):
        _replace(model, config, name, layers[name], ranks.get(name, 0), moments[name], mismatch)
    return fine_tuned(model, config, data, teacher, title="distilling")


def _moments(model: nn.Module, config: MixedRank, data: ImageData) -> dict[str, Moments]:
    """The moments of all layers. With `split_qkv`, also splits the qkv layers in `model` and adds the parts' moments."""
    needs_gradients = config.gradient_weight > 0 or (config.allocation == "greedy" and config.scale == "sensitivity")
    layers = vit.linear_layers(model, config.layers)
    moments = moments_module.collect_moments(model, layers, data, gradients=needs_gradients)
    widest_layer = max(moments, key=lambda name: len(moments[name].mean))
    size, tokens = len(moments[widest_layer].mean), moments[widest_layer].tokens
    if tokens < TOKENS_PER_INPUT * size:
        images = len(data.calibration)
        warnings.warn(
            f"{images} calibration images give {tokens} tokens for the {size} inputs of {widest_layer}: too few for a "
            f"stable covariance, so it is shrunk by {100 * _shrinkage(moments[widest_layer]):.0f} % towards a multiple of the "
            f"identity; give {-(-TOKENS_PER_INPUT * size * images // tokens)} images to avoid this",
            stacklevel=2,
        )
    if config.split_qkv and "qkv" in config.layers:
        for name, rows in blocks.split_qkv_by_head(model).items():
            qkv_moments = moments[name.rpartition(".parts.")[0]]
            gradient = qkv_moments.gradient[rows, rows] if needs_gradients else qkv_moments.gradient
            moments[name] = dataclasses.replace(qkv_moments, gradient=gradient)
    return moments


def _shrinkage(moments: Moments) -> float:
    """The shrinkage of a covariance towards the identity: n / (n + tokens), or 0 where tokens are enough."""
    size = len(moments.mean)
    return size / (size + moments.tokens) if moments.tokens < TOKENS_PER_INPUT * size else 0.0


def _covariance(layer: nn.Linear, moments: Moments, config: MixedRank) -> Tensor:
    shrinkage = _shrinkage(moments)
    if not config.mean_correction:
        return moments_module.shrink_towards_identity(moments.second_moment, shrinkage)
    return moments.output_error_covariance(layer, shrinkage)


def _ranks(
    model: nn.Module, config: MixedRank, layers: dict[str, nn.Linear], moments: dict[str, Moments]
) -> dict[str, int]:
    """Layer name -> rank, for the layers to factor; the others stay dense."""
    token_shares = _token_shares(model, layers) if config.budget == "macs" else {}
    shapes = {
        name: LayerErrors(tuple(layer.weight.shape), (), token_shares.get(name, 1.0)) for name, layer in layers.items()
    }
    spend, saving = config.remainder == "spent", _weights_to_remove(model, config, layers)
    if config.allocation == "uniform" and spend:
        return uniform_ranks(shapes, saving, config.rank_step)
    if config.allocation == "uniform":
        if config.budget != "params":
            raise InputError(
                f"remainder=left keeps a fraction of each layer's weights; give remainder=spent for budget={config.budget}"
            )
        return floored_ranks(shapes, config.keep, config.rank_step)
    layer_errors = {}
    for name, layer in progress.progress_bar(layers.items(), "error by rank", unit="layer"):
        covariance = _covariance(layer, moments[name], config)
        error_by_rank = factorise(
            layer.weight, moments[name], covariance, config.decomposition, config.gradient_weight
        ).output_error_by_rank(covariance)
        scale = {
            "sensitivity": moments[name].sensitivity,
            "error": 1.0,
            "energy": 1 / max(float(error_by_rank[0]), 1e-300),
        }[config.scale]
        layer_errors[name] = dataclasses.replace(shapes[name], error_by_rank=tuple((scale * error_by_rank).tolist()))
    return greedy_ranks(layer_errors, saving, config.rank_step, spend=spend)


def _token_shares(model: nn.Module, layers: Iterable[str]) -> dict[str, float]:
    """Layer name -> the share of an image's tokens that it gets; less than 1 where tokens were reduced before it."""
    tokens = vit.token_count(model)
    before, after = blocks.tokens_per_block(blocks.block_shapes(model), tokens)
    tokens_seen = {"qkv": before, "proj": before, "fc1": after, "fc2": after}
    return {name: tokens_seen[vit.layer_type(name)][int(name.split(".")[1])] / tokens for name in layers}


def _weights_to_remove(model: nn.Module, config: MixedRank, layers: dict[str, nn.Linear]) -> int:
    """The number of weights to remove so that `keep` of the budget remains."""
    if config.budget == "params":
        total_budget, cost_per_weight = sum(layer.weight.numel() for layer in layers.values()), 1
    elif config.budget == "macs":
        total_budget, cost_per_weight = vit.analytic_macs(model), vit.token_count(model)
    else:
        cost_per_weight = getattr(torch, model.recipe.storage).itemsize
        total_budget = sum(
            tensor.numel() * (cost_per_weight if tensor.is_floating_point() else tensor.element_size())
            for tensor in model.state_dict().values()
        )
    return round((1 - config.keep) * total_budget / cost_per_weight)


def _zero_error_moments(layer: nn.Linear, moments: Moments) -> ErrorMoments:
    """The compensation's input for a layer by itself: its original inputs, without error from earlier layers."""
    zeros = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    return ErrorMoments(
        moments.tokens, moments.output_error_covariance(layer), moments.mean, zeros, zeros[:, 0].clone(), 0.0
    )


def _replace(
    model: nn.Module,
    config: MixedRank,
    name: str,
    layer: nn.Linear,
    rank: int,
    moments: Moments,
    mismatch: ErrorMoments | None,
) -> None:
    """Replace the layer in `model` by its factors of that rank (0: a dense weight) with the corrected bias."""
    factors_or_weight = _new_weight(config, layer, rank, moments, mismatch)
    new_weight = factors_or_weight[0] @ factors_or_weight[1] if rank else factors_or_weight[0]
    change = new_weight - layer.weight.detach().double()
    bias = layer.bias
    if bias is not None and mismatch:
        bias = bias + mismatch.bias_change(change)
    elif bias is not None and config.mean_correction:
        bias = bias - change @ moments.mean
    shape = layer.in_features, layer.out_features
    if rank:
        left, right = factors_or_weight
        new = LowRankLinear(*shape, rank, bias=bias is not None).set_factors(left, right, bias)
    else:
        new = nn.Linear(*shape, bias=bias is not None)
        new.weight.data = factors_or_weight[0].float()
        if bias is not None:
            new.bias.data = bias.detach().float()
    vit.replace_module(model, name, new)


def _new_weight(
    config: MixedRank, layer: nn.Linear, rank: int, moments: Moments, mismatch: ErrorMoments | None
) -> tuple[Tensor, ...]:
    """The layer's new weight (float64), compensated as `config` says: A and B of that rank, or for rank 0 a dense weight."""
    weight = layer.weight.detach().double()
    if mismatch and config.compensation == "closed_form":
        weight = weight + mismatch.correction(config.ridge)
    if not rank:
        return (weight,)
    covariance = mismatch.covariance if mismatch else _covariance(layer, moments, config)
    factors = factorise(weight, moments, covariance, config.decomposition, config.gradient_weight)
    if mismatch and config.compensation == "gradient":
        return fit_compact_residual(
            weight, *factors.truncate(rank), mismatch, config.residual_rank, config.residual_steps, config.ridge
        )
    return factors.truncate(rank)
