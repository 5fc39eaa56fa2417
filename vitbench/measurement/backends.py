"""Backends that run a model: eager or compiled PyTorch, ONNX Runtime, OpenVINO, ExecuTorch.

A model is prepared once, its logits are checked against eager's, and then it is called.
"""

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

# None makes the import of this package fail. OpenVINO then uses a stub, which reports nothing
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # typeshed has no None here

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        call: makes a model callable for inputs shaped like x, with torch's thread count; None if there is `export`.
        tolerance: the largest allowed `logit_distance` from eager. Rounding to bf16 errs by up to 1 part in 256, and a
            model makes some tens of such roundings one after another.
        packages: what it imports; layers name the first one if they can be exported for it.
        extra: the extra of vitbench that installs the packages.
        export: writes a file for inputs shaped like x, `export(model, x, stem)`; the backend runs that file.
        precision: of floating-point values, where OpenVINO runs the file.
    """

    call: Callable[[nn.Module, Tensor], Call] | None = None
    tolerance: float = 1e-3
    packages: tuple[str, ...] = ()
    extra: str = ""
    export: Callable[[nn.Module, Tensor, Path], Path] | None = None
    precision: str = "f32"

    @property
    def runs_without_torch(self) -> bool:
        """Whether `standalone` can run the exported file without PyTorch, as in a bundle."""
        return bool(self.export) and self.precision == "f32"


def eager(model: nn.Module, x: Tensor) -> Call:
    """The model itself, which PyTorch runs operator by operator."""
    return model


def cuda(model: nn.Module, x: Tensor) -> Call:
    """The model on the graphics card; images are copied to it and logits back."""
    cuda_model = copy.deepcopy(model).cuda()
    return lambda images: cuda_model(images.cuda()).cpu()


def torch_compile(model: nn.Module, x: Tensor) -> Call:
    """The model compiled by torch.compile for this shape, with frozen weights; takes tens of seconds."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    compiled = torch.compile(copy.deepcopy(model), dynamic=False, fullgraph=True)
    # each model counts as a recompilation of the same code, and past the default limit nothing is compiled;
    # freezing as an option of torch.compile fails
    with dynamo.patch(recompile_limit=1000), inductor.patch(freezing=True):
        compiled(x)
    return compiled


def onnx_file(model: nn.Module, x: Tensor) -> bytes:
    """The model as an ONNX file for inputs shaped like `x`."""
    file = io.BytesIO()
    # a copy, because packed layers are replaced for the export; a copy of an int8 layer also has no cached kernel weight,
    # which the exporter cannot read
    torch.onnx.export(replace_for_onnx(copy.deepcopy(model)), (x,), dynamo=True, verbose=False).save(file)
    return file.getvalue()


def onnx_call(file: bytes, optimized: str = "") -> Call:
    """A call of an ONNX file; ONNX Runtime writes the graph that it runs to `optimized`, if it is not empty."""
    session = standalone.onnx_session(file, torch.get_num_threads(), optimized=optimized)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def write_onnx(model: nn.Module, x: Tensor, stem: Path) -> Path:
    """Write `stem`.onnx with the optimised graph, and `stem`.data with the weights, which can then be memory-mapped."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, stem.name)
        optimized_path = str(Path(folder, "optimized.onnx"))
        standalone.onnx_session(onnx_file(model, x), 1, optimized=optimized_path, portable=True)
        graph = onnx.load(optimized_path)
        for node in graph.graph.node:
            del node.metadata_props[:]  # positions in the source, as long as a small model
        path, data = exported.with_suffix(".onnx"), exported.with_suffix(".data")
        onnx.save(graph, path, save_as_external_data=True, location=data.name, size_threshold=1024)
        return _move_files(stem, data, path)


def openvino_model(model: nn.Module, x: Tensor) -> Any:
    """The model converted to OpenVINO for inputs shaped like `x`; through ONNX if it has packed codes, which stay packed."""
    import openvino as runtime

    if has_packed_layers(model):
        return runtime.Core().read_model(onnx_file(model, x))
    with torch.no_grad():
        return runtime.convert_model(torch.export.export(model, (x,)))


def openvino_call(model: Any, precision: str) -> Call:
    """A call of an OpenVINO model; `precision` is f32 or bf16."""
    import openvino as runtime

    compiled = runtime.compile_model(model, "CPU", standalone.openvino_settings(torch.get_num_threads(), precision))
    return lambda images: torch.from_numpy(compiled(images.numpy(), share_inputs=True)[0])


def write_openvino(model: nn.Module, x: Tensor, stem: Path) -> Path:
    """Write `stem`.xml and `stem`.bin, the weights in their own precision; OpenVINO's default is half precision."""
    import openvino as runtime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, stem.name).with_suffix(".xml")
        runtime.save_model(openvino_model(model, x), path, compress_to_fp16=False)
        return _move_files(stem, path.with_suffix(".bin"), path)


