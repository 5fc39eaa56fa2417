"""What is stored in float16 is rounded as float16 rounds: subnormal numbers stay, and no step that divides becomes 0."""

import numpy as np
import pytest
import torch
from torch import nn

from vitbench.base.errors import InputError
from vitbench.methods.registry import compress, make_config
from vitbench.methods.simulated_integer import reparameterise
from vitbench.model import vit
from vitbench.model.layers import Log2Rounded, Rounded
from vitbench.training.coded import MIN_FLOAT16, round_to_half

VALUES = [0.0, 1e-9, -2.9e-8, 3.1e-8, 5.9e-8, -1e-6, 1e-5, 6.1e-5, 6.2e-5, 0.1, -3.0, 65504.0]


def test_every_tensor_becomes_what_numpys_float16_holds():
    layer = nn.Linear(len(VALUES), 1)
    layer.weight.data = torch.tensor([VALUES])
    layer.bias.data = torch.tensor([1e-6])
    round_to_half(layer)
    assert layer.weight[0].tolist() == np.array(VALUES, np.float16).astype(np.float32).tolist()
    assert float(layer.bias.detach()) == pytest.approx(1e-6, abs=MIN_FLOAT16 / 2)
    assert np.float32(np.nextafter(np.float16(0), np.float16(1))) == MIN_FLOAT16


def test_a_step_that_divides_stays_above_0():
    for layer, name in ((Rounded(8), "step"), (Rounded(8, 3), "step"), (Log2Rounded(4), "scale")):
        setattr(layer, name, torch.full_like(getattr(layer, name), 1e-9))
        round_to_half(layer)
        assert bool((getattr(layer, name) == MIN_FLOAT16).all())
        assert bool(torch.isfinite(layer(torch.rand(2, 3))).all()), type(layer).__name__


def test_reparameterised_zero_points_are_whole_numbers_in_float16():
    """A channel that hardly changes has a zero point in the ten thousands, which would move the mean of all."""
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(12), nn.Linear(12, 7)
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0, 40
        x = norm(tokens := torch.randn(500, 12))
        wanted, low = layer(x), x.amin(0)
        each = Rounded(4, 12).set_range(low, x.amax(0).maximum(low + 0.02))
        assert float(each.zero.abs().max()) > 20_000
        one = reparameterise(norm, layer, each)
        assert torch.allclose(layer(norm(tokens)), wanted, atol=1e-3)
        zero = float(one.zero)
        round_to_half(one)
    assert float(one.zero) == zero
    assert zero in range(16)


def test_a_value_above_float16s_largest_is_refused():
    layer = nn.Linear(1, 1)
    layer.weight.data.fill_(7e4)
    with pytest.raises(InputError, match="does not fit float16; give rest=float32"):
        round_to_half(layer)


def test_small_layer_scales_and_small_steps_lose_no_more_than_float16_loses():
    """Weights a sixteenth as large have steps of 1e-5 in groups of 32: the answers stay as near as those of large steps."""
    apart, x = {}, torch.randn(16, 3, 8, 8)
    for size in (1.0, 1 / 16):
        model = vit.create_model("vit_mini_patch2_8").requires_grad_(False)
        for block in model.blocks:
            block.ls1 = block.ls2 = LayerScale(model.embed_dim, 1e-6)
            for layer in (block.mlp.fc1, block.mlp.fc2):
                layer.weight.data *= size
        config = make_config("weight_only", {"bits": 8, "group": 32, "ends_bits": None})
        small = compress(model, config).model
        scale = small.blocks[0].ls1.gamma
        assert torch.allclose(scale, torch.full_like(scale, 1e-6), atol=MIN_FLOAT16 / 2)
        for block, given in zip(small.blocks, model.blocks, strict=True):
            block.ls1, block.ls2, given.ls1, given.ls2 = (nn.Identity() for _ in range(4))
        with torch.inference_mode():
            apart[size] = float((small(x) - model(x)).abs().max() / model(x).std())
    assert apart[1.0] < 0.05
    assert apart[1 / 16] < 2 * apart[1.0]


class LayerScale(nn.Module):
    """A factor for each channel, as timm's blocks have it."""

    def __init__(self, dim, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x):
        return x * self.gamma
