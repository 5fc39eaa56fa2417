"""Distillation: each loss by hand, answers that are kept, students of every kind, and what must not be asked for."""

import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vitbench.base.errors import InputError
from vitbench.data import batches
from vitbench.data.splits import load_data
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, blocks, vit
from vitbench.rows.comparison_table import experiment_rows
from vitbench.rows.runs import Run
from vitbench.training import distilling, loop
from vitbench.training.config import TrainConfig
from vitbench.training.distilling import load_teacher

SHORT = TrainConfig(epochs=3, batch_size=64, lr=2e-3, warmup_epochs=0, mixup=0.0, augment="shift-flip", views=2)
MICRO = {"student": "vit_micro_patch2_8", "depth": 1}


@pytest.fixture(scope="module")
def few():
    return load_data("digits", train=256, val=64)


@pytest.fixture(scope="module")
def teacher(base):
    return base.model


def distillation_result(model, data, **changes):
    train = SHORT.replace(**changes.pop("train", {}))
    return compress(model, make_config("distillation", {**MICRO, **changes}).replace(train=train), data)


def distilled(model, data, **changes):
    return distillation_result(model, data, **changes).model


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_the_losses_by_hand():
    even, sure = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])  # 1/2 and 1/2; 3/4 and 1/4
    assert distilling.soft_loss(even, sure) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    p = math.sqrt(3) / (1 + math.sqrt(3))  # at a temperature of 2
    wanted = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert distilling.soft_loss(even, sure, 2.0) == pytest.approx(wanted)
    assert distilling.hard_loss(sure, torch.tensor([[5.0, 6.0]])) == pytest.approx(math.log(4))
    tokens = torch.tensor([[[1.0, 3.0]]])  # standardised: -1 and 1
    assert distilling.feature_loss(torch.tensor([[[0.0, 3.0]]]), tokens) == pytest.approx(2.5, rel=1e-4)
    first, both = torch.tensor([[[2.0], [0.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]])
    assert distilling.attention_loss(first, both) == pytest.approx(2 - math.sqrt(2))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_cached_logits_teach_as_live_ones_do(few, teacher, monkeypatch, kind):
    how = {"train": {"kd_labels": kind, "kd_weight": 1.0}}
    kept = distilled(teacher, few, **how)
    monkeypatch.setattr(distilling, "caches_teacher_logits", lambda config: False)
    live = distilled(teacher, few, **how)
    assert torch.allclose(weights(kept), weights(live), atol=1e-4)
    other = distilled(teacher, few, train={**how["train"], "seed": 1})
    assert not torch.allclose(weights(kept), weights(other), atol=1e-2)


def test_the_teacher_answers_each_view_once(few, teacher):
    class Counted(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.recipe, self.images = model, model.recipe, 0

        def forward(self, x):
            self.images += len(x)
            return self.model(x)

    counted = Counted(teacher)
    config = SHORT.replace(seed=11)
    for _ in range(2):
        loop.train(vit.create_model("vit_micro_patch2_8"), few, config, teacher=counted)
    assert counted.images == 2 * len(few.train)


def test_an_image_looks_the_same_in_every_epoch_of_a_view(few):
    preprocess = vit.create_model("vit_mini_patch2_8").recipe.preprocess
    whole = torch.cat([x for x, _ in batches.view_batches(few.train, preprocess, 100, "shift-flip", 5)])
    other = torch.cat([x for x, _ in batches.view_batches(few.train, preprocess, 100, "shift-flip", 6)])
    assert not torch.equal(whole, other)
    for seed in (1, 2):
        order = batches.epoch_order(len(few.train), 64, seed)
        epoch = batches.train_batches(few.train, preprocess, 64, "shift-flip", seed, view=5)
        for places, (x, y) in zip(order, epoch, strict=True):
            assert torch.equal(x, whole[places])
            assert np.array_equal(y, few.train.labels[places])
    larger = preprocess.replace(size=16, interpolation="nearest")
    double = torch.cat([x for x, _ in batches.view_batches(few.train, larger, 256, "shift-flip", 5)])
    assert torch.equal(double[:, :, ::2, ::2], whole)


def test_timms_augmentation_has_views_too(few):
    preprocess = vit.create_model("vit_mini_patch2_8").recipe.preprocess
    split = few.train.subset(12)
    (whole, _), (again, _) = (next(batches.view_batches(split, preprocess, 12, "timm", 5)) for _ in range(2))
    (order,) = batches.epoch_order(12, 12, 3)
    x, _ = next(batches.train_batches(split, preprocess, 12, "timm", 3, view=5))
    assert torch.equal(whole, again)
    assert torch.equal(x, whole[order])


@pytest.mark.parametrize("harm", ["torn", "one bit"])
def test_a_damaged_cache_is_made_again(few, teacher, home, capsys, harm):
    def answers():
        return distilling.cached_teacher_logits(
            teacher, few, SHORT, view, torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False)
        )

    view, folder = {"torn": 71, "one bit": 72}[harm], home / "results" / "cache" / "answers"
    before = set(folder.glob("*")) if folder.is_dir() else set()
    first = answers()
    (file,) = set(folder.glob("*")) - before
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content[:-100] if harm == "torn" else content)
    assert torch.equal(answers(), first)
    assert "is damaged" in capsys.readouterr().out
    assert torch.equal(load_file(file)["logits"], first)


