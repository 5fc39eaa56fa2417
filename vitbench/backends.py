"""What runs a model: eager PyTorch, ONNX Runtime or OpenVINO. Prepared once, checked against eager's answer, then called."""

import copy
import io
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.errors import InputError, one_of, require
from vitbench.layers import RUNTIME_LAYERS
from vitbench.recipe import Recipe

# without this package OpenVINO takes its own stand-in and reports nothing to anyone
sys.modules.setdefault("openvino_telemetry", None)

Call = Callable[[Tensor], Tensor]


def eager(model: nn.Module, x: Tensor) -> Call:
    """The model as PyTorch runs it, operator by operator."""
    return model


def onnxruntime(model: nn.Module, x: Tensor) -> Call:
    """The model exported for inputs shaped like `x` and run by ONNX Runtime's CPU provider, with torch's thread count."""
    available("onnxruntime")
    return onnx_call(onnx_file(model, x))


def onnx_file(model: nn.Module, x: Tensor) -> bytes:
    """The model as an ONNX file for inputs shaped like `x`."""
    file = io.BytesIO()
    # a copy: int8 layers that have answered before hold packed weights, which only they can read
    torch.onnx.export(copy.deepcopy(model), (x,), dynamo=True, verbose=False).save(file)
    return file.getvalue()


def onnx_call(file: bytes, optimized: str = "") -> Call:
    """An ONNX file made callable; `optimized` is where ONNX Runtime writes the graph that it really runs."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # of errors alone
    options.optimized_model_filepath = optimized
    # its threads wait busily for more work; what is timed in turn with it should not find the cores taken
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not torch.cpu._is_vnni_supported():  # its int8 instructions saturate; slower, and exact, is to widen the codes
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(model: nn.Module, x: Tensor) -> Call:
    """The model exported for inputs shaped like `x` and compiled by OpenVINO for the CPU in fp32, with torch's thread count."""
    available("openvino")
    return openvino_call(openvino_model(model, x), "f32")


def openvino_bf16(model: nn.Module, x: Tensor) -> Call:
    """Likewise, and what is not in integers is computed in bf16."""
    available("openvino_bf16")
    return openvino_call(openvino_model(model, x), "bf16")


def openvino_model(model: nn.Module, x: Tensor) -> Any:
    """The model as OpenVINO's own, for inputs shaped like `x`."""
    import openvino as runtime

    with torch.no_grad():
        return runtime.convert_model(torch.export.export(model, (x,)))


def openvino_call(model: Any, precision: str) -> Call:
    """An OpenVINO model made callable; `precision` is f32 or bf16."""
    import openvino as runtime

    # without the hint a CPU with bf16 instructions would compute in bf16
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = runtime.compile_model(model, "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy(), share_inputs=True)[0])


BACKENDS = {"eager": eager, "onnxruntime": onnxruntime, "openvino": openvino, "openvino_bf16": openvino_bf16}
# the packages of each; the first is the one whose operators it has
NEEDS = {
    "eager": (),
    "onnxruntime": ("onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "openvino_bf16": ("openvino",),
}
EXTRAS = {"onnxruntime": "onnx", "onnxscript": "onnx", "openvino": "openvino"}

# Largest difference from eager's logits, relative to the largest logit. A number of bf16 is off by up to 1 part in 256,
# and a model is some tens of such roundings one after another, in directions of their own.
TOLERANCE = {"eager": 1e-3, "onnxruntime": 1e-3, "openvino": 1e-3, "openvino_bf16": 0.05}
# the same where activations are rounded to codes: a sum that differs in its last bit may get another, in every layer
ROUNDED = 0.3


def prepare(backend: str, model: nn.Module, x: Tensor) -> Call:
    """Make `model` callable in `backend` for inputs shaped like `x`.

    Raises:
        InputError: unknown backend, or its extra is not installed.
        RuntimeError: its answer is not eager's.
    """
    call = BACKENDS[one_of("backend", backend, BACKENDS)](model, x)
    wanted = model(x)
    apart = float((call(x) - wanted).abs().max() / wanted.abs().max())
    rounds = any(getattr(module, "rounds_inputs", False) for module in model.modules())
    allowed = ROUNDED if rounds else TOLERANCE[backend]
    if apart > allowed:
        raise RuntimeError(
            f"{backend} differs from eager by {apart:.1e} of the largest logit; at most {allowed} is allowed"
        )
    return call


class Prepared(nn.Module):
    """A model that answers batches of any size from a backend prepared for `batch` images; short ones are filled up."""

    def __init__(self, backend: str, model: nn.Module, batch: int = 8):
        super().__init__()
        self.recipe, self.batch, size = model.recipe, batch, model.recipe.preprocess.size
        with torch.inference_mode():
            self.call = prepare(backend, model, torch.randn(batch, 3, size, size))

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for part in x.split(self.batch):
            missing = self.batch - len(part)
            parts.append(self.call(torch.cat([part, part.new_zeros(missing, *part.shape[1:])]))[: len(part)].clone())
        return torch.cat(parts)


def available(backend: str) -> None:
    """Raise `InputError` if `backend` is unknown, or what it needs is not installed or not in this CPU."""
    for module in NEEDS[one_of("backend", backend, BACKENDS)]:
        require(module, EXTRAS[module])
    if backend == "openvino_bf16" and not _has_bf16():
        raise InputError(
            "this CPU has no bf16 instructions (AVX512_BF16 or AMX), openvino_bf16 needs them; take openvino"
        )


def _has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def obstacle(backend: str, recipe: Recipe) -> str:
    """Why `backend` cannot run a model with this recipe; "" if it can."""
    if backend == "eager":
        return ""
    names = {spec["layer"] for spec in recipe.layers.values()}
    layers = sorted(name for name in names if not _portable(name, NEEDS[backend][0]))
    return f"{backend} has no form of {', '.join(layers)}" if layers else ""


def _portable(layer: str, package: str) -> bool:
    """Whether the package can run a runtime layer, as `runtime_layer` says it."""
    where = getattr(RUNTIME_LAYERS.get(layer), "portable", False)
    return where if isinstance(where, bool) else package in where
