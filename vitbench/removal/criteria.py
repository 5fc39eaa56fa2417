"""How much each unit of a Vision Transformer matters: neurons, heads, dimensions of heads.

Every criterion is `(model, data, settings) -> [Scores, one a block]`; a unit with a lower score goes first. Scores of
one criterion can be compared within a block; `magnitude`, `taylor`, `gates` and `activation` also across blocks.
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

MIN_HSIC_SAMPLES = 8  # fewer tell nothing about dependence


def score(model: nn.Module, data: ImageData | None, criterion: Criterion) -> list[Scores]:
    """Score the units of each block on calibration images, or take the scores from the cache; the model is not changed.

    Raises:
        InputError: units that cannot be taken out (`removal.cut.check_prunable`), no images, or too few of them for HSIC.
    """
    check_prunable(model)
    if data is None and criterion.name != "magnitude":
        raise InputError(
            f"the criterion {criterion.name} looks at images and no data set was given; give one, or magnitude"
        )
    if criterion.name == "hsic" and data is not None and len(scoring_images(data, criterion)) < MIN_HSIC_SAMPLES:
        raise InputError(
            f"HSIC from {len(scoring_images(data, criterion))} samples says nothing; at least {MIN_HSIC_SAMPLES} calibration images are "
            "needed, and 128 or more are advised"
        )

    def make() -> dict[str, Tensor]:
        found = CRITERIA[criterion.name](model, data, criterion)
        return {f"{i}:{field}": value for i, scores in enumerate(found) for field, value in vars(scores).items()}

    if criterion.name == "magnitude":
        return magnitude(model, data, criterion)
    assert data is not None  # checked above for all other criteria
    facts = {"model": model_digest(model), "data": data.fingerprint, "criterion": criterion.to_dict()}
    device = loop.pick_device() if criterion.name == "gates" else "cpu"
    tensors = Store("scores").tensors(work_key("removal", facts, device), make)
    fields = [field.name for field in dataclasses.fields(Scores)]
    return [Scores(**{field: tensors[f"{i}:{field}"] for field in fields}) for i in range(len(model.blocks))]


def magnitude(model: nn.Module, data: ImageData | None, settings: Criterion) -> list[Scores]:
    """The Euclidean norm of all weights that go with a unit."""
    found = []
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        q, k, v = (by_head(part, block).square().sum(-1) for part in attn.qkv.weight.detach().chunk(3))
        v = v + by_head(attn.proj.weight.detach().T, block).square().sum(-1)
        neurons = mlp.fc1.weight.detach().square().sum(1) + mlp.fc2.weight.detach().square().sum(0)
        found.append(Scores(neurons.sqrt(), (q + k + v).sum(1).sqrt(), (q + k).sqrt(), v.sqrt()))
    return found


class _Sums:
    """Adds up, batch by batch, what `see` makes of the units' values: fc2's and proj's inputs, and qkv's outputs."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.layers = {
            name: layer
            for name, layer in vit.linear_layers(model).items()
            if vit.layer_type(name) in ("qkv", "proj", "fc2")
        }

    def add(self, name: str, value: Tensor) -> None:
        """`value` is (images, ...); its sum over images joins the others."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum(0)

    def over(self, split: Split, see: Callable, after: Callable | None = None) -> "_Sums":
        batches = eval_batches(split, self.model.recipe.preprocess, CALIBRATION_BATCH)
        vit.set_fused_attention(self.model, after is None)
        with torch.set_grad_enabled(after is not None), forward_hooks(self.layers, see):
            for x, y in progress.progress_bar(
                batches, "scoring units", total=math.ceil(len(split) / CALIBRATION_BATCH), unit="batch"
            ):
                logits = self.model(x.requires_grad_(after is not None))
                if after:
                    after(x, logits, y)
        vit.set_fused_attention(self.model, True)
        return self

    def of(self, index: int, layer: str) -> Tensor:
        return self.sums[f"blocks.{index}.{layer}"].float()


def activation(model: nn.Module, data: ImageData, settings: Criterion) -> list[Scores]:
    """The sum of |z| over tokens and images; of q and k the geometric mean of both energies; of a head that of its values."""
    sums = _Sums(model)

    def see(name: str, x: Tensor, y: Tensor) -> None:
        sums.add(name, y.square().sum(1) if name.endswith("qkv") else x.abs().sum(1))

    sums.over(scoring_images(data, settings), see)
    found = []
    for index, block in enumerate(model.blocks):
        q, k, _ = sums.of(index, "attn.qkv").chunk(3)
        v = by_head(sums.of(index, "attn.proj"), block)
        found.append(Scores(sums.of(index, "mlp.fc2"), v.sum(1), by_head((q * k).sqrt(), block), v))
    return found


def taylor(model: nn.Module, data: ImageData, settings: Criterion) -> list[Scores]:
    """The mean over images of (dL/dg)^2 for a gate g = 1 on the unit (Molchanov et al. 2019, arXiv 1906.10771).

    dL/dg is the sum over tokens of z dL/dz. L is the cross-entropy with the calibration images' labels.
    """
    sums = _Sums(model)

    def see(name: str, x: Tensor, y: Tensor) -> None:
        value = y if name.endswith("qkv") else x

        def add(gradient: Tensor) -> None:
            change = (value.detach() * gradient).sum(1)
            if name.endswith("proj"):
                heads = model.get_submodule(name.rpartition(".")[0]).num_heads
                sums.add(f"{name}.heads", change.unflatten(1, (heads, -1)).sum(2).square())
            sums.add(name, change.square())

        value.register_hook(add)

    def after(x: Tensor, logits: Tensor, labels: Tensor) -> None:
        F.cross_entropy(logits, labels, reduction="sum").backward(inputs=[x])

    sums.over(scoring_images(data, settings), see, after)
    found = []
    for index, block in enumerate(model.blocks):
        q = sums.of(index, "attn.qkv").chunk(3)[0]  # a gate on q_j is a gate on the product q_j k_j
        v = by_head(sums.of(index, "attn.proj"), block)
        heads = sums.of(index, "attn.proj.heads")
        found.append(Scores(sums.of(index, "mlp.fc2"), heads, by_head(q, block), v))
    return found


def gates(model: nn.Module, data: ImageData, settings: Criterion) -> list[Scores]:
    """The survey's method: |gate| after training with plain cross-entropy.

    Gates start at 1: one for each of the attention's dimensions, on q, k and v alike, and one for each hidden neuron.
    They are trained together with the weights of a copy, with no pressure towards zero, which is what the public code
    does. Its masks are then discarded or kept as masks; here the scores choose what is removed.
    """
    copied = copy.deepcopy(model).requires_grad_(True)
    device = loop.pick_device()
    inner = [nn.Parameter(torch.ones(block.attn.attn_dim, device=device)) for block in copied.blocks]
    hidden = [nn.Parameter(torch.ones(block.mlp.fc1.out_features, device=device)) for block in copied.blocks]
    for block, gate, neurons in zip(copied.blocks, inner, hidden, strict=True):
        block.attn.qkv.register_forward_hook(lambda _, x, y, gate=gate: y * gate.repeat(3))
        block.mlp.fc2.register_forward_pre_hook(lambda _, x, gate=neurons: (x[0] * gate,))
    groups = [
        {"params": list(copied.parameters()), "lr_scale": 0.1},
        {"params": [*inner, *hidden], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    loop.train(copied, data, settings.gates, groups=groups, title="training gates")
    found = []
    for block, gate, neurons in zip(model.blocks, inner, hidden, strict=True):
        v = by_head(gate.detach().abs().cpu(), block)
        found.append(Scores(neurons.detach().abs().cpu(), v.mean(1), v, v.clone()))
    return found


CRITERIA = {
    "magnitude": magnitude,
    "activation": activation,
    "taylor": taylor,
    "gates": gates,
    "hsic": dependence.unit_hsic,
}
