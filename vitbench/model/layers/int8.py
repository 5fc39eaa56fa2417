"""Linear layers with 8-bit weights and activations, and integer products where the backend has them."""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.model.layers import onnx_forms
from vitbench.model.layers.registry import runtime_layer


class _Int8Linear(nn.Module):
    """W ~ scale[:, None] * weight in int8, one scale for each output row: weight (out, in), scale (out,), bias (out,) or None."""

    quantizes_inputs = True

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    @property
    def param_count(self) -> int:
        """Weights and biases."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def int8_macs(self, x: Tensor, y: Tensor) -> int:
        """Multiply-accumulates of one call, all with 8-bit factors."""
        return y.numel() * self.in_features

    def dense(self) -> Tensor:
        """The rounded weight W (out, in), float32."""
        return self.weight.float() * self.scale[:, None]


@runtime_layer
class DynamicInt8Linear(_Int8Linear):
    """y = x W^T + b with W in int8 and x quantized to 8 bits on the fly, per tensor.

    W ~ scale[:, None] * weight, with one scale for each output row. On an x86 or Arm CPU torch's int8 kernel computes the
    product in integers, and so does ONNX Runtime. Elsewhere the same integers are multiplied in floating point, which is
    exact but not fast; on a CPU a warning is printed.

    Shapes: x (..., in_features) -> (..., out_features); weight int8 (out, in), scale (out,), bias (out,) or None.
    """

    exportable = ("onnxruntime",)
    supports_torch_compile = False
    depends_on_batch = True  # the range of x is taken over the whole batch

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return onnx_forms.dynamic_linear(x, self.weight, self.scale, self.bias)
        if x.device.type != "cpu":
            return self.reference(x)
        _warn_without_int8_kernel()
        if _int8_engine() == "none":
            return self.reference(x)
        if self._packed is None:
            self._packed = self._pack()
        return torch.ops.quantized.linear_dynamic(x.float(), self._packed, not _has_vnni()).to(x.dtype)

    def reference(self, x: Tensor, bits: int = 8) -> Tensor:
        """The kernel's arithmetic written out: asymmetric x over the tensor's range, integer product, rescale.

        bits: of the codes of x; on a CPU without VNNI instructions the kernel uses 7.
        """
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        largest = 2**bits - 1
        step = ((high - low) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.round(-low / step)
        codes = (torch.round(x / step) + zero).clamp(0, largest) - zero
        y = F.linear(codes.float(), self.weight.float()) * (step * self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _pack(self) -> Any:
        with warnings.catch_warnings():  # torch will remove these tensors one day; `reference` needs none
            warnings.simplefilter("ignore")
            zeros = torch.zeros(self.out_features, dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, self.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> "DynamicInt8Linear":
        self._packed = None  # moved or converted: pack again at the next call
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # packed weights belong to this process


@runtime_layer
class StaticInt8Linear(_Int8Linear):
    """y = x W^T + b with W in int8 and x quantized to 8 bits over a fixed range.

    W ~ scale[:, None] * weight, with one scale for each output row, and x ~ input_step (q - input_zero), q in [0, 255].
    PyTorch rounds x and multiplies in floating point: the same values without the speed. A backend with integer kernels
    finds the rounding and the codes in the graph and multiplies in integers.

    Shapes: x (..., in_features) -> (..., out_features); weight int8 (out, in), scale (out,), bias (out,) or None.
    """

    exportable = True

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, input_step: float = 1.0, input_zero: int = 0
    ):
        super().__init__(in_features, out_features, bias)
        self.input_step, self.input_zero = input_step, input_zero

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().spec(), "input_step": self.input_step, "input_zero": self.input_zero}

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            grid = (self.input_step, self.input_zero)
            return onnx_forms.static_linear(x, *grid, self.weight, self.scale, self.bias)
        x = torch.fake_quantize_per_tensor_affine(x, self.input_step, self.input_zero, 0, 255)
        return F.linear(x, self.dense(), self.bias)


@runtime_layer
class StaticInt8Rounding(nn.Module):
    """Activations rounded to 8 bits over a fixed range: x ~ step (q - zero), q in [0, 255]. Shapes: any -> the same.

    If both factors of a product are rounded so, a backend with integer kernels multiplies in integers.
    """

    exportable = True
    quantizes_inputs = True
    param_count = 0

    def __init__(self, step: float, zero: int):
        super().__init__()
        self.step, self.zero = step, zero

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"step": self.step, "zero": self.zero}

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, 0, 255)


def int8_kernel() -> str:
    """The kernel of `DynamicInt8Linear` on this CPU, in words."""
    engine = _int8_engine()
    if engine == "none":
        return "no int8 kernel, floating point"
    return f"int8 kernel {engine} {'with VNNI' if _has_vnni() else 'without VNNI, activations in 7 bits'}"


@functools.cache
def _warn_without_int8_kernel() -> None:
    """Warn, once in each process, if this CPU lacks the instructions for fast dynamic int8."""
    if _int8_engine() == "none":
        warnings.warn(
            "this torch has no int8 kernel for this CPU: the same integers are multiplied in floating point, "
            "so outputs are right and times say nothing about int8",
            stacklevel=2,
        )
    elif not _has_vnni():
        warnings.warn(
            "this CPU has no VNNI instructions: activations take 7 bits, so that the int8 kernel's sums do not overflow",
            stacklevel=2,
        )


def _int8_engine() -> str:
    return torch.backends.quantized.engine if hasattr(torch.ops.quantized, "linear_dynamic") else "none"


def _has_vnni() -> bool:
    """Whether the CPU has VNNI. Without it the kernel's 16-bit sums can overflow, so x takes 7 bits, as in torch itself."""
    return torch.cpu._is_vnni_supported()


# torch's counter has no formula for this operator. The packed weight has no shape, so the count comes from x and y.
def _linear_dynamic_flops(x_shape: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    return 2 * out_shape.numel() * x_shape[-1]


def flop_formulas() -> dict[Any, Any]:
    """Formulas for torch's FlopCounterMode of the operators that runtime layers call."""
    return {torch.ops.quantized.linear_dynamic: _linear_dynamic_flops}
