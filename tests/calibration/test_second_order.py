"""Second-order rounding: the outputs' error, step by step, and weight-only codes with groups."""

import itertools

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.calibration.gptq import gptq_codes
from vitbench.calibration.quantizers import code_range, min_error_step
from vitbench.data.batches import eval_batches
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import PackedLinear
from vitbench.model.layers.packed import packed_bytes
from vitbench.training.loop import evaluate


@pytest.fixture(scope="module")
def layer():
    """A weight and the covariance of inputs that are far from independent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return torch.randn(48, 64, generator=generator), (x.T @ x / 2000).double()


def lost(weight, rounded, covariance):
    change = (weight - rounded).double()
    return float(((change @ covariance) * change).sum())


def nearest(weight, bits, group):
    groups, (low, high) = weight.reshape(-1, group), code_range(bits)
    step = min_error_step(groups, bits, 1)
    return ((groups / step).round().clamp(low, high) * step).view_as(weight)


@pytest.mark.parametrize(("bits", "group"), list(itertools.product((2, 3, 4), (16, 64))))
def test_outputs_change_less_than_by_the_nearest_codes(layer, bits, group):
    weight, covariance = layer
    errors = [lost(weight, nearest(weight, bits, group), covariance)]
    for sweeps in (0, 1, 4):
        codes, step = gptq_codes(weight, covariance, bits, group, refinements=sweeps)
        low, high = code_range(bits)
        assert codes.shape == weight.shape
        assert step.shape == (48, 64 // group)
        assert codes.min() >= low
        assert codes.max() <= high
        assert torch.equal(codes, codes.round())
        errors.append(lost(weight, codes * step.repeat_interleave(group, 1), covariance))
    assert errors[1] < 0.7 * errors[0]
    assert errors == sorted(errors, reverse=True)


def test_groups_of_any_size_get_steps_of_their_own():
    """96 does not divide into the blocks of columns that are corrected together."""
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(8, 96), 100 * torch.randn(8, 96)], 1)
    codes, step = gptq_codes(weight, torch.eye(192).double(), 4, 96)
    assert float((step[:, 1] / step[:, 0]).abs().min()) > 10
    assert lost(weight, codes * step.repeat_interleave(96, 1), torch.eye(192).double()) < 0.02 * float(
        weight.square().sum()
    )


def test_one_column_after_the_other_is_optimal_for_two_columns():
    """Of two correlated inputs the second makes up for the first: here its best code is not the nearest."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
    weight = torch.tensor([[1.4, 2.0], [-3.0, 1.0]])
    codes, step = gptq_codes(weight, covariance, 3, 2, damping=1e-6, refinements=8)
    found = lost(weight, codes * step, covariance)
    for row in range(2):  # no other pair of codes with this row's step does better
        for pair in itertools.product(range(-4, 4), repeat=2):
            other = (codes * step).clone()
            other[row] = torch.tensor(pair) * step[row]
            assert lost(weight, other, covariance) >= found - 1e-9


def test_independent_inputs_give_nearest_codes(layer):
    weight, _ = layer
    codes, step = gptq_codes(weight, torch.eye(64).double(), 4, 16, refinements=0)
    wide = step.repeat_interleave(16, 1)
    low, high = code_range(4)
    assert torch.equal(codes, (weight / wide).round().clamp(low, high))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [32, None])
