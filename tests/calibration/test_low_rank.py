"""Low-rank forms: moments, the closed form against its rivals, allocation, and compensation."""

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.calibration import moments as moments_module
from vitbench.calibration.allocation import LayerErrors, floored_ranks, greedy_ranks, uniform_ranks
from vitbench.calibration.compensation import layer_error_moments
from vitbench.calibration.factors import DECOMPOSITIONS, factorise
from vitbench.calibration.moments import Moments, collect_moments, forward_hooks
from vitbench.methods.mixed_rank import MixedRank, _token_shares, _weights_to_remove
from vitbench.model import blocks, vit
from vitbench.model.layers import LowRankLinear


@pytest.fixture(scope="module")
def found(base, digits):
    return collect_moments(base.model, vit.linear_layers(base.model), digits, gradients=True)


@pytest.fixture(scope="module")
def inputs(base, digits):
    """Every token that the layers see on the calibration images, in float64."""
    seen = {name: [] for name in vit.linear_layers(base.model)}
    from vitbench.data.batches import eval_batches

    with torch.inference_mode(), forward_hooks(vit.linear_layers(base.model), lambda name, x, y: seen[name].append(x)):
        for x, _ in eval_batches(digits.calibration, base.model.recipe.preprocess):
            base.model(x)
    return {name: torch.cat(parts).flatten(0, -2).double() for name, parts in seen.items()}


def test_moments_are_those_of_all_tokens(found, inputs):
    for name, x in inputs.items():
        moments = found[name]
        assert moments.tokens == len(x)
        assert torch.allclose(moments.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert torch.allclose(moments.mean, x.mean(0), rtol=1e-4, atol=1e-6)
        assert torch.allclose(moments.mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-6)
        assert moments.second_moment.dtype == torch.float64
        assert moments.sensitivity > 0


def test_deit_base_fits_in_two_gibibytes():
    model = vit.meta_model(vit.Architecture(name="deit_base_patch16_224", num_classes=10, img_size=224))
    with torch.device("meta"):
        sums = moments_module._MomentSums(model, vit.linear_layers(model), gradients=True, seed=0).sums
    assert sum(tensor.nbytes for held in sums.values() for tensor in held.values()) <= 2 * 2**30


def test_moments_are_collected_once(base, digits, found, monkeypatch):
    monkeypatch.setattr(moments_module._MomentSums, "accumulate", lambda *_: pytest.fail("collected again"))
    again = collect_moments(base.model, vit.linear_layers(base.model), digits, gradients=True)
    assert all(torch.equal(again[name].gradient, found[name].gradient) for name in found)


def test_the_gradient_moments_predict_the_loss(base, digits, found):
    """tr(Gamma dW C dW^T) / 2 is of the size of the divergence that a small change of the weights causes.

    It takes the tokens of an image as independent. They are not, so the divergence is up to 17 tokens times larger.
    """
    import copy

    from vitbench.data.batches import eval_batches

    torch.manual_seed(0)
    for name in ("blocks.1.attn.qkv", "blocks.3.mlp.fc2"):
        changed = copy.deepcopy(base.model)
        layer, moments = changed.get_submodule(name), found[name]
        change = 0.03 * torch.randn_like(layer.weight) * layer.weight.std()
        layer.weight.data += change
        predicted = 0.5 * torch.trace(
            moments.gradient.double() @ change.double() @ moments.second_moment @ change.double().T
        )
        total = 0.0
        with torch.inference_mode():
            for x, _ in eval_batches(digits.calibration, base.model.recipe.preprocess):
                old, new = (model(x).double().log_softmax(1) for model in (base.model, changed))
                total += float((old.exp() * (old - new)).sum())
        measured = total / len(digits.calibration)
        assert 0.5 / 17 < predicted / measured < 2, name


@pytest.mark.parametrize("rank", [4, 24, 60])
def test_the_closed_form_loses_what_it_says_and_no_rival_loses_less(base, found, inputs, rank):
    for name, layer in vit.linear_layers(base.model).items():
        moments, weight = found[name], layer.weight.detach().double()
        x = inputs[name] - inputs[name].mean(0)
        lost = {}
        for how in DECOMPOSITIONS:
            factors = factorise(weight, moments, moments.covariance(), how)
            left, right = factors.truncate(rank)
            assert left.shape == (len(weight), rank)
            measured = float((x @ (weight - left @ right).T).square().sum() / len(x))
            whole = float(factors.output_error_by_rank(moments.covariance())[0])
            assert measured == pytest.approx(
                float(factors.output_error_by_rank(moments.covariance())[rank]), rel=1e-5, abs=1e-9 * whole
            ), (name, how)
            lost[how] = measured
        values = torch.linalg.svdvals(x @ weight.T / len(x) ** 0.5)
        assert lost["activation"] == pytest.approx(float(values[rank:].square().sum()), rel=1e-5, abs=1e-9 * whole)
        assert lost["activation"] <= min(lost.values()) * (1 + 1e-9) + 1e-9 * whole


def test_the_gradients_weight_trades_errors_that_the_loss_does_not_feel(base, found):
    name = "blocks.1.attn.qkv"
    weight, moments = base.model.get_submodule(name).weight.detach().double(), found[name]
    covariance = moments.covariance()

    def felt(gradient_weight):
        left, right = factorise(weight, moments, covariance, "activation", gradient_weight).truncate(16)
        error = weight - left @ right
        gamma = moments.gradient.double()
        plain, by_loss = error @ covariance @ error.T, gamma / gamma.diagonal().mean()
        return float((by_loss @ plain).trace() + plain.trace()), float(plain.trace())

    assert felt(1.0)[0] < felt(0.0)[0]
    assert felt(1.0)[1] > felt(0.0)[1]


def test_singular_moments(base, found):
    size = 64
    dead = found["blocks.0.attn.qkv"].second_moment.clone()
    dead[3], dead[:, 3] = 0, 0
    moments = Moments(1000, dead, torch.zeros(size), dead.diagonal().sqrt(), torch.empty(0, 0))
    weight = base.model.blocks[0].attn.qkv.weight.detach()
    for how in DECOMPOSITIONS:
        assert torch.isfinite(factorise(weight, moments, dead, how).left).all()
    nothing = Moments(1000, 0 * dead, torch.zeros(size), torch.zeros(size), torch.empty(0, 0))
    with pytest.raises(InputError, match="singular .*decomposition=activation, which needs none"):
        factorise(weight, nothing, dead, "svd_llm")


def test_inputs_that_are_not_finite(base, digits):
    import copy

    broken = copy.deepcopy(base.model)
    broken.blocks[0].norm1.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="blocks.0.attn.qkv are not finite"):
        collect_moments(broken, vit.linear_layers(broken), digits)


