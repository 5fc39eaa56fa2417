"""Factored linear layers: two thin ones, parts side by side, and W^T ~ Z D in packed codes with one D for all blocks.

The first two are made of ordinary `nn.Linear` modules, so a quantizer finds those and a backend sees nothing new.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitbench.model.layers.packed import pack, packed_bytes, unpack
from vitbench.model.layers.registry import matrix, runtime_layer

Order = Literal["reordered", "decode_first", "cheapest"]


@runtime_layer
class SharedFactor(nn.Module):
    """The right factor D (rank x out) that all blocks share, and the quantizer of their left factors Z.

    D = step (codes - 2^(bits-1)), one step for each output; Z = latent_step (codes - latent_zero), one step and one zero
    point for each of the `rank` columns, the same in every block.
    """

    portable = ("onnxruntime", "openvino")

    def __init__(self, rank: int, out_features: int, bits: int):
        super().__init__()
        self.rank, self.out_features, self.bits = rank, out_features, bits
        self.register_buffer("codes", torch.zeros(packed_bytes(rank * out_features, bits), dtype=torch.uint8))
        self.register_buffer("step", torch.ones(out_features))
        self.register_buffer("latent_step", torch.ones(rank))
        self.register_buffer("latent_zero", torch.zeros(rank, dtype=torch.int16))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"rank": self.rank, "out_features": self.out_features, "bits": self.bits}

    @property
    def param_count(self) -> int:
        """Weights of D."""
        return self.rank * self.out_features

    def fill(self, codes: Tensor, step: Tensor, latent_step: Tensor, latent_zero: Tensor) -> "SharedFactor":
        """Take signed codes (rank, out), steps (out,), and the quantizer of Z; zero points count from the lowest code."""
        self.codes = pack(codes.detach() + 2 ** (self.bits - 1), self.bits)
        self.step = step.detach().flatten().float().clone()
        self.latent_step = latent_step.detach().flatten().float().clone()
        self.latent_zero = latent_zero.detach().flatten().to(torch.int16)
        return self

    def matrix(self) -> Tensor:
        """D (rank, out) in float32, made anew at each call."""
        codes = unpack(self.codes, self.bits, self.rank * self.out_features).view(self.rank, self.out_features)
        return codes.sub_(2 ** (self.bits - 1)).mul_(self.step)


@runtime_layer
class FactoredLinear(nn.Module):
    """y = x W^T + b with W^T ~ Z D, where Z (in x rank) is this layer's and D (rank x out) is shared.

    `order` says what is multiplied first (the matrix product is associative):
    "reordered" is (x Z) D, which never builds W; "decode_first" is x (Z D), at every call; "cheapest" takes what needs
    fewer multiply-accumulates for the tokens at hand, n rank (in + out) or in rank out + n in out.

    Shapes: x (..., in_features) -> (..., out_features).
    """

    portable = ("onnxruntime", "openvino")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bits: int,
        shared: str,
        bias: bool = True,
        order: str = "reordered",
    ):
        super().__init__()
        if order not in get_args(Order):
            raise ValueError(f"order = {order!r}; allowed: {', '.join(get_args(Order))}")
        self.in_features, self.out_features, self.rank, self.bits = in_features, out_features, rank, bits
        self.shared, self.order = shared, order
        self.register_buffer("codes", torch.zeros(packed_bytes(in_features * rank, bits), dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bits": self.bits,
            "shared": self.shared,
            "bias": self.bias is not None,
            "order": self.order,
        }

    @property
    def param_count(self) -> int:
        """Weights of Z, and biases."""
        return self.in_features * self.rank + (0 if self.bias is None else self.out_features)

    def fill(self, codes: Tensor, bias: Tensor | None) -> "FactoredLinear":
        """Take codes (in, rank) in [0, 2^bits) and the bias."""
        self.codes = pack(codes.detach(), self.bits)
        self.bias = None if bias is None else bias.detach().float().clone()
        return self

    def connect(self, shared: nn.ModuleDict) -> None:
        """Find the shared factor among the model's `shared` modules; it stays theirs and is not saved with this layer."""
        self.__dict__["_factor"] = shared[self.shared]

    def latent(self) -> Tensor:
        """Z (in, rank) in float32, made anew at each call."""
        codes = unpack(self.codes, self.bits, self.in_features * self.rank).view(self.in_features, self.rank)
        return codes.sub_(self._factor.latent_zero).mul_(self._factor.latent_step)

    def decoded(self) -> Tensor:
        """Z D = W^T (in, out)."""
        return self.latent() @ self._factor.matrix()

    def dense(self) -> Tensor:
        """W (out, in) as it is after coding, float32."""
        return self.decoded().T

    def reorders(self, tokens: int) -> bool:
        """Whether a call with so many tokens multiplies (x Z) first."""
        if self.order != "cheapest":
            return self.order == "reordered"
        n, i, o, r = tokens, self.in_features, self.out_features, self.rank
        return n * r * (i + o) <= i * r * o + n * i * o

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        if self.reorders(len(tokens)):
            left, right = tokens @ self.latent().to(x.dtype), self._factor.matrix().to(x.dtype)
        else:
            left, right = tokens, self.decoded().to(x.dtype)
        y = left @ right if self.bias is None else torch.addmm(self.bias.to(x.dtype), left, right)
        return y.view(*x.shape[:-1], self.out_features)


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """The factored layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def reordered_share(width: int, rank: int) -> float:
    """Multiply-accumulates of a block's four linear layers as (x Z) D, over those of the dense ones: 16 d r / 12 d^2.

    Below 1 for rank < 0.75 width. Holds for hidden width 4 d.
    """
    return 16 * width * rank / (12 * width**2)


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
