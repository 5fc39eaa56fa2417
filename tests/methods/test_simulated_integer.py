"""Simulated integers: powers of two, factors and reparameterised norms, and what becomes of the answers."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.batches import eval_batches
from vitbench.methods.registry import compress, make_config
from vitbench.methods.simulated_integer import FQ_VIT, REPQ_VIT, SimulatedInteger, reparameterise
from vitbench.model import artifact, blocks, vit
from vitbench.model.layers import (
    Log2Rounded,
    PackedLinear,
    RMSNorm,
    Rounded,
    RoundedAttention,
    RoundedNorm,
    fake_quantize,
)
from vitbench.training.loop import evaluate


@pytest.fixture(scope="module")
def images(base, digits):
    return next(eval_batches(digits.test, base.model.recipe.preprocess))[0]


@pytest.fixture(scope="module")
def fq(base, digits):
    return compress(base.model, FQ_VIT, digits).model


def test_powers_of_two():
    layer = Log2Rounded(3)
    shares = torch.tensor([1.0, 0.8, 0.6, 0.25, 0.2, 2**-6, 2**-7, 1e-9, 0.0])
    assert layer(shares).tolist() == [1, 1, 0.5, 0.25, 0.25, 2**-6, 0, 0, 0]
    roots = Log2Rounded(4, 2**0.5)
    assert torch.allclose(roots(torch.tensor([1.0, 0.7, 0.5, 0.36])), torch.tensor([1, 2**-0.5, 0.5, 2**-1.5]))
    assert len(roots(torch.rand(10_000)).unique()) <= 16


def test_a_scale_fits_powers_to_small_shares():
    torch.manual_seed(0)
    shares = (torch.randn(100, 197) / 2).softmax(-1)
    plain, fitted = Log2Rounded(4, 2**0.5), Log2Rounded(4, 2**0.5)
    fitted.fit_scale(torch.histc(-shares.log2(), 960, 0, 24), 24)
    assert fitted.scale < 0.2
    assert (fitted(shares) - shares).norm() < 0.5 * (plain(shares) - shares).norm()


def test_each_channel_gets_a_range_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(20_000, 3) * torch.tensor([1.0, 30, 0.1]) + torch.tensor([0.0, 5, 3])
    low, high = x.amin(0), x.amax(0)
    counts = torch.stack([torch.histc(*one) for one in zip(x.T, [512] * 3, low.tolist(), high.tolist())])
    whole, fitted = Rounded(4, 3).set_range(low, high), Rounded(4, 3).fit_range(counts, low, high)
    errors = [(layer(x) - x).square().mean(0) / x.var(0) for layer in (whole, fitted)]
    assert (errors[1] < 0.9 * errors[0]).all()
    assert (errors[1] < 0.02).all()


def test_attention_answers_as_timms():
    torch.manual_seed(0)
    attn = vit.create_model("vit_mini_patch2_8").blocks[0].attn
    x = torch.randn(2, 17, 64)
    assert torch.allclose(RoundedAttention.from_attention(attn)(x, attn_mask=None, is_causal=False), attn(x), atol=1e-5)


def test_factors_are_powers_of_two_of_one_step(fq):
    names = [name for name, module in fq.named_modules() if isinstance(module, RoundedNorm)]
    assert names == [*(f"blocks.{i}.norm{j}" for i in range(4) for j in (1, 2)), "norm"]
    used = set()
    for name in names:
        made = fq.get_submodule(name).input
        factors = made.step / made.step.min()
        assert set(factors.tolist()) <= {1, 2, 4, 8}
        assert len(made.zero.unique()) == 1
        used |= set(factors.tolist())
    assert len(used) > 1


def test_reparameterised_norms_change_no_answer_and_round_each_channel():
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(12), nn.Linear(12, 7, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(12) + 0.1)
        norm.weight[3] *= 30
        norm.bias.copy_(torch.randn(12))
        x = norm(tokens := 2 * torch.randn(500, 12))
        each = Rounded(4, 12).set_range(x.amin(0), x.amax(0))
        wanted, coarse = layer(x), nn.functional.linear(each(x), layer.weight)
        one = reparameterise(norm, layer, each)
        assert one.step.ndim == one.zero.ndim == 0
        assert torch.allclose(layer(norm(tokens)), wanted, atol=1e-4)
        codes = (one(norm(tokens)) / one.step + one.zero).round()
        assert (codes == (each(x) / each.step + each.zero).round()).float().mean() > 0.999, "but for ties"
        apart = (layer(one(norm(tokens))) - coarse).abs().amax(1)
        assert (apart < 1e-3).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"softmax": "log_sqrt2", "norms": "reparameterised", "attention_bits": 8, "range": "mse"}]
)
def test_eight_bits_keep_the_answers(base, digits, images, changes):
    small = compress(base.model, FQ_VIT.replace(**changes), digits).model
    with torch.inference_mode():
        wanted = base.model(images)
        assert (small(images) - wanted).norm() < 0.15 * wanted.norm()
    assert evaluate(small, digits.test).top1.mean() > evaluate(base.model, digits.test).top1.mean() - 0.02


@pytest.mark.slow
def test_reparameterised_norms_help_where_a_channel_is_large(base, digits, images):
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for name, norm in blocks.preceding_norms(model).items():  # one channel far above the others; no answer changes
            norm.weight[3] *= 30
            norm.bias[3] *= 30
            model.get_submodule(name).weight[:, 3] /= 30
        wanted = base.model(images)
        assert torch.allclose(model(images), wanted, atol=1e-3)
        apart = {}
        for norms in ("reparameterised", "plain"):
            apart[norms] = float((compress(model, REPQ_VIT.replace(norms=norms), digits).model(images) - wanted).norm())
    assert apart["reparameterised"] < 0.7 * apart["plain"]


@pytest.mark.slow
def test_second_order_weights_answer_better(base, digits, images):
    apart = {}
    for rounding in ("nearest", "second_order"):
        small = compress(base.model, REPQ_VIT.replace(rounding=rounding), digits).model
        with torch.inference_mode():
            apart[rounding] = float((small(images) - base.model(images)).norm())
    assert apart["second_order"] < 0.9 * apart["nearest"]


def with_a_large_channel(base):
    """The base with one channel of the tokens, and what reads it, far from the others."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight[3] *= 8
                norm.bias[3] *= 8
            for layer in (block.attn.qkv, block.mlp.fc1):
                layer.weight[:, 3] /= 8
    return model


