"""Weights as low-bit codes, stored packed: each code takes b bits, so two 4-bit codes share one byte."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.model.layers.registry import runtime_layer

ROWS_PER_UNPACK = 256  # rows of a weight; a multiple of 8, so that each part starts at a whole byte


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes of `bits` bits."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers in [0, 2^bits) into bytes, the first code in the lowest bits.

    Args:
        codes: any shape, any integer type.
        bits: 2 to 8.

    Returns:
        uint8 (ceil(count * bits / 8),).
    """
    flat = codes.flatten().to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise ValueError(
            f"codes of {bits} bits must lie in [0, {(1 << bits) - 1}]; these lie in [{int(flat.min())}, {int(flat.max())}]"
        )
    if bits == 8:
        return flat.to(torch.uint8)
    groups = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)  # eight codes fill `bits` bytes
    words = sum(groups[:, i] << (bits * i) for i in range(8))
    octets = torch.stack([(words >> (8 * i)) & 255 for i in range(bits)], dim=1)
    return octets.flatten()[: packed_bytes(flat.numel(), bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes in `pack`'s bytes, as float32 (count,)."""
    if bits == 8:
        return packed[:count].float()
    if 8 % bits == 0:  # each byte holds whole codes, so no words are needed
        codes = torch.empty(packed.numel(), 8 // bits, device=packed.device)
        for i in range(8 // bits):
            codes[:, i] = (packed >> (bits * i)) & ((1 << bits) - 1)
        return codes.flatten()[:count]
    octets = F.pad(packed, (0, -packed.numel() % bits)).view(-1, bits).to(torch.int64)
    words = sum(octets[:, i] << (8 * i) for i in range(bits))
    codes = torch.stack([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(8)], dim=1)
    return codes.flatten()[:count].float()


class _Packed(nn.Module):
    """Packed codes of a weight tensor W = step (codes - 2^(bits-1)), a step for each output row or each group of a row."""

    codes: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], bits: int, bias: bool, group: int | None = None):
        super().__init__()
        self.shape, self.bits, self.group = tuple(shape), bits, group
        inputs = math.prod(shape[1:])
        self.register_buffer("codes", torch.zeros(packed_bytes(math.prod(shape), bits), dtype=torch.uint8))
        self.register_buffer("step", torch.ones((shape[0], inputs // group) if group else shape[0]))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments that all packed layers have."""
        return {"bits": self.bits, "bias": self.bias is not None}

    @property
    def param_count(self) -> int:
        """Weights and biases."""
        return math.prod(self.shape) + (0 if self.bias is None else self.shape[0])

    def set_codes(self, codes: Tensor, step: Tensor, bias: Tensor | None) -> "_Packed":
        """Set signed codes in [-2^(bits-1), 2^(bits-1)) of the weight's shape, steps like `step`, and the bias; in place."""
        self.codes = pack(codes.detach() + 2 ** (self.bits - 1), self.bits)
        self.step = step.detach().float().reshape(self.step.shape).clone()
        self.bias = None if bias is None else bias.detach().float().clone()
        return self

    def dense(self, start: int = 0, end: int | None = None) -> Tensor:
        """The weight's rows from `start`, a multiple of 8, to `end` in float32, decoded at each call."""
        end, inputs = self.shape[0] if end is None else min(end, self.shape[0]), math.prod(self.shape[1:])
        packed = self.codes[start * inputs * self.bits // 8 : packed_bytes(end * inputs, self.bits)]
        codes = unpack(packed, self.bits, (end - start) * inputs).sub_(2 ** (self.bits - 1))
        return codes.view(-1, self.group or inputs).mul_(self.step[start:end].reshape(-1, 1)).view(-1, *self.shape[1:])


@runtime_layer
class PackedLinear(_Packed):
    """y = x W^T + b with W in packed codes, one step for each output row or each `group` of a row's weights.

    x stays in floating point unless `input` is a `Rounded`. W is unpacked by `ROWS_PER_UNPACK` rows at a time, so memory
    holds only the codes and one such part.
    Shapes: x (..., in_features) -> (..., out_features); codes uint8 (ceil(out in bits / 8),), step (out,) or
    (out, in / group).
    """

    exportable = ("onnxruntime", "openvino")

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = True, group: int | None = None):
        super().__init__((out_features, in_features), bits, bias, group)
        self.in_features, self.out_features = in_features, out_features
        self.input = nn.Identity()

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        grouped = {"group": self.group} if self.group else {}
        return {"in_features": self.in_features, "out_features": self.out_features, **super().spec(), **grouped}

    def forward(self, x: Tensor) -> Tensor:
        x, starts = self.input(x), range(0, self.out_features, ROWS_PER_UNPACK)
        y = torch.cat([F.linear(x, self.dense(start, start + ROWS_PER_UNPACK).to(x.dtype)) for start in starts], dim=-1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


@runtime_layer
class PackedConv2d(_Packed):
    """A convolution without padding whose stride is its kernel size (a patch embedding), W in packed codes.

    Shapes: x (B, in, H, W) -> (B, out, H / kernel, W / kernel).
    """

    exportable = ("onnxruntime", "openvino")

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bits: int, bias: bool = True):
        super().__init__((out_channels, in_channels, kernel, kernel), bits, bias)
        self.stride = kernel

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        out, channels, kernel, _ = self.shape
        return {"in_channels": channels, "out_channels": out, "kernel": kernel, **super().spec()}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.dense().to(x.dtype), bias, stride=self.stride)
