"""The int8 layers as ONNX operators, in the forms for which ONNX Runtime has integer kernels.

Only for the inside of a `torch.onnx.export`: elsewhere these operators compute nothing. The weight stays int8 and signed,
for which the kernels are faster than for unsigned ones; ONNX wants it as (in, out).
"""

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out


def dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x quantized over its own range, times the codes, in integers; ONNX Runtime makes one kernel of all of it.

    Shapes: x (..., in) -> (..., out); weight int8 (out, in), scale (out,), bias (out,) or None.
    """
    codes, step, zero = symbolic_multi_out(
        "DynamicQuantizeLinear",
        (x,),
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()),
    )
    shape = (*x.shape[:-1], len(weight))
    product = symbolic("MatMulInteger", (codes, weight.t().contiguous(), zero), dtype=torch.int32, shape=shape)
    y = product.float() * (step * scale)
    return y if bias is None else y + bias


def static_linear(x: Tensor, step: float, zero: int, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x over a fixed range and the codes, each rounded and taken back; ONNX Runtime makes the product of the codes of it.

    Shapes: x (..., in) -> (..., out); weight int8 (out, in), scale (out,), bias (out,) or None.
    """
    if x.dim() == 2:
        return static_linear(x[None], step, zero, weight, scale, bias)[0]
    grid = (torch.tensor(step), torch.tensor(zero, dtype=torch.uint8))
    codes = symbolic("QuantizeLinear", (x, *grid), dtype=torch.uint8, shape=x.shape)
    rounded = symbolic("DequantizeLinear", (codes, *grid), dtype=torch.float32, shape=x.shape)
    columns = weight.t().contiguous()
    dense = symbolic("DequantizeLinear", (columns, scale), {"axis": 1}, dtype=torch.float32, shape=columns.shape)
    y = rounded @ dense
    # with a bias of one dimension, or for x of two, it would become a Gemm first, and that never becomes integers
    return y if bias is None else y + bias[None, None]
