"""Other tools' quantizers, each as `(model, x, calibration) -> (callable, bytes of the model that it would save)`.

The model is vitbench's in fp32, x an input of the shape to prepare for, and calibration holds images (N, 3, size, size), N a
multiple of len(x). Each tool quantizes the layers of its defaults, with weights per channel.
"""

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import vitbench as vb

Quantized = tuple[vb.measurement.Call, int]


def nncf(precision: str) -> Callable:
    """NNCF's post-training quantization of the OpenVINO model."""

    def make(model: nn.Module, x: Tensor, calibration: Tensor) -> Quantized:
        import nncf
        import openvino

        images = nncf.Dataset([part.numpy() for part in calibration.split(len(x))])
        small = nncf.quantize(
            vb.measurement.openvino_model(model, x),
            images,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
        )
        with tempfile.TemporaryDirectory() as folder:
            openvino.save_model(small, Path(folder, "model.xml"))
            size = vb.size_on_disk(folder)
        return vb.measurement.openvino_call(small, precision), size

    return make


def onnxruntime_dynamic(model: nn.Module, x: Tensor, calibration: Tensor) -> Quantized:
    """ONNX Runtime's dynamic quantization: weights ahead of time, activations at each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    return _onnx(model, x, lambda old, new: quantize_dynamic(old, new, per_channel=True, weight_type=QuantType.QInt8))


def onnxruntime_static(model: nn.Module, x: Tensor, calibration: Tensor) -> Quantized:
    """ONNX Runtime's static quantization, with ranges fixed on the calibration images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        parts = iter(calibration.split(len(x)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {"x": part.numpy()}

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ}
    # with all operators, its default, ONNX Runtime 1.32 cannot load its own model of a ViT ("replace the existing tensor")
    kinds["op_types_to_quantize"] = ["MatMul", "Gemm"]
    return _onnx(model, x, lambda old, new: quantize_static(old, new, Images(), per_channel=True, **kinds))


def _onnx(model: nn.Module, x: Tensor, quantize: Callable[[str, str], None]) -> Quantized:
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported = onnx.load_from_string(vb.measurement.onnx_file(model, x))
    exported.graph.ClearField("value_info")  # the exporter's shapes of transposed weights, on which the quantizer fails
    with tempfile.TemporaryDirectory() as folder:
        raw, clean, small = (str(Path(folder, name)) for name in ("raw.onnx", "clean.onnx", "small.onnx"))
        onnx.save(exported, raw)
        quant_pre_process(raw, clean, skip_symbolic_shape=True)
        quantize(clean, small)
        file = Path(small).read_bytes()
    return vb.measurement.onnx_call(file), len(file)


def pt2e(model: nn.Module, x: Tensor, calibration: Tensor) -> Quantized:
    """torchao's PT2E with the quantizer for x86, compiled."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    rules = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize_pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), rules)
    for part in calibration.split(len(x)):
        prepared(part)
    return _compiled(quantize_pt2e.convert_pt2e(prepared), x)


def torch_dynamic(model: nn.Module, x: Tensor, calibration: Tensor) -> Quantized:
    """PyTorch's own dynamic quantization, which is deprecated."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    small = quantize_dynamic(copy.deepcopy(model), {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)
    return small, _saved_bytes(small)


def torchao_dynamic(model: nn.Module, x: Tensor, calibration: Tensor) -> Quantized:
    """torchao's dynamic quantization, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    small = copy.deepcopy(model)
    quantize_(small, Int8DynamicActivationInt8WeightConfig())
    return _compiled(small, x)


def _compiled(model: nn.Module, x: Tensor) -> Quantized:
    """Compile with frozen weights, a switch of the whole process."""
    import torch._inductor.config

    size, call = _saved_bytes(model), torch.compile(model)
    with torch._inductor.config.patch(freezing=True):
        call(x)
    return call, size


def _saved_bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()
