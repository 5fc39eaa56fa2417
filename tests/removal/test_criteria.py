"""Dependence against a direct reference; criteria that find the units which were made to matter; clear errors."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from timm.layers import LayerScale

from vitbench.base.errors import InputError
from vitbench.calibration.moments import CALIBRATION_BATCH
from vitbench.data.splits import load_data
from vitbench.measurement.limits import LiveTensors
from vitbench.methods.pruning import Pruning
from vitbench.methods.registry import compress
from vitbench.model import vit
from vitbench.removal import criteria, dependence
from vitbench.removal.dependence import position_scores
from vitbench.removal.scores import OFFICIAL_CRITERION, Criterion, Scores, top_units
from vitbench.training.loop import evaluate

EVERY = ["magnitude", "activation", "taylor", pytest.param("gates", marks=pytest.mark.slow), "hsic"]
PAPER = Criterion(normalise="corrected")
GATES = {"gates": {"epochs": 2, "lr": 0.01, "warmup_epochs": 0, "mixup": 0.0}}


def direct_hsic(x, y, widths):
    """The sums written out, sample by sample: E k l + E k E l - 2 E_i (E_j k E_j l), times n^2 / (n - 1)^2."""
    n = len(x)
    k, m = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            k[i, j] = np.mean([np.exp(-np.sum((x[i] - x[j]) ** 2) / (2 * w**2)) for w in widths])
            m[i, j] = np.dot(y[i], y[j])
    return ((k * m).mean() + k.mean() * m.mean() - 2 * (k.mean(1) * m.mean(1)).mean()) * n**2 / (n - 1) ** 2


def test_hsic_equals_the_direct_sums():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
    kernels = dependence.gaussian_mixture(torch.tensor(x)), dependence.linear(torch.tensor(y))
    found = float(dependence.hsic(*kernels))
    assert found == pytest.approx(direct_hsic(x, y, dependence.WIDTHS), rel=1e-9)
    assert float(dependence.hsic(*kernels[::-1])) == pytest.approx(found, rel=1e-9)


def test_hsic_is_near_zero_for_independent_variables_and_grows_with_dependence():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal(500), rng.standard_normal(500)

    def both(y):
        kernels = [dependence.gaussian_mixture(torch.tensor(v)[:, None]) for v in (x, y)]
        return float(dependence.hsic(*kernels))

    found = [both(share * x + (1 - share**2) ** 0.5 * noise) for share in (0, 0.3, 0.6, 0.9, 1)]
    assert found == sorted(found)
    assert found[0] < 0.02 * found[-1]
    assert abs(np.corrcoef(x, x**2)[0, 1]) < 0.2
    assert both(x**2) > 10 * found[0]


def test_both_normalisations_are_there_by_name():
    x = 3 + 2 * torch.randn(50, 4)
    corrected, official = (dependence.standardize(x, how) for how in ("corrected", "official"))
    assert torch.allclose(corrected.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(corrected.std(0), torch.ones(4), atol=1e-3)
    assert torch.allclose(official, x - x.mean(0) / (x.std(0) + 1e-5))
    assert torch.equal(dependence.standardize(x, "none"), x)
    assert OFFICIAL_CRITERION.normalise == "official"
    assert OFFICIAL_CRITERION.blend == 0.1


@pytest.fixture(scope="module")
def lame(base):
    """The base model with units that do nothing: in each block neurons 0 to 9, the first head's values, and one pair of
    dimensions of queries and keys."""
    model = copy.deepcopy(base.model)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        d, width = attn.attn_dim, attn.head_dim
        for weight in (mlp.fc1.weight, mlp.fc1.bias):
            weight[:10] = 0
        mlp.fc2.weight[:, :10] = 0
        for tensor in (attn.qkv.weight, attn.qkv.bias):
            tensor[2 * d : 2 * d + width] = 0
            tensor[width + 3] = tensor[d + width + 3] = 0
        attn.proj.weight[:, :width] = 0
    return model


@pytest.mark.parametrize("name", ["magnitude", "activation", "taylor", "hsic", "hsic corrected"])
def test_units_that_do_nothing_go_first(name, lame, digits):
    name, _, normalise = name.partition(" ")
    for found in criteria.score(lame, digits, Criterion(name=name, normalise=normalise or "cka")):
        assert set(found.neurons.topk(10, largest=False).indices.tolist()) == set(range(10))
        assert int(found.qk[1].argmin()) == 3
        if name != "magnitude":  # the head's queries and keys still weigh something
            assert int(found.heads.argmin()) == 0


@pytest.mark.slow
def test_gates_are_learned_by_plain_training_and_move_little(base, digits):
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    scores = criteria.score(base.model, digits, Criterion(name="gates", **GATES))
    neurons = torch.cat([found.neurons for found in scores])
    assert neurons.std() > 1e-4
    assert 0.5 < neurons.mean() < 1.5
    assert torch.equal(scores[0].qk, scores[0].v)  # one gate for q, k and v
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_kept_and_the_same_again(name, base, digits, monkeypatch):
    criterion = Criterion(name=name, **GATES)
    first = criteria.score(base.model, digits, criterion)
    if name not in ("magnitude", "gates"):
        monkeypatch.setitem(criteria.CRITERIA, name, lambda *_: pytest.fail("scored again"))
    again = criteria.score(base.model, digits, criterion)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(value, getattr(other, key)) for key, value in vars(one).items())


@pytest.mark.slow
def test_the_official_blend_is_mostly_size(base, digits):
    size, pure, blend = (
        criteria.score(base.model, digits, criterion)[0].neurons
        for criterion in (Criterion(name="activation"), PAPER, PAPER.replace(blend=0.1))
    )

    def alike(a, b):
        return float(torch.corrcoef(torch.stack([a.argsort().argsort().float(), b.argsort().argsort().float()]))[0, 1])

    assert alike(blend, size) > 0.9 > alike(pure, size)


def test_cka_is_scale_free_and_between_nothing_and_equality():
    rng = np.random.default_rng(0)
    x, noise = (torch.tensor(rng.standard_normal((60, 3))) for _ in range(2))
    kernel, other = dependence.gaussian_median(x), dependence.gaussian_median(noise)
    assert float(dependence.cka(kernel, kernel)) == pytest.approx(1)
    assert float(dependence.cka(kernel, other)) < 0.5
    assert torch.allclose(dependence.gaussian_median(1000 * x), kernel)
    direct = dependence.hsic(kernel, other) / (dependence.hsic(kernel, kernel) * dependence.hsic(other, other)).sqrt()
    assert float(dependence.cka(kernel, other)) == pytest.approx(float(direct))
    assert float(dependence.cka(dependence.gaussian_median(torch.ones(9, 2)), torch.eye(9))) == 0
    pairs = [float(((x[i] - x[j]) ** 2).sum()) for i in range(60) for j in range(i)]
    width = sorted(pairs)[(len(pairs) - 1) // 2] ** 0.5
    assert torch.allclose(kernel, dependence.gaussian_mixture(x, (width,)))


@torch.no_grad()
def test_the_energy_is_that_of_what_a_unit_adds(base):
    """Against the change of the block's output, or of the logits, when the unit alone is there."""
    torch.manual_seed(0)
    block, x = copy.deepcopy(base.model.blocks[0]), torch.randn(6, 17, 64)
    block.ls1, block.ls2 = LayerScale(64), LayerScale(64)
    for layer_scale in (block.ls1, block.ls2):
        layer_scale.gamma.data = torch.rand(64)
    attn, values = block.attn, {}
    hooks = [
        layer.register_forward_hook(lambda _, x, y, name=name: values.update({name: (x[0], y)}))
        for name, layer in (("qkv", attn.qkv), ("proj", attn.proj), ("fc2", block.mlp.fc2))
    ]
    block(x)
    for hook in hooks:
        hook.remove()
    (q, k, _), inputs = values["qkv"][1].chunk(3, -1), {name: values[name][0] for name in ("proj", "fc2")}
    by_unit = {name: value.movedim(-1, 0) for name, value in (("qkv", q), *inputs.items())}
    found = dependence._energies(block, by_unit, k.square().sum((0, 1)))

    def added(name, layer, scale, units):
        alone = torch.zeros_like(inputs[name])
        alone[..., units] = inputs[name][..., units]
        return float(scale(alone @ layer.weight.T).square().sum())

    assert found["fc2"][5] == pytest.approx(added("fc2", block.mlp.fc2, block.ls2, [5]), rel=1e-4)
    assert found["proj"][7] == pytest.approx(added("proj", attn.proj, block.ls1, [7]), rel=1e-4)
    assert found["heads"][1] == pytest.approx(added("proj", attn.proj, block.ls1, list(range(16, 32))), rel=1e-4)
    logits = q[..., 3].flatten()[:, None] * k[..., 3].flatten()
    assert found["qkv"][3] == pytest.approx(float(logits.square().sum()), rel=1e-4)


