"""Dynamic int8 quantization: weights in 8 bits ahead of time, activations in 8 bits with ranges taken at each call.

The survey (Chen et al. 2024, arXiv 2404.10407) applies PyTorch's `quantize_dynamic` to every linear layer. Here it is applied
to the four linear layers of each block, with one step for each output row of the weights:

    s_i = max_j |W_ij| / 127,    Q_ij = round(W_ij / s_i),    y = s_i s_x (Q_i . (q_x - z_x)) + b_i

where (s_x, z_x) come from the range of x at each call. No calibration images are needed.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model.layers import DynamicInt8Linear
from vitbench.model.vit import LINEAR_TYPES, linear_layers, replace_module


class DynamicInt8(Config):
    """Which linear layers of the blocks to quantize, and whether each output row of the weights has its own step.

    With `per_channel` False all rows share the step of the largest weight, to show what that costs in accuracy.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    per_channel: bool = True


def quantize_rows(weight: Tensor, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes and steps of a weight matrix.

    Args:
        weight: (out, in), floating point.
        per_channel: one step for each row; if False, all rows share the largest step.

    Returns:
        codes int8 (out, in) in [-127, 127] and steps float32 (out,), with weight ~ steps[:, None] * codes.
        An all-zero row gets step 1.
    """
    largest = weight.abs().amax(dim=1) if per_channel else weight.abs().max().expand(len(weight))
    steps = torch.where(largest > 0, largest / 127, torch.ones_like(largest)).float()
    codes = torch.round(weight / steps[:, None]).clamp(-127, 127).to(torch.int8)
    return codes, steps.contiguous()


def to_dynamic_int8(linear: nn.Linear, per_channel: bool = True) -> DynamicInt8Linear:
    """The int8 runtime layer of a dense linear layer."""
    layer = DynamicInt8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.weight, layer.scale = quantize_rows(linear.weight.detach(), per_channel)
    if linear.bias is not None:
        layer.bias = linear.bias.detach().float().clone()
    return layer


@register(DynamicInt8, identity=DynamicInt8(layers=()))
def dynamic_int8(model: nn.Module, config: DynamicInt8, data: ImageData | None) -> nn.Module:
    """Replace the dense linear layers by int8 layers. `data` is not used."""
    for name, linear in linear_layers(model, config.layers).items():
        replace_module(model, name, to_dynamic_int8(linear, config.per_channel))
    return model
