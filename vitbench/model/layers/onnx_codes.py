"""Layers with packed codes in ONNX: ONNX Runtime's operator MatMulNBits multiplies by codes of 2, 4 or 8 bits.

The modules here replace packed layers for `torch.onnx.export` and compute nothing outside it. They hold a layer's codes in
the operator's layout. OpenVINO reads the operator as constants of that many bits and keeps them packed.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from vitbench.model.layers.factored import FactoredLinear, SharedFactor, SharedFactorLinear
from vitbench.model.layers.packed import PackedConv2d, PackedLinear, middle_code, pack, unpack
from vitbench.model.vit import replace_module

OPERATOR_BITS = (2, 4, 8)  # code widths of the operator; other widths, and ternary codes, take the next larger one
OPERATOR_BLOCK_SIZES = (16, 32, 64, 128, 256)  # inputs that share a step


class MatMulNBits(nn.Module):
    """x W^T + b with W (out, in) = step (codes - 2^(bits-1)), the codes of a row in blocks.

    Each group of a row's inputs becomes whole blocks, of the size that takes the fewest bytes. If a group is no multiple of
    the block size, it is padded with codes that stand for 0, and x is padded with zeros at the same indices.
    Shapes: x (..., in) -> (..., out); codes uint8 (out, blocks, bytes of a block), step (out, blocks), bias (out,) or None.
    """

    def __init__(self, codes: Tensor, step: Tensor, bits: float, bias: Tensor | None = None):
        """Pack codes (out, in) from 0 on, steps (out, groups) and the bias (out,)."""
        super().__init__()
        (self.out, inputs), groups = codes.shape, step.shape[1]
        self.bits, self.groups, group = (
            next(width for width in OPERATOR_BITS if width >= bits),
            groups,
            inputs // groups,
        )
        self.block = min(OPERATOR_BLOCK_SIZES, key=lambda block: math.ceil(group / block) * (block * self.bits / 8 + 4))
        blocks_per_group, zero_code = math.ceil(group / self.block), 2 ** (self.bits - 1)
        self.padding = blocks_per_group * self.block - group
        codes = (codes + (zero_code - middle_code(bits))).view(self.out, groups, group)
        octets = pack(F.pad(codes, (0, self.padding), value=zero_code), self.bits)
        self.register_buffer("codes", octets.view(self.out, groups * blocks_per_group, -1))
        self.register_buffer("step", step.repeat_interleave(blocks_per_group, dim=1))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding and self.groups > 1:  # the operator itself pads the last block
            x = F.pad(x.unflatten(-1, (self.groups, -1)), (0, self.padding)).flatten(-2)
        attributes = {"K": x.shape[-1], "N": self.out, "bits": self.bits, "block_size": self.block}
        inputs = (x, self.codes, self.step, None, None, self.bias)
        shape = (*x.shape[:-1], self.out)
        return symbolic("com.microsoft::MatMulNBits", inputs, attributes, dtype=x.dtype, shape=shape, version=1)


class PatchMatMul(nn.Module):
    """A convolution whose stride is its kernel size, as a product with patches: x (B, in, H, W) -> (B, out, H', W')."""

    def __init__(self, product: MatMulNBits, kernel: int):
        super().__init__()
        self.product, self.kernel = product, kernel

    def forward(self, x: Tensor) -> Tensor:
        size = self.kernel
        rows, columns = x.shape[2] // size, x.shape[3] // size
        x = x[:, :, : rows * size, : columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        return self.product(x.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


class FactoredMatMul(nn.Module):
    """x (Z D) + b in the layer's order of products, where D is the `MatMulNBits` of the shared factor.

    Z = s (c - z), and the zero point z may lie outside the codes. So x Z = x s (c - m) + (sum of x) s (m - z), with the
    middle m of the codes. If Z D comes first, Z is decoded from 8-bit codes.
    """

    def __init__(self, layer: FactoredLinear):
        super().__init__()
        self.is_reordered, self.shared = layer.is_reordered, layer.shared
        codes = _codes(layer, layer.in_features, layer.rank)
        step, zero = layer._factor.latent_step, layer._factor.latent_zero
        self.left = MatMulNBits(codes.T, step[:, None], layer.bits)
        self.register_buffer("moved", step * (2 ** (layer.bits - 1) - zero))
        self.register_buffer("codes", codes.to(torch.uint8))
        self.register_buffer("step", step)
        self.register_buffer("offset", step * zero)
        self.register_buffer("bias", layer.bias)

    def bind_shared(self, shared: nn.ModuleDict) -> None:
        """Take the shared factor's `MatMulNBits` without registering it, so that the file holds it once."""
        self.__dict__["_right"] = shared[self.shared]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_reordered(math.prod(x.shape[:-1])):
            y = self._right(self.left(x) + x.sum(-1, keepdim=True) * self.moved)
        else:
            y = x @ self._right(self._latent())
        return y if self.bias is None else y + self.bias

    def _latent(self) -> Tensor:
        """Z (in, rank), decoded at each call. ONNX Runtime folds products of constants, but not this operator."""
        operands = (self.codes, self.step)
        scaled = symbolic("DequantizeLinear", operands, {"axis": 1}, dtype=torch.float32, shape=self.codes.shape)
        return scaled - self.offset


def has_packed_layers(model: nn.Module) -> bool:
    """Whether a model has layers with packed codes."""
    return any(isinstance(module, (PackedLinear, PackedConv2d, FactoredLinear)) for module in model.modules())


def replace_for_onnx(model: nn.Module) -> nn.Module:
    """Replace all packed layers by their modules for ONNX, in place; returns the model."""
    for name, module in list(model.named_modules()):
        replacement = onnx_module(module)
        if replacement is not module:
            replace_module(model, name, replacement)
    for module in model.modules():
        if isinstance(module, FactoredMatMul | SharedFactorLinear):
            module.bind_shared(model.shared)
    return model


@functools.singledispatch
def onnx_module(module: nn.Module) -> nn.Module:
    """The module to export to ONNX: a replacement for a packed layer, else the module itself."""
    return module


@onnx_module.register
def _(layer: PackedLinear) -> nn.Module:
    codes = _codes(layer, layer.out_features, layer.in_features)
    return nn.Sequential(layer.input, MatMulNBits(codes, layer.step.view(len(codes), -1), layer.bits, layer.bias))


@onnx_module.register
def _(layer: PackedConv2d) -> nn.Module:
    codes = _codes(layer, layer.shape[0], math.prod(layer.shape[1:]))
    return PatchMatMul(MatMulNBits(codes, layer.step[:, None], layer.bits, layer.bias), layer.stride)


@onnx_module.register
def _(factor: SharedFactor) -> nn.Module:
    codes = _codes(factor, factor.rank, factor.out_features)
    return MatMulNBits(codes.T, factor.step[:, None], factor.bits)


@onnx_module.register
def _(layer: FactoredLinear) -> nn.Module:
    return FactoredMatMul(layer)


def _codes(layer: nn.Module, rows: int, columns: int) -> Tensor:
    """A layer's codes from 0 on, (rows, columns)."""
    return unpack(layer.codes, layer.bits, rows * columns).to(torch.int64).view(rows, columns)
