"""Mixed rank: activation-aware low-rank layers, ranks by greedy allocation, and layer-wise error compensation.

Azizi, Nazemi and Pedram (2024, arXiv 2402.06004) state three stages; no code of theirs is public, so the formulas are
ours:

1. W ~ A B with the least error of the outputs on calibration images (`vitbench.calibration.factors`), the mean of what is lost
   going into the bias: b' = b + (W - A B) mean(x).
2. Ranks by greedy allocation (`vitbench.calibration.allocation`). Losses of different layers are compared by the second order of the
   model's loss, tr(Gamma dW C dW^T) ~ mean(diag Gamma) E||dW x||^2 with Gamma the second moments of the loss's gradient.
3. Compensation (`vitbench.calibration.compensation`), layer by layer on the inputs that the compressed layers before produce.

All three are free of training. A short distillation may follow (`train`); it is another setting, never the same number.
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
from vitbench.calibration.allocation import LayerErrors, greedy_ranks, uniform_ranks
from vitbench.calibration.compensation import ErrorMoments, fit_compact_residual, layer_error_moments
from vitbench.calibration.factors import factorise
from vitbench.calibration.moments import Moments
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.layers import LowRankLinear
from vitbench.model.vit import LINEAR_TYPES
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tune

TOKENS_PER_INPUT = 10  # calibration tokens for each input feature below which a covariance is called unstable


class MixedRank(FineTuneConfig):
    """Settings of mixed rank.

    Attributes:
        layers: which types of linear layers may be factored.
        keep: the share of the budget that is left, in (0, 1].
        budget: what `keep` is a share of: the weights of those layers, the model's multiply-accumulates for one image,
            or the bytes of the model's tensors.
        decomposition: "activation" (stage 1), or the rivals svd, asvd and svd_llm.
        gradient_weight: how much the gradient's moments decide which errors of a layer's outputs count, see
            `low_rank.factorise`; 0 counts all alike, as the paper does.
        allocation: "greedy" (stage 2), or the same share of each layer ("uniform").
        scale: how greedy compares layers: by "sensitivity" to the loss, by their plain "error", or by "energy", the
            error as a share of the layer's outputs.
        rank_step: ranks are multiples of it.
        split_qkv: cut q, k and v of every head apart, so that each gets a rank of its own.
        mean_correction: put the mean of what is lost into the bias; covariances are then about the mean, but for layers
            without a bias.
        compensation: stage 3: "closed_form" (least squares, dense layers too), "gradient" (Adam on a compact residual
            of the factors, as the paper has it), or "none".
        propagate: compensate on the inputs that the compressed layers produce; False shows what is lost without.
        ridge: of the compensation, in units of the inputs' mean variance.
        residual_rank, residual_steps: the compact residual's rank, which is part of the layer's, and Adam's steps.
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
    split_qkv: bool = False
    mean_correction: bool = True
    compensation: Literal["closed_form", "gradient", "none"] = "closed_form"
    propagate: bool = True
    ridge: float = Field(default=3.0, ge=0)
    residual_rank: int = Field(default=8, ge=1)
    residual_steps: int = Field(default=200, ge=1)
    train: TrainConfig = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


def _keeps(model: nn.Module) -> list[dict[str, float]]:
    """Down to the share at which every layer has the least rank."""
    layers, step = vit.linear_layers(model).values(), MixedRank().rank_step
    least = step * sum(layer.in_features + layer.out_features for layer in layers)
    least /= sum(layer.in_features * layer.out_features for layer in layers)
    return [{"keep": n / 50} for n in range(50, 0, -1) if n / 50 >= least]


@register(MixedRank, identity=MixedRank(keep=1.0), operating_points=_keeps)
def mixed_rank(model: nn.Module, config: MixedRank, data: ImageData | None) -> nn.Module:
    """Factor linear layers at ranks that suit them, compensate the error, and train on if asked to."""
    vit.dense_layers_by_type(model, config.layers)
    if config.keep == 1 or not config.layers:
        return model
    if data is None:
        raise InputError("mixed_rank needs calibration images and no data set was given; give one")
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    found = _moments(model, config, data)
    layers = vit.linear_layers(model, config.layers)
    ranks = _ranks(model, config, layers, found)
    names = [name for name in layers if name in ranks or config.compensation == "closed_form"]
    work: Iterable[tuple[str, ErrorMoments | None]]
    if config.compensation == "none":
        work = ((name, None) for name in names)
    elif config.propagate:
        work = layer_error_moments(model, copy.deepcopy(model), names, data.calibration)
    else:
        work = ((name, _no_mismatch(layers[name], found[name])) for name in names)
    for name, mismatch in progress.progress_bar(work, "factoring", total=len(names), unit="layer"):
        _replace(model, config, name, layers[name], ranks.get(name, 0), found[name], mismatch)
    small = model.requires_grad_(bool(config.train.epochs))
    fine_tune(small, config, data, teacher, title="distilling")
    return small.cpu()


