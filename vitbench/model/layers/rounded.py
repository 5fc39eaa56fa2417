"""Fake quantization of activations to low-bit codes: integer arithmetic is simulated in floating point."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.model.layers.registry import runtime_layer


def fake_quantize(x: Tensor, step: Tensor | float, zero: Tensor | float, bits: int) -> Tensor:
    """s (q - z) with q = round(x / s) + z, clamped to [0, 2^bits - 1]; step and zero are broadcast to x (..., channels)."""
    codes = x / step
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # exporters do not know every operation in place
        return (codes.round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(step)
    # in place: several times faster on a CPU, where each new tensor of this size costs page faults
    return codes.round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(step)


@runtime_layer
class Rounded(nn.Module):
    """`fake_quantize` with one step and zero point for the whole tensor, or one of each for each channel.

    Shapes: x (..., channels) -> the same; step and zero () or (channels,).
    """

    exportable = True
    quantizes_inputs = True
    divisors = ("step",)
    param_count = 0
    step: Tensor
    zero: Tensor

    def __init__(self, bits: int, channels: int | None = None):
        super().__init__()
        self.bits, self.channels = bits, channels
        shape = () if channels is None else (channels,)
        self.register_buffer("step", torch.ones(shape))
        self.register_buffer("zero", torch.zeros(shape))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"bits": self.bits, "channels": self.channels}

    def set_range(self, low: Tensor | float, high: Tensor | float) -> "Rounded":
        """Set the step and zero point whose codes span [low, high], which holds 0; in place."""
        low, high = torch.as_tensor(low, dtype=torch.float32), torch.as_tensor(high, dtype=torch.float32)
        self.step = ((high - low) / (2**self.bits - 1)).clamp(min=1e-8).reshape(self.step.shape).clone()
        self.zero = (-low.reshape(self.step.shape) / self.step).round()
        return self

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value that codes stand for, like `step`."""
        return -self.zero * self.step, (2**self.bits - 1 - self.zero) * self.step

    def fit_range(self, counts: Tensor, low: Tensor, high: Tensor) -> "Rounded":
        """Set each channel's range to the part of [low, high] with the least squared error, in place.

        Args:
            counts: histograms of equal bins over [low, high], (channels, bins).
            low, high: (channels,); 0 may lie outside.
        """
        values = low[:, None] + (high - low)[:, None] * (torch.arange(counts.shape[1]) + 0.5) / counts.shape[1]
        mean, min_error = (values * counts).sum(1) / counts.sum(1), torch.full_like(low, float("inf"))
        best_range = low, high
        for below, above in itertools.product(torch.linspace(0.1, 1, 10).tolist(), repeat=2):
            candidate = mean + below * (low - mean), mean + above * (high - mean)
            error = ((self.set_range(*candidate)(values.T).T - values).square() * counts).sum(1)
            best_range = tuple(torch.where(error < min_error, new, old) for new, old in zip(candidate, best_range))
            min_error = torch.minimum(error, min_error)
        return self.set_range(*best_range)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.step, self.zero, self.bits)


@runtime_layer
class Log2Rounded(nn.Module):
    """Attention probabilities p in [0, 1] as powers: p ~ s base^-q, q = round(-log_base(p / s)), clamped to [0, 2^bits - 1].

    The last code stands for 0, because the sum of many rounded-up small probabilities would be large. Base 2 is FQ-ViT's
    (Lin et al. 2022, arXiv 2111.13824), where a product with a power is a shift. Base sqrt(2), with a scale s for the
    tensor, is RepQ-ViT's (Li et al. 2023, arXiv 2212.08254).
    Shapes: any -> the same; scale ().
    """

    exportable = True
    quantizes_inputs = True
    divisors = ("scale",)
    param_count = 0
    scale: Tensor

    def __init__(self, bits: int, base: float = 2.0):
        super().__init__()
        self.bits, self.base = bits, base
        self.register_buffer("scale", torch.ones(()))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"bits": self.bits, "base": self.base}

    def fit_scale(self, counts: Tensor, octaves: int) -> "Log2Rounded":
        """Set the scale with the least squared error for a histogram of -log2(p), of equal bins over [0, octaves]; in place."""
        values = torch.exp2(-(torch.arange(len(counts)) + 0.5) * octaves / len(counts))
        min_error = float("inf")
        for scale in torch.linspace(0, -8, 65).exp2():
            candidate = Log2Rounded(self.bits, self.base)
            candidate.scale = scale
            error = float(((candidate(values) - values).square() * counts).sum())
            if error < min_error:
                min_error, self.scale = error, scale.clone()
        return self

    def forward(self, p: Tensor) -> Tensor:
        octaves, max_code = math.log2(self.base), 2**self.bits - 1
        q = (p / self.scale).log2().div(-octaves).round().clamp(0, max_code)
        return torch.pow(2.0, -octaves * q) * self.scale * (q < max_code)  # OpenVINO has no exp2


@runtime_layer
class RoundedNorm(nn.LayerNorm):
    """LayerNorm over the last axis whose inputs are quantized if `input` is a `Rounded`.

    FQ-ViT's power-of-two factors are such a `Rounded`: channel c has the step 2^a_c s, and all have the same zero point.
    """

    exportable = True

    def __init__(self, size: int, eps: float = 1e-6, affine: bool = True, bias: bool = True):
        super().__init__(size, eps=eps, elementwise_affine=affine, bias=bias)
        self.input = nn.Identity()

    @classmethod
    def from_norm(cls, norm: nn.LayerNorm) -> "RoundedNorm":
        """Make a layer with the weight and bias of `norm`, shared."""
        new = cls(norm.normalized_shape[0], norm.eps, norm.weight is not None, norm.bias is not None)
        new.weight, new.bias = norm.weight, norm.bias
        return new

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        affine, bias = self.weight is not None, self.bias is not None
        return {"size": self.normalized_shape[0], "eps": self.eps, "affine": affine, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.input(x))
