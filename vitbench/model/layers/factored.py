"""Factored linear layers: two thin layers, parts side by side, and W^T ~ Z D in packed codes with one D for all blocks.

The first two consist of ordinary `nn.Linear` modules, so quantizers find these and backends need no new operator.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitbench.model.layers.packed import PackedLinear, pack, packed_bytes, unpack
from vitbench.model.layers.registry import dense_weight, runtime_layer

Order = Literal["reordered", "decode_first", "cheapest"]


@runtime_layer
class SharedFactor(nn.Module):
    """The right factor D (rank x out) that all blocks share, and the quantizer of their left factors Z.

    D = step (codes - 2^(bits-1)), one step for each output; Z = latent_step (codes - latent_zero), one step and one zero
    point for each of the `rank` columns, the same in every block.
    """

    exportable = ("onnxruntime", "openvino")

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

    def set_codes(self, codes: Tensor, step: Tensor, latent_step: Tensor, latent_zero: Tensor) -> "SharedFactor":
        """Set signed codes (rank, out), steps (out,), and steps and zero points of Z, from 0 for the lowest code; in place."""
        self.codes = pack(codes.detach() + 2 ** (self.bits - 1), self.bits)
        self.step = step.detach().flatten().float().clone()
        self.latent_step = latent_step.detach().flatten().float().clone()
        self.latent_zero = latent_zero.detach().flatten().to(torch.int16)
        return self

    def matrix(self) -> Tensor:
        """D (rank, out) in float32, decoded at each call."""
        codes = unpack(self.codes, self.bits, self.rank * self.out_features).view(self.rank, self.out_features)
        return codes.sub_(2 ** (self.bits - 1)).mul_(self.step)


class _SharedFactorLayer(nn.Module):
    """A linear layer of two factors, one of them among the model's shared modules, under the name `shared`.

    `order` is "reordered", x first times one factor, then times the other, so W is never built; "decode_first", W at every
    call; or "cheapest", the one with fewer multiply-accumulates for the n tokens of the call: n rank (in + out), or
    in rank out + n in out.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, shared: str, bias: bool, order: str):
        super().__init__()
        if order not in get_args(Order):
            raise ValueError(f"order = {order!r}; allowed: {', '.join(get_args(Order))}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.shared, self.order = shared, order
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments that both layers have."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "shared": self.shared,
            "bias": self.bias is not None,
            "order": self.order,
        }

    def bind_shared(self, shared: nn.ModuleDict) -> None:
        """Take D from the model's `shared` modules, without registering it, so that it is not saved twice."""
        self.__dict__["_factor"] = shared[self.shared]

    def is_reordered(self, tokens: int) -> bool:
        """Whether a call with this many tokens computes x Z first."""
        if self.order != "cheapest":
            return self.order == "reordered"
        n, i, o, r = tokens, self.in_features, self.out_features, self.rank
        return n * r * (i + o) <= i * r * o + n * i * o


@runtime_layer
class FactoredLinear(_SharedFactorLayer):
    """y = x W^T + b with W^T ~ Z D, where Z (in x rank) is this layer's and D (rank x out) is a `SharedFactor`.

    The columns of Z have steps and zero points, the same in every block.

    Shapes: x (..., in_features) -> (..., out_features).
    """

    exportable = ("onnxruntime", "openvino")

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
        super().__init__(in_features, out_features, rank, shared, bias, order)
        self.bits = bits
        self.register_buffer("codes", torch.zeros(packed_bytes(in_features * rank, bits), dtype=torch.uint8))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().spec(), "bits": self.bits}

    @property
    def param_count(self) -> int:
        """Weights of Z, and biases."""
        return self.in_features * self.rank + (0 if self.bias is None else self.out_features)

    def set_codes(self, codes: Tensor, bias: Tensor | None) -> "FactoredLinear":
        """Set codes (in, rank) in [0, 2^bits) and the bias, in place."""
        self.codes = pack(codes.detach(), self.bits)
        self.bias = None if bias is None else bias.detach().float().clone()
        return self

    def latent(self) -> Tensor:
        """Z (in, rank) in float32, decoded at each call."""
        codes = unpack(self.codes, self.bits, self.in_features * self.rank).view(self.in_features, self.rank)
        return codes.sub_(self._factor.latent_zero).mul_(self._factor.latent_step)

    def decoded_weight(self) -> Tensor:
        """Z D = W^T (in, out)."""
        return self.latent() @ self._factor.matrix()

    def dense(self) -> Tensor:
        """The decoded weight W (out, in), float32."""
        return self.decoded_weight().T

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        if self.is_reordered(len(tokens)):
            left, right = tokens @ self.latent().to(x.dtype), self._factor.matrix().to(x.dtype)
        else:
            left, right = tokens, self.decoded_weight().to(x.dtype)
        y = left @ right if self.bias is None else torch.addmm(self.bias.to(x.dtype), left, right)
        return y.view(*x.shape[:-1], self.out_features)