def test_a_token_student_answers_with_the_mean_of_two_heads(few, teacher, tmp_path):
    small = distilled(teacher, few, student="", depth=1, token=True, train={"kd_labels": "hard", "weight_decay": 0.0})
    loaded = artifact.load(artifact.save(small, tmp_path / "token"))
    x = torch.randn(5, 3, 8, 8)
    tokens = loaded.forward_features(x)
    mean = (loaded.head(tokens[:, 0]) + loaded.head_dist(tokens[:, 1])) / 2
    assert torch.allclose(loaded(x), mean, atol=1e-6)
    assert torch.equal(loaded(x), small(x))
    assert not torch.equal(loaded.head.weight, loaded.head_dist.weight)
    assert isinstance(small.train()(x), torch.Tensor), "after training the heads answer together"
    assert vit.analytic_macs(loaded) > vit.analytic_macs(
        distilled(teacher, few, student="", depth=1, train={"epochs": 0})
    )


def test_each_head_hears_its_own(few, teacher):
    deaf = {"kd_weight": 1.0, "weight_decay": 0.0}
    small = distilled(teacher, few, student="", depth=1, token=True, train=deaf)
    assert torch.equal(small.head.weight, teacher.head.weight), "the labels weigh nothing"
    assert not torch.equal(small.head_dist.weight, teacher.head.weight)


def test_timms_distilled_models_are_students_as_they_are(tmp_path):
    model = vit.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=32, depth=1)
    path = artifact.save(model, tmp_path / "deit")
    assert {"dist_token", "head_dist.weight"} <= load_file(path / "model.safetensors").keys()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(artifact.load(path)(x), model(x))
    small = compress(model, make_config("weight_only", {"ends_bits": 8})).model
    assert {"head", "head_dist"} <= artifact.recipe_of(small).layers.keys()


@pytest.mark.parametrize("weight", ["feature_weight", "attention_weight"])
def test_what_blocks_hold_is_followed_and_the_projections_vanish(few, teacher, tmp_path, weight):
    plain = distilled(teacher, few, train={"kd_weight": 0.0})
    result = distillation_result(teacher, few, train={"kd_weight": 0.0, weight: 1.0})
    small = result.model
    assert not torch.allclose(weights(small), weights(plain), atol=1e-3)
    path = artifact.save(small, tmp_path / "small")
    own = vit.create_model("vit_micro_patch2_8", depth=1).state_dict().keys()
    assert load_file(path / "model.safetensors").keys() == own
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_a_stopped_run_with_projections_goes_on(few, teacher, stopped):
    how = {"train": {"feature_weight": 1.0, "seed": 3}}
    whole = distilled(teacher, few, **how)
    with stopped(2):
        distilled(teacher, few, **how)
    assert torch.equal(weights(distilled(teacher, few, **how)), weights(whole))


def test_alone_differs_in_the_teacher_and_in_nothing_else(few, teacher):
    alone = distilled(teacher, few, teacher="none")
    unheard = distilled(teacher, few, train={"kd_weight": 0.0})
    assert torch.equal(weights(alone), weights(unheard))
    assert not torch.equal(weights(alone), weights(distilled(teacher, few)))


