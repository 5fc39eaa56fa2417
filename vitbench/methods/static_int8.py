"""Static int8: weights and activations in 8 bits, the activations' ranges fixed on calibration images.

No tensor is searched for its range at run time, as dynamic int8 does, and a backend can keep to integers from layer to
layer. What a ViT adds are activations with a few large channels (after LayerNorm) and lopsided ones (after GELU): ranges
are those of least squared error, lopsided where the values are, and channels are evened out first (SmoothQuant, Xiao et
al. 2023, arXiv 2211.10438), which costs nothing since LayerNorm takes the factors. Attention's two products can be made of
codes too: queries, keys and values about 0, for which integer kernels need no zero point, and softmax's shares.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from vitbench.base import progress
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.calibration import compensation, quantizers
from vitbench.calibration.quantizers import ChannelRanges
from vitbench.data.splits import ImageData, Split
from vitbench.methods.dynamic_int8 import quantize_rows
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.layers import StaticInt8Linear, StaticInt8Rounding
from vitbench.model.vit import LINEAR_TYPES, replace_module


class StaticInt8(Config):
    """What of the blocks to quantize, and how the ranges of what passes are found.

    Attributes:
        range: "mse", the range whose rounding has the least squared error, or "minmax", all that was seen.
        equalise: how much of the channels' unevenness after LayerNorm goes into the weights, 0 to 1.
        compensation: fit each layer to what the quantized layers before it produce (`vitbench.calibration.compensation`).
        ridge: of the compensation, in units of the inputs' mean variance.
        attention: round queries, keys, values and softmax's shares too, so that no matrix product of a block is left in
            floating point. Plain attention only.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    range: Literal["mse", "minmax"] = "mse"
    equalise: float = Field(default=0.5, ge=0, le=1)
    compensation: bool = True
    ridge: float = Field(default=1.0, gt=0)
    attention: bool = False


@register(StaticInt8, identity=StaticInt8(layers=()))
def static_int8(model: nn.Module, config: StaticInt8, data: ImageData | None) -> nn.Module:
    """Put int8 layers with fixed input ranges in the place of the dense ones."""
    vit.dense_layers_by_type(model, config.layers)
    layers = vit.linear_layers(model, config.layers)
    if not layers:
        return model
    if data is None:
        raise InputError("static_int8 fixes ranges on calibration images and no data set was given; give one")
    split = data.require_split("calibration")
    places = blocks.make_attention_quantizable(model) if config.attention else {}
    seen = quantizers.channel_ranges(model, layers, split)
    if config.equalise:
        _smooth_channels(model, layers, seen, config.equalise)
    found = quantizers.input_ranges(model, layers, seen, split, config.range)
    given = copy.deepcopy(model) if config.compensation else None
    if places:
        _round_attention(model, places, split, config.range)
    if config.compensation:
        work = compensation.layer_error_moments(model, given, list(layers), split)
    else:
        work = ((name, None) for name in layers)
    for name, mismatch in progress.progress_bar(work, "quantizing", total=len(layers), unit="layer"):
        weight, bias = layers[name].weight.detach(), layers[name].bias
        wanted = weight if mismatch is None else (weight + mismatch.correction(config.ridge)).float()
        low, high = found[name]
        step = (high - low) / 255
        new = StaticInt8Linear(
            layers[name].in_features, layers[name].out_features, bias is not None, step, round(-low / step)
        )
        new.weight, new.scale = quantize_rows(wanted)
        if bias is not None:
            new.bias = bias.detach().clone()
            if mismatch is not None:
                new.bias += mismatch.bias_change((new.dense() - weight).double()).float()
        replace_module(model, name, new)
    return model


def _round_attention(
    model: nn.Module, places: Mapping[str, list[str]], split: Split, rule: Literal["mse", "minmax"]
) -> None:
    """Put roundings into every block's attention, in place."""
    modules = {name: model.get_submodule(name) for names in places.values() for name in names}
    found = quantizers.input_ranges(model, modules, quantizers.channel_ranges(model, modules, split), split, rule)
    for name, (low, high) in found.items():
        about_zero = name not in places["softmax"]
        step, zero = (max(-low, high) / 127, 128) if about_zero else (high / 255, 0)
        replace_module(model, name, StaticInt8Rounding(step, zero))


@torch.no_grad()
def _smooth_channels(
    model: nn.Module, layers: Mapping[str, nn.Linear], seen: Mapping[str, ChannelRanges], power: float
) -> None:
    """Divide what LayerNorm gives channel j by s_j = max|x_j|^p / max|W_.j|^(1-p), and multiply W_.j by it, in place."""
    norms = {name: norm for name, norm in blocks.preceding_norms(model).items() if name in layers}
    alone = [name for name in layers if vit.layer_type(name) in ("qkv", "fc1") and name not in norms]
    if alone:
        warnings.warn(
            f"the inputs of {', '.join(alone[:3])}{' and others' if len(alone) > 3 else ''} do not come from a LayerNorm that "
            f"could take factors, so their channels are not evened out ({len(alone)} of {len(layers)} layers)",
            stacklevel=2,
        )
    for name, norm in norms.items():
        layer, found = layers[name], seen[name]
        largest = torch.maximum(found.low.abs(), found.high.abs()).clamp(min=1e-5)
        s = largest**power / layer.weight.abs().amax(dim=0).clamp(min=1e-5) ** (1 - power)
        s = s / s.log().mean().exp()
        norm.weight.div_(s)
        if norm.bias is not None:
            norm.bias.div_(s)
        layer.weight.mul_(s)
        found.low, found.high = found.low / s, found.high / s
