"""Criteria that score the units of a Vision Transformer: neurons, heads and dimensions of heads.

Each is a function `(model, data, criterion) -> [Scores of each block]`, and pruning removes the units with the lowest scores.
Scores are comparable within a block, and those of `COMPARABLE_ACROSS_BLOCKS` also across blocks.
"""

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.base.store import Store, work_key
from vitbench.calibration.moments import CALIBRATION_BATCH, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData, Split
from vitbench.model import vit
from vitbench.model.artifact import model_digest
from vitbench.removal import dependence
from vitbench.removal.cut import check_prunable
from vitbench.removal.scores import Criterion, Scores, by_head, scoring_images
from vitbench.training import loop

COMPARABLE_ACROSS_BLOCKS = ("magnitude", "activation", "taylor", "gates")
MIN_HSIC_SAMPLES = 8  # with fewer, HSIC does not measure dependence


def score(model: nn.Module, data: ImageData | None, criterion: Criterion) -> list[Scores]:
    """Score the units of each block on calibration images, or load the scores from the cache; the model is not changed.

    Raises:
        InputError: units that cannot be removed (`removal.cut.check_prunable`), no images, or too few of them for HSIC.
    """
    check_prunable(model)
    if data is None and criterion.name != "magnitude":
        raise InputError(
            f"the criterion {criterion.name} needs images and no data set was given; give one, or criterion magnitude"
        )
    if criterion.name == "hsic" and data is not None and len(scoring_images(data, criterion)) < MIN_HSIC_SAMPLES:
        raise InputError(
            f"HSIC from {len(scoring_images(data, criterion))} samples does not measure dependence; give at least "
            f"{MIN_HSIC_SAMPLES} calibration images, better 128 or more"
        )

    def compute() -> dict[str, Tensor]:
        block_scores = CRITERIA[criterion.name](model, data, criterion)
        return {f"{i}:{field}": value for i, scores in enumerate(block_scores) for field, value in vars(scores).items()}

    if criterion.name == "magnitude":
        return magnitude(model, data, criterion)
    assert data is not None  # checked above for all other criteria
    key_inputs = {"model": model_digest(model), "data": data.fingerprint, "criterion": criterion.to_dict()}
    device = loop.pick_device() if criterion.name == "gates" else "cpu"
    tensors = Store("scores").tensors(work_key("removal", key_inputs, device), compute)
    fields = [field.name for field in dataclasses.fields(Scores)]
    return [Scores(**{field: tensors[f"{i}:{field}"] for field in fields}) for i in range(len(model.blocks))]


def magnitude(model: nn.Module, data: ImageData | None, criterion: Criterion) -> list[Scores]:
    """The Euclidean norm of all weights of a unit."""
    block_scores = []
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        q, k, v = (by_head(part, block).square().sum(-1) for part in attn.qkv.weight.detach().chunk(3))
        v = v + by_head(attn.proj.weight.detach().T, block).square().sum(-1)
        neurons = mlp.fc1.weight.detach().square().sum(1) + mlp.fc2.weight.detach().square().sum(0)
        block_scores.append(Scores(neurons.sqrt(), (q + k + v).sum(1).sqrt(), (q + k).sqrt(), v.sqrt()))
    return block_scores


class _ActivationSums:
    """Sums over images of statistics of the units' values: of the inputs of fc2 and proj, and of the outputs of qkv."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.layers = {
            name: layer
            for name, layer in vit.linear_layers(model).items()
            if vit.layer_type(name) in ("qkv", "proj", "fc2")
        }

    def add(self, name: str, value: Tensor) -> None:
        """Add the sum over images of `value`, (images, ...), to the sum called `name`."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum(0)

    def run(self, split: Split, on_call: Callable, on_logits: Callable | None = None) -> "_ActivationSums":
        """Run the model on all images, with `on_call` as a forward hook of the layers and `on_logits` after each batch.

        Args:
            on_call: (name, input, output) of a layer.
            on_logits: (images, logits, labels) of a batch; with it the batch records gradients.
        """
        batches = eval_batches(split, self.model.recipe.preprocess, CALIBRATION_BATCH)
        vit.set_fused_attention(self.model, on_logits is None)
        with torch.set_grad_enabled(on_logits is not None), forward_hooks(self.layers, on_call):
            for x, y in progress.progress_bar(
                batches, "scoring units", total=math.ceil(len(split) / CALIBRATION_BATCH), unit="batch"
            ):
                logits = self.model(x.requires_grad_(on_logits is not None))
                if on_logits:
                    on_logits(x, logits, y)
        vit.set_fused_attention(self.model, True)
        return self

    def total(self, index: int, layer: str) -> Tensor:
        return self.sums[f"blocks.{index}.{layer}"].float()


