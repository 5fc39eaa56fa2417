"""Static int8: weights and activations in 8 bits, the activations' ranges fixed on calibration images.

No tensor is searched for its range at run time, as dynamic int8 does, and a backend can keep to integers from layer to
layer. What a ViT adds are activations with a few large channels (after LayerNorm) and lopsided ones (after GELU): ranges
are those of least squared error, lopsided where the values are, and channels are evened out first (SmoothQuant, Xiao et
al. 2023, arXiv 2211.10438), which costs nothing since LayerNorm takes the factors.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench import blocks, compensation, progress, vit
from vitbench.batches import eval_batches
from vitbench.configs import Config
from vitbench.data import ImageData, Split
from vitbench.errors import InputError
from vitbench.layers import StaticInt8Linear
from vitbench.methods import register
from vitbench.methods.dynamic_int8 import quantize_rows
from vitbench.moments import BATCH, watching
from vitbench.vit import LINEAR_TYPES, replace_module

BINS, SHARES = 2048, 25  # of the histograms; shares of a range's ends that are tried


class StaticInt8(Config):
    """Which linear layers of the blocks to quantize, and how the ranges of their inputs are found.

    Attributes:
        range: "mse", the range whose rounding has the least squared error, or "minmax", all that was seen.
        equalise: how much of the channels' unevenness after LayerNorm goes into the weights, 0 to 1.
        compensation: fit each layer to what the quantized layers before it produce (`vitbench.compensation`).
        ridge: of the compensation, in units of the inputs' mean variance.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    range: Literal["mse", "minmax"] = "mse"
    equalise: float = Field(default=0.5, ge=0, le=1)
    compensation: bool = True
    ridge: float = Field(default=1.0, gt=0)


@register(StaticInt8, identity=StaticInt8(layers=()))
def static_int8(model: nn.Module, config: StaticInt8, data: ImageData | None) -> nn.Module:
    """Put int8 layers with fixed input ranges in the place of the dense ones."""
    vit.dense_layers(model, config.layers)
    layers = vit.linears(model, config.layers)
    if not layers:
        return model
    if data is None:
        raise InputError("static_int8 fixes ranges on calibration images and no data set was given; give one")
    split = data.needs("calibration")
    seen = _channels(model, layers, split)
    if config.equalise:
        _equalise(model, layers, seen, config.equalise)
    ranges = _ranges(model, layers, seen, split, config.range)
    if config.compensation:
        work = compensation.mismatches(model, copy.deepcopy(model), list(layers), split)
    else:
        work = ((name, None) for name in layers)
    for name, mismatch in progress.bar(work, "quantizing", total=len(layers), unit="layer"):
        weight, bias = layers[name].weight.detach(), layers[name].bias
        wanted = weight if mismatch is None else (weight + mismatch.correction(config.ridge)).float()
        low, high = ranges[name]
        step = (high - low) / 255
        new = StaticInt8Linear(
            layers[name].in_features, layers[name].out_features, bias is not None, step, round(-low / step)
        )
        new.weight, new.scale = quantize_rows(wanted)
        if bias is not None:
            new.bias = bias.detach().clone()
            if mismatch is not None:
                new.bias += mismatch.bias((new.dense() - weight).double()).float()
        replace_module(model, name, new)
    return model


@dataclass
class Channels:
    """The least and the largest value of each of a layer's inputs, (in,)."""

    low: Tensor
    high: Tensor


@torch.inference_mode()
def _channels(model: nn.Module, layers: Mapping[str, nn.Linear], split: Split) -> dict[str, Channels]:
    found: dict[str, Channels] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        low, high = x.flatten(0, -2).aminmax(dim=0)
        if name in found:
            low, high = torch.minimum(low, found[name].low), torch.maximum(high, found[name].high)
        found[name] = Channels(low, high)

    _pass(model, layers, split, see, "ranges of inputs")
    return found


@torch.no_grad()
def _equalise(model: nn.Module, layers: Mapping[str, nn.Linear], seen: Mapping[str, Channels], power: float) -> None:
    """Divide what LayerNorm gives channel j by s_j = max|x_j|^p / max|W_.j|^(1-p), and multiply W_.j by it, in place."""
    for name, norm in blocks.norms_before(model).items():
        if name not in layers or norm.weight is None:
            continue
        layer, found = layers[name], seen[name]
        largest = torch.maximum(found.low.abs(), found.high.abs()).clamp(min=1e-5)
        s = largest**power / layer.weight.abs().amax(dim=0).clamp(min=1e-5) ** (1 - power)
        s = s / s.log().mean().exp()
        norm.weight.div_(s)
        if norm.bias is not None:
            norm.bias.div_(s)
        layer.weight.mul_(s)
        found.low, found.high = found.low / s, found.high / s


def _ranges(
    model: nn.Module, layers: Mapping[str, nn.Linear], seen: Mapping[str, Channels], split: Split, rule: str
) -> dict[str, tuple[float, float]]:
    """The range of each layer's inputs that the 256 codes cover; 0 is always in it."""
    whole = {name: (min(0.0, float(c.low.min())), max(1e-6, float(c.high.max()))) for name, c in seen.items()}
    if rule == "minmax":
        return whole
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in layers}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        counts[name] += torch.histc(x.float(), BINS, *whole[name]).double()

    _pass(model, layers, split, see, "histograms of inputs")
    return {name: least_error_range(counts[name], *whole[name]) for name in layers}


def least_error_range(counts: Tensor, low: float, high: float) -> tuple[float, float]:
    """The part of [low, high], which holds 0, whose 256 values round a histogram with the least squared error.

    Args:
        counts: of equal bins over [low, high].
    """
    width = (high - low) / len(counts)
    values = low + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5)
    shares = torch.linspace(0.1, 1, SHARES, dtype=torch.float64)
    lows, highs = (end.flatten()[:, None] for end in torch.meshgrid(low * shares, high * shares, indexing="ij"))
    steps = (highs - lows) / 255
    zeros = (-lows / steps).round()
    rounded = ((values / steps).round().clamp(-zeros, 255 - zeros)) * steps
    best = int(((rounded - values).square() * counts).sum(1).argmin())
    return float(lows[best]), float(highs[best])


@torch.inference_mode()
def _pass(model: nn.Module, layers: Mapping[str, nn.Module], split: Split, see, title: str) -> None:
    batches = eval_batches(split, model.recipe.preprocess, BATCH)
    with watching(dict(layers), see):
        for x, _ in progress.bar(batches, title, total=-(-len(split) // BATCH), unit="batch"):
            model(x)