@pytest.mark.slow
def test_rotated_tokens_help_where_a_channel_is_large(base, digits, images):
    model = with_a_large_channel(base)
    with torch.inference_mode():
        wanted, apart = base.model(images), {}
        assert torch.allclose(model(images), wanted, atol=1e-3)
        for rotate in (False, True):
            config = REPQ_VIT.replace(norms="plain", rotate=rotate)
            apart[rotate] = float((compress(model, config, digits).model(images) - wanted).norm())
    assert apart[True] < 0.7 * apart[False]


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["power_of_two", "reparameterised", "plain"])
def test_a_rotated_model_goes_through_the_file_with_all_norms(base, digits, images, norms, tmp_path):
    config = FQ_VIT.replace(norms=norms, rotate=True, range="mse", attention_bits=8)
    small = compress(base.model, config, digits).model
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    with torch.inference_mode():
        wanted = base.model(images)
        assert (loaded(images) - wanted).norm() < 0.15 * wanted.norm()
        assert torch.equal(loaded(images[:8]), small(images[:8]))
    norm = loaded.blocks[1].norm2
    assert isinstance(norm, RMSNorm)
    assert isinstance(norm.input, Rounded) == (norms == "power_of_two")
    assert torch.equal(norm.weight, torch.ones(64)) == (norms != "reparameterised")


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["power_of_two", "reparameterised"])
def test_reconstruction_moves_ranges_with_the_weights_and_answers_better(base, digits, images, norms, tmp_path):
    few = {"weight_bits": 3, "activation_bits": 3, "attention_bits": 3, "norms": norms, "rotate": True}
    apart, made = {}, {}
    for steps in (0, 60):
        small = compress(base.model, REPQ_VIT.replace(**few, reconstruction=steps), digits).model
        made[steps] = artifact.load(artifact.save(small, tmp_path / str(steps)))
        with torch.inference_mode():
            assert torch.equal(made[steps](images[:8]), small(images[:8]))
            apart[steps] = float((small(images) - base.model(images)).norm())
    assert apart[60] < 0.9 * apart[0]
    for name in ("attn.q", "attn.qkv.input", "mlp.fc2.input"):
        old, new = (model.blocks[1].get_submodule(name) for model in made.values())
        assert old.bits == new.bits == 3
        assert not torch.equal(old.step, new.step), name
    specs = [artifact.recipe_of(model).layers for model in made.values()]
    assert specs[0] == specs[1]


