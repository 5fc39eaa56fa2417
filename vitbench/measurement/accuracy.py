"""Quality of a saved model: top1 and top5 with 95 % Wilson intervals, cross-entropy image by image, and errors of layer outputs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.calibration.moments import CALIBRATION_BATCH, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData
from vitbench.measurement import backends
from vitbench.measurement.cost import Measurement, count_params
from vitbench.model import artifact, vit
from vitbench.model.recipe import Recipe
from vitbench.rows.statistics import mean_interval, pack_hits, wilson
from vitbench.training.loop import SCORING_BATCH, evaluate, pick_device


def accuracy(path: Path, data: ImageData, metrics: Sequence[str], device: str, backend: str) -> Iterator[Measurement]:
    """Load the model and score it on every test image; `metrics` is top1, or top1 and top5, and cross_entropy."""
    model, device = artifact.load(path), pick_device(device)
    if backend != "eager":
        model, device = backends.BackendModel(backend, model, min(SCORING_BATCH, len(data.test))), "cpu"
    found = evaluate(model, data.test, device=device, title="scoring")
    if not np.isfinite(found.loss).all():
        raise RuntimeError(f"{(~np.isfinite(found.loss)).sum()} of {len(found.loss)} answers are not finite numbers")
    for metric in metrics:
        if metric == "cross_entropy":
            mean, low, high = mean_interval(found.loss)
            samples = [float(f"{loss:.3g}") for loss in found.loss]  # in rows no more digits than count
            yield Measurement(metric, mean, "measured: test images, mean, Student 95 %", low, high, samples=samples)
            continue
        hits = getattr(found, metric)
        low, high = wilson(hits.sum(), len(hits))
        how = "measured: test images, Wilson 95 %"
        yield Measurement(metric, float(hits.mean()), how, low, high, hits=pack_hits(hits))


def layers_of(model: nn.Module) -> list[str]:
    """Names of the blocks' linear layers, whatever stands in their places, in the order of the forward pass."""
    return [name for name, _ in model.named_modules() if vit.layer_type(name) == name.rpartition(".")[-1] != ""]


def have_same_blocks(own: Recipe, other: Recipe) -> bool:
    """Whether two models have the same blocks, so that their layers can be compared one by one."""
    first, second = (vit.meta_model(recipe.architecture) for recipe in (own, other))
    return first.embed_dim == second.embed_dim and len(first.blocks) == len(second.blocks)


def measure_outputs(path: Path, versus: Path, data: ImageData, names: list[str]) -> Iterator[Measurement]:
    """For each of the layers `names`, as samples: the error of its outputs, its rank, and the share of weights left.

    The error is E||y' - y||^2 / E||y - mean y||^2 over the tokens of the calibration images, each layer with the inputs
    that its own model gives it, so errors of earlier layers count. The rank of a dense layer is the smaller side of its
    weight, that of a split layer the sum over its parts. A factor that several layers share counts for none of them.
    """
    own, other = artifact.load(path), artifact.load(versus)
    errors = output_errors(own, other, data, names)
    how = "measured: calibration images, own inputs; mean over layers"
    yield Measurement("output_error", sum(errors) / len(errors), how, samples=errors)
    pairs = [(own.get_submodule(name), other.get_submodule(name)) for name in names]
    ranks = [float(_rank(new)) for new, _ in pairs]
    yield Measurement("layer_rank", sum(ranks), "measured: sum over layers of the loaded file", samples=ranks)
    counts = [(count_params(new), count_params(old)) for new, old in pairs]
    left = sum(new for new, _ in counts) / sum(old for _, old in counts)
    shares = [new / old for new, old in counts]
    yield Measurement("layer_keep", left, "measured: weights of the loaded file over the original's", samples=shares)


@torch.inference_mode()
def output_errors(model: nn.Module, original: nn.Module, data: ImageData, names: list[str]) -> list[float]:
    """The relative squared error of each layer's outputs, as `outputs` says."""
    split, answers = data.require_split("calibration"), {}
    lost, power, tokens = (dict.fromkeys(names, 0.0) for _ in range(3))
    total: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)

    def keep(name: str, x: Tensor, y: Tensor) -> None:
        answers[name] = y

    def compare(name: str, x: Tensor, y: Tensor) -> None:
        y, wanted = y.flatten(0, -2).double(), answers.pop(name).flatten(0, -2).double()
        lost[name] += float((y - wanted).square().sum())
        power[name] += float(wanted.square().sum())
        total[name] = total[name] + wanted.sum(0)
        tokens[name] += len(wanted)

    batches = eval_batches(split, original.recipe.preprocess, CALIBRATION_BATCH)
    for x, _ in progress.progress_bar(
        batches, "errors of outputs", total=-(-len(split) // CALIBRATION_BATCH), unit="batch"
    ):
        for each, see in ((original, keep), (model, compare)):
            with forward_hooks({name: each.get_submodule(name) for name in names}, see):
                each(x)
    spreads = {name: power[name] - float(total[name].square().sum()) / tokens[name] for name in names}
    return [lost[name] / spreads[name] if spreads[name] > 0 else 0.0 for name in names]


def _rank(module: nn.Module) -> int:
    if hasattr(module, "parts"):
        return sum(_rank(part) for part in module.parts)
    return getattr(module, "rank", min(module.in_features, module.out_features))
