"""Pruning and multi-dimensional pruning as methods: recovery, searches, latency tables, weight sharing, wrong settings."""

import copy
import warnings

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from vitbench.base.errors import InputError
from vitbench.calibration.moments import Moments, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.figures import search_policies
from vitbench.measurement.cost import count_macs
from vitbench.measurement.measuring import measure
from vitbench.methods.multidimensional import MultiDimensional, PolicySearch
from vitbench.methods.pruning import Pruning
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, blocks, vit
from vitbench.removal import cut
from vitbench.removal.policy import DIMENSIONS
from vitbench.removal.pruner import compensate
from vitbench.removal.scores import Criterion
from vitbench.removal.search import LatencyTable, SearchConfig
from vitbench.rows import comparison_table
from vitbench.rows.experiment import Experiment
from vitbench.rows.runs import Run
from vitbench.run.history import search_rows
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate

BARE = Pruning(neurons=0.0, heads=0.0, compensation="none")
QUICK = MultiDimensional(keep=0.5, objective="cross_entropy", search=SearchConfig(evaluations=6, first=3), most=0.7)


def test_every_dimension_makes_the_model_smaller(base, digits):
    whole = count_macs(base.model)
    for config, share in (
        (BARE.replace(neurons=0.5), 0.70),
        (BARE.replace(heads=0.5), 0.84),
        (BARE.replace(head_dims=0.5), 0.84),
        (BARE.replace(tokens=0.3), 0.75),
        (BARE.replace(tokens=0.3, reduction="merge"), 0.75),
    ):
        small = compress(base.model, config, digits).model
        assert count_macs(small) / whole < share, config
        assert vit.analytic_macs(small) == pytest.approx(count_macs(small), rel=0.01)


def test_nothing_removed_is_the_given_model(base, digits):
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(compress(base.model, BARE, digits).model(x), base.model(x))


def first_mlp(model, data):
    """fc2's inputs and outputs in the first block on the calibration images, float64; its inputs no cut changes before."""
    seen = {}
    with forward_hooks({"fc2": model.blocks[0].mlp.fc2}, lambda _, x, y: seen.update(x=x, y=y)), torch.inference_mode():
        for x, _ in eval_batches(data.calibration, model.recipe.preprocess, len(data.calibration)):
            model(x)
    return seen["x"].flatten(0, 1).double(), seen["y"].flatten(0, 1).double()


def test_the_ridge_is_the_least_squares_solution(base, digits):
    """On the calibration images no other weights of fc2 for the kept neurons do better."""
    config = BARE.replace(neurons=0.5, compensation="ridge", ridge=0.0, criterion=Criterion(name="magnitude"))
    _, wanted = first_mlp(base.model, digits)
    z, given = first_mlp(compress(base.model, config, digits).model, digits)
    inputs = torch.cat([z, torch.ones(len(z), 1)], 1)
    least = (inputs @ torch.linalg.lstsq(inputs, wanted).solution - wanted).square().mean()
    bare = compress(base.model, config.replace(compensation="none"), digits).model
    assert (given - wanted).square().mean() == pytest.approx(float(least), rel=1e-3)
    assert (first_mlp(bare, digits)[1] - wanted).square().mean() > 1.5 * least


def test_the_mean_alone_keeps_the_mean_of_the_outputs(base, digits):
    wanted = first_mlp(base.model, digits)[1].mean(0)
    apart = {}
    for how in ("none", "mean", "ridge"):
        small = compress(base.model, BARE.replace(neurons=0.7, compensation=how), digits).model
        apart[how] = float((first_mlp(small, digits)[1].mean(0) - wanted).abs().max())
    assert max(apart["mean"], apart["ridge"]) < 1e-4 < 1e-2 < apart["none"]


@pytest.mark.slow
def test_the_same_code_prunes_t2t_vit(digits):
    model = vit.create_model("t2t_vit_t_14", img_size=64, depth=4, num_classes=10)
    config = Pruning(neurons=0.3, heads=0.3, tokens=0.3, criterion=Criterion(samples=16))
    small = compress(model, config, digits).model
    assert [shape.heads for shape in blocks.block_shapes(small)] == [4] * 4
    assert vit.analytic_macs(small) == pytest.approx(count_macs(small), rel=0.01)
    found = compress(
        model, QUICK.replace(keep=0.8, criterion=Criterion(name="magnitude"), compensation="none"), digits
    ).model
    assert vit.analytic_macs(found) / vit.analytic_macs(model) == pytest.approx(0.8, rel=0.025)


def test_a_layer_without_bias_gets_none_and_is_refused_nothing():
    model = vit.create_model("t2t_vit_t_14", img_size=32, depth=1, num_classes=10)
    kept = [cut.KeptUnits(torch.arange(600), torch.arange(3))]
    moments = {}
    for name, size in (("blocks.0.mlp.fc2", 1152), ("blocks.0.attn.proj", 384)):
        moments[name] = Moments(
            10, torch.eye(size).double(), torch.zeros(size).double(), torch.ones(size), torch.empty(0)
        )
    compensate(model, kept, moments, "ridge", 0.1)
    cut.remove_units(model, kept)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.slow
