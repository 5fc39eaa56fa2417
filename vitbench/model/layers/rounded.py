"""Activations as codes of a few bits, written out in floating point: integer arithmetic is simulated here, not run."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.model.layers.registry import runtime_layer


def rounded(x: Tensor, step: Tensor | float, zero: Tensor | float, bits: int) -> Tensor:
    """s (q - z) with q = round(x / s) + z, cut to [0, 2^bits - 1]; step and zero are broadcast to x (..., channels)."""
    return ((x / step).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(step)


@runtime_layer
class Rounded(nn.Module):
    """`rounded` with a step and a zero point for the whole tensor, or for each channel.

    Shapes: x (..., channels) -> the same; step and zero () or (channels,).
    """

    portable = True
    rounds_inputs = True
    divisors = ("step",)
    param_count = 0

    def __init__(self, bits: int, channels: int | None = None):
        super().__init__()
        self.bits, self.channels = bits, channels
        shape = () if channels is None else (channels,)
        self.register_buffer("step", torch.ones(shape))
        self.register_buffer("zero", torch.zeros(shape))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"bits": self.bits, "channels": self.channels}

    def over(self, low: Tensor | float, high: Tensor | float) -> "Rounded":
        """Take the step and zero point whose codes span [low, high], which holds 0."""
        low, high = torch.as_tensor(low, dtype=torch.float32), torch.as_tensor(high, dtype=torch.float32)
        self.step = ((high - low) / (2**self.bits - 1)).clamp(min=1e-8).reshape(self.step.shape).clone()
        self.zero = (-low.reshape(self.step.shape) / self.step).round()
        return self

    def fit(self, counts: Tensor, low: Tensor, high: Tensor) -> "Rounded":
        """Take each channel's part of [low, high] with the least squared error for histograms of equal bins over it.

        Args:
            counts: (channels, bins).
            low, high: (channels,); 0 may lie outside.
        """
        values = low[:, None] + (high - low)[:, None] * (torch.arange(counts.shape[1]) + 0.5) / counts.shape[1]
        mean, least = (values * counts).sum(1) / counts.sum(1), torch.full_like(low, float("inf"))
        best = low, high
        for below, above in itertools.product(torch.linspace(0.1, 1, 10).tolist(), repeat=2):
            span = mean + below * (low - mean), mean + above * (high - mean)
            lost = ((self.over(*span)(values.T).T - values).square() * counts).sum(1)
            best = tuple(torch.where(lost < least, new, old) for new, old in zip(span, best))
            least = torch.minimum(lost, least)
        return self.over(*best)

    def forward(self, x: Tensor) -> Tensor:
        return rounded(x, self.step, self.zero, self.bits)


@runtime_layer
class Log2Rounded(nn.Module):
    """Shares in [0, 1], such as softmax's, as powers: p ~ s base^-q with q = round(-log_base(p / s)), cut to [0, 2^bits - 1].

    The last code stands for 0, so that the many shares too small for a power do not add up to something. Base 2 is FQ-ViT's
    (Lin et al. 2022, arXiv 2111.13824), where a product with a power is a shift; base sqrt(2), with a scale s for the
    tensor, is RepQ-ViT's (Li et al. 2023, arXiv 2212.08254).
    Shapes: any -> the same; scale ().
    """

    portable = True
    rounds_inputs = True
    divisors = ("scale",)
    param_count = 0

    def __init__(self, bits: int, base: float = 2.0):
        super().__init__()
        self.bits, self.base = bits, base
        self.register_buffer("scale", torch.ones(()))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"bits": self.bits, "base": self.base}

    def fit(self, counts: Tensor, octaves: int) -> "Log2Rounded":
        """Take the scale of least squared error for a histogram of -log2(p), of equal bins over [0, octaves]."""
        values = torch.exp2(-(torch.arange(len(counts)) + 0.5) * octaves / len(counts))
        least = float("inf")
        for scale in torch.linspace(0, -8, 65).exp2():
            tried = Log2Rounded(self.bits, self.base)
            tried.scale = scale
            lost = float(((tried(values) - values).square() * counts).sum())
            if lost < least:
                least, self.scale = lost, scale.clone()
        return self

    def forward(self, p: Tensor) -> Tensor:
        octaves, most = math.log2(self.base), 2**self.bits - 1
        q = (p / self.scale).log2().div(-octaves).round().clamp(0, most)
        return torch.pow(2.0, -octaves * q) * self.scale * (q < most)  # OpenVINO knows no exp2


@runtime_layer
class RoundedNorm(nn.LayerNorm):
    """LayerNorm over the last axis, with a `Rounded` in the place of `input` where its inputs are to be rounded.

    FQ-ViT's power-of-two factors are such a `Rounded`: channel c has the step 2^a_c s and all the same zero point.
    """

    portable = True

    def __init__(self, size: int, eps: float = 1e-6, affine: bool = True, bias: bool = True):
        super().__init__(size, eps=eps, elementwise_affine=affine, bias=bias)
        self.input = nn.Identity()

    @classmethod
    def like(cls, norm: nn.LayerNorm) -> "RoundedNorm":
        """The same with the given layer's weight and bias, shared."""
        new = cls(norm.normalized_shape[0], norm.eps, norm.weight is not None, norm.bias is not None)
        new.weight, new.bias = norm.weight, norm.bias
        return new

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        affine, bias = self.weight is not None, self.bias is not None
        return {"size": self.normalized_shape[0], "eps": self.eps, "affine": affine, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.input(x))