def _move_files(stem: Path, *files: Path) -> Path:
    """Copy a runtime's files atomically to `stem` with their suffixes; the path of the last, which refers to the others."""
    for file in files:
        copy_file(file, stem.with_suffix(file.suffix))
    return stem.with_suffix(files[-1].suffix)


def executorch(model: nn.Module, x: Tensor) -> Call:
    """The model exported for inputs shaped like `x`, lowered to XNNPACK (kernels for phones) and run by ExecuTorch."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    try:
        with torch.no_grad():
            program = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    except Exception as error:  # the exporter raises exceptions of many kinds
        raise RuntimeError(f"ExecuTorch cannot express the model: {' '.join(str(error).split())[:300]}") from error
    portable_lib._unsafe_reset_threadpool(
        torch.get_num_threads()
    )  # unsafe during a call; its thread pool is not torch's
    # a method does not hold the program's bytes that it reads, so the call has to keep the program alive
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
# if activations are rounded to codes, a sum that differs in its last bit may get another code, in every layer
QUANTIZED_TOLERANCE = 0.3


def prepare(backend: str, model: nn.Module, x: Tensor) -> Call:
    """A call of `model` in `backend` for inputs shaped like `x`; errors as in `prepare_checked`."""
    return prepare_checked(backend, model, x)[0]


def make_call(backend: str, model: nn.Module, x: Tensor, stem: Path | None = None) -> Call:
    """A call of `model` in `backend` for inputs shaped like `x`, with torch's thread count; not checked against eager.

    Args:
        stem: of the file that the backend runs, if it runs one. An existing file is used, else it is written.
    """
    backend_spec, threads = BACKENDS[backend], torch.get_num_threads()
    if backend_spec.call:
        return backend_spec.call(model, x)
    assert backend_spec.export is not None, "a backend has a call or an export"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stem = stem or Path(folder, "model")
        existing = [path for path in map(stem.with_suffix, standalone.PACKAGES) if path.exists()]
        path = existing[0] if existing else backend_spec.export(model, x, stem)
        run_file = standalone.open_model(path, threads, backend_spec.precision)
    return lambda images: torch.from_numpy(run_file(images.numpy()))


def prepare_checked(backend: str, model: nn.Module, x: Tensor, stem: Path | None = None) -> tuple[Call, float]:
    """A call as `make_call` gives it, and the `logit_distance` of its logits for `x` from eager's.

    Raises:
        InputError: an unknown backend, or one that is not available here.
        RuntimeError: the distance is above the tolerance.
    """
    require_backend(backend)
    call = make_call(backend, model, x, stem)
    distance, allowed_distance = logit_distance(call(x), model(x)), tolerance(backend, model)
    if not distance <= allowed_distance:
        raise RuntimeError(
            f"{backend} differs from eager by {distance:.1e} of the largest logit; at most {allowed_distance} is allowed"
        )
    return call, distance


def logit_distance(logits: Tensor, reference: Tensor) -> float:
    """The largest difference of `logits` from `reference`, relative to the largest logit of `reference`."""
    return float((logits - reference).abs().max() / reference.abs().max())


def tolerance(backend: str, model: nn.Module) -> float:
    """The largest allowed `logit_distance` of the model in a backend from eager."""
    rounds = any(getattr(module, "quantizes_inputs", False) for module in model.modules())
    return QUANTIZED_TOLERANCE if rounds else BACKENDS[backend].tolerance


class BackendModel(nn.Module):
    """A model that takes batches of any size, from a backend prepared for `batch` images.

    Short batches are filled with copies of their images, so that ranges over a batch are those that eager takes over the short one.
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
    """Check that `backend` is available here.

    Raises:
        InputError: an unknown backend, a package that is not installed, or a missing feature of this machine.
    """
    backend_spec = BACKENDS[one_of("backend", backend, BACKENDS)]
    for module in backend_spec.packages:
        import_optional(module, backend_spec.extra)
    if backend == "openvino_bf16" and not _has_bf16():
        raise InputError(
            "this CPU has no bf16 instructions (AVX512_BF16 or AMX), openvino_bf16 needs them; take openvino"
        )
    if backend == "cuda" and not torch.cuda.is_available():
        raise InputError("no graphics card is visible, or this PyTorch has no CUDA; take another backend")
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
    return f"{backend} does not support {', '.join(layers)}" if layers else ""


def _runs(backend: str, layer: type | None) -> bool:
    """Whether the backend can run a runtime layer, by what `runtime_layer` declares of it."""
    packages = BACKENDS[backend].packages
    if not packages:
        return backend != "torch_compile" or getattr(layer, "supports_torch_compile", True)
    exportable = getattr(layer, "exportable", False)
    return exportable if isinstance(exportable, bool) else packages[0] in exportable
