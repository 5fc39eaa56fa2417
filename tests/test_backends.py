"""Backends: integer kernels that really run, models off by more than rounding, CPUs that lack something."""

import collections
import importlib.util
import warnings

import pytest
import torch

from vitbench import artifact, backends
from vitbench.errors import InputError
from vitbench.layers import DynamicInt8Linear, StaticInt8Linear, int8
from vitbench.measure import measure
from vitbench.methods import compress, make_config
from vitbench.runs import Run

INTEGER_KERNELS = ("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul")
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in backends.BACKENDS["onnxruntime"].needs),
    reason="the extra onnx is not installed",
)
needs_bf16 = pytest.mark.skipif(
    not importlib.util.find_spec("openvino") or not backends._has_bf16(),
    reason="the extra openvino is not installed, or this CPU has no bf16 instructions",
)


@pytest.fixture(scope="module")
def small(base, digits):
    return {name: compress(base.model, make_config(name), digits) for name in ("dynamic_int8", "static_int8")}


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


@needs_onnx
def test_onnxruntime_multiplies_in_integers_in_attention_too(base, digits, tmp_path):
    whole = compress(base.model, make_config("static_int8", {"attention": True}), digits)
    found = kernels(whole, torch.randn(8, 3, 8, 8), tmp_path / "optimized.onnx")
    assert sum(found[kind] for kind in INTEGER_KERNELS) == 16 + 2 * 4


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


@needs_onnx
def test_dynamic_int8_is_scored_in_onnxruntime(base, small, digits, tmp_path):
    path = artifact.save(small["dynamic_int8"], tmp_path / "small")
    eager, other = (
        measure(path, digits, Run(tmp_path / name), what=("accuracy",), backend=name).set_index("metric")
        for name in ("eager", "onnxruntime")
    )
    assert set(other["status"]) == {"ok"}
    assert other.loc["top1", "value"] == pytest.approx(eager.loc["top1", "value"], abs=0.01)


@needs_onnx
@pytest.mark.parametrize("name", ["dynamic_int8", "static_int8"])
def test_several_batch_sizes_are_timed_one_after_the_other(base, small, digits, tmp_path, name):
    path, how = artifact.save(small[name], tmp_path / "small"), {"batches": (1, 3), "rounds": 10}
    rows = measure(path, digits, Run(tmp_path), versus=base.path, what=("latency",), backend="onnxruntime", **how)
    assert set(rows["status"]) == {"ok"}
    assert set(rows["batch"]) == {1, 3}


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
    monkeypatch.setattr(backends, "require", lambda *_: None)
    monkeypatch.setattr(backends, "_has_bf16", lambda: False)
    with pytest.raises(InputError, match="this CPU has no bf16 instructions .* take openvino"):
        backends.available("openvino_bf16")


def test_each_layer_says_what_can_run_it(small):
    recipes = {name: artifact.recipe_of(model) for name, model in small.items()}
    assert all(backends.obstacle(backend, recipes["static_int8"]) == "" for backend in backends.BACKENDS)
    assert backends.obstacle("onnxruntime", recipes["dynamic_int8"]) == ""
    for backend in ("openvino", "openvino_bf16", "torch_compile", "executorch"):
        assert backends.obstacle(backend, recipes["dynamic_int8"]) == f"{backend} has no form of DynamicInt8Linear"


def test_the_command_line_names_every_backend(capsys):
    from vitbench.cli import _parser

    with pytest.raises(SystemExit):
        _parser().parse_args(["measure", "--help"])
    text = capsys.readouterr().out
    assert all(backend in text for backend in backends.BACKENDS)


@pytest.mark.parametrize(
    ("engine", "vnni", "kernel", "warning"),
    [
        ("x86", True, "int8 kernel x86 with VNNI", ""),
        ("x86", False, "int8 kernel x86 without VNNI, activations in 7 bits", "no VNNI .* keep to 7 bits"),
        ("none", False, "no int8 kernel, floating point", "multiplied in floating point, .* say nothing about int8"),
    ],
)
def test_a_cpu_that_lacks_something_says_so_once(monkeypatch, engine, vnni, kernel, warning):
    monkeypatch.setattr(int8, "_int8_engine", lambda: engine)
    monkeypatch.setattr(int8, "_has_vnni", lambda: vnni)
    int8._say_what_is_missing.cache_clear()
    layer, x = DynamicInt8Linear(8, 4), torch.randn(3, 8)
    assert int8.int8_kernel() == kernel
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x)
        layer(x)
    int8._say_what_is_missing.cache_clear()
    assert len(caught) == bool(warning)
    if warning:
        with pytest.warns(UserWarning, match=warning):
            layer(x)
    int8._say_what_is_missing.cache_clear()