@pytest.mark.slow
def test_pruning_by_hsic_is_as_accurate_as_by_taylor(base, digits):
    """Of standardized values it is not: they do not tell a large contribution from a small one."""

    def top1(**criterion):
        config = Pruning(neurons=0.4, heads=0.0, compensation="none", criterion=criterion)
        return float(evaluate(compress(base.model, config, digits).model, digits.val).top1.mean())

    assert top1(name="hsic") >= top1(name="taylor") - 0.03
    assert top1(name="hsic") > top1(name="hsic", normalise="corrected")


@pytest.mark.slow
@pytest.mark.parametrize("normalise", ["cka", "corrected"])
def test_a_head_that_repeats_another_loses_for_it(normalise, base, digits):
    model = copy.deepcopy(base.model)
    attn = model.blocks[1].attn
    d, width = attn.attn_dim, attn.head_dim
    for tensor in (attn.qkv.weight, attn.qkv.bias):
        for part in range(3):
            tensor[part * d : part * d + width] = tensor[part * d + width : part * d + 2 * width]
    relevance, both = (
        criteria.score(model, digits, Criterion(redundancy=r, normalise=normalise))[1].heads for r in (0.0, 1.0)
    )
    lost = relevance - both
    if normalise == "cka":  # heads add unequal energies, so the lost shares are compared
        lost = lost / relevance
    assert lost[0] == pytest.approx(float(lost[1]), rel=1e-3)
    assert min(lost[:2]) > max(lost[2:])