def activation(model: nn.Module, data: ImageData, criterion: Criterion) -> list[Scores]:
    """The sum of |z| over tokens and images, with z the input of fc2 for neurons and of proj for values.

    A dimension of queries and keys has the geometric mean of its two sums of squares, and a head the sum of its values' scores.
    """
    sums = _ActivationSums(model)

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        sums.add(name, y.square().sum(1) if name.endswith("qkv") else x.abs().sum(1))

    sums.run(scoring_images(data, criterion), on_call)
    block_scores = []
    for index, block in enumerate(model.blocks):
        q, k, _ = sums.total(index, "attn.qkv").chunk(3)
        v = by_head(sums.total(index, "attn.proj"), block)
        block_scores.append(Scores(sums.total(index, "mlp.fc2"), v.sum(1), by_head((q * k).sqrt(), block), v))
    return block_scores


def taylor(model: nn.Module, data: ImageData, criterion: Criterion) -> list[Scores]:
    """The mean over images of (dL/dg)^2 for a gate g = 1 on the unit (Molchanov et al. 2019, arXiv 1906.10771).

    dL/dg is the sum over tokens of z dL/dz. L is the cross-entropy with the calibration images' labels.
    """
    sums = _ActivationSums(model)

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        value = y if name.endswith("qkv") else x

        def add(gradient: Tensor) -> None:
            change = (value.detach() * gradient).sum(1)
            if name.endswith("proj"):
                heads = model.get_submodule(name.rpartition(".")[0]).num_heads
                sums.add(f"{name}.heads", change.unflatten(1, (heads, -1)).sum(2).square())
            sums.add(name, change.square())

        value.register_hook(add)

    def on_logits(x: Tensor, logits: Tensor, labels: Tensor) -> None:
        F.cross_entropy(logits, labels, reduction="sum").backward(inputs=[x])

    sums.run(scoring_images(data, criterion), on_call, on_logits)
    block_scores = []
    for index, block in enumerate(model.blocks):
        q = sums.total(index, "attn.qkv").chunk(3)[0]  # a gate on q_j is a gate on the product q_j k_j
        v = by_head(sums.total(index, "attn.proj"), block)
        heads = sums.total(index, "attn.proj.heads")
        block_scores.append(Scores(sums.total(index, "mlp.fc2"), heads, by_head(q, block), v))
    return block_scores


def gates(model: nn.Module, data: ImageData, criterion: Criterion) -> list[Scores]:
    """The survey's method: |gate| after training with plain cross-entropy.

    Gates start at 1: one for each of the attention's dimensions, shared by q, k and v, and one for each hidden neuron. They
    are trained together with the weights of a copy, without a penalty on their size, as in the public code. That code then
    discards its masks or keeps them as masks; here the scores choose the units to remove.
    """
    trained_copy = copy.deepcopy(model).requires_grad_(True)
    device = loop.pick_device()
    attention_gates = [nn.Parameter(torch.ones(block.attn.attn_dim, device=device)) for block in trained_copy.blocks]
    neuron_gates = [
        nn.Parameter(torch.ones(block.mlp.fc1.out_features, device=device)) for block in trained_copy.blocks
    ]
    for block, attention_gate, neuron_gate in zip(trained_copy.blocks, attention_gates, neuron_gates, strict=True):
        block.attn.qkv.register_forward_hook(lambda _, x, y, gate=attention_gate: y * gate.repeat(3))
        block.mlp.fc2.register_forward_pre_hook(lambda _, x, gate=neuron_gate: (x[0] * gate,))
    groups = [
        {"params": list(trained_copy.parameters()), "lr_scale": 0.1},
        {"params": [*attention_gates, *neuron_gates], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    loop.train(trained_copy, data, criterion.gates, groups=groups, title="training gates")
    block_scores = []
    for block, attention_gate, neuron_gate in zip(model.blocks, attention_gates, neuron_gates, strict=True):
        v = by_head(attention_gate.detach().abs().cpu(), block)
        block_scores.append(Scores(neuron_gate.detach().abs().cpu(), v.mean(1), v, v.clone()))
    return block_scores


CRITERIA = {
    "magnitude": magnitude,
    "activation": activation,
    "taylor": taylor,
    "gates": gates,
    "hsic": dependence.unit_hsic,
}
