"""Costs that need no clock: weights, multiply-accumulates, bytes on disk, predicted bytes, and errors of the weights.

`Measurement` is one value before it becomes a row. `model_row_fields` gives the fields that all rows of a model share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitbench.data.splits import ImageData
from vitbench.model import artifact, vit
from vitbench.model.layers import RUNTIME_LAYERS, flop_formulas
from vitbench.model.layers.registry import dense_weight
from vitbench.model.recipe import Recipe, Step
from vitbench.model.vit import set_fused_attention


@dataclass(frozen=True)
class Measurement:
    """A metric's value, its source, and the interval and raw samples if there are any. The row has the unit."""

    metric: str
    value: float
    source: str
    low: float | None = None
    high: float | None = None
    samples: Sequence[float] | None = None
    hits: str = ""

    def fields(self) -> dict[str, Any]:
        """The fields of the row, without the metric."""
        return {key: value for key, value in asdict(self).items() if key != "metric"}


def model_row_fields(recipe: Recipe, data: ImageData | None) -> dict[str, Any]:
    """The fields of a row that describe the model and the images."""
    return {
        "model": recipe.original or recipe.architecture.name,
        "dataset": data.name if data else "none",
        "data_fingerprint": data.fingerprint if data else "",
        "method": recipe.method,
        "config": {"origin": recipe.origin, "methods": [_step_fields(step, data) for step in recipe.methods]},
        "seed": recipe.origin.get("train", {}).get("seed", 0),
    }


def _step_fields(step: Step, data: ImageData | None) -> dict[str, Any]:
    """A step as a row holds it: of its images only what differs from `data`, on which the model was measured."""
    fields = step.to_dict()
    images = fields.pop("images", {})
    if data and images and images["fingerprint"] != data.fingerprint:
        measured_on = data.identity()
        differing = [key for key in {**images, **measured_on} if images.get(key) != measured_on.get(key)]
        fields["images"] = {key: images.get(key) for key in differing}
    return fields


def batch_context(recipe: Recipe, batch: int) -> dict[str, int]:
    """The scoring batch as context of a row, if the model's logits depend on it."""
    layers = {spec["layer"] for spec in recipe.layers.values()}
    return {"scoring_batch": batch} if any(_depends_on_batch(name) for name in layers) else {}


def _depends_on_batch(name: str) -> bool:
    return getattr(RUNTIME_LAYERS.get(name), "depends_on_batch", False)


def cost(path: Path) -> Iterator[Measurement]:
    """Weights, multiply-accumulates and bytes of the model saved at `path`, counted on the loaded model and its folder."""
    model = artifact.load(path)
    yield Measurement("params", count_params(model), "measured: weights in the loaded model, scales not counted")
    yield Measurement("macs", count_macs(model), "measured: torch FlopCounterMode / 2, one image")
    yield Measurement("int8_macs", count_int8_macs(model), "measured: those of them whose two factors are 8-bit codes")
    yield Measurement("bytes", artifact.size_on_disk(path), "measured: files on disk")
    width = getattr(torch, model.recipe.storage).itemsize
    predicted = sum(
        tensor.numel() * (width if tensor.is_floating_point() else tensor.element_size())
        for tensor in model.state_dict().values()
    )
    yield Measurement("bytes_predicted", predicted, "modelled: weights x bits / 8, scales included, no headers")
    for part, size in artifact.bytes_by_part(path).items():
        yield Measurement("part_bytes", size, f"measured: {part}")


def count_params(model: nn.Module) -> int:
    """Weights and biases, however many bits each takes. Steps and zero points are not counted."""
    runtime_layers = {name: module for name, module in model.named_modules() if hasattr(module, "param_count")}
    coded = sum(module.param_count for module in runtime_layers.values())
    dense = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in runtime_layers}
    return coded + sum(tensor.numel() for tensor in dense.values())


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of the operators that run for one image: convolutions, linear layers and attention products."""
    size = model.recipe.preprocess.size
    return macs_of(model, torch.zeros(1, 3, size, size))


@torch.inference_mode()
def count_int8_macs(model: nn.Module) -> int:
    """Multiply-accumulates for one image whose two factors are 8-bit codes, as integer kernels multiply them."""
    layer_macs = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        layer_macs.append(layer.int8_macs(inputs[0], y))

    hooks = [layer.register_forward_hook(count) for layer in model.modules() if hasattr(layer, "int8_macs")]
    size = model.recipe.preprocess.size
    model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(layer_macs)


@torch.no_grad()
def macs_of(module: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of any module for the input `x`."""
    set_fused_attention(module, False)  # some versions of torch do not count the fused kernel
    parameters = {
        name: parameter.detach() for name, parameter in module.named_parameters()
    }  # the counter registers hooks on gradients
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        functional_call(module, parameters, (x,))
    return counter.get_total_flops() // 2


def coded_layers(recipe: Recipe) -> list[str]:
    """Names of the blocks' linear layers that a method replaced, block by block."""
    return [name for name in recipe.layers if vit.layer_type(name) == name.rpartition(".")[-1]]


@torch.inference_mode()
def weight_error(path: Path, versus: Path, names: list[str]) -> Iterator[Measurement]:
    """||W' - W|| / ||W|| in the Frobenius norm over the named layers together; the samples are the layers' own errors."""
    model, original = artifact.load(path), artifact.load(versus)
    errors, norms = [], []
    for name in names:
        weight, original_weight = dense_weight(model.get_submodule(name)), dense_weight(original.get_submodule(name))
        errors.append(float((weight - original_weight).square().sum()))
        norms.append(float(original_weight.square().sum()))
    layer_errors = [(error / norm) ** 0.5 if norm else 0.0 for error, norm in zip(errors, norms, strict=True)]
    overall = (sum(errors) / sum(norms)) ** 0.5
    yield Measurement("weight_error", overall, "measured: Frobenius norms of the loaded weights", samples=layer_errors)
