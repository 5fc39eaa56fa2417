"""Quality of a saved model: top1 and top5 with 95 % Wilson intervals, cross-entropy image by image, and errors of layer outputs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.calibration.moments import CALIBRATION_BATCH, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData, Split
from vitbench.measurement import backends
from vitbench.measurement.cost import Measurement, count_params
from vitbench.model import artifact, vit
from vitbench.model.recipe import Recipe
from vitbench.rows.statistics import mean_interval, pack_hits, wilson
from vitbench.training.loop import SCORING_BATCH, evaluate, pick_device


def accuracy(path: Path, data: ImageData, metrics: Sequence[str], device: str, backend: str) -> Iterator[Measurement]:
    """Score the model saved at `path` on every test image.

    Args:
        metrics: cross_entropy, and top1 and top5 or top1 alone.

    Raises:
        RuntimeError: the model's logits are not finite numbers.
    """
    model, device = artifact.load(path), pick_device(device)
    if backend != "eager":
        model, device = backends.BackendModel(backend, model, min(SCORING_BATCH, len(data.test))), "cpu"
    evaluation = evaluate(model, data.test, device=device, title="scoring")
    if not np.isfinite(evaluation.loss).all():
        raise RuntimeError(
            f"{(~np.isfinite(evaluation.loss)).sum()} of {len(evaluation.loss)} losses are not finite numbers"
        )
    for metric in metrics:
        if metric == "cross_entropy":
            mean, low, high = mean_interval(evaluation.loss)
            samples = [float(f"{loss:.3g}") for loss in evaluation.loss]  # three digits suffice in rows
            yield Measurement(metric, mean, "measured: test images, mean, Student 95 %", low, high, samples=samples)
            continue
        hits = getattr(evaluation, metric)
        low, high = wilson(hits.sum(), len(hits))
        source = "measured: test images, Wilson 95 %"
        yield Measurement(metric, float(hits.mean()), source, low, high, hits=pack_hits(hits))


@torch.inference_mode()
def predict(model: nn.Module, split: Split) -> np.ndarray:
    """The probabilities of the classes for each image of `split`, (N, classes), in batches as in scoring."""
    batches = eval_batches(split, model.recipe.preprocess, SCORING_BATCH)
    return torch.cat([model.eval()(x).float().softmax(1) for x, _ in batches]).numpy()


def layers_of(model: nn.Module) -> list[str]:
    """Names of the blocks' linear layers, replaced or not, in the order of the forward pass."""
    return [name for name, _ in model.named_modules() if vit.layer_type(name) == name.rpartition(".")[-1] != ""]


def have_same_blocks(recipe: Recipe, other_recipe: Recipe) -> bool:
    """Whether two models have blocks of the same number and width, so that their layers can be compared one by one."""
    first, second = vit.meta_model(recipe.architecture), vit.meta_model(other_recipe.architecture)
    return first.embed_dim == second.embed_dim and len(first.blocks) == len(second.blocks)


def measure_outputs(path: Path, versus: Path, data: ImageData, names: list[str]) -> Iterator[Measurement]:
    """For each of the layers `names`, as samples: the error of its outputs, its rank, and the kept fraction of its weights.

    The error is E||y' - y||^2 / E||y - mean y||^2 over the tokens of the calibration images. Each layer gets the inputs of
    its own model, so errors of earlier layers are included. The rank of a dense layer is the smaller side of its weight, that
    of a split layer the sum over its parts. A factor that several layers share is counted for none of them.
    """
    model, original = artifact.load(path), artifact.load(versus)
    errors = output_errors(model, original, data, names)
    source = "measured: calibration images, own inputs; mean over layers"
    yield Measurement("output_error", sum(errors) / len(errors), source, samples=errors)
    layer_pairs = [(model.get_submodule(name), original.get_submodule(name)) for name in names]
    ranks = [float(_rank(layer)) for layer, _ in layer_pairs]
    yield Measurement("layer_rank", sum(ranks), "measured: sum over layers of the loaded file", samples=ranks)
    counts = [(count_params(layer), count_params(original_layer)) for layer, original_layer in layer_pairs]
    kept_fraction = sum(count for count, _ in counts) / sum(original_count for _, original_count in counts)
    samples = [count / original_count for count, original_count in counts]
    source = "measured: weights of the loaded file over the original's"
    yield Measurement("layer_keep", kept_fraction, source, samples=samples)


@torch.inference_mode()
def output_errors(model: nn.Module, original: nn.Module, data: ImageData, names: list[str]) -> list[float]:
    """The relative squared error of each layer's outputs, as `measure_outputs` defines it."""
    split = data.require_split("calibration")
    original_outputs: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    squared_errors, squared_sums = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    token_counts = dict.fromkeys(names, 0)

    def store_original(name: str, x: Tensor, y: Tensor) -> None:
        original_outputs[name] = y

    def add_error(name: str, x: Tensor, y: Tensor) -> None:
        y, original_y = (output.flatten(0, -2).double() for output in (y, original_outputs.pop(name)))
        squared_errors[name] += float((y - original_y).square().sum())
        squared_sums[name] += float(original_y.square().sum())
        sums[name] = sums[name] + original_y.sum(0) if name in sums else original_y.sum(0)
        token_counts[name] += len(original_y)

    batches = eval_batches(split, original.recipe.preprocess, CALIBRATION_BATCH)
    for x, _ in progress.progress_bar(
        batches, "errors of outputs", total=-(-len(split) // CALIBRATION_BATCH), unit="batch"
    ):
        for network, on_call in ((original, store_original), (model, add_error)):
            with forward_hooks({name: network.get_submodule(name) for name in names}, on_call):
                network(x)
    variations = {name: squared_sums[name] - float(sums[name].square().sum()) / token_counts[name] for name in names}
    return [squared_errors[name] / variations[name] if variations[name] > 0 else 0.0 for name in names]


def _rank(module: nn.Module) -> int:
    if hasattr(module, "parts"):
        return sum(_rank(part) for part in module.parts)
    return getattr(module, "rank", min(module.in_features, module.out_features))