def test_a_student_of_the_teachers_blocks_starts_with_their_weights(few, teacher, tmp_path):
    small = distilled(teacher, few, student="", depth=2, train={"epochs": 0})
    assert blocks.evenly_spaced_blocks(2, 4) == [0, 3]
    assert blocks.evenly_spaced_blocks(4, 12) == [0, 4, 7, 11]
    assert blocks.matching_blocks(4, 12) == [2, 5, 8, 11]
    for own, place in enumerate((0, 3)):
        assert torch.equal(small.blocks[own].attn.qkv.weight, teacher.blocks[place].attn.qkv.weight)
    assert len(teacher.blocks) == 4
    loaded = artifact.load(artifact.save(small, tmp_path / "two"))
    assert len(loaded.blocks) == loaded.recipe.architecture.depth == 2
    cut = compress(teacher, make_config("pruning", {"neurons": 0.5, "compensation": "none"}), few).model
    again = artifact.load(
        artifact.save(distilled(cut, few, student="", depth=1, train={"epochs": 0}), tmp_path / "cut")
    )
    assert again.blocks[0].mlp.fc1.out_features == cut.blocks[0].mlp.fc1.out_features


def test_a_student_of_another_architecture_stands_beside_its_teacher(few, base, tmp_path):
    run = Run(tmp_path / "run")
    path = artifact.save(distilled(base.model, few), tmp_path / "small")
    measure(base.path, few, run, what=("accuracy", "size"))
    measure(path, few, run, versus=base.path, what=("accuracy", "size", "outputs"))
    rows = experiment_rows(run.rows())
    assert set(rows["label"]) == {"baseline", "distillation"}
    assert set(rows["model"]) == {"vit_mini_patch2_8"}
    assert artifact.read_manifest(path).recipe.architecture.name == "vit_micro_patch2_8"


def test_a_compressed_model_recovers_and_keeps_its_recipe(few, teacher):
    cut = compress(teacher, make_config("pruning", {"neurons": 0.75, "compensation": "none"}), few).model
    back = distilled(cut, few, student="", depth=0, train={"seed": 5})
    assert back.recipe.method == "pruning+distillation"
    assert back.recipe.architecture == cut.recipe.architecture
    assert not torch.equal(weights(back), weights(cut))


@pytest.mark.slow
def test_a_teacher_of_another_kind_and_size_answers_from_disk(teacher, tmp_path):
    some = load_data("digits", train=64, val=10)
    net = timm.create_model("resnet10t", num_classes=10)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    name = f"resnet10t:{tmp_path / 'net.safetensors'}"
    assert load_teacher(name, 10).recipe.preprocess.size == 176
    short = {"batch_size": 32, "epochs": 1}
    assert distillation_result(teacher, some, teacher=name, train=short).history
    with pytest.raises(InputError, match="has another preprocessing.*train.views of 1 or more"):
        distilled(teacher, some, teacher=name, train={**short, "views": 0})
    with pytest.raises(InputError, match="'resnet10t' could not be made"):
        load_teacher(name, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"mixup": 0.2}}, "views = 2 caches the teacher's logits, and mixup = 0.2.*set both to 0"),
        ({"train": {"cutmix": 1.0}}, "views = 2 caches.*cutmix = 1"),
        ({"student": "", "depth": 5}, "depth = 5 is more than the 4 blocks.*at most 4"),
        ({"student": "vit_nano"}, "unknown model 'vit_nano'"),
        ({"train": {"epochs": 0}}, "starts from random weights"),
        ({"teacher": "nowhere"}, "'nowhere' is not a saved model"),
    ],
)
def test_what_cannot_be_asked_for(few, teacher, changes, message):
    with pytest.raises(InputError, match=message):
        distilled(teacher, few, **changes)


def test_unknown_kinds_of_labels():
    with pytest.raises(InputError, match="kd_labels = 'warm'.*'soft' or 'hard'"):
        TrainConfig(kd_labels="warm")


def test_teachers_that_do_not_fit(few, teacher, tmp_path):
    seven = artifact.save(vit.create_model("vit_mini_patch2_8", num_classes=7), tmp_path / "seven")
    with pytest.raises(InputError, match="has 7 classes and the student 10"):
        distilled(teacher, few, teacher=str(seven))
    large = vit.create_model("vit_mini_patch2_8", img_size=16)
    large.recipe = large.recipe.replace(preprocess=teacher.recipe.preprocess)
    other = artifact.save(large, tmp_path / "large")
    with pytest.raises(InputError, match="the student has 16 and the teacher 64 of them"):
        distilled(teacher, few, teacher=str(other), train={"feature_weight": 1.0})
    reduced = compress(teacher, make_config("pruning", {"neurons": 0.0, "heads": 0.0, "tokens": 0.3}), few).model
    with pytest.raises(InputError, match="one class token"):
        distilled(reduced, few, student="", depth=0, token=True)
