"""Linear layers as two thin ones, and linear layers in parts whose outputs stand side by side.

Both are made of ordinary `nn.Linear` modules, so a quantizer finds those and a backend sees nothing new.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.layers.registry import matrix, runtime_layer


@runtime_layer
class LowRankLinear(nn.Module):
    """y = A (B x) + b with A (out x rank) in `up` and B (rank x in) in `down`; W = A B is never built.

    rank (in + out) weights, and as many multiply-accumulates a token; fewer than the dense layer's below the rank
    in out / (in + out). Shapes: x (..., in_features) -> (..., out_features).
    """

    portable = True

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.up.bias is not None,
        }

    def fill(self, left: Tensor, right: Tensor, bias: Tensor | None) -> "LowRankLinear":
        """Take A (out, rank), B (rank, in) and the bias, of any floating-point type."""
        self.up.weight.data, self.down.weight.data = left.float().contiguous(), right.float().contiguous()
        if bias is not None:
            self.up.bias.data = bias.detach().float().clone()
        return self

    def dense(self) -> Tensor:
        """W = A B (out, in), float32."""
        return matrix(self.up) @ matrix(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@runtime_layer
class SplitLinear(nn.Module):
    """A linear layer cut by its outputs: y = [W_1 x + b_1, W_2 x + b_2, ...]; each part can be compressed by itself.

    Shapes: x (..., in_features) -> (..., sum of `sizes`).
    """

    portable = True

    def __init__(self, in_features: int, sizes: Sequence[int], bias: bool = True):
        super().__init__()
        self.in_features, self.sizes, self.bias = in_features, tuple(sizes), bias
        self.out_features = sum(sizes)
        self.parts = nn.ModuleList(nn.Linear(in_features, size, bias=bias) for size in sizes)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"in_features": self.in_features, "sizes": list(self.sizes), "bias": self.bias}

    def fill(self, linear: nn.Linear) -> "SplitLinear":
        """Take the rows and biases of a dense layer."""
        start = 0
        for part in self.parts:
            rows = slice(start, start + part.out_features)
            part.weight.data = linear.weight.detach()[rows].clone()
            if linear.bias is not None:
                part.bias.data = linear.bias.detach()[rows].clone()
            start = rows.stop
        return self

    def dense(self) -> Tensor:
        """W (out, in), float32."""
        return torch.cat([matrix(part) for part in self.parts])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)