def test_greedy_is_the_best_split_of_a_budget():
    steep, flat = [2.0 ** (-i / 4) for i in range(33)], [0.01 * 2.0 ** (-i / 4) for i in range(33)]
    layers = {"steep": LayerErrors((32, 32), tuple(steep)), "flat": LayerErrors((32, 32), tuple(flat))}
    ranks = greedy_ranks(layers, 32 * 32 - 8 * 64, step=4, spend=False)
    assert ranks == {"flat": 8}, "the layer that loses little pays for the other"
    saving = 2 * 32 * 32 * 6 // 10
    ranks = greedy_ranks(layers, saving, step=4)
    assert sum(layers[name].saving(rank) for name, rank in ranks.items()) >= saving
    assert ranks["flat"] < ranks["steep"]


def test_greedy_is_optimal_at_the_budgets_it_passes():
    import itertools

    generator = torch.Generator().manual_seed(0)
    layers = {}
    for i in range(3):
        values = torch.rand(16, generator=generator).sort(descending=True).values
        layers[str(i)] = LayerErrors((16, 16), (*values.flip(0).cumsum(0).flip(0).tolist(), 0.0))
    for saving in (40, 100, 200, 400):
        ranks = greedy_ranks(layers, saving, step=2, spend=False)
        saved = sum(layers[name].saving(rank) for name, rank in ranks.items())
        loss = sum(layers[name].error_by_rank[rank] for name, rank in ranks.items())
        choices = [layer.choices(2) for layer in layers.values()]
        best = min(
            sum(choice[1] for choice in pick)
            for pick in itertools.product(*choices)
            if sum(choice[0] for choice in pick) >= saved
        )
        assert loss == pytest.approx(best)


def test_greedy_spends_what_its_last_step_saves_too_much():
    """The hull has one step from dense to rank 8; the rank between is above the line, and still better than rank 8."""
    errors = {0: 100.0, 4: 90.0, 8: 1.0, 12: 0.9}
    layers = {"a": LayerErrors((32, 32), tuple(errors.get(rank, 0.5) for rank in range(33)))}
    assert greedy_ranks(layers, 100, step=4, spend=False) == {"a": 8}
    assert greedy_ranks(layers, 100, step=4) == {"a": 12}
    assert greedy_ranks(layers, 0, step=4) == {}


WIDTHS = {
    "vit_mini_patch2_8": 1,
    "deit_tiny_patch16_224": 8,
    "deit_small_patch16_224": 8,
}  # 64, 192, 384, and a rank step


