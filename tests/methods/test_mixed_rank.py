"""Mixed rank: budgets are met by real files, stages add up, it composes with quantizers, and what is refused."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch

from tests.conftest import SHARED
from vitbench.base.errors import InputError
from vitbench.calibration import compensation
from vitbench.calibration.factors import DECOMPOSITIONS, factorise
from vitbench.calibration.moments import collect_moments, forward_hooks
from vitbench.data.splits import Split, load_data
from vitbench.measurement.cost import coded_layers, count_macs, count_params, weight_error
from vitbench.methods.mixed_rank import MixedRank
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import DynamicInt8Linear, LowRankLinear, PackedLinear, SplitLinear
from vitbench.run.cache import baseline
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate

STAGE1 = MixedRank(allocation="uniform", gradient_weight=0, split_qkv=False, compensation="none")
STAGE2 = MixedRank(compensation="none")
WEIGHTS = SHARED / "weights" / "deit_tiny_patch16_224.safetensors"
IMAGENET = SHARED / "data" / "imagenet-1k-sample"


def block_weights(model):
    return sum(layer.weight.numel() for layer in vit.linear_layers(model).values())


def divergence(small, base, digits):
    """Mean KL of the answers on the val images, in nats."""
    from vitbench.data.batches import eval_batches

    total = 0.0
    with torch.inference_mode():
        for x, _ in eval_batches(digits.val, base.model.recipe.preprocess):
            old, new = (model(x).double().log_softmax(1) for model in (base.model, small))
            total += float((old.exp() * (old - new)).sum())
    return total / len(digits.val)


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
def test_the_budget_of_weights_is_met_and_used(base, digits, tmp_path, keep):
    small = compress(base.model, STAGE2.replace(keep=keep), digits).model
    left = block_weights(small) / block_weights(base.model)
    assert keep - 0.02 <= left <= keep
    file, whole = (artifact.save(model, tmp_path / name) for name, model in (("s", small), ("b", base.model)))
    saved = count_params(base.model) - count_params(small)
    sizes = [(path / "model.safetensors").stat().st_size for path in (file, whole)]
    headers = 150 * len(small.state_dict())
    assert sizes[1] - sizes[0] == pytest.approx(4 * saved, abs=headers)


def test_the_budgets_of_multiply_accumulates_and_bytes(base, digits):
    for allocation in ("greedy", "uniform"):
        config = STAGE2.replace(keep=0.8, allocation=allocation, rank_step=1)
        small = compress(base.model, config.replace(budget="macs"), digits).model
        assert 0.792 <= count_macs(small) / count_macs(base.model) <= 0.8
        small = compress(base.model, config.replace(budget="bytes"), digits).model
        assert 0.792 <= count_params(small) / count_params(base.model) <= 0.8


def test_early_versions_left_a_part_of_the_budget(base, digits):
    """Ranks are rounded down to 8 in every layer: 0.3 of the weights becomes 0.167."""
    config = STAGE1.replace(keep=0.3)
    early, now = (
        block_weights(compress(base.model, each, digits).model) / block_weights(base.model)
        for each in (config.replace(remainder="left"), config)
    )
    assert early == pytest.approx(0.167, abs=0.001)
    assert 0.29 <= now <= 0.3


def test_a_layer_stays_dense_where_a_rank_would_not_save(base, digits):
    small = compress(base.model, STAGE2.replace(keep=0.9), digits).model
    kinds = {type(small.get_submodule(name)) for name in vit.linear_layers(base.model)}
    assert torch.nn.Linear in kinds, "some layers stay dense at 0.9"
    for layer in small.modules():
        if isinstance(layer, LowRankLinear):
            assert layer.rank % 8 == 0
            assert layer.rank * (layer.in_features + layer.out_features) < layer.in_features * layer.out_features


@pytest.mark.slow
def test_each_stage_brings_the_answers_nearer(base, digits):
    far = divergence(compress(base.model, STAGE1.replace(decomposition="svd", keep=0.5), digits).model, base, digits)
    one = divergence(compress(base.model, STAGE1.replace(keep=0.5), digits).model, base, digits)
    two = divergence(compress(base.model, STAGE2.replace(keep=0.5), digits).model, base, digits)
    three = divergence(compress(base.model, MixedRank(keep=0.5), digits).model, base, digits)
    assert far > one > two > three


@pytest.mark.slow
def test_without_propagated_inputs_compensation_changes_nothing(base, digits):
    """Eckart-Young: on its own inputs the closed form is already the best of its rank."""
    config = MixedRank(keep=0.5, propagate=False)
    plain = compress(base.model, STAGE2.replace(keep=0.5), digits).model
    alone = compress(base.model, config, digits).model
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(alone(x), plain(x), atol=1e-3)
    learned = compress(base.model, config.replace(compensation="gradient", gradient_weight=0), digits).model
    fixed = compress(base.model, STAGE2.replace(keep=0.5, gradient_weight=0), digits).model
    found = collect_moments(base.model, vit.linear_layers(base.model, ("fc1",)), digits)
    factored = [name for name in found if isinstance(fixed.get_submodule(name), LowRankLinear)]
    assert factored
    for name in factored:
        weight = base.model.get_submodule(name).weight
        lost = [
            torch.trace(
                (error := (model.get_submodule(name).dense() - weight).double()) @ found[name].covariance() @ error.T
            )
            for model in (learned, fixed)
        ]
        assert lost[0] >= lost[1] * (1 - 1e-6)


@pytest.mark.slow
def test_the_learned_residual_lowers_the_error_and_keeps_the_rank(base, digits):
    names = ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    model = compress(base.model, MixedRank(keep=1.0)).model
    for name, mismatch in compensation.layer_error_moments(model, base.model, names, digits.calibration):
        layer = base.model.get_submodule(name)
        moments = collect_moments(base.model, vit.linear_layers(base.model), digits)[name]
        left, right = factorise(layer.weight, moments, mismatch.covariance).truncate(16)

        def loss(left, right, layer=layer, mismatch=mismatch):
            change = left @ right - layer.weight.double()
            return float(((change @ mismatch.covariance - 2 * mismatch.cross) * change).sum())

        new = compensation.fit_compact_residual(layer.weight, left, right, mismatch, rank=4, steps=100, ridge=0.0)
        assert [part.shape for part in new] == [left.shape, right.shape]
        if name == names[0]:
            assert loss(*new) == pytest.approx(loss(left, right), rel=1e-2), "nothing to gain on unchanged inputs"
            vit.replace_module(model, name, LowRankLinear(64, 256, 16).set_factors(left, right, layer.bias))
        else:
            assert loss(*new) < loss(left, right)


@pytest.mark.slow
def test_a_short_distillation_pays_and_is_another_setting(base, digits):
    config = MixedRank(keep=0.25, rank_step=2)
    tuned = config.replace(train=config.train.replace(epochs=2, lr=1e-3))
    free_result, trained_result = (compress(base.model, each, digits) for each in (config, tuned))
    free, trained = free_result.model, trained_result.model
    assert evaluate(trained, digits.val).top1.mean() > evaluate(free, digits.val).top1.mean()
    assert not free_result.history
    assert len(trained_result.history) == 2
    assert free.recipe.methods != trained.recipe.methods
    assert block_weights(free) == block_weights(trained)


@pytest.mark.parametrize(
    ("other", "kind"), [("dynamic_int8", DynamicInt8Linear), ("weight_only", PackedLinear)], ids=["int8", "int4"]
)
def test_it_composes_with_quantizers(base, digits, tmp_path, other, kind):
    alone = compress(base.model, STAGE2, digits).model
    both = compress(base.model, [STAGE2, make_config(other)], digits).model
    assert not vit.linear_layers(both), "no dense layer is left in the blocks"
    assert isinstance(both.blocks[1].mlp.fc1, LowRankLinear)
    assert isinstance(both.blocks[1].mlp.fc1.down, kind)
    loaded = artifact.load(artifact.save(both, tmp_path / "both"))
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(loaded(x), both(x), atol=2e-2 * both(x).abs().max())
    assert both.recipe.method == f"mixed_rank+{other}"
    assert count_params(loaded) == count_params(alone)
    sizes = [artifact.size_on_disk(artifact.save(model, tmp_path / str(i))) for i, model in enumerate((alone, both))]
    assert sizes[1] < 0.55 * sizes[0]
    assert evaluate(loaded, digits.val).top1.mean() > 0.5


def test_heads_get_ranks_of_their_own(base, digits, tmp_path):
    whole = compress(base.model, STAGE2.replace(split_qkv=False, keep=0.5, rank_step=2), digits).model
    split = compress(base.model, STAGE2.replace(split_qkv=True, keep=0.5, rank_step=2), digits).model
    assert isinstance(split.blocks[0].attn.qkv, SplitLinear)
    ranks = {part.rank for block in split.blocks for part in block.attn.qkv.parts if isinstance(part, LowRankLinear)}
    assert len(ranks) > 1
    assert not any(isinstance(module, SplitLinear) for module in whole.modules())
    path = artifact.save(split, tmp_path / "split")
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(artifact.load(path)(x), split(x), atol=1e-5)
    names = coded_layers(artifact.read_manifest(path).recipe)
    assert "blocks.0.attn.qkv" in names
    assert not any("parts" in name for name in names)
    (error,) = weight_error(path, base.path, names)
    assert len(error.samples) == len(names)
    assert 0 < error.value < 1


def test_a_recipe_with_a_part_that_is_not_there_is_refused(base, digits, tmp_path):
    path = artifact.save(compress(base.model, STAGE2.replace(split_qkv=True), digits).model, tmp_path / "a")
    manifest = json.loads((path / "recipe.json").read_text())
    layers = manifest["recipe"]["layers"]
    name = next(name for name in layers if ".parts." in name)
    layers[name.rpartition(".")[0] + ".99"] = layers.pop(name)
    del manifest["check"]
    (path / "recipe.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="layer in the recipe"):
        artifact.load(path)


def few(digits, count):
    split = digits.calibration
    return dataclasses.replace(
        digits,
        calibration=Split("calibration", split.source, split.indices[:count], split.labels[:count]),
        fingerprint=f"first {count}",
    )


def test_too_few_calibration_images_warn_with_the_number_needed(base, digits):
    with pytest.warns(UserWarning, match=r"20 calibration images give 340 tokens .* shrunk by 43 % .* 151 images"):
        compress(base.model, STAGE2, few(digits, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(base.model, STAGE2, few(digits, 151))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, "keep = 0"),
        ({"keep": 1.2}, "keep = 1.2"),
        ({"layers": ["norm1"]}, "layers"),
        ({"keep": 0.01}, "give a larger keep"),
        ({"keep": 0.02, "allocation": "uniform"}, "weights below what rank 8 in every layer needs"),
        ({"keep": 0.02, "allocation": "uniform", "remainder": "left"}, "below rank_step = 8"),
        ({"allocation": "uniform", "budget": "macs", "remainder": "left"}, "give remainder=spent for budget=macs"),
        ({"decomposition": "qr"}, "decomposition"),
        ({"ridge": -1}, "ridge = -1"),
    ],
)
def test_wrong_settings(base, digits, values, message):
    with pytest.raises(InputError, match=message):
        compress(base.model, make_config("mixed_rank", values), digits)


def test_images_are_needed(base, digits):
    with pytest.raises(InputError, match="needs calibration images"):
        compress(base.model, MixedRank())
    with pytest.raises(InputError, match="has no calibration images"):
        compress(base.model, MixedRank(), load_data("digits", test=1.0))


def test_layers_that_are_not_linear_any_more_are_refused(base, digits):
    small = compress(base.model, make_config("dynamic_int8")).model
    with pytest.raises(InputError, match="has a dense qkv layer in 0 of 4 blocks"):
        compress(small, MixedRank(), digits)


@pytest.mark.slow
@pytest.mark.skipif(
    not (WEIGHTS.exists() and IMAGENET.exists()), reason="needs DeiT-Tiny and an ImageNet sample in ../shared"
)
def test_stage_one_on_real_weights_and_photographs():
    """Measured output error = the discarded eigenvalues to 1e-5 on every layer, and no rival has less at equal rank."""
    data = load_data(IMAGENET, test=744, val=0, calibration=64)
    base = baseline("deit_tiny_patch16_224", data, TrainConfig(epochs=0), checkpoint=WEIGHTS)
    layers = vit.linear_layers(base.model)
    found = collect_moments(base.model, layers, data)
    formed, errors = {}, {}
    for name, layer in layers.items():
        rank = layer.in_features * layer.out_features // (layer.in_features + layer.out_features) // 2 // 8 * 8
        weight, moments = layer.weight.detach().double(), found[name]
        for how in DECOMPOSITIONS:
            factors = factorise(weight, moments, moments.covariance(), how)
            left, right = factors.truncate(rank)
            formed[name, how] = weight - left @ right, float(factors.output_error_by_rank(moments.covariance())[rank])
            errors[name, how] = np.zeros(1)

    def see(name, x, y):
        x = x.flatten(0, -2).double() - found[name].mean
        for how in DECOMPOSITIONS:
            errors[name, how] += float((x @ formed[name, how][0].T).square().sum()) / found[name].tokens

    from vitbench.data.batches import eval_batches

    with torch.inference_mode(), forward_hooks(layers, see):
        for x, _ in eval_batches(data.calibration, base.model.recipe.preprocess, 16):
            base.model(x)
    for name in layers:
        assert errors[name, "activation"] == pytest.approx(formed[name, "activation"][1], rel=1e-5)
        assert all(errors[name, "activation"] <= errors[name, how] * (1 + 1e-9) for how in DECOMPOSITIONS), name
