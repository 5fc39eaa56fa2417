"""What runs a model: eager or compiled PyTorch, ONNX Runtime, OpenVINO, ExecuTorch. Prepared once, checked against eager, then called."""

import copy
import functools
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.base import standalone
from vitbench.base.errors import InputError, import_optional, one_of
from vitbench.base.files import copy_file
from vitbench.model.layers import RUNTIME_LAYERS
from vitbench.model.layers.onnx_codes import has_packed_layers, replace_for_onnx
from vitbench.model.recipe import Recipe

# without this package OpenVINO takes its own stand-in and reports nothing to anyone
sys.modules.setdefault("openvino_telemetry", None)

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        call: makes a model callable for inputs shaped like x, with torch's thread count; None where there is `file`.
        tolerance: largest difference from eager's logits, relative to the largest logit. A number of bf16 is off by up to
            1 part in 256, and a model is some tens of such roundings one after another, in directions of their own.
        needs: packages; the first is the one whose operators it has.
        extra: of vitbench, which installs them.
        file: writes the model for inputs shaped like x, `file(model, x, stem)`; what was written is what runs.
        precision: that of what is not in integers, where OpenVINO runs the file.
    """

    call: Callable[[nn.Module, Tensor], Call] | None = None
    tolerance: float = 1e-3
    packages: tuple[str, ...] = ()
    extra: str = ""
    export: Callable[[nn.Module, Tensor, Path], Path] | None = None
    precision: str = "f32"

    @property
    def runs_without_torch(self) -> bool:
        """Whether `standalone` measures the file without PyTorch, as in a bundle."""
        return bool(self.export) and self.precision == "f32"


def eager(model: nn.Module, x: Tensor) -> Call:
    """The model as PyTorch runs it, operator by operator."""
    return model


def cuda(model: nn.Module, x: Tensor) -> Call:
    """The model on the graphics card, images brought there and answers back."""
    there = copy.deepcopy(model).cuda()
    return lambda images: there(images.cuda()).cpu()


def torch_compile(model: nn.Module, x: Tensor) -> Call:
    """The model compiled by torch.compile with its weights frozen into the code, for this shape; takes tens of seconds."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    compiled = torch.compile(copy.deepcopy(model), dynamic=False, fullgraph=True)
    # every model counts as one more version of the same code, and past the usual limit of them nothing is compiled;
    # freezing as an option of torch.compile itself fails
    with dynamo.patch(recompile_limit=1000), inductor.patch(freezing=True):
        compiled(x)
    return compiled


def onnx_file(model: nn.Module, x: Tensor) -> bytes:
    """The model as an ONNX file for inputs shaped like `x`."""
    file = io.BytesIO()
    # a copy: packed layers give way to their forms, and int8 layers that have answered before hold what only they can read
    torch.onnx.export(replace_for_onnx(copy.deepcopy(model)), (x,), dynamo=True, verbose=False).save(file)
    return file.getvalue()


def onnx_call(file: bytes, optimized: str = "") -> Call:
    """An ONNX file made callable; `optimized` is where ONNX Runtime writes the graph that it really runs."""
    session = standalone.onnx_session(file, torch.get_num_threads(), optimized=optimized)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def write_onnx(model: nn.Module, x: Tensor, stem: Path) -> Path:
    """`stem`.onnx, its graph optimised, and `stem`.data with the weights, which are then mapped and not read."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, stem.name)
        whole = str(Path(folder, "optimized.onnx"))
        standalone.onnx_session(onnx_file(model, x), 1, optimized=whole, portable=True)
        graph = onnx.load(whole)
        for node in graph.graph.node:
            del node.metadata_props[:]  # where in the source it came from, which is as long as a small model
        path, data = made.with_suffix(".onnx"), made.with_suffix(".data")
        onnx.save(graph, path, save_as_external_data=True, location=data.name, size_threshold=1024)
        return _moved(stem, data, path)


def openvino_model(model: nn.Module, x: Tensor) -> Any:
    """The model as OpenVINO's own, for inputs shaped like `x`; from ONNX where there are packed codes, which then stay so."""
    import openvino as runtime

    if has_packed_layers(model):
        return runtime.Core().read_model(onnx_file(model, x))
    with torch.no_grad():
        return runtime.convert_model(torch.export.export(model, (x,)))


def openvino_call(model: Any, precision: str) -> Call:
    """An OpenVINO model made callable; `precision` is f32 or bf16."""
    import openvino as runtime

    compiled = runtime.compile_model(model, "CPU", standalone.openvino_settings(torch.get_num_threads(), precision))
    return lambda images: torch.from_numpy(compiled(images.numpy(), share_inputs=True)[0])


def write_openvino(model: nn.Module, x: Tensor, stem: Path) -> Path:
    """`stem`.xml and `stem`.bin, the weights as they are and not in half precision, which is OpenVINO's default."""
    import openvino as runtime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, stem.name).with_suffix(".xml")
        runtime.save_model(openvino_model(model, x), path, compress_to_fp16=False)
        return _moved(stem, path.with_suffix(".bin"), path)


def _moved(stem: Path, *made: Path) -> Path:
    """What a runtime's own writer made, each file whole beside `stem`; the path of the last, which names the others."""
    for file in made:
        copy_file(file, stem.with_suffix(file.suffix))
    return stem.with_suffix(made[-1].suffix)


