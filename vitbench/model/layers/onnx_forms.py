"""The int8 layers as ONNX operators, in the patterns for which ONNX Runtime has integer kernels.

These functions compute something only inside a `torch.onnx.export`. The weight stays signed int8, because the kernels are
faster than for unsigned weights; ONNX needs it as (in, out).
"""

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out


def dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Quantize x over its own range and multiply by the codes in integers; ONNX Runtime fuses all of it into one kernel.

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
    """Quantize and dequantize x over a fixed range, dequantize the weight, multiply; ONNX Runtime multiplies the codes.

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
    # with a bias of one dimension, or for x of two, ONNX Runtime makes a Gemm first, which has no integer kernel
    return y if bias is None else y + bias[None, None]
