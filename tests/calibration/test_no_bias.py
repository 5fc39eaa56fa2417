"""Layers without a bias: nothing takes the mean of what is lost, so errors are counted by moments about 0.

The references are written out in numpy from the inputs that a hook sees.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from vitbench.calibration.compensation import layer_error_moments
from vitbench.calibration.gptq import gptq_codes
from vitbench.calibration.moments import collect_moments, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.methods.mixed_rank import MixedRank
from vitbench.methods.registry import compress, make_config
from vitbench.model import vit

FIRST = "blocks.0.attn.qkv"


@pytest.fixture(scope="module")
def model():
    """A model whose q, k and v have no bias and get inputs with a large mean."""
    model = vit.create_model("vit_micro_patch2_8").requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv.bias = None
        block.norm1.bias.data = torch.linspace(-3, 3, model.embed_dim)
    return model


@pytest.fixture(scope="module")
def few(digits):
    return dataclasses.replace(digits, calibration=digits.calibration.subset(48))


def seen(model, few, name=FIRST):
    """Inputs (tokens, in) and outputs (tokens, out) of a layer on the calibration images, float64."""
    found = []
    with torch.inference_mode(), forward_hooks({name: model.get_submodule(name)}, lambda _, x, y: found.append((x, y))):
        for x, _ in eval_batches(few.calibration, model.recipe.preprocess):
            model(x)
    return [torch.cat([each.flatten(0, -2) for each in side]).double().numpy() for side in zip(*found, strict=True)]


def lost(model, small, few):
    """Mean squared change of the first layer's outputs; its inputs are the same in both."""
    return float(((seen(small, few)[1] - seen(model, few)[1]) ** 2).sum(1).mean())


def test_a_mismatch_is_about_0(model, few):
    """Inputs and errors as they are in a model whose first layer was changed."""
    changed = copy.deepcopy(model)
    changed.get_submodule(FIRST).weight.mul_(0.8)
    name = "blocks.1.attn.qkv"
    found = dict(layer_error_moments(changed, copy.deepcopy(model), [name], few.calibration))[name]
    x, wanted = seen(changed, few, name)[0], seen(model, few, name)[1]
    error = wanted - x @ model.get_submodule(name).weight.double().numpy().T
    for moments, reference in ((found.covariance, x.T @ x / len(x)), (found.cross, error.T @ x / len(x))):
        assert np.allclose(moments, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def test_low_rank_loses_what_the_best_of_its_rank_loses(model, few):
    """The sum of the discarded eigenvalues of W E[x x^T] W^T, which no matrix of that rank is below."""
    config = MixedRank(layers=("qkv",), keep=0.5, allocation="uniform", gradient_weight=0, compensation="none")
    small = compress(model, config, few).model
    x, y = seen(model, few)
    values = np.linalg.eigvalsh(y.T @ y / len(y))[::-1]
    rank = small.get_submodule(FIRST).rank
    assert lost(model, small, few) == pytest.approx(values[rank:].sum(), rel=1e-3)
    whole = compress(model, config.replace(mean_correction=False), few).model
    assert lost(model, whole, few) == pytest.approx(values[rank:].sum(), rel=1e-3)


def test_second_order_codes_are_those_of_moments_about_0(model, few):
    small = compress(model, make_config("weight_only", {"bits": 3, "rounding": "second_order"}), few).model
    x, weight = seen(model, few)[0], model.get_submodule(FIRST).weight
    answers = {}
    for kind, moments in (("about 0", x.T @ x / len(x)), ("about the mean", np.cov(x.T, bias=True))):
        codes, step = gptq_codes(weight, torch.from_numpy(moments), 3, weight.shape[1])
        answers[kind] = (codes * step).double().numpy()
    made = small.get_submodule(FIRST).dense().double().numpy()
    assert np.mean(np.isclose(made, answers["about 0"], rtol=1e-2)) > 0.99
    errors = {
        kind: float(((x @ (answer - weight.double().numpy()).T) ** 2).sum(1).mean()) for kind, answer in answers.items()
    }
    assert lost(model, small, few) == pytest.approx(errors["about 0"], rel=0.02)
    assert errors["about 0"] < 0.7 * errors["about the mean"]


def test_moments_are_about_the_mean_only_where_a_bias_takes_it(model, few):
    layer = model.get_submodule(FIRST)
    found, x = collect_moments(model, {FIRST: layer}, few)[FIRST], seen(model, few)[0]
    assert np.allclose(found.output_error_covariance(layer), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    with_bias = torch.nn.Linear(layer.in_features, layer.out_features)
    assert np.allclose(found.output_error_covariance(with_bias), np.cov(x.T, bias=True), rtol=1e-4, atol=1e-4)
