"""What runs a model: eager PyTorch, ONNX Runtime or OpenVINO. Prepared once, checked against eager's answer, then called."""

import io
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitbench.errors import one_of, require
from vitbench.layers import RUNTIME_LAYERS
from vitbench.recipe import Recipe

# without this package OpenVINO takes its own stand-in and reports nothing to anyone
sys.modules.setdefault("openvino_telemetry", None)

TOLERANCE = 1e-3  # largest difference from eager's logits, relative to the largest logit
# the same where activations are rounded: a sum that differs in its last bit may get another code, in every layer
ROUNDED = 0.3


def eager(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model as PyTorch runs it, operator by operator."""
    return model


def onnxruntime(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model exported for inputs shaped like `x` and run by ONNX Runtime's CPU provider, with torch's thread count."""
    available("onnxruntime")
    import onnxruntime as runtime

    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model exported for inputs shaped like `x` and compiled by OpenVINO for the CPU in fp32, with torch's thread count."""
    available("openvino")
    import openvino as runtime

    with torch.no_grad():
        converted = runtime.convert_model(torch.export.export(model, (x,)))
    # without the hint a CPU with bf16 instructions would compute in bf16
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = runtime.compile_model(converted, "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy(), share_inputs=True)[0])


BACKENDS = {"eager": eager, "onnxruntime": onnxruntime, "openvino": openvino}
NEEDS = {"eager": (), "onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}
EXTRAS = {"onnxruntime": "onnx", "onnxscript": "onnx", "openvino": "openvino"}


def prepare(backend: str, model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Make `model` callable in `backend` for inputs shaped like `x`.

    Raises:
        InputError: unknown backend, or its extra is not installed.
        RuntimeError: its answer is not eager's.
    """
    call = BACKENDS[one_of("backend", backend, BACKENDS)](model, x)
    wanted = model(x)
    apart = float((call(x) - wanted).abs().max() / wanted.abs().max())
    allowed = ROUNDED if any(hasattr(module, "rounds_inputs") for module in model.modules()) else TOLERANCE
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
    """Raise `InputError` if `backend` is unknown or what it needs is not installed."""
    for module in NEEDS[one_of("backend", backend, BACKENDS)]:
        require(module, EXTRAS[module])


def obstacle(backend: str, recipe: Recipe) -> str:
    """Why `backend` cannot run a model with this recipe; "" if it can."""
    names = {spec["layer"] for spec in recipe.layers.values()}
    layers = sorted(name for name in names if not getattr(RUNTIME_LAYERS.get(name), "portable", False))
    return f"{backend} has no form of {', '.join(layers)}" if backend != "eager" and layers else ""
