"""Static int8: ranges, smoothed channels, the outputs, and a backend's integer kernels."""

import copy
import importlib.util

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.calibration.quantizers import channel_ranges, least_error_range
from vitbench.data.batches import eval_batches
from vitbench.measurement import backends
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import compress, make_config
from vitbench.methods.static_int8 import _smooth_channels
from vitbench.model import artifact, blocks, vit
from vitbench.model.layers import StaticInt8Linear
from vitbench.rows import comparison_table
from vitbench.rows.runs import Run
from vitbench.training.loop import evaluate

needs_openvino = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in backends.BACKENDS["openvino"].packages),
    reason="the extra openvino is not installed",
)


@pytest.fixture(scope="module")
def small(base, digits):
    return compress(base.model, make_config("static_int8"), digits).model


@pytest.fixture(scope="module")
def whole(base, digits):
    """With attention's products in codes too."""
    return compress(base.model, make_config("static_int8", {"attention": True}), digits).model


def rounding_error(values, low, high):
    step = (high - low) / 255
    zero = round(-low / step)
    return float((torch.fake_quantize_per_tensor_affine(values, step, zero, 0, 255) - values).square().mean())


def test_a_layer_is_its_whole_numbers():
    """The product of codes, written out in integers."""
    torch.manual_seed(0)
    layer, x = StaticInt8Linear(6, 4, input_step=0.05, input_zero=90), 3 * torch.randn(10, 6)
    layer.weight = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    layer.scale, layer.bias = torch.rand(4), torch.randn(4)
    codes = ((x / 0.05).round() + 90).clamp(0, 255).long()
    product = (codes - 90) @ layer.weight.long().T
    assert torch.allclose(layer(x), product * 0.05 * layer.scale + layer.bias, atol=1e-3)
    assert int((codes == 0).sum()) > 0, "some values lie outside"


def test_the_range_with_the_least_error_is_lopsided_and_cuts_outliers():
    torch.manual_seed(0)
    values = torch.cat([torch.nn.functional.gelu(torch.randn(2_000_000)), torch.tensor([20.0])])
    low, high = float(values.min()), float(values.max())
    found = least_error_range(torch.histc(values, 2048, low, high).double(), low, high)
    assert rounding_error(values, *found) < 0.5 * rounding_error(values, low, high)
    assert found[1] < 10
    assert -found[0] < 0.1 * found[1]
    flat = least_error_range(torch.ones(2048).double(), -1.0, 1.0)
    assert flat == pytest.approx((-1, 1), abs=0.1)


def test_evening_out_channels_changes_no_answer(base, digits):
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] *= 30  # one channel far above the others
    layers, x = vit.linear_layers(model), torch.randn(4, 3, 8, 8)
    before, seen = model(x), channel_ranges(model, layers, digits.calibration)
    reach = {name: torch.maximum(c.low.abs(), c.high.abs()) for name, c in seen.items()}
    _smooth_channels(model, layers, seen, 0.5)
    after = channel_ranges(model, layers, digits.calibration)
    assert torch.allclose(model(x), before, atol=1e-4)
    for name, found in after.items():
        assert torch.allclose(found.high, seen[name].high, rtol=1e-3, atol=1e-5)
    name = "blocks.0.attn.qkv"
    now = torch.maximum(after[name].low.abs(), after[name].high.abs())
    assert now.max() / now.median() < 0.6 * reach[name].max() / reach[name].median()


@pytest.mark.slow
def test_answers_stay_and_compensation_helps(base, digits, small):
    wanted = evaluate(base.model, digits.test).top1.mean()
    assert evaluate(small, digits.test).top1.mean() > wanted - 0.01
    x, apart = torch.cat([batch for batch, _ in eval_batches(digits.test, base.model.recipe.preprocess)]), {}
    for compensation in (False, True):
        config = make_config("static_int8", {"compensation": compensation})
        made = compress(base.model, config, digits).model
        with torch.inference_mode():
            apart[compensation] = float((made(x) - base.model(x)).square().mean())
    assert apart[True] < apart[False]


