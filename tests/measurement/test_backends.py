"""Backends: integer kernels that really run, codes that stay packed, models off by more than rounding, what a CPU lacks."""

import collections
import gc
import importlib.util
import math
import warnings

import pytest
import torch

from vitbench.base import standalone
from vitbench.base.errors import InputError
from vitbench.measurement import backends
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import (
    DynamicInt8Linear,
    FactoredLinear,
    PackedConv2d,
    PackedLinear,
    Rounded,
    SharedFactor,
    StaticInt8Linear,
    int8,
)
from vitbench.rows.runs import Run

INTEGER_KERNELS = ("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul")


def installed(backend):
    return all(importlib.util.find_spec(name) for name in backends.BACKENDS[backend].packages)


needs_onnx = pytest.mark.skipif(not installed("onnxruntime"), reason="the extra onnx is not installed")
needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="the extra openvino is not installed")
needs_executorch = pytest.mark.skipif(not installed("executorch"), reason="the extra executorch is not installed")
needs_bf16 = pytest.mark.skipif(
    not installed("openvino_bf16") or not backends._has_bf16(),
    reason="the extra openvino is not installed, or this CPU has no bf16 instructions",
)


@pytest.fixture(scope="module")
def small(base, digits):
    return {name: compress(base.model, make_config(name), digits).model for name in ("dynamic_int8", "static_int8")}


def kernels(model, x, file):
    """How many nodes of each operator are in the graph that ONNX Runtime runs."""
    import onnx

    backends.onnx_call(backends.onnx_file(model, x), str(file))
    return collections.Counter(node.op_type for node in onnx.load(file).graph.node)


@needs_onnx
@pytest.mark.parametrize("name", ["dynamic_int8", "static_int8"])
def test_onnxruntime_multiplies_in_integers(small, tmp_path, name):
    """Its optimised graph holds 8-bit matrix products, one for each quantized layer, and no weight is taken back."""
    x = torch.randn(8, 3, 8, 8)
    found = kernels(small[name], x, tmp_path / "optimized.onnx")
    layers = sum(isinstance(module, (DynamicInt8Linear, StaticInt8Linear)) for module in small[name].modules())
    assert sum(found[kind] for kind in INTEGER_KERNELS) == layers == 16
    assert found["DequantizeLinear"] == 0
    backends.prepare("onnxruntime", small[name], x)


@pytest.mark.slow
@needs_onnx
def test_onnxruntime_pools_merged_tokens_by_their_size():
    made = vit.create_model("vit_medium_patch16_gap_240", img_size=64, num_classes=10, depth=2, seed=1)
    merged = compress(made.requires_grad_(False), make_config("token_merging", {"r": 3})).model
    assert merged.blocks.restores
    x = torch.randn(2, 3, 64, 64)
    assert backends.prepare_checked("onnxruntime", merged, x)[1] < 1e-4


@pytest.mark.slow
@needs_onnx
def test_onnxruntime_multiplies_in_integers_in_attention_too(base, digits, tmp_path):
    whole = compress(base.model, make_config("static_int8", {"attention": True}), digits).model
    found = kernels(whole, torch.randn(8, 3, 8, 8), tmp_path / "optimized.onnx")
    assert sum(found[kind] for kind in INTEGER_KERNELS) == 16 + 2 * 4


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 48), (2, 3, 7, 48)])
def test_the_onnx_forms_compute_what_the_layers_do(shape, bias):
    torch.manual_seed(0)
    x = torch.randn(shape) + 0.3
    step = float(x.max() - x.min()) / 255
    static = StaticInt8Linear(48, 32, bias, input_step=step, input_zero=round(-float(x.min()) / step))
    for layer in (DynamicInt8Linear(48, 32, bias), static):
        layer.weight = torch.randint(-127, 128, (32, 48), dtype=torch.int8)
        layer.scale = torch.rand(32) / 100
        if bias:
            layer.bias = torch.randn(32)
        wanted = layer.reference(x) if isinstance(layer, DynamicInt8Linear) else layer(x)
        layer.eval()
        answer = backends.onnx_call(backends.onnx_file(layer, x))(x)
        assert answer.shape == wanted.shape
        assert torch.allclose(answer, wanted, atol=1e-3)