def _moments(model: nn.Module, config: MixedRank, data: ImageData) -> dict[str, Moments]:
    """The moments of all layers, those of a split layer's parts included; splits the layers in `model`."""
    needs_gradients = config.gradient_weight > 0 or (config.allocation == "greedy" and config.scale == "sensitivity")
    layers = vit.linear_layers(model, config.layers)
    found = moments_module.collect_moments(model, layers, data, gradients=needs_gradients)
    widest = max(found, key=lambda name: len(found[name].mean))
    size, tokens = len(found[widest].mean), found[widest].tokens
    if tokens < TOKENS_PER_INPUT * size:
        images = len(data.calibration)
        warnings.warn(
            f"{images} calibration images give {tokens} tokens for the {size} inputs of {widest}: too few for a stable "
            f"covariance, which is drawn {100 * _shrinkage(found[widest]):.0f} % towards a multiple of the identity; "
            f"{-(-TOKENS_PER_INPUT * size * images // tokens)} images would do without",
            stacklevel=2,
        )
    if config.split_qkv and "qkv" in config.layers:
        for name, rows in blocks.split_qkv_by_head(model).items():
            whole = found[name.rpartition(".parts.")[0]]
            gradient = whole.gradient[rows, rows] if needs_gradients else whole.gradient
            found[name] = dataclasses.replace(whole, gradient=gradient)
    return found


def _shrinkage(moments: Moments) -> float:
    """How far a covariance from few tokens is drawn towards the identity: n / (n + tokens), or 0 where they are enough."""
    size = len(moments.mean)
    return size / (size + moments.tokens) if moments.tokens < TOKENS_PER_INPUT * size else 0.0


def _covariance(layer: nn.Linear, moments: Moments, config: MixedRank) -> Tensor:
    shrinkage = _shrinkage(moments)
    if not config.mean_correction:
        return moments_module.shrink_towards_identity(moments.second_moment, shrinkage)
    return moments.output_error_covariance(layer, shrinkage)


def _ranks(
    model: nn.Module, config: MixedRank, layers: dict[str, nn.Linear], found: dict[str, Moments]
) -> dict[str, int]:
    """Layer name -> rank, for the layers that do not stay dense."""
    shapes = {name: LayerErrors(tuple(layer.weight.shape), ()) for name, layer in layers.items()}
    if config.allocation == "uniform":
        if config.budget != "params":
            raise InputError(
                f"allocation=uniform keeps a share of each layer's weights; budget={config.budget} needs greedy"
            )
        return uniform_ranks(shapes, config.keep, config.rank_step)
    curves, shares = {}, _shares(model, layers) if config.budget == "macs" else {}
    for name, layer in progress.progress_bar(layers.items(), "error by rank", unit="layer"):
        moments = found[name]
        covariance = _covariance(layer, moments, config)
        lost = factorise(
            layer.weight, moments, covariance, config.decomposition, config.gradient_weight
        ).output_error_by_rank(covariance)
        scale = {"sensitivity": moments.sensitivity, "error": 1.0, "energy": 1 / max(float(lost[0]), 1e-300)}[
            config.scale
        ]
        curves[name] = LayerErrors(shapes[name].shape, tuple((scale * lost).tolist()), shares.get(name, 1.0))
    return greedy_ranks(curves, _saving(model, config, layers), config.rank_step)


def _shares(model: nn.Module, layers: Iterable[str]) -> dict[str, float]:
    """Layer name -> the part of an image's tokens that it sees; less than 1 where tokens were reduced before it."""
    tokens = vit.token_count(model)
    before, after = blocks.tokens_per_block(blocks.block_shapes(model), tokens)
    seen = {"qkv": before, "proj": before, "fc1": after, "fc2": after}
    return {name: seen[vit.layer_type(name)][int(name.split(".")[1])] / tokens for name in layers}


def _saving(model: nn.Module, config: MixedRank, layers: dict[str, nn.Linear]) -> int:
    """How many weights have to go for `keep` of the budget to be left."""
    if config.budget == "params":
        whole, each = sum(layer.weight.numel() for layer in layers.values()), 1
    elif config.budget == "macs":
        whole, each = vit.analytic_macs(model), vit.token_count(model)
    else:
        each = getattr(torch, model.recipe.storage).itemsize
        whole = sum(
            tensor.numel() * (each if tensor.is_floating_point() else tensor.element_size())
            for tensor in model.state_dict().values()
        )
    return round((1 - config.keep) * whole / each)


def _no_mismatch(layer: nn.Linear, moments: Moments) -> ErrorMoments:
    """What compensation would be given if each layer were looked at by itself: its original inputs, and no error yet."""
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
    """Put the layer's factors of that rank (0: a dense weight) into `model`, with the bias that goes with them."""
    form = _form(config, layer, rank, moments, mismatch)
    change = (form[0] @ form[1] if rank else form[0]) - layer.weight.detach().double()
    bias = layer.bias
    if bias is not None and mismatch:
        bias = bias + mismatch.bias_change(change)
    elif bias is not None and config.mean_correction:
        bias = bias - change @ moments.mean
    shape = layer.in_features, layer.out_features
    if rank:
        left, right = form
        new = LowRankLinear(*shape, rank, bias=bias is not None).set_factors(left, right, bias)
    else:
        new = nn.Linear(*shape, bias=bias is not None)
        new.weight.data = form[0].float()
        if bias is not None:
            new.bias.data = bias.detach().float()
    vit.replace_module(model, name, new)


def _form(
    config: MixedRank, layer: nn.Linear, rank: int, moments: Moments, mismatch: ErrorMoments | None
) -> tuple[Tensor, ...]:
    """The layer's new weight (float64): A and B of that rank, or for rank 0 the whole, compensated as `config` says."""
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
