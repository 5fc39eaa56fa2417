"""Weights as low-bit codes, stored packed: each code takes b bits, so two 4-bit codes share one byte.

Ternary codes (-1, 0, 1) are called 1.58 bits, log2(3). Five of them share one byte as digits of base 3: 1.6 bits a code.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from vitbench.model.layers.registry import runtime_layer

ROWS_PER_UNPACK = 320  # rows of a weight; a multiple of 8 and of 5, so that each part starts at a whole byte
TERNARY, TRITS = 1.58, 5  # bits of a ternary code by name; ternary codes in a byte


def _check_bits(bits: float) -> float:
    if bits != TERNARY and (bits != int(bits) or not 2 <= bits <= 8):
        raise ValueError(f"give a whole number from 2 to 8, or {TERNARY} for ternary codes (-1, 0, 1)")
    return bits if bits == TERNARY else int(bits)


Bits = Annotated[int | float, AfterValidator(_check_bits)]


def middle_code(bits: float) -> int:
    """The stored code that stands for 0: 1 of three ternary codes, else 2^(bits - 1)."""
    return 1 if bits == TERNARY else 2 ** (int(bits) - 1)


def packed_bytes(count: int, bits: float) -> int:
    """Bytes of `count` packed codes of `bits` bits."""
    return math.ceil(count / TRITS) if bits == TERNARY else math.ceil(count * bits / 8)


def coded_bytes(rows: int, columns: int, bits: float, group: int | None, rest: str) -> int:
    """The bytes of a matrix in codes, with a step for each row or each `group` of a row, stored as `rest`."""
    steps = rows * (columns // group if group else 1)
    return packed_bytes(rows * columns, bits) + steps * getattr(torch, rest).itemsize


def pack(codes: Tensor, bits: float) -> Tensor:
    """Pack integers in [0, 2^bits) into bytes, the first code in the lowest bits; ternary codes are in [0, 3).

    Args:
        codes: any shape, any integer type.
        bits: 2 to 8, or 1.58.

    Returns:
        uint8 (`packed_bytes`,).
    """
    flat, levels = codes.flatten().to(torch.int64), 3 if bits == TERNARY else 1 << int(bits)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= levels):
        raise ValueError(
            f"codes of {bits} bits must lie in [0, {levels - 1}]; these lie in [{int(flat.min())}, {int(flat.max())}]"
        )
    if bits == TERNARY:
        digits = F.pad(flat, (0, -flat.numel() % TRITS)).view(-1, TRITS)
        return sum(digits[:, i] * 3**i for i in range(TRITS)).to(torch.uint8)
    bits = int(bits)
    if bits == 8:
        return flat.to(torch.uint8)
    groups = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)  # eight codes fill `bits` bytes
    words = sum(groups[:, i] << (bits * i) for i in range(8))
    octets = torch.stack([(words >> (8 * i)) & 255 for i in range(bits)], dim=1)
    return octets.flatten()[: packed_bytes(flat.numel(), bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: float, count: int) -> Tensor:
    """The first `count` codes in `pack`'s bytes, as float32 (count,)."""
    if bits == TERNARY:
        codes = torch.empty(packed.numel(), TRITS, device=packed.device)
        for i in range(TRITS):
            codes[:, i] = torch.div(packed, 3**i, rounding_mode="floor") % 3
        return codes.flatten()[:count]
    bits = int(bits)
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
    """Packed codes of a weight tensor W = step (codes - middle), a step for each output row or each group of a row."""

    codes: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], bits: float, bias: bool, group: int | None = None):
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
        """Set signed codes, around 0, of the weight's shape, steps like `step`, and the bias; in place."""
        self.codes = pack(codes.detach() + middle_code(self.bits), self.bits)
        self.step = step.detach().float().reshape(self.step.shape).clone()
        self.bias = None if bias is None else bias.detach().float().clone()
        return self

    def dense(self, start: int = 0, end: int | None = None) -> Tensor:
        """The weight's rows from `start`, a multiple of `ROWS_PER_UNPACK`, to `end` in float32, decoded at each call."""
        end, inputs = self.shape[0] if end is None else min(end, self.shape[0]), math.prod(self.shape[1:])
        packed = self.codes[packed_bytes(start * inputs, self.bits) : packed_bytes(end * inputs, self.bits)]
        codes = unpack(packed, self.bits, (end - start) * inputs).sub_(middle_code(self.bits))
        return codes.view(-1, self.group or inputs).mul_(self.step[start:end].reshape(-1, 1)).view(-1, *self.shape[1:])


@runtime_layer
class PackedLinear(_Packed):
    """y = x W^T + b with W in packed codes, one step for each output row or each `group` of a row's weights.

    x stays in floating point unless `input` is a `Rounded`. W is unpacked by `ROWS_PER_UNPACK` rows at a time, so memory
    holds only the codes and one such part.
    Shapes: x (..., in_features) -> (..., out_features); codes uint8 (`packed_bytes`,), step (out,) or
    (out, in / group).
    """

    exportable = ("onnxruntime", "openvino")

    def __init__(self, in_features: int, out_features: int, bits: float, bias: bool = True, group: int | None = None):
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

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bits: float, bias: bool = True):
        super().__init__((out_channels, in_channels, kernel, kernel), bits, bias)
        self.stride = kernel

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        out, channels, kernel, _ = self.shape
        return {"in_channels": channels, "out_channels": out, "kernel": kernel, **super().spec()}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.dense().to(x.dtype), bias, stride=self.stride)