def test_recovery_by_training_and_its_control(base, digits):
    train = TrainConfig(epochs=2, lr=1e-3, warmup_epochs=0, mixup=0.0)
    hard = BARE.replace(neurons=0.8, heads=0.5)
    small, trained = (compress(base.model, hard.replace(train=t), digits) for t in (Pruning().train, train))
    assert len(trained.history) == 2
    assert evaluate(trained.model, digits.val).top1.mean() > evaluate(small.model, digits.val).top1.mean()
    control = compress(base.model, BARE.replace(train=train), digits).model  # the dense model trained as much longer
    assert count_macs(control) == count_macs(base.model)
    assert not torch.equal(control.head.weight, base.model.head.weight)


def test_ranking_across_blocks_keeps_as_many_units_and_one_in_each(base, digits):
    config = BARE.replace(neurons=0.6, heads=0.5, criterion=Criterion(name="magnitude"))
    within, across = (
        blocks.block_shapes(compress(base.model, config.replace(scope=scope), digits).model)
        for scope in ("block", "global")
    )
    assert sum(shape.neurons for shape in across) == pytest.approx(sum(shape.neurons for shape in within), rel=0.01)
    assert len({shape.neurons for shape in across}) > 1
    assert min(shape.heads for shape in across) >= 1


def test_across_blocks_the_scores_have_one_scale(base, digits):
    assert make_config("pruning", {"scope": "global"}).criterion.name == "taylor"
    with pytest.raises(ValidationError):
        Pruning.model_validate(["scope", "global"])
    assert make_config("pruning", {}).criterion.name == "hsic"
    named = make_config("pruning", {"scope": "global", "heads": 0.0, "criterion": {"name": "hsic", "samples": 16}})
    assert named.criterion.name == "hsic"
    with pytest.warns(UserWarning, match="scores of hsic have another scale in each block; give scope=block"):
        compress(base.model, named, digits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(base.model, named.replace(criterion={"name": "magnitude"}), digits)
        compress(base.model, named.replace(scope="block"), digits)


def test_the_block_whose_units_the_loss_feels_least_loses_most(base, digits):
    model = copy.deepcopy(base.model)
    model.blocks[2].mlp.fc2.weight.mul_(1e-3)
    small = compress(model, Pruning(neurons=0.25, heads=0.0, scope="global", compensation="none"), digits).model
    assert [shape.neurons for shape in blocks.block_shapes(small)] == [256, 256, 1, 256]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"neurons": 1.0}, "neurons = 1.0"),
        ({"neurons": 0.999}, "neurons = 0.999 leaves block 0 with none of its 256 neurons; give at most 0.9961"),
        ({"heads": 0.9}, "heads = 0.9 leaves block 0 with none of its 4 heads; give at most 0.75"),
        ({"head_dims": 0.99}, "head_dims = 0.99 leaves block 0 with none of its 16 head_dims; give at most 0.9375"),
        ({"tokens": 0.2, "token_blocks": [7]}, r"token_blocks = \(7,\): vit_mini_patch2_8 has blocks 0 to 3"),
        ({"tokens": 0.7, "reduction": "merge"}, "merging in pairs leaves at least half of the tokens"),
        ({"reduction": "magic"}, "reduction = 'magic'"),
    ],
)
def test_wrong_settings(config, message, base, digits):
    with pytest.raises(InputError, match=message):
        compress(base.model, make_config("pruning", {"heads": 0.0, "neurons": 0.0, **config}), digits)


def test_a_model_without_class_token_is_told_what_to_take(digits):
    model = vit.create_model("vit_mini_patch2_8")
    model.cls_token = None
    with pytest.raises(InputError, match="has no class token.*take reduction=merge or hsic"):
        compress(model, BARE.replace(tokens=0.3), digits)


def test_tokens_are_reduced_once(base, digits):
    small = compress(base.model, BARE.replace(tokens=0.3), digits).model
    with pytest.raises(InputError, match="tokens of this vit_mini_patch2_8 are reduced already"):
        compress(small, BARE.replace(tokens=0.3), digits)
    again = compress(small, BARE.replace(neurons=0.3), digits).model  # other units may still go
    assert blocks.block_shapes(again)[-1].tokens == blocks.block_shapes(small)[-1].tokens
    assert count_macs(again) < count_macs(small)


@pytest.fixture(scope="module")
def found(base, digits):
    """The base model, searched for and cut."""
    from vitbench.run.cache import compress_cached

    return compress_cached(base, QUICK, digits)


