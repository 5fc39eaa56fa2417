"""Weight-only quantization: codes of a few bits, a step for each output row or each group of its weights.

    W_ij ~ s_ig q_ij,    q_ij in [-2^(b-1), 2^(b-1) - 1]

and x in floating point. The codes are the nearest ones, with the steps that round with the least squared error, or those
that keep the layers' outputs on calibration images (`vitbench.second_order`), each layer fitted to the inputs that the
rounded layers before it produce (`vitbench.compensation`). Both can be trained together with their steps (LSQ, Esser et
al. 2020) under cross-entropy and distillation. It is also what a factorisation has to beat at the same number of bytes.
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench import compensation, progress
from vitbench.coded import CodedModel, Coding, RowCoder, ends, train_codes
from vitbench.data import ImageData
from vitbench.errors import InputError
from vitbench.methods import register
from vitbench.second_order import second_order
from vitbench.training import TrainConfig
from vitbench.tuning import find_teacher
from vitbench.vit import LINEAR_TYPES, dense_layers


class WeightOnly(Coding):
    """Which linear layers of the blocks to code and how; by default nothing is trained.

    Attributes:
        bits: of a code.
        group: inputs that share a step, which takes 16 bits for each group; None: a step for each output row.
        rounding: "nearest", or "second_order", which needs calibration images.
        damping: of the second order, on the covariance's diagonal, in units of its mean.
        ridge: of the correction for what the layers before have lost, in the same units.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    bits: int = Field(default=4, ge=2, le=8)
    group: int | None = Field(default=None, ge=2)
    rounding: Literal["nearest", "second_order"] = "nearest"
    damping: float = Field(default=0.01, gt=0)
    ridge: float = Field(default=1.0, gt=0)
    train: TrainConfig = TrainConfig(epochs=0, lr=2e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


@register(WeightOnly, identity=WeightOnly(layers=(), ends_bits=None, rest="float32"))
def weight_only(model: nn.Module, config: WeightOnly, data: ImageData | None) -> nn.Module:
    """Round the blocks' linear layers to packed codes of a few bits, and train them if asked to."""
    layers = {name: layer for found in dense_layers(model, config.layers).values() for name, layer in found.items()}
    _check_group(layers, config.group)
    teacher = find_teacher(model, config, data)
    steps = _fit(model, layers, config, data) if config.rounding == "second_order" else {}
    coders = [RowCoder(name, layer, config.bits, config.group, steps.get(name)) for name, layer in layers.items()]
    coders += ends(model, config.ends_bits)
    if not coders:
        return model
    small, small.history = train_codes(CodedModel(model, coders), config, data, teacher)
    return small


def _check_group(layers: Mapping[str, nn.Linear], group: int | None) -> None:
    for name, layer in layers.items():
        if group and layer.in_features % group:
            known = [size for size in (16, 32, 64, 128) if not any(one.in_features % size for one in layers.values())]
            raise InputError(
                f"group = {group} does not divide the {layer.in_features} inputs of {name}; take one that divides the inputs "
                f"of every layer{f', such as {known}' if known else ''}, or none for a step for each row"
            )


def _fit(
    model: nn.Module, layers: Mapping[str, nn.Linear], config: WeightOnly, data: ImageData | None
) -> dict[str, Tensor]:
    """Round the layers in place, first to last, so that they answer as in the model given. Returns their steps."""
    if data is None:
        raise InputError(
            "rounding=second_order needs calibration images and no data set was given; give one, or nearest"
        )
    steps, given = {}, copy.deepcopy(model)
    found = compensation.mismatches(model, given, list(layers), data.needs("calibration"))
    for name, mismatch in progress.bar(found, "rounding", total=len(layers), unit="layer"):
        layer = layers[name]
        weight = layer.weight.detach().double()
        wanted = weight + mismatch.correction(config.ridge)
        codes, step = second_order(
            wanted, mismatch.covariance, config.bits, config.group or layer.in_features, config.damping
        )
        rounded = codes * step.repeat_interleave(config.group or layer.in_features, 1)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
        layer.bias.data += mismatch.bias(rounded - weight).float()
        layer.weight.data, steps[name] = rounded, step
    return steps
