"""Static int8: weights and activations in 8 bits, with activation ranges fixed on calibration images.

Unlike dynamic int8, no range is computed at run time, so a backend can stay in integers from layer to layer. A ViT has
activations with a few large channels (after LayerNorm) and asymmetric ones (after GELU). So ranges have the least squared
error, may be asymmetric, and channels are smoothed first (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438). Smoothing has no
cost at run time, since LayerNorm absorbs the factors. The inputs of attention's two products can be coded too: queries, keys
and values symmetrically about 0, for which integer kernels need no zero point, and attention probabilities.
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
    """The parts of the blocks to quantize, and how activation ranges are found.

    Attributes:
        range: "mse", the range of least squared rounding error, or "minmax", the range of all calibration values.
        equalise: the smoothing strength after LayerNorm, from 0 (none) to 1 (channels get equal ranges).
        compensation: fit each layer to the inputs that the quantized earlier layers produce
            (`vitbench.calibration.compensation`).
        ridge: the ridge penalty of the compensation, in units of the inputs' mean variance.
        attention: also round queries, keys, values and attention probabilities, so that all matrix products of a block have
            integer inputs. Supports standard attention only.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    range: Literal["mse", "minmax"] = "mse"
    equalise: float = Field(default=0.5, ge=0, le=1)
    compensation: bool = True
    ridge: float = Field(default=1.0, gt=0)
    attention: bool = False


@register(StaticInt8, identity=StaticInt8(layers=()))
def static_int8(model: nn.Module, config: StaticInt8, data: ImageData | None) -> nn.Module:
    """Replace the dense linear layers by int8 layers with fixed input ranges."""
    vit.dense_layers_by_type(model, config.layers)
    layers = vit.linear_layers(model, config.layers)
    if not layers:
        return model
    if data is None:
        raise InputError("static_int8 fixes ranges on calibration images and no data set was given; give one")
    split = data.require_split("calibration")
    quantizer_names = blocks.make_attention_quantizable(model) if config.attention else {}
    channel_ranges = quantizers.channel_ranges(model, layers, split)
    if config.equalise:
        _smooth_channels(model, layers, channel_ranges, config.equalise)
    input_ranges = quantizers.input_ranges(model, layers, channel_ranges, split, config.range)
    original = copy.deepcopy(model) if config.compensation else None
    if quantizer_names:
        _round_attention(model, quantizer_names, split, config.range)
    if config.compensation:
        layer_errors = compensation.layer_error_moments(model, original, list(layers), split)
    else:
        layer_errors = ((name, None) for name in layers)
    for name, mismatch in progress.progress_bar(layer_errors, "quantizing", total=len(layers), unit="layer"):
        weight, bias = layers[name].weight.detach(), layers[name].bias
        target_weight = weight if mismatch is None else (weight + mismatch.correction(config.ridge)).float()
        low, high = input_ranges[name]
        step = (high - low) / 255
        new = StaticInt8Linear(
            layers[name].in_features, layers[name].out_features, bias is not None, step, round(-low / step)
        )
        new.weight, new.scale = quantize_rows(target_weight)
        if bias is not None:
            new.bias = bias.detach().clone()
            if mismatch is not None:
                new.bias += mismatch.bias_change((new.dense() - weight).double()).float()
        replace_module(model, name, new)
    return model


def _round_attention(
    model: nn.Module, quantizer_names: Mapping[str, list[str]], split: Split, rule: Literal["mse", "minmax"]
) -> None:
    """Insert quantizers into every block's attention, in place."""
    modules = {name: model.get_submodule(name) for names in quantizer_names.values() for name in names}
    channel_ranges = quantizers.channel_ranges(model, modules, split)
    ranges_by_name = quantizers.input_ranges(model, modules, channel_ranges, split, rule)
    for name, (low, high) in ranges_by_name.items():
        is_symmetric = name not in quantizer_names["softmax"]
        step, zero = (max(-low, high) / 127, 128) if is_symmetric else (high / 255, 0)
        replace_module(model, name, StaticInt8Rounding(step, zero))


@torch.no_grad()
def _smooth_channels(
    model: nn.Module, layers: Mapping[str, nn.Linear], channel_ranges: Mapping[str, ChannelRanges], power: float
) -> None:
    """Divide LayerNorm's output channel j by s_j = max|x_j|^p / max|W_.j|^(1-p), and multiply W_.j by it, in place."""
    norms = {name: norm for name, norm in blocks.preceding_norms(model).items() if name in layers}
    without_norm = [name for name in layers if vit.layer_type(name) in ("qkv", "fc1") and name not in norms]
    if without_norm:
        warnings.warn(
            f"the inputs of {', '.join(without_norm[:3])}{' and others' if len(without_norm) > 3 else ''} do not come from a "
            f"LayerNorm that can absorb factors, so their channels are not smoothed ({len(without_norm)} of {len(layers)} layers)",
            stacklevel=2,
        )
    for name, norm in norms.items():
        layer, channel_range = layers[name], channel_ranges[name]
        largest = torch.maximum(channel_range.low.abs(), channel_range.high.abs()).clamp(min=1e-5)
        factors = largest**power / layer.weight.abs().amax(dim=0).clamp(min=1e-5) ** (1 - power)
        factors = factors / factors.log().mean().exp()
        norm.weight.div_(factors)
        if norm.bias is not None:
            norm.bias.div_(factors)
        layer.weight.mul_(factors)
        channel_range.low, channel_range.high = channel_range.low / factors, channel_range.high / factors
