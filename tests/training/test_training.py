"""Training: the same seed gives the same weights, also after a kill; distillation follows the teacher."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.conftest import stop_training
from vitbench.base.errors import InputError
from vitbench.data.splits import load_data
from vitbench.model import vit
from vitbench.run.cache import baseline
from vitbench.training import loop
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate, train

SHORT = TrainConfig(epochs=3, batch_size=64, ema=0.9, augment="shift", mixup=0.4)


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def short_run(data, config=SHORT, **options):
    model, history = train(vit.create_model("vit_mini_patch2_8", seed=config.seed), data, config, **options)
    return weights(model), history


@pytest.mark.slow
def test_same_seed_same_weights_and_another_seed_others(digits):
    first, history = short_run(digits)
    again, same_history = short_run(digits)
    other, _ = short_run(digits, SHORT.replace(seed=1))
    assert torch.equal(first, again)
    assert history == same_history
    assert not torch.equal(first, other)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(digits, tmp_path, stopped, mixup):
    config = SHORT.replace(mixup=mixup)
    whole, history = short_run(digits, config)
    with stopped(2):
        short_run(digits, config, checkpoint=tmp_path / "run.pt")
    resumed, resumed_history = short_run(digits, config, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole, resumed)
    assert history == resumed_history


@pytest.fixture(scope="module")
def halfway(digits, tmp_path_factory):
    """A checkpoint in the middle of a run, and the weights that the whole run ends with."""
    file = tmp_path_factory.mktemp("halfway") / "run.safetensors"
    with stop_training(2):
        short_run(digits, checkpoint=file)
    return file.read_bytes(), short_run(digits)[0]


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 9, 200, 5_003, 20_011, 0.5, -3])
def test_a_checkpoint_with_one_flipped_bit_is_named_and_not_used(digits, tmp_path, capsys, halfway, place):
    content, whole = bytearray(halfway[0]), halfway[1]
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 8
    file = tmp_path / "run.safetensors"
    file.write_bytes(content)
    again, _ = short_run(digits, checkpoint=file)
    assert torch.equal(whole, again)
    assert f"'{file}' is damaged" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("other", ["torn", "of older versions", "another seed", "another model"])
def test_a_checkpoint_that_is_not_this_runs_is_named_and_not_used(digits, tmp_path, capsys, halfway, other):
    file = tmp_path / "run.safetensors"
    file.write_bytes(halfway[0][:-500])
    if other == "of older versions":
        torch.save({"config": SHORT.to_dict(), "history": []}, file)
    elif other != "torn":
        file.write_bytes(halfway[0])
    config, seed = SHORT.replace(seed=1) if other == "another seed" else SHORT, 3 if other == "another model" else 0
    whole, again = (
        train(vit.create_model("vit_mini_patch2_8", seed=seed), digits, config, checkpoint=checkpoint)[0]
        for checkpoint in ("", file)
    )
    assert torch.equal(weights(whole), weights(again))
    assert f"'{file}' is" in capsys.readouterr().out


@pytest.mark.slow
def test_kill_minus_nine_during_training(tmp_path, home):
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from vitbench.training import loop as training; training.CHECKPOINT_SECONDS = 0.0\n"
        "from vitbench import baseline, load_data, TrainConfig\n"
        "made = baseline('vit_mini_patch2_8', load_data('digits', train=600), TrainConfig(epochs=8, seed=7))\n"
        "print(made.path)"
    )
    command = [sys.executable, "-c", code]
    cache = home / "results" / "cache"
    before = set(cache.glob("*/training.safetensors"))
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not set(cache.glob("*/training.safetensors")) - before:
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not set(cache.glob("*/training.safetensors")) - before
    made = baseline("vit_mini_patch2_8", load_data("digits", train=600), TrainConfig(epochs=8, seed=7))
    assert str(made.path) == done.stdout.strip().splitlines()[-1]
    whole, _ = train(
        vit.create_model("vit_mini_patch2_8", seed=7), load_data("digits", train=600), TrainConfig(epochs=8, seed=7)
    )
    assert torch.equal(weights(made.model), weights(whole))


def test_a_baseline_is_trained_once(digits, base, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
    again = baseline("vit_mini_patch2_8", digits, TrainConfig(epochs=10, mixup=0.0))
    assert again.path == base.path
    assert torch.equal(weights(again.model), weights(base.model))


def test_a_trained_baseline_is_far_from_chance(base, digits):
    assert evaluate(base.model, digits.val).top1.mean() > 0.6


@pytest.mark.slow
def test_a_teacher_that_answers_one_class_is_followed(digits):
    class Teacher(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10) * 20.0

    config = TrainConfig(epochs=3, kd_weight=1.0, temperature=1.0, mixup=0.0)
    model, _ = train(vit.create_model("vit_mini_patch2_8"), digits, config, teacher=Teacher())
    answers = evaluate(model, digits.val).top1
    assert answers.mean() == pytest.approx((digits.val.labels == 3).mean())


def test_evaluate_counts_right_answers(digits):
    class Oracle(torch.nn.Module):
        def __init__(self, model, labels):
            super().__init__()
            self.recipe, self.labels, self.at = model.recipe, torch.from_numpy(labels), 0

        def forward(self, x):
            y = self.labels[self.at : self.at + len(x)]
            self.at += len(x)
            return torch.nn.functional.one_hot(y, 10).float()

    labels = digits.test.labels.copy()
    labels[:36] = (labels[:36] + 1) % 10
    found = evaluate(Oracle(vit.create_model("vit_mini_patch2_8"), labels), digits.test)
    assert found.top1.sum() == 359 - 36
    assert not found.top1[:36].any()
    assert found.top1.dtype == np.bool_


@pytest.mark.slow
def test_bf16_training_learns_too(digits):
    _, history = short_run(digits, SHORT.replace(precision="bf16", ema=0.0))
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": -1}, "epochs = -1"),
        ({"lr": "fast"}, "lr = 'fast'"),
        ({"learning_rate": 1}, "unknown key 'learning_rate'.*allowed: epochs"),
        ({"augment": "mirror"}, "augment = 'mirror'"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**values)


def test_what_cannot_be_trained(digits):
    model = vit.create_model("vit_mini_patch2_8")
    with pytest.raises(InputError, match="more than the 1294 training images"):
        train(model, digits, TrainConfig(batch_size=5000))
    with pytest.raises(InputError, match="no train images"):
        train(model, load_data("digits", test=1.0), TrainConfig(epochs=1))
    with pytest.raises(InputError, match="diverged"):
        train(model, digits, TrainConfig(epochs=3, lr=1e30, warmup_epochs=0))
    with pytest.raises(InputError, match="device 'abacus'"):
        train(model, digits, TrainConfig(epochs=1), device="abacus")


def test_a_random_head_is_never_measured(digits):
    with pytest.raises(InputError, match="random head"):
        baseline("vit_mini_patch2_8", digits, TrainConfig(epochs=0))