@runtime_layer
class SharedFactorLinear(_SharedFactorLayer):
    """y = D (Z x) + b with Z (rank x in), this layer's, and D (out x rank), which all blocks share, both in packed codes.

    Each row of Z and of D has a step, or each `group` of a row, without zero points: both are products that kernels for
    packed codes know. Z is the layer `down`; D is a `PackedLinear` among the model's shared modules.
    Shapes: x (..., in_features) -> (..., out_features).
    """

    exportable = ("onnxruntime", "openvino")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bits: float,
        shared: str,
        bias: bool = True,
        group: int | None = None,
        order: str = "reordered",
    ):
        super().__init__(in_features, out_features, rank, shared, bias, order)
        self.down = PackedLinear(in_features, rank, bits, bias=False, group=group)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().spec(), "bits": self.down.bits, "group": self.down.group}

    @property
    def param_count(self) -> int:
        """The biases; the layer `down` counts Z."""
        return 0 if self.bias is None else self.out_features

    def dense(self) -> Tensor:
        """The decoded weight W = D Z (out, in), float32."""
        return self._factor.dense() @ self.down.dense()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_reordered(math.prod(x.shape[:-1])):
            y = self._factor(self.down(x))
        else:
            y = x @ self._factor(self.down(torch.eye(self.in_features, dtype=x.dtype, device=x.device)))
        return y if self.bias is None else y + self.bias.to(x.dtype)


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear | SharedFactorLinear]:
    """The layers with a shared factor of a model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear | SharedFactorLinear)
    }


def reordered_share(width: int, rank: int) -> float:
    """Multiply-accumulates of a block's four linear layers as (x Z) D over those of the dense layers: 16 d r / 12 d^2.

    Valid for a hidden width of 4 d. Below 1 for rank < 0.75 width.
    """
    return 16 * width * rank / (12 * width**2)


@runtime_layer
class LowRankLinear(nn.Module):
    """y = A (B x) + b with A (out x rank) in `up` and B (rank x in) in `down`; W = A B is never built.

    It has rank (in + out) weights and as many multiply-accumulates for each token: fewer than the dense layer if rank is
    below in out / (in + out). Shapes: x (..., in_features) -> (..., out_features).
    """

    exportable = True

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

    @property
    def bias(self) -> Tensor | None:
        """The bias, which `up` holds, and may hold in a factor of its own if it was factored again."""
        return self.up.bias

    def set_factors(self, left: Tensor, right: Tensor, bias: Tensor | None) -> "LowRankLinear":
        """Set A (out, rank), B (rank, in) and the bias, of any floating-point type, in place."""
        self.up.weight.data, self.down.weight.data = left.float().contiguous(), right.float().contiguous()
        if bias is not None:
            self.up.bias.data = bias.detach().float().clone()
        return self

    def dense(self) -> Tensor:
        """W = A B (out, in), float32."""
        return dense_weight(self.up) @ dense_weight(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@runtime_layer
class SplitLinear(nn.Module):
    """A linear layer cut by its outputs: y = [W_1 x + b_1, W_2 x + b_2, ...]; each part can be compressed by itself.

    Shapes: x (..., in_features) -> (..., sum of `sizes`).
    """

    exportable = True

    def __init__(self, in_features: int, sizes: Sequence[int], bias: bool = True):
        super().__init__()
        self.in_features, self.sizes, self.bias = in_features, tuple(sizes), bias
        self.out_features = sum(sizes)
        self.parts = nn.ModuleList(nn.Linear(in_features, size, bias=bias) for size in sizes)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"in_features": self.in_features, "sizes": list(self.sizes), "bias": self.bias}

    def set_rows(self, linear: nn.Linear) -> "SplitLinear":
        """Copy the rows and biases of a dense layer, in place."""
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
        return torch.cat([dense_weight(part) for part in self.parts])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)