def filled(layer):
    """A packed layer with random codes, steps and bias."""
    middle = 2 ** (layer.bits - 1)
    codes = torch.randint(-middle, middle, layer.shape)
    bias = None if layer.bias is None else torch.randn(len(codes))
    return layer.set_codes(codes, torch.rand(layer.step.shape), bias)


class Factored(torch.nn.Sequential):
    """Two factored layers with one factor; zero points may lie outside of the codes."""

    def __init__(self, bits, order, rank=37, bias=True):
        middle = 2 ** (bits - 1)
        layers = [FactoredLinear(48, 48, rank, bits, "proj", bias, order) for _ in range(2)]
        super().__init__(*layers)
        factor, zero = SharedFactor(rank, 48, bits), torch.randint(-50, 300, (rank,))
        factor.set_codes(torch.randint(-middle, middle, (rank, 48)), torch.rand(48) / 10, torch.rand(rank) / 10, zero)
        self.shared = torch.nn.ModuleDict({"proj": factor})
        for layer in layers:
            layer.set_codes(torch.randint(0, 2 * middle, (48, rank)), torch.randn(48) if bias else None)
            layer.bind_shared(self.shared)

    def forward(self, x):
        return self[1](self[0](x))


def same(model, x, within=1e-5):
    """Whether ONNX Runtime answers as eager PyTorch does."""
    answer, wanted = backends.onnx_call(backends.onnx_file(model.eval(), x))(x), model(x)
    return answer.shape == wanted.shape and backends.logit_distance(answer, wanted) < within


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 8, 24, 32])
def test_packed_codes_are_multiplied_in_onnxruntime(bits, group):
    torch.manual_seed(bits)
    layer = filled(PackedLinear(96, 40, bits, bias=bits % 2 == 0, group=group))
    assert same(torch.nn.Sequential(layer), torch.randn((5, 96) if bits > 5 else (2, 7, 96)))