def test_positions_have_scores_and_the_class_token_none(base, digits):
    scores = position_scores(base.model, digits, 2, Criterion())
    assert scores.shape == (17,)
    assert scores[0] == 0
    assert scores.min() >= 0
    assert scores.max() == 1


def test_the_best_units_are_chosen_in_order():
    scores = Scores(torch.tensor([1.0, 3, 2, 4]), torch.tensor([0.0, 1]), torch.eye(2, 3), 1 - torch.eye(2, 3))
    (kept,) = top_units([scores], [(2, 1, scores.v.shape[1])])
    assert kept.neurons.tolist() == [1, 3]
    assert kept.heads.tolist() == [1]
    assert kept.qk is None
    (kept,) = top_units([scores], [(4, 2, 1)])
    assert kept.qk.tolist() == [[0], [1]]


def test_too_few_images_and_none_are_refused(base, digits):
    few = dataclasses.replace(digits, calibration=digits.calibration.subset(4))
    with pytest.raises(
        InputError, match="HSIC from 4 samples does not measure dependence; give at least 8 calibration images"
    ):
        criteria.score(base.model, few, Criterion())
    with pytest.raises(InputError, match="the criterion taylor needs images and no data set was given"):
        criteria.score(base.model, None, Criterion(name="taylor"))
    assert len(criteria.score(base.model, None, Criterion(name="magnitude"))) == len(base.model.blocks)
    with pytest.raises(InputError, match="samples = 1"):
        Criterion(samples=1)


@pytest.mark.slow
def test_512_images_on_deit_base_fit_in_8_gib(monkeypatch):
    """Blocks are scored one after the other and let go; tensors of the meta device have sizes and no content to compute."""
    images, data = 512, load_data("digits", calibration=512)  # only their number counts
    batches = [(torch.empty(CALIBRATION_BATCH, 3, 224, 224, device="meta"), None)] * (images // CALIBRATION_BATCH)
    monkeypatch.setattr(dependence, "eval_batches", lambda *_: batches)

    def made(depth):
        with torch.device("meta"):
            return vit.create_model("deit_base_patch16_224", num_classes=10, depth=depth)

    peaks = []
    for depth in (1, 2):
        with LiveTensors() as live:
            found = dependence.unit_hsic(made(depth), data, Criterion(samples=images))
        assert [scores.neurons.shape for scores in found] == [(3072,)] * depth
        peaks.append(live.peak)
    assert peaks[1] < 1.01 * peaks[0], "a block is not let go"
    assert peaks[0] > images * 197 * (2 + 4) * 768 * 4, "the values of one block's heads (queries, values) and neurons"
    weights = sum(weight.untyped_storage().nbytes() for weight in made(12).parameters())
    assert peaks[1] + weights < 7 * 2**30, "a gibibyte is left for Python, PyTorch and the images"


def test_a_model_with_layers_in_codes_is_refused(base, digits):
    from vitbench.methods.registry import compress, make_config

    with pytest.raises(InputError, match="prune first, then factorise or quantize"):
        criteria.score(compress(base.model, make_config("dynamic_int8")).model, digits, Criterion())