@pytest.mark.slow
def test_the_policy_found_meets_the_budget_and_its_history_is_kept(found, base, digits, tmp_path):
    assert count_macs(found.model) / count_macs(base.model) == pytest.approx(0.5, rel=0.025)
    assert len(found.search) == 6
    best = max(found.search, key=lambda step: step["score"])
    assert [shape.neurons for shape in blocks.block_shapes(found.model)] == best["neurons"]
    assert [shape.heads for shape in blocks.block_shapes(found.model)] == best["heads"]
    assert blocks.tokens_per_block(blocks.block_shapes(found.model), 17)[1] == best["after"]
    assert best["cost"] == pytest.approx(count_macs(found.model), rel=0.01)
    run = Run(tmp_path)
    measure(base.path, digits, run, what=("accuracy", "size"))
    run.append(search_rows(base.path, digits, QUICK, found.search))
    measured = measure(found.path, digits, run, versus=base.path, what=("accuracy", "size"))
    rows = run.rows()
    (label,) = comparison_table.experiment_rows(rows).query("metric == 'search_score'")["label"]
    scores = comparison_table.find_row(comparison_table.experiment_rows(rows), label, "search_score")
    assert scores["samples"] == [step["score"] for step in found.search]
    policies = comparison_table.find_row(comparison_table.experiment_rows(rows), label, "search_policies")
    assert len(policies["samples"]) == 6 * 13
    assert "search" not in Experiment(Experiment.of(rows).of_metrics("top1")).timed_labels
    for figure, shown in (
        search_policies.search_progress(rows, {"guided": [label]}),
        search_policies.policies(rows, {label: "found"}),
        search_policies.by_budget(rows, {(0.5, "found"): comparison_table.label_of(rows, measured)}, "a title"),
    ):
        assert len(shown)
        assert figure.axes


@pytest.mark.slow
def test_the_search_never_sees_the_test_images(base, digits, monkeypatch):
    import dataclasses

    blind = dataclasses.replace(digits, test=None)
    same, other = (compress(base.model, QUICK, data).model for data in (digits, blind))
    assert artifact.weights_hash(same) == artifact.weights_hash(other)


@pytest.mark.slow
def test_one_dimension_alone_leaves_the_others(base, digits):
    fields = {"neurons": "neurons", "head_dims": "head_dim", "tokens": "tokens"}
    for name, field in fields.items():
        config = QUICK.replace(keep=0.8, dimensions=(name,), most=0.9)
        shapes, whole = blocks.block_shapes(compress(base.model, config, digits).model), blocks.block_shapes(base.model)
        for other in ("heads", *fields.values()):
            same = [getattr(shape, other) for shape in shapes] == [getattr(shape, other) for shape in whole]
            assert same == (other != field), (name, other)


def test_what_the_search_cannot_do_says_why(base, digits):
    with pytest.raises(InputError, match="no policy keeps 0.1 of the cost"):
        compress(base.model, QUICK.replace(keep=0.1), digits)
    with pytest.raises(InputError, match="scores policies on images and no data set was given"):
        compress(base.model, QUICK)
    with pytest.raises(InputError, match="keep = 0"):
        MultiDimensional(keep=0)


@pytest.mark.slow
def test_weights_shared_over_policies_suit_them_better(base, digits):
    """The same policies, cut without compensation: after training under random ones their cross-entropy is lower."""
    hard = QUICK.replace(keep=0.4, compensation="none", dimensions=DIMENSIONS)
    shared = hard.replace(sharing=TrainConfig(epochs=6, lr=1e-3, warmup_epochs=0, mixup=0.0))
    tasks = [PolicySearch(base.model, config, digits) for config in (hard, shared)]
    rng = np.random.default_rng(0)
    policies = tasks[0].space.scale_to_budget(tasks[0].space.sample(rng, 20), tasks[0].cost, *tasks[0].limits)[:5]
    plain, better = ([task.evaluate(each) for each in policies] for task in tasks)
    assert np.mean(better) > np.mean(plain)
    assert type(tasks[1].pruner.model.blocks) is torch.nn.Sequential
    assert tasks[1].pruner.model.state_dict().keys() == base.model.state_dict().keys()


@pytest.mark.slow
def test_a_latency_table_grows_with_units_and_is_met(base, digits):
    table = LatencyTable(
        tokens=np.array([1, 17]),
        heads=np.arange(1, 5),
        head_dims=np.array([0, 16]),
        neurons=np.array([64, 256]),
        attention=np.array([[[1.0, 1], [1, 1 + heads]] for heads in range(1, 5)]),
        mlp=np.array([[1.0, 2], [2, 4]]),
        other_seconds=1.0,
    )
    task = PolicySearch(base.model, QUICK.replace(keep=0.7, most=0.7), digits)
    whole = task.space.counts(np.zeros(13))
    assert table(whole)[0] == pytest.approx(1 + 4 * (5 + 4))
    half = task.space.counts(np.array([0.5] * 8 + [0.0] * 5))
    assert table(half)[0] == pytest.approx(1 + 4 * (3 + 2 + 2 / 3))
    narrow = task.space.counts(np.array([0.0] * 8 + [0.5] * 4 + [0.0]))
    assert table(narrow)[0] == pytest.approx(1 + 4 * (3 + 4))
    table = LatencyTable.measure(base.model, task.space, 4)
    assert 0 < table(half)[0] < 1
    assert table.attention.shape == (4, 2, len(table.tokens))