@pytest.mark.slow
@needs_onnx
def test_rounded_inputs_and_patches_too():
    torch.manual_seed(0)
    rounding, conv = filled(PackedLinear(50, 8, 4)), filled(PackedConv2d(3, 40, 4, 8))
    rounding.input = Rounded(4).set_range(-2.0, 2.5)
    assert same(torch.nn.Sequential(rounding), torch.randn(3, 50))
    assert same(torch.nn.Sequential(conv), torch.randn(2, 3, 13, 20)), "what is left of an image is cut off"


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("order", ["reordered", "decode_first", "cheapest"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_factors_are_multiplied_in_their_order_and_kept_once(tmp_path, order, bits):
    torch.manual_seed(bits)
    model, x = Factored(bits, order, bias=bits > 2).eval(), torch.randn(2, 400, 48)
    assert same(model, x, 1e-4), "the sums of outlying zero points are large"
    found = kernels(model, x, tmp_path / "optimized.onnx")
    reordered = order == "reordered"
    assert [found["MatMulNBits"], found["DequantizeLinear"]] == ([4, 0] if reordered else [2, 2])
    shared = [held for held in initializers(tmp_path / "optimized.onnx") if held[0][0] == 48 and len(held[0]) == 3]
    assert len(shared) == 1


def initializers(path):
    """Shape and numpy type of each tensor in an ONNX file."""
    import onnx

    held = onnx.load(path).graph.initializer
    return [(tuple(each.dims), onnx.helper.tensor_dtype_to_np_dtype(each.data_type).name) for each in held]


@pytest.fixture(scope="module")
def packed(base):
    """Models with codes of 4 bits."""
    nothing = {"train": {"epochs": 0}}
    configs = {"weight_only": {"group": 32}, "uct": {"start": "weights", **nothing}}
    return {name: compress(base.model, make_config(name, values)).model for name, values in configs.items()}


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(("name", "products"), [("weight_only", 18), ("uct", 34)])
def test_codes_are_small_in_the_onnx_file(packed, tmp_path, name, products):
    """Its optimised graph multiplies by the codes, and no weight lies in it in floating point."""
    import onnx

    small, x = packed[name], torch.randn(8, 3, 8, 8)
    path = backends.write_onnx(small, x, tmp_path / "small")
    found = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert [found["MatMulNBits"], found["DequantizeLinear"], found["Conv"]] == [products, 0, 0]
    # positions are 17 of 64, steps a number for each 32 weights; the least of the blocks' weights is 64 by 64
    assert max(math.prod(shape) for shape, kind in initializers(path) if kind == "float32") < 64 * 64
    saved = artifact.size_on_disk(artifact.save(small, tmp_path / "artifact"))
    assert path.with_suffix(".data").stat().st_size < saved
    assert backends.logit_distance(backends.prepare("onnxruntime", small, x)(x), small(x)) < 1e-5


@pytest.mark.slow
@needs_openvino
@pytest.mark.parametrize("name", ["weight_only", "uct"])
def test_codes_are_small_in_openvino_too(packed, name):
    small, x = packed[name], torch.randn(8, 3, 8, 8)
    held = [op for op in backends.openvino_model(small, x).get_ops() if op.get_type_name() == "Constant"]
    kinds = {op.get_element_type().get_type_name() for op in held if math.prod(op.get_output_shape(0)) >= 64 * 64}
    assert kinds == {"u4"}
    assert backends.logit_distance(backends.prepare("openvino", small, x)(x), small(x)) < 1e-5


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(
    ("name", "values"),
    [("lsq", {"train": {"epochs": 0}}), ("diffq", {"train": {"epochs": 1}}), ("simulated_integer", {})],
)
def test_every_method_with_packed_codes_runs_in_other_backends(base, digits, name, values):
    small = compress(base.model, make_config(name, values), digits).model
    for backend in ("onnxruntime", "openvino"):
        assert backends.unsupported_reason(backend, artifact.recipe_of(small)) == ""
        if installed(backend):
            backends.prepare(backend, small, torch.randn(8, 3, 8, 8))


@pytest.mark.slow
@needs_executorch
def test_executorch_answers_again_and_again_with_torch_s_threads(base):
    """Its program must not go while its method is in use: that ended the process."""
    from executorch.extension.pybindings import portable_lib

    call, x = backends.prepare("executorch", base.model, torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    gc.collect()
    first = call(x)
    assert backends.logit_distance(first, base.model(x)) < backends.BACKENDS["executorch"].tolerance
    call(torch.zeros_like(x))
    assert torch.equal(call(x), first), "an answer is the caller's, and the next does not change it"
    assert portable_lib._threadpool_get_thread_count() == torch.get_num_threads()


@pytest.mark.slow
@needs_onnx
def test_dynamic_int8_is_scored_in_onnxruntime(base, small, digits, tmp_path):
    path = artifact.save(small["dynamic_int8"], tmp_path / "small")
    eager, other = (
        measure(path, digits, Run(tmp_path / name), what=("accuracy",), backend=name).set_index("metric")
        for name in ("eager", "onnxruntime")
    )
    assert set(other["status"]) == {"ok"}
    assert other.loc["top1", "value"] == pytest.approx(eager.loc["top1", "value"], abs=0.01)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("name", ["dynamic_int8", "static_int8"])
def test_several_batch_sizes_are_timed_one_after_the_other(base, small, digits, tmp_path, name):
    path, how = artifact.save(small[name], tmp_path / "small"), {"batches": (1, 3), "rounds": 10}
    rows = measure(path, digits, Run(tmp_path), versus=base.path, what=("latency",), backend="onnxruntime", **how)
    assert set(rows["status"]) == {"ok"}
    assert set(rows["batch"]) == {1, 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("onnxruntime", marks=needs_onnx),
        pytest.param("openvino", marks=needs_openvino),
        pytest.param("openvino_bf16", marks=needs_bf16),
    ],
)
def test_a_file_that_was_exported_already_is_run_and_not_written_again(base, tmp_path, monkeypatch, backend):
    x = torch.randn(2, 3, 8, 8)
    first = backends.make_call(backend, base.model, x, tmp_path / "0")(x)
    monkeypatch.setattr(torch.onnx, "export", None)
    monkeypatch.setattr(torch.export, "export", None)
    assert torch.equal(backends.make_call(backend, base.model, x, tmp_path / "0")(x), first)


@pytest.mark.slow
@needs_bf16
def test_openvino_in_bf16_is_near_and_not_the_same(base, small):
    x = torch.randn(8, 3, 8, 8)
    wanted = base.model(x)
    apart = {
        name: float((backends.prepare(name, base.model, x)(x) - wanted).abs().max() / wanted.abs().max())
        for name in ("openvino", "openvino_bf16")
    }
    assert apart["openvino"] < backends.BACKENDS["openvino"].tolerance < apart["openvino_bf16"]
    backends.prepare("openvino_bf16", small["static_int8"], x)


def test_without_bf16_instructions_there_is_no_bf16(monkeypatch):
    monkeypatch.setattr(backends, "import_optional", lambda *_: None)
    monkeypatch.setattr(backends, "_has_bf16", lambda: False)
    with pytest.raises(InputError, match="this CPU has no bf16 instructions .* take openvino"):
        backends.require_backend("openvino_bf16")


def test_each_layer_says_what_can_run_it(small):
    recipes = {name: artifact.recipe_of(model) for name, model in small.items()}
    assert all(backends.unsupported_reason(backend, recipes["static_int8"]) == "" for backend in backends.BACKENDS)
    assert backends.unsupported_reason("onnxruntime", recipes["dynamic_int8"]) == ""
    for backend in ("openvino", "openvino_bf16", "torch_compile", "executorch"):
        assert (
            backends.unsupported_reason(backend, recipes["dynamic_int8"])
            == f"{backend} does not support DynamicInt8Linear"
        )


def test_the_command_line_names_every_backend(capsys):
    from vitbench.cli.program import _parser

    with pytest.raises(SystemExit):
        _parser().parse_args(["measure", "--help"])
    text = capsys.readouterr().out
    assert all(backend in text for backend in backends.BACKENDS)


@pytest.mark.parametrize(
    ("engine", "vnni", "kernel", "warning"),
    [
        ("x86", True, "int8 kernel x86 with VNNI", ""),
        ("x86", False, "int8 kernel x86 without VNNI, activations in 7 bits", "no VNNI .* take 7 bits"),
        ("none", False, "no int8 kernel, floating point", "multiplied in floating point, .* say nothing about int8"),
    ],
)
def test_a_cpu_that_lacks_something_says_so_once(monkeypatch, engine, vnni, kernel, warning):
    monkeypatch.setattr(int8, "_int8_engine", lambda: engine)
    monkeypatch.setattr(int8, "_has_vnni", lambda: vnni)
    int8._warn_without_int8_kernel.cache_clear()
    layer, x = DynamicInt8Linear(8, 4), torch.randn(3, 8)
    assert int8.int8_kernel() == kernel
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x)
        layer(x)
    int8._warn_without_int8_kernel.cache_clear()
    assert len(caught) == bool(warning)
    if warning:
        with pytest.warns(UserWarning, match=warning):
            layer(x)
    int8._warn_without_int8_kernel.cache_clear()


def test_only_an_x86_without_vnni_saturates(monkeypatch):
    seen = {}
    for machine, flags in (("x86_64", "avx2 avx512_vnni"), ("x86_64", "avx2"), ("aarch64", "asimd"), ("x86_64", None)):
        standalone.int8_sums_can_overflow.cache_clear()
        monkeypatch.setattr(standalone.platform, "machine", lambda machine=machine: machine)

        def read_text(self, flags=flags):
            if flags is None:
                raise FileNotFoundError
            return flags

        monkeypatch.setattr(standalone.Path, "read_text", read_text)
        seen[machine, flags] = standalone.int8_sums_can_overflow()
    standalone.int8_sums_can_overflow.cache_clear()
    assert list(seen.values()) == [False, True, False, True]
