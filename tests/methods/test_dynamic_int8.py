"""Dynamic int8: the arithmetic against references."""

import warnings

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.measurement.cost import count_macs
from vitbench.methods.dynamic_int8 import DynamicInt8, quantize_rows, to_dynamic_int8
from vitbench.methods.registry import compress
from vitbench.model.layers import int8 as layers


def test_codes_are_the_nearest_of_each_rows_grid():
    weight = torch.randn(7, 33) * torch.logspace(-3, 1, 7)[:, None]
    codes, steps = quantize_rows(weight)
    assert codes.abs().amax(1).eq(127).all()
    assert ((steps[:, None] * codes - weight).abs() <= steps[:, None] / 2 * 1.0001).all()


def test_a_row_of_zeros_stays_zero():
    codes, steps = quantize_rows(torch.zeros(2, 5))
    assert not codes.any()
    assert steps.eq(1).all()


def test_one_step_for_all_rows_is_worse():
    weight = torch.randn(6, 64) * torch.logspace(-2, 0, 6)[:, None]

    def error(per_channel):
        codes, steps = quantize_rows(weight, per_channel)
        return ((steps[:, None] * codes - weight).norm(dim=1) / weight.norm(dim=1)).max()

    assert error(True) < 0.02 < error(False)


@pytest.mark.parametrize("shape", [(5, 48), (2, 17, 48)])
def test_the_kernel_computes_what_is_written_out(shape):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32)
    layer, x = to_dynamic_int8(linear), torch.randn(shape) + 0.3
    exact = torch.nn.functional.linear(x, layer.weight.float() * layer.scale[:, None], layer.bias)
    scale = exact.norm()
    bits = 8 if layers._has_vnni() else 7
    assert (layer(x) - layer.reference(x, bits)).norm() / scale < 0.005
    assert (layer(x) - exact).norm() / scale < 0.012 * 2 ** (8 - bits)
    assert layer(x).shape == exact.shape


def test_it_agrees_with_pytorchs_own_dynamic_quantization():
    quantization = pytest.importorskip("torch.ao.quantization", reason="this torch no longer has quantize_dynamic")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = quantization.per_channel_dynamic_qconfig
        theirs = quantization.quantize_dynamic(model, {torch.nn.Linear: kind}, dtype=torch.qint8)
    x = torch.randn(9, 64)
    ours, exact = to_dynamic_int8(model[0])(x), model(x)
    assert (ours - exact).norm() <= (theirs(x) - exact).norm() * 1.1


def test_without_the_kernel_the_written_out_form_answers(monkeypatch):
    layer, x = to_dynamic_int8(torch.nn.Linear(8, 4)), torch.randn(3, 8)
    monkeypatch.setattr(layers, "_int8_engine", lambda: "none")
    assert torch.equal(layer(x), layer.reference(x))


def test_packed_weights_follow_a_change_of_weights():
    layer, x = to_dynamic_int8(torch.nn.Linear(8, 4)), torch.randn(3, 8)
    before = layer(x)
    state = {**layer.state_dict(), "weight": torch.zeros_like(layer.weight)}
    layer.load_state_dict(state)
    assert not torch.equal(layer(x), before)
    assert torch.allclose(layer(x), layer.bias.expand(3, 4))


def test_macs_do_not_change_and_the_chosen_layers_do(base):
    small = compress(base.model, DynamicInt8(layers=("fc1", "fc2"))).model
    kinds = {
        name.rsplit(".")[-1] for name, module in small.named_modules() if isinstance(module, layers.DynamicInt8Linear)
    }
    assert kinds == {"fc1", "fc2"}
    assert count_macs(small) == count_macs(base.model)


def test_unknown_layer_types():
    with pytest.raises(InputError, match="'qkv', 'proj', 'fc1' or 'fc2'"):
        DynamicInt8(layers=("mlp",))
