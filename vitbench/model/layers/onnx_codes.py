"""Layers with packed codes in ONNX: ONNX Runtime's operator MatMulNBits multiplies by codes of 2, 4 or 8 bits.

A form holds the codes of one layer in that operator's order, and computes nothing outside a `torch.onnx.export`. OpenVINO
reads the operator as constants of so many bits, and keeps them.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from vitbench.model.layers.factored import FactoredLinear, SharedFactor
from vitbench.model.layers.packed import PackedConv2d, PackedLinear, pack, unpack
from vitbench.model.vit import replace_module

WIDTHS = (2, 4, 8)  # bits of a code that the operator knows; codes of other widths take the next one
BLOCKS = (16, 32, 64, 128, 256)  # inputs that share a step


class BlockProduct(nn.Module):
    """x W^T + b with W (out, in) = step (codes - 2^(bits-1)), the codes of a row in blocks.

    Each group of a row's inputs becomes whole blocks, of the size that takes the fewest bytes; where a group is no multiple
    of it, codes that stand for 0 fill it up, and x gets zeros in the same places.
    Shapes: x (..., in) -> (..., out); codes uint8 (out, blocks, bytes of a block), step (out, blocks), bias (out,) or None.
    """

    def __init__(self, codes: Tensor, step: Tensor, bits: int, bias: Tensor | None = None):
        """Take codes (out, in) from 0 on, steps (out, groups) and the bias (out,)."""
        super().__init__()
        (self.out, inputs), groups = codes.shape, step.shape[1]
        self.bits, self.groups, group = next(width for width in WIDTHS if width >= bits), groups, inputs // groups
        self.block = min(BLOCKS, key=lambda block: math.ceil(group / block) * (block * self.bits / 8 + 4))
        each, middle = math.ceil(group / self.block), 2 ** (self.bits - 1)
        self.filling = each * self.block - group
        codes = (codes + (middle - 2 ** (bits - 1))).view(self.out, groups, group)
        octets = pack(F.pad(codes, (0, self.filling), value=middle), self.bits)
        self.register_buffer("codes", octets.view(self.out, groups * each, -1))
        self.register_buffer("step", step.repeat_interleave(each, dim=1))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.filling and self.groups > 1:  # the operator itself fills up the last block
            x = F.pad(x.unflatten(-1, (self.groups, -1)), (0, self.filling)).flatten(-2)
        facts = {"K": x.shape[-1], "N": self.out, "bits": self.bits, "block_size": self.block}
        inputs = (x, self.codes, self.step, None, None, self.bias)
        shape = (*x.shape[:-1], self.out)
        return symbolic("com.microsoft::MatMulNBits", inputs, facts, dtype=x.dtype, shape=shape, version=1)


class PatchProduct(nn.Module):
    """A convolution whose stride is its kernel, as a product with patches: x (B, in, H, W) -> (B, out, H', W')."""

    def __init__(self, product: BlockProduct, kernel: int):
        super().__init__()
        self.product, self.kernel = product, kernel

    def forward(self, x: Tensor) -> Tensor:
        size = self.kernel
        rows, columns = x.shape[2] // size, x.shape[3] // size
        x = x[:, :, : rows * size, : columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        return self.product(x.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


class FactoredProduct(nn.Module):
    """x (Z D) + b in the layer's order, D being the form of the shared factor.

    Z = s (c - z) has zero points that may be no code: x Z = x s (c - m) + (sum of x) s (m - z) with the middle m of the
    codes. Where Z D comes first, Z itself is made of codes of 8 bits.
    """

    def __init__(self, layer: FactoredLinear):
        super().__init__()
        self.reorders, self.shared = layer.reorders, layer.shared
        codes = _codes(layer, layer.in_features, layer.rank)
        step, zero = layer._factor.latent_step, layer._factor.latent_zero
        self.left = BlockProduct(codes.T, step[:, None], layer.bits)
        self.register_buffer("moved", step * (2 ** (layer.bits - 1) - zero))
        self.register_buffer("codes", codes.to(torch.uint8))
        self.register_buffer("step", step)
        self.register_buffer("offset", step * zero)
        self.register_buffer("bias", layer.bias)

    def connect(self, shared: nn.ModuleDict) -> None:
        """Find the form of the shared factor; it stays the model's, so that the file holds it once."""
        self.__dict__["_right"] = shared[self.shared]

    def forward(self, x: Tensor) -> Tensor:
        if self.reorders(math.prod(x.shape[:-1])):
            y = self._right(self.left(x) + x.sum(-1, keepdim=True) * self.moved)
        else:
            y = x @ self._right(self._latent())
        return y if self.bias is None else y + self.bias

    def _latent(self) -> Tensor:
        """Z (in, rank), made at each call: of constants, ONNX Runtime keeps this operator alone and would fold products."""
        operands = (self.codes, self.step)
        scaled = symbolic("DequantizeLinear", operands, {"axis": 1}, dtype=torch.float32, shape=self.codes.shape)
        return scaled - self.offset


def packed(model: nn.Module) -> bool:
    """Whether a model has layers with packed codes."""
    return any(isinstance(module, (PackedLinear, PackedConv2d, FactoredLinear)) for module in model.modules())


def with_forms(model: nn.Module) -> nn.Module:
    """The same model with the forms of its packed layers in their places, changed in place."""
    for name, module in list(model.named_modules()):
        form = onnx_form(module)
        if form is not module:
            replace_module(model, name, form)
    for module in model.modules():
        if isinstance(module, FactoredProduct):
            module.connect(model.shared)
    return model


@functools.singledispatch
def onnx_form(module: nn.Module) -> nn.Module:
    """What stands for a module in an ONNX file: a form for a packed layer, else the module itself."""
    return module


@onnx_form.register
def _(layer: PackedLinear) -> nn.Module:
    codes = _codes(layer, layer.out_features, layer.in_features)
    return nn.Sequential(layer.input, BlockProduct(codes, layer.step.view(len(codes), -1), layer.bits, layer.bias))


@onnx_form.register
def _(layer: PackedConv2d) -> nn.Module:
    codes = _codes(layer, layer.shape[0], math.prod(layer.shape[1:]))
    return PatchProduct(BlockProduct(codes, layer.step[:, None], layer.bits, layer.bias), layer.stride)


@onnx_form.register
def _(factor: SharedFactor) -> nn.Module:
    codes = _codes(factor, factor.rank, factor.out_features)
    return BlockProduct(codes.T, factor.step[:, None], factor.bits)


@onnx_form.register
def _(layer: FactoredLinear) -> nn.Module:
    return FactoredProduct(layer)


def _codes(layer: nn.Module, rows: int, columns: int) -> Tensor:
    """A layer's codes from 0 on, (rows, columns)."""
    return unpack(layer.codes, layer.bits, rows * columns).to(torch.int64).view(rows, columns)