def test_a_joint_fit_answers_better_without_labels(base, digits, images, tmp_path):
    few = {"weight_bits": 3, "activation_bits": 3, "rotate": True, "norms": "plain", "softmax": "log2"}
    fit = {"epochs": 4, "batch_size": 32, "lr": 2e-3, "warmup_epochs": 0, "kd_weight": 1.0, "mixup": 0.0}
    rounded, fitted = (
        compress(base.model, REPQ_VIT.replace(**few, train=train), digits) for train in (fit | {"epochs": 0}, fit)
    )
    assert len(fitted.history) == 4
    wrong = dataclasses.replace(digits.calibration, labels=(digits.calibration.labels + 1) % 10)
    unlabelled = compress(
        base.model, REPQ_VIT.replace(**few, train=fit), dataclasses.replace(digits, calibration=wrong)
    )
    loaded = artifact.load(artifact.save(fitted.model, tmp_path / "fitted"))
    with torch.no_grad():
        target = base.model(images).log_softmax(-1)
        errors = {}
        for name, model in {"rounded": rounded.model, "fitted": fitted.model}.items():
            errors[name] = nn.functional.kl_div(
                model(images).log_softmax(-1), target, log_target=True, reduction="batchmean"
            )
        assert errors["fitted"] < 0.7 * errors["rounded"]
        assert torch.equal(unlabelled.model(images), fitted.model(images))
        assert torch.equal(loaded(images), fitted.model(images))
    steps = [module.step for name, module in fitted.model.named_modules() if name.endswith("qkv.input")]
    starts = [module.step for name, module in rounded.model.named_modules() if name.endswith("qkv.input")]
    assert not any(torch.equal(step, start) for step, start in zip(steps, starts, strict=True))


def test_a_joint_fit_takes_no_answers_of_a_training_on_other_images(base, few_digits, tmp_path, monkeypatch):
    fit = {"epochs": 1, "batch_size": 32, "lr": 2e-3, "warmup_epochs": 0, "kd_weight": 1.0, "mixup": 0.0, "views": 1}
    config = SimulatedInteger(weight_bits=3, activation_bits=3, train=fit)
    data = few_digits.reload(train=128)  # of which 32 calibrate
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path / "empty"))
    expected = compress(base.model, config, data)
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path / "warm"))
    compress(base.model, make_config("weight_only", {"bits": 4, "train": fit}), data)  # keeps its teacher's logits
    found = compress(base.model, config, data)
    assert [epoch["loss"] for epoch in found.history] == [epoch["loss"] for epoch in expected.history]


def test_the_file_is_small_and_loads_as_it_was(base, digits, images, tmp_path):
    small = compress(base.model, REPQ_VIT.replace(norms="power_of_two"), digits).model
    path, dense = artifact.save(small, tmp_path / "small"), artifact.save(base.model, tmp_path / "base")
    assert artifact.size_on_disk(path) < 0.25 * artifact.size_on_disk(dense)
    loaded = artifact.load(path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in small.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(loaded(images[:8]), small(images[:8]))
    block = loaded.blocks[1]
    assert isinstance(block.attn, RoundedAttention)
    assert isinstance(block.attn.softmax, Log2Rounded)
    assert isinstance(block.norm2.input, Rounded)
    assert isinstance(block.mlp.fc2, PackedLinear)
    assert block.mlp.fc2.bits == block.mlp.fc2.input.bits == 4
    assert loaded.head.bits == loaded.head.input.bits == 8
    x = torch.randn(9, 256)
    made = block.mlp.fc2.input
    assert torch.equal(made(x), fake_quantize(x, made.step, made.zero, 4))


def test_pruned_heads_are_fine(base, digits, images):
    config = make_config("pruning", {"heads": 0.25, "head_dims": 0.25, "train": {"epochs": 0}})
    pruned = compress(base.model, config, digits).model
    small = compress(pruned, FQ_VIT.replace(attention_bits=8), digits).model
    assert blocks.block_shapes(small) == blocks.block_shapes(pruned)
    with torch.inference_mode():
        assert (small(images) - pruned(images)).norm() < 0.2 * pruned(images).norm()


def test_refused_models(base, digits):
    with pytest.raises(InputError, match="simulated_integer fixes ranges on calibration images and no data set"):
        compress(base.model, FQ_VIT)
    tokens = make_config("pruning", {"tokens": 0.3, "compensation": "none", "train": {"epochs": 0}})
    with pytest.raises(InputError, match="reduces tokens"):
        compress(compress(base.model, tokens, digits).model, FQ_VIT, digits)
    with pytest.raises(InputError, match="has a dense qkv layer in 0 of 4 blocks"):
        compress(compress(base.model, FQ_VIT, digits).model, FQ_VIT, digits)
    odd = copy.deepcopy(base.model)
    odd.blocks[2].attn.q_norm = nn.LayerNorm(16)
    with pytest.raises(InputError, match=r"the attention in blocks\.2 of vit_mini_patch2_8 has a q_norm"):
        compress(odd, FQ_VIT, digits)
    odd = copy.deepcopy(base.model)
    odd.blocks[1].norm2 = nn.Identity()
    with pytest.raises(InputError, match=r"blocks\.1 of vit_mini_patch2_8 has no LayerNorm.*give norms=plain"):
        compress(odd, FQ_VIT, digits)
    with pytest.raises(InputError, match="weight_bits = 9"):
        SimulatedInteger(weight_bits=9)
