"""Layers of a model whose norms were folded into the layers after them (`vitbench.calibration.rotation`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.model.layers.registry import runtime_layer


@runtime_layer
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight + bias over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).

    Of tokens whose channels have mean 0 it makes what LayerNorm makes, and it commutes with rotations of the channels, up to
    weight and bias. Those start at 1 and 0, and are free for what a quantizer leaves them (`reparameterise`).
    Its inputs are quantized if `input` is a `Rounded`. Shapes: x (..., size) -> the same; weight and bias (size,).
    """

    exportable = True

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.eps, self.input = eps, nn.Identity()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"size": self.weight.numel(), "eps": self.eps}

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        with torch.autocast(x.device.type, enabled=False):  # as LayerNorm: squares of bf16 values would lose digits
            return (F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps) + self.bias).to(x.dtype)


@runtime_layer
class BiasedLinear(nn.Linear):
    """A dense linear layer with a bias, where the architecture has a layer without one.

    The bias of a norm goes there. Shapes: x (..., in_features) -> (..., out_features).
    """

    exportable = True

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "BiasedLinear":
        """Make a layer with the weight of `linear`, shared, and a bias of zeros."""
        new = cls(linear.in_features, linear.out_features)
        new.weight = linear.weight
        nn.init.zeros_(new.bias)
        return new.requires_grad_(linear.weight.requires_grad)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features}