def executorch(model: nn.Module, x: Tensor) -> Call:
    """The model exported for inputs shaped like `x` and lowered to XNNPACK, the kernels of phones, and run by ExecuTorch."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    try:
        with torch.no_grad():
            program = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    except Exception as error:  # of the exporter's own kinds
        raise RuntimeError(f"ExecuTorch cannot express it: {' '.join(str(error).split())[:300]}") from error
    portable_lib._unsafe_reset_threadpool(torch.get_num_threads())  # unsafe while it computes; its own is not torch's
    # a method reads the program's bytes without keeping them, so the program has to live as long as the call
    loaded = Runtime.get().load_program(program.to_executorch().buffer)
    return lambda images: loaded.load_method("forward").execute((images,))[0].clone()


BACKENDS = {
    "eager": Backend(eager),
    "cuda": Backend(cuda),
    "torch_compile": Backend(torch_compile),
    "onnxruntime": Backend(packages=("onnxruntime", "onnxscript"), extra="onnx", export=write_onnx),
    "openvino": Backend(packages=("openvino", "onnxscript"), extra="openvino", export=write_openvino),
    "openvino_bf16": Backend(
        tolerance=0.05, packages=("openvino", "onnxscript"), extra="openvino", export=write_openvino, precision="bf16"
    ),
    "executorch": Backend(executorch, packages=("executorch",), extra="executorch"),
}
# the tolerance where activations are rounded to codes: a sum that differs in its last bit may get another, in every layer
QUANTIZED_TOLERANCE = 0.3


def prepare(backend: str, model: nn.Module, x: Tensor) -> Call:
    """Make `model` callable in `backend` for inputs shaped like `x`; raises what `checked` raises."""
    return prepare_checked(backend, model, x)[0]


def make_call(backend: str, model: nn.Module, x: Tensor, stem: Path | None = None) -> Call:
    """The model callable in `backend` for inputs shaped like `x`, with torch's thread count.

    Args:
        stem: of the file that the backend runs, if it runs one: it is taken where it is there already, else left there.
    """
    found, threads = BACKENDS[backend], torch.get_num_threads()
    if not found.export:
        return found.call(model, x)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stem = stem or Path(folder, "model")
        written = [path for path in map(stem.with_suffix, standalone.PACKAGES) if path.exists()]
        path = written[0] if written else found.export(model, x, stem)
        run = standalone.open_model(path, threads, found.precision)
    return lambda images: torch.from_numpy(run(images.numpy()))


def prepare_checked(backend: str, model: nn.Module, x: Tensor, stem: Path | None = None) -> tuple[Call, float]:
    """`make_call`'s, and how far its answer to `x` is from eager's.

    Raises:
        InputError: unknown backend, or its extra is not installed.
        RuntimeError: its answer is not eager's.
    """
    require_backend(backend)
    call = make_call(backend, model, x, stem)
    apart, allowed = logit_distance(call(x), model(x)), tolerance(backend, model)
    if not apart <= allowed:
        raise RuntimeError(
            f"{backend} differs from eager by {apart:.1e} of the largest logit; at most {allowed} is allowed"
        )
    return call, apart


def logit_distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference between two answers, relative to the largest logit of the second."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def tolerance(backend: str, model: nn.Module) -> float:
    """How far a backend's logits may be from eager's, as `distance` says it."""
    rounds = any(getattr(module, "quantizes_inputs", False) for module in model.modules())
    return QUANTIZED_TOLERANCE if rounds else BACKENDS[backend].tolerance


class BackendModel(nn.Module):
    """A model that answers batches of any size from a backend prepared for `batch` images.

    Short ones are filled up with their own images, so that ranges taken over a batch are what eager takes over the short one.
    """

    def __init__(self, backend: str, model: nn.Module, batch: int):
        super().__init__()
        self.recipe, self.batch, size = model.recipe, batch, model.recipe.preprocess.size
        with torch.inference_mode():
            self.call = prepare(backend, model, torch.randn(batch, 3, size, size))

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for part in x.split(self.batch):
            full = part[torch.arange(self.batch, device=part.device) % len(part)]
            parts.append(self.call(full)[: len(part)].clone())
        return torch.cat(parts)


def require_backend(backend: str) -> None:
    """Raise `InputError` if `backend` is unknown, or what it needs is not installed or not in this CPU."""
    found = BACKENDS[one_of("backend", backend, BACKENDS)]
    for module in found.packages:
        import_optional(module, found.extra)
    if backend == "openvino_bf16" and not _has_bf16():
        raise InputError(
            "this CPU has no bf16 instructions (AVX512_BF16 or AMX), openvino_bf16 needs them; take openvino"
        )
    if backend == "cuda" and not torch.cuda.is_available():
        raise InputError("no graphics card is to be seen here, or this PyTorch has no CUDA; take another backend")
    if backend == "torch_compile" and not _compiler():
        raise InputError("torch_compile needs a C++ compiler and none was found; install g++ (or clang) and try again")


def _has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _compiler() -> str:
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        return ""


def unsupported_reason(backend: str, recipe: Recipe) -> str:
    """Why `backend` cannot run a model with this recipe; "" if it can."""
    names = {spec["layer"] for spec in recipe.layers.values()}
    layers = sorted(name for name in names if not _runs(backend, RUNTIME_LAYERS.get(name)))
    return f"{backend} has no form of {', '.join(layers)}" if layers else ""


def _runs(backend: str, layer: type | None) -> bool:
    """Whether the backend can run a runtime layer, as `runtime_layer` says it."""
    packages = BACKENDS[backend].packages
    if not packages:
        return backend != "torch_compile" or getattr(layer, "supports_torch_compile", True)
    where = getattr(layer, "exportable", False)
    return where if isinstance(where, bool) else packages[0] in where