def test_a_file_is_bits_times_weights_and_steps(base, tmp_path, bits, group):
    small = compress(base.model, make_config("weight_only", {"bits": bits, "group": group})).model
    path = artifact.save(small, tmp_path / "small")
    predicted = 0
    for name, dense in vit.linear_layers(base.model).items():
        layer, count = small.get_submodule(name), dense.weight.numel()
        assert layer.codes.numel() == packed_bytes(count, bits)
        predicted += count * bits / 8 + 2 * (count // group if group else dense.out_features)  # steps take 16 bits
    assert artifact.bytes_by_part(path)["block weights"] == pytest.approx(predicted, rel=1e-6)
    x, loaded = torch.randn(3, 3, 8, 8), artifact.load(path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in small.state_dict().items())
    assert torch.allclose(loaded(x), small(x), atol=1e-4)  # kernels may differ in the last bit


def test_weights_are_unpacked_by_blocks_of_rows():
    torch.manual_seed(0)
    for bits, group in itertools.product((2, 3, 5, 8), (None, 4)):
        layer = PackedLinear(12, 600, bits, group=group)
        layer.set_codes(
            torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (600, 12)), torch.randn(layer.step.shape), None
        )
        x = torch.randn(2, 5, 12)
        assert torch.allclose(layer(x), x @ layer.dense().T, atol=1e-4)
        assert torch.equal(layer.dense(256, 512), layer.dense()[256:512])


@pytest.mark.slow
def test_second_order_keeps_more_of_the_answers_than_nearest(base, digits):
    wanted, apart = evaluate(base.model, digits.test).top1.mean(), {}
    x = torch.cat([batch for batch, _ in eval_batches(digits.test, base.model.recipe.preprocess)])
    for rounding in ("nearest", "second_order"):
        config = make_config("weight_only", {"bits": 2, "group": 16, "rounding": rounding, "rest": "float32"})
        small = compress(base.model, config, digits).model
        with torch.inference_mode():
            apart[rounding] = float((small(x) - base.model(x)).square().mean())
        assert any(bool((layer.step < 0).any()) for layer in small.modules() if isinstance(layer, PackedLinear))
    assert apart["second_order"] < 0.5 * apart["nearest"]
    assert evaluate(small, digits.test).top1.mean() > wanted - 0.05


@pytest.mark.slow
def test_training_goes_on_from_second_order_codes(base, digits):
    config = make_config("weight_only", {"bits": 2, "group": 16, "rounding": "second_order", "train": {"epochs": 1}})
    result = compress(base.model, config, digits)
    small = result.model
    assert len(result.history) == 1
    assert small.blocks[0].mlp.fc1.step.shape == (256, 4)


@pytest.mark.slow
def test_bits_by_layer_meet_a_target_of_bytes(base, digits, tmp_path):
    """At the bytes of 3 bits everywhere: the target is met to a layer's bits, and the answers change less."""
    x = torch.cat([batch for batch, _ in eval_batches(digits.test, base.model.recipe.preprocess)])
    same = compress(base.model, make_config("weight_only", {"bits": 3})).model
    target = sum(tensor.numel() * (2 if tensor.is_floating_point() else 1) for tensor in same.state_dict().values())
    small = compress(base.model, make_config("weight_only", {"target_bytes": target}), digits).model
    held = artifact.bytes_by_part(artifact.save(small, tmp_path / "small"))
    held = sum(held.values()) - held["names and recipe"]
    assert 0.97 * target < held <= target
    bits = {small.get_submodule(name).bits for name in vit.linear_layers(base.model)}
    assert len(bits) > 1
    assert bits <= set(range(2, 9))
    with torch.inference_mode():
        apart = [float((model(x) - base.model(x)).square().mean()) for model in (same, small)]
    assert apart[1] < apart[0]


def test_what_cannot_be_rounded_says_why(base, digits):
    with pytest.raises(InputError, match=r"group = 48 does not divide the 64 inputs of blocks.0.attn.qkv; give one"):
        compress(base.model, make_config("weight_only", {"group": 48}))
    with pytest.raises(InputError, match="rounding=second_order needs calibration images and no data set was given"):
        compress(base.model, make_config("weight_only", {"rounding": "second_order"}))
    with pytest.raises(
        InputError, match=r"target_bytes = 1,000 is below the smallest size: with 2 bits in each of the 16 layers"
    ):
        compress(base.model, make_config("weight_only", {"target_bytes": 1000}), digits)
    with pytest.raises(InputError, match="target_bytes needs calibration images and no data set was given"):
        compress(base.model, make_config("weight_only", {"target_bytes": 10**6}))
    with pytest.raises(InputError, match="bits"):
        make_config("weight_only", {"bits": 9})