@pytest.mark.parametrize("budget", ["params", "macs", "bytes"])
@pytest.mark.parametrize("name", WIDTHS)
def test_uniform_and_greedy_spend_the_budget(name, budget):
    model, step = vit.create_model(name, num_classes=10), WIDTHS[name]
    blocks.reduce_tokens(model, "merge", [None, 12] + [None] * (len(model.blocks) - 2))
    layers = vit.linear_layers(model)
    shares = _token_shares(model, layers) if budget == "macs" else {}
    errors = {}
    for index, (layer_name, layer) in enumerate(layers.items()):
        falls = 10 * (1 + index % 5)  # of layers of unequal sensitivity
        curve = [2.0 ** (-rank / falls) for rank in range(layer.in_features + 1)]
        errors[layer_name] = LayerErrors(tuple(layer.weight.shape), tuple(curve), shares.get(layer_name, 1.0))
    allocations, reached = {"greedy": greedy_ranks, "uniform": uniform_ranks}, 0
    for keep in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        saving = _weights_to_remove(model, MixedRank(keep=keep, budget=budget), layers)
        asked, spent = saving * keep / (1 - keep), {}
        for how, allocate in allocations.items():
            try:
                ranks = allocate(errors, saving, step)
            except InputError:  # the embedding, the head or attention take more
                continue
            spent[how] = asked + saving - sum(errors[layer].saving(rank) for layer, rank in ranks.items())
            assert all(rank % step == 0 for rank in ranks.values())
        assert len(spent) in (0, 2)
        if spent:
            reached += 1
            assert 0.99 * asked <= min(spent.values()) <= max(spent.values()) <= asked + 1
            assert spent["uniform"] == pytest.approx(spent["greedy"], rel=0.01)
    assert reached == 7 or (budget != "params" and reached >= 3)


def test_uniform_ranks_keep_the_same_fraction_of_each_layer():
    layers = {
        f"{shape}:{i}": LayerErrors(shape, ()) for shape in ((576, 192), (192, 192), (768, 192)) for i in range(6)
    }
    for keep in (0.3, 0.5, 0.8):
        ranks = uniform_ranks(layers, round((1 - keep) * sum(layer.dense for layer in layers.values())), step=8)
        for name, layer in layers.items():
            step_share = 8 * sum(layer.shape) / layer.dense
            assert ranks[name] * sum(layer.shape) / layer.dense == pytest.approx(keep, abs=2 * step_share)
    assert uniform_ranks(layers, 0) == {}


def test_a_rank_that_saves_nothing_is_no_choice():
    layer = LayerErrors((16, 16), tuple(range(16, -1, -1)))
    assert [rank for *_, rank in layer.choices(2)] == [0, 6, 4, 2]  # 8 breaks even


def test_budgets_that_cannot_be_met():
    layers = {"a": LayerErrors((16, 16), tuple(range(16, -1, -1)))}
    with pytest.raises(InputError, match="smaller rank_step"):
        greedy_ranks(layers, 200, step=8)
    with pytest.raises(InputError, match="leaves a a rank below rank_step = 8"):
        floored_ranks(layers, 0.4, step=8)
    with pytest.raises(InputError, match="smaller rank_step"):
        uniform_ranks(layers, 200, step=8)


def test_before_anything_is_compressed_there_is_no_mismatch(base, digits):
    names = list(vit.linear_layers(base.model))
    for name, mismatch in layer_error_moments(base.model, base.model, names, digits.calibration):
        assert mismatch.error_energy < 1e-9, name
        assert mismatch.correction(0.1).abs().max() < 1e-6


def test_the_correction_makes_up_for_the_layers_before(base, digits):
    import copy

    model = copy.deepcopy(base.model)
    crude = model.blocks[0].mlp.fc1
    crude.weight.data = torch.round(crude.weight.data / 0.2) * 0.2
    before, after = {}, {}
    for correct, kept in ((False, before), (True, after)):
        own = copy.deepcopy(model)
        for name, mismatch in layer_error_moments(
            own, base.model, ["blocks.0.mlp.fc2", "blocks.1.attn.qkv"], digits.calibration
        ):
            kept[name] = mismatch.error_energy
            if correct:
                layer, change = own.get_submodule(name), mismatch.correction(1e-4)
                layer.bias.data += mismatch.bias_change(change).float()
                layer.weight.data += change.float()
    assert before["blocks.0.mlp.fc2"] == pytest.approx(after["blocks.0.mlp.fc2"])
    assert after["blocks.1.attn.qkv"] < 0.5 * before["blocks.1.attn.qkv"]


def test_layers_of_two_thin_matrices_and_in_parts():
    torch.manual_seed(0)
    dense, x = torch.nn.Linear(12, 9), torch.randn(2, 7, 12)
    u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    layer = LowRankLinear(12, 9, 9).set_factors(u * s, v, dense.bias)
    assert torch.allclose(layer(x), dense(x), atol=1e-5)
    assert torch.allclose(layer.dense(), dense.weight, atol=1e-5)
    model = vit.create_model("vit_mini_patch2_8")
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    rows = blocks.split_qkv_by_head(model)
    assert len(rows) == 4 * 3 * 4
    assert torch.allclose(model(images), before, atol=1e-5)
