"""Dynamic int8 takes its ranges over a batch: every backend scores in the same one, and the rows say which."""

import dataclasses

import pytest
import torch

from vitbench.measurement import backends
from vitbench.measurement.accuracy import accuracy
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import DynamicInt8Linear
from vitbench.rows.runs import Run
from vitbench.training.loop import SCORING_BATCH, evaluate


@pytest.fixture(scope="module")
def few(digits):
    """More images than a batch, not a multiple of it."""
    return dataclasses.replace(
        digits, test=digits.test.subset(SCORING_BATCH + 9), calibration=digits.calibration.subset(16)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = vit.create_model("vit_micro_patch2_8").requires_grad_(False)
    folder = tmp_path_factory.mktemp("models")
    small = compress(model, make_config("dynamic_int8")).model
    return {name: artifact.save(made, folder / name) for name, made in (("base", model), ("small", small))}


def test_another_backend_scores_in_eagers_batches(saved, few, monkeypatch):
    """A stand-in for a backend of fixed shapes: the same arithmetic, batches filled up to one size."""
    shapes = []

    def fixed(model, x):
        shapes.append(tuple(x.shape))

        def call(images):
            assert images.shape == x.shape, "prepared for one shape"
            return model(images)

        return call

    monkeypatch.setitem(backends.BACKENDS, "fixed", backends.Backend(fixed))
    monkeypatch.setattr(DynamicInt8Linear, "forward", DynamicInt8Linear.reference)
    losses = {}
    for backend in ("eager", "fixed"):
        losses[backend] = [value.samples for value in accuracy(saved["small"], few, ["cross_entropy"], "cpu", backend)]
    assert losses["fixed"] == losses["eager"]
    assert shapes == [(SCORING_BATCH, 3, 8, 8)]
    model = artifact.load(saved["small"])
    apart = evaluate(model, few.test, batch_size=8).loss != evaluate(model, few.test).loss
    assert apart.any(), "the answers hang on the batch, or this test shows nothing"


class Noting(torch.nn.Module):
    """Answers with the images, and notes them."""

    def __init__(self):
        super().__init__()
        self.seen, self.recipe = [], vit.create_model("vit_micro_patch2_8").recipe

    def forward(self, x):
        self.seen.append(x)
        return x


def test_a_short_batch_is_filled_with_its_own_images():
    prepared, x = backends.BackendModel("eager", Noting(), 4), torch.randn(6, 3, 8, 8)
    assert torch.equal(prepared(x), x)
    assert torch.equal(prepared.call.seen[-1], x[[4, 5, 4, 5]])


def test_rows_say_the_batch_where_answers_hang_on_it(saved, few, tmp_path):
    run, found = Run(tmp_path / "run"), {}
    for name in ("base", "small"):
        rows = measure(saved[name], few, run, versus=saved["base"], what=("accuracy", "outputs"), device="cpu")
        assert (rows["status"] == "ok").all(), rows["error"].tolist()
        found[name] = {row.metric: row.context.get("scoring_batch") for row in rows.itertuples()}
    assert set(found["base"].values()) == {None}
    assert found["small"]["top1"] == found["small"]["cross_entropy"] == SCORING_BATCH
    assert found["small"]["output_error"] == 16