def test_the_file_is_small_and_loads_as_it_was(base, small, tmp_path):
    path, dense = artifact.save(small, tmp_path / "small"), artifact.save(base.model, tmp_path / "base")
    assert artifact.size_on_disk(path) < 0.32 * artifact.size_on_disk(dense)
    x, loaded = torch.randn(3, 3, 8, 8), artifact.load(path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in small.state_dict().items())
    assert torch.allclose(loaded(x), small(x), atol=0.1)  # a sum that differs in its last bit may get another code
    layer = loaded.blocks[1].mlp.fc2
    assert isinstance(layer, StaticInt8Linear)
    assert layer.weight.dtype == torch.int8
    assert 0 < layer.input_zero < 60, "what comes out of GELU hardly goes below zero"


def test_no_images_no_ranges(base):
    with pytest.raises(InputError, match="static_int8 fixes ranges on calibration images and no data set was given"):
        compress(base.model, make_config("static_int8"))


def precisions(model, x, kind):
    """In what each node of a kind computes, in the graph that OpenVINO compiled."""
    run = backends.make_call("openvino", model, x).__closure__[0].cell_contents
    compiled = run.__closure__[0].cell_contents
    about = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    return [each["runtimePrecision"].astype(str) for each in about if each["layerType"].astype(str) == kind]


@needs_openvino
def test_openvino_multiplies_in_integers(small):
    """Its compiled graph holds 8-bit matrix products, one for each quantized layer."""
    x = torch.randn(8, 3, 8, 8)
    products = precisions(small, x, "FullyConnected")
    layers = sum(isinstance(module, StaticInt8Linear) for module in small.modules())
    assert sum(kind in ("u8", "i8") for kind in products) == layers == 16
    backends.prepare("openvino", small, x)


@needs_openvino
def test_openvino_makes_attention_in_integers_where_it_is_rounded(small, whole):
    x = torch.randn(8, 3, 8, 8)
    fused = [precisions(model, x, "Subgraph").count("i8") for model in (small, whole)]
    assert fused == [0, 4], "one for each block"
    backends.prepare("openvino", whole, x)


def test_rounded_attention_keeps_answers_and_comes_back_from_its_file(base, digits, whole, tmp_path):
    assert evaluate(whole, digits.test).top1.mean() > evaluate(base.model, digits.test).top1.mean() - 0.01
    x, loaded = torch.randn(3, 3, 8, 8), artifact.load(artifact.save(whole, tmp_path / "whole"))
    assert torch.allclose(loaded(x), whole(x), atol=0.1)
    attn = loaded.blocks[2].attn
    assert [attn.q.zero, attn.k.zero, attn.v.zero, attn.softmax.zero] == [128, 128, 128, 0]
    assert 0 < attn.softmax.step <= 1 / 255


def test_attention_that_passes_roundings_by_is_refused(base, digits):
    merged = copy.deepcopy(base.model)
    blocks.reduce_tokens(merged, "merge", [None, 12, 12, 12])
    for model, why in ((merged, "reduces tokens"), (with_query_norms(base.model), "has a q_norm")):
        with pytest.raises(InputError, match=why):
            compress(model, make_config("static_int8", {"attention": True}), digits)


def with_query_norms(model):
    model = copy.deepcopy(model)
    model.blocks[2].attn.q_norm = torch.nn.LayerNorm(model.blocks[2].attn.head_dim)
    return model


@pytest.mark.slow
@needs_openvino
def test_openvino_scores_and_times_against_eager(base, small, digits, tmp_path):
    path, run = artifact.save(small, tmp_path / "small"), Run(tmp_path / "run")
    measure(base.path, digits, run, what=("accuracy",))
    rows = measure(
        path,
        digits,
        run,
        versus=base.path,
        what=("accuracy", "latency"),
        backend="openvino",
        versus_backend="eager",
        rounds=10,
        batches=[1],
    )
    assert set(rows["backend"]) == {"openvino"}
    rows = comparison_table.experiment_rows(run.rows())
    assert comparison_table.find_row(rows, "static_int8", "latency_ratio", 1, "openvino") is None
    assert comparison_table.find_row(rows, "static_int8", "latency_ratio", 1, "openvino", versus="eager")["value"] > 0
    top1 = comparison_table.find_row(rows, "static_int8", "top1", backend="openvino")
    assert top1["value"] == pytest.approx(evaluate(small, digits.test).top1.mean(), abs=0.01)
    assert top1["context"]["images"] == len(digits.test)
