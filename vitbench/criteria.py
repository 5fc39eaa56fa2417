"""How much each unit of a Vision Transformer matters: neurons, heads, dimensions of heads, and positions of tokens.

Every criterion is `(model, split, settings) -> [Scores, one a block]`; a unit with a lower score goes first. Scores of
one criterion can be compared within a block; `magnitude`, `taylor`, `gates` and `activation` also across blocks.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vitbench import dependence, progress, training, vit
from vitbench.batches import eval_batches
from vitbench.blocks import Kept, check_prunable
from vitbench.configs import Config
from vitbench.data import ImageData, Split
from vitbench.errors import InputError
from vitbench.moments import BATCH, watching
from vitbench.training import TrainConfig

LEAST_SAMPLES = 8  # fewer tell nothing about dependence
CHUNK = 2**24  # numbers in the kernel matrices that are held at once


class Criterion(Config):
    """What units are scored by.

    Attributes:
        name: one of `CRITERIA`.
        samples: how many calibration images are looked at; all of them if there are fewer.
        normalise: of a unit's values before HSIC: "corrected", "official" or "none" (`dependence.standardised`).
        blend: the share of HSIC in the score of a neuron, the rest is the sum of |activation|, both scaled to [0, 1].
            1 is the paper's criterion; its public code has 0.1.
        redundancy: what a head loses for its mean HSIC with the block's other heads.
        gates: how the gates of the survey's method are trained.
    """

    name: Literal["magnitude", "activation", "taylor", "gates", "hsic"] = "hsic"
    samples: int = Field(default=256, ge=2)
    normalise: Literal["corrected", "official", "none"] = "corrected"
    blend: float = Field(default=1.0, ge=0, le=1)
    redundancy: float = Field(default=0.1, ge=0)
    gates: TrainConfig = TrainConfig(epochs=1, lr=1e-3, warmup_epochs=0, mixup=0.0, label_smoothing=0.0)


OFFICIAL = Criterion(name="hsic", samples=128, normalise="official", blend=0.1)  # the public code's choices


@dataclass(frozen=True)
class Scores:
    """Scores of one block's units: neurons (h,), heads (H,), and each head's dimensions qk and v, (H, head_dim) each."""

    neurons: Tensor
    heads: Tensor
    qk: Tensor
    v: Tensor


def score(model: nn.Module, data: ImageData | None, criterion: Criterion) -> list[Scores]:
    """Score the units of each block on calibration images; the model is not changed.

    Raises:
        InputError: units that cannot be taken out (`blocks.check_prunable`), no images, or too few of them for HSIC.
    """
    check_prunable(model)
    if criterion.name != "magnitude" and data is None:
        raise InputError(
            f"the criterion {criterion.name} looks at images and no data set was given; give one, or magnitude"
        )
    split = None if data is None else data.needs("calibration").some(criterion.samples)
    if criterion.name == "hsic" and len(split) < LEAST_SAMPLES:
        raise InputError(
            f"HSIC from {len(split)} samples says nothing; at least {LEAST_SAMPLES} calibration images are needed, and 128 "
            "or more are advised"
        )
    if criterion.name == "gates":
        return gates(model, data, criterion)
    return CRITERIA[criterion.name](model, split, criterion)


def choose(
    scores: Sequence[Scores], neurons: Sequence[int], heads: Sequence[int], head_dims: Sequence[int] | None = None
) -> list[Kept]:
    """The best units of each block, as many as the counts say."""
    kept = []
    for index, found in enumerate(scores):
        narrower = head_dims is not None and head_dims[index] < found.v.shape[1]
        inside = {which: _best(getattr(found, which), head_dims[index]) for which in ("qk", "v")} if narrower else {}
        kept.append(Kept(_best(found.neurons, neurons[index]), _best(found.heads, heads[index]), **inside))
    return kept


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def _by_head(values: Tensor, block: nn.Module) -> Tensor:
    """(heads x head_dim, ...) -> (heads, head_dim, ...)."""
    return values.unflatten(0, (block.attn.num_heads, block.attn.head_dim))


def magnitude(model: nn.Module, split: Split | None, settings: Criterion) -> list[Scores]:
    """The Euclidean norm of all weights that go with a unit."""
    found = []
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        q, k, v = (_by_head(part, block).square().sum(-1) for part in attn.qkv.weight.detach().chunk(3))
        v = v + _by_head(attn.proj.weight.detach().T, block).square().sum(-1)
        neurons = mlp.fc1.weight.detach().square().sum(1) + mlp.fc2.weight.detach().square().sum(0)
        found.append(Scores(neurons.sqrt(), (q + k + v).sum(1).sqrt(), (q + k).sqrt(), v.sqrt()))
    return found


class _Sums:
    """Adds up, batch by batch, what `see` makes of the units' values: fc2's and proj's inputs, and qkv's outputs."""

    def __init__(self, model: nn.Module):
        self.model, self.sums = model, {}
        self.layers = {
            name: layer for name, layer in vit.linears(model).items() if vit.layer_type(name) in ("qkv", "proj", "fc2")
        }

    def add(self, name: str, value: Tensor) -> None:
        """`value` is (images, ...); its sum over images joins the others."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum(0)

    def over(self, split: Split, see: Callable, after: Callable | None = None) -> "_Sums":
        batches = eval_batches(split, self.model.recipe.preprocess, BATCH)
        vit.set_fused_attention(self.model, after is None)
        with torch.set_grad_enabled(after is not None), watching(self.layers, see):
            for x, y in progress.bar(batches, "scoring units", total=math.ceil(len(split) / BATCH), unit="batch"):
                logits = self.model(x.requires_grad_(after is not None))
                if after:
                    after(x, logits, y)
        vit.set_fused_attention(self.model, True)
        return self

    def of(self, index: int, layer: str) -> Tensor:
        return self.sums[f"blocks.{index}.{layer}"].float()


def activation(model: nn.Module, split: Split, settings: Criterion) -> list[Scores]:
    """The sum of |z| over tokens and images; of q and k the geometric mean of both energies; of a head that of its values."""
    sums = _Sums(model)

    def see(name: str, x: Tensor, y: Tensor) -> None:
        sums.add(name, y.square().sum(1) if name.endswith("qkv") else x.abs().sum(1))

    sums.over(split, see)
    found = []
    for index, block in enumerate(model.blocks):
        q, k, _ = sums.of(index, "attn.qkv").chunk(3)
        v = _by_head(sums.of(index, "attn.proj"), block)
        found.append(Scores(sums.of(index, "mlp.fc2"), v.sum(1), _by_head((q * k).sqrt(), block), v))
    return found


def taylor(model: nn.Module, split: Split, settings: Criterion) -> list[Scores]:
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

    sums.over(split, see, after)
    found = []
    for index, block in enumerate(model.blocks):
        q = sums.of(index, "attn.qkv").chunk(3)[0]  # a gate on q_j is a gate on the product q_j k_j
        v = _by_head(sums.of(index, "attn.proj"), block)
        heads = sums.of(index, "attn.proj.heads")
        found.append(Scores(sums.of(index, "mlp.fc2"), heads, _by_head(q, block), v))
    return found


def gates(model: nn.Module, data: ImageData, settings: Criterion) -> list[Scores]:
    """The survey's method: |gate| after training with plain cross-entropy.

    Gates start at 1: one for each of the attention's dimensions, on q, k and v alike, and one for each hidden neuron.
    They are trained together with the weights of a copy, with no pressure towards zero, which is what the public code
    does. Its masks are then discarded or kept as masks; here the scores choose what is removed.
    """
    copied = copy.deepcopy(model).requires_grad_(True)
    device = training.pick_device()
    inner = [nn.Parameter(torch.ones(block.attn.attn_dim, device=device)) for block in copied.blocks]
    hidden = [nn.Parameter(torch.ones(block.mlp.fc1.out_features, device=device)) for block in copied.blocks]
    for block, gate, neurons in zip(copied.blocks, inner, hidden, strict=True):
        block.attn.qkv.register_forward_hook(lambda _, x, y, gate=gate: y * gate.repeat(3))
        block.mlp.fc2.register_forward_pre_hook(lambda _, x, gate=neurons: (x[0] * gate,))
    groups = [
        {"params": list(copied.parameters()), "lr_scale": 0.1},
        {"params": [*inner, *hidden], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    training.train(copied, data, settings.gates, groups=groups, title="training gates")
    found = []
    for block, gate, neurons in zip(model.blocks, inner, hidden, strict=True):
        v = _by_head(gate.detach().abs().cpu(), block)
        found.append(Scores(neurons.detach().abs().cpu(), v.mean(1), v, v))
    return found


@torch.inference_mode()
def hsic(model: nn.Module, split: Split, settings: Criterion) -> list[Scores]:
    """HSIC of a unit's values over tokens with the model's softmax answer, a Gaussian mixture against a linear kernel.

    A neuron's values are its activations, a head's the mean over its dimensions, (images, N) each; heads lose
    `redundancy` times their mean HSIC with the other heads. Block after block is run on all images and let go again, so
    memory is that of one block's values.
    """
    preprocess = model.recipe.preprocess
    batches = eval_batches(split, preprocess, BATCH)
    tokens, answers = [], []
    for x, _ in progress.bar(batches, "answers", total=math.ceil(len(split) / BATCH), unit="batch"):
        tokens.append(vit.embedded(model, x))
        answers.append(model(x).softmax(-1))
    wanted = dependence.centred(dependence.linear(torch.cat(answers)))
    found = []
    for block in progress.bar(model.blocks, "dependence", unit="block"):
        held: dict[str, list[Tensor]] = {"qkv": [], "proj": [], "fc2": []}

        def see(name: str, x: Tensor, y: Tensor, held=held) -> None:
            values = y[..., : y.shape[-1] // 3] if name == "qkv" else x
            held[name].append(values.transpose(1, 2).contiguous())

        layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc2": block.mlp.fc2}
        with watching(layers, see):
            tokens = [block(x) for x in tokens]
        values = {name: torch.cat(held.pop(name)).transpose(0, 1) for name in layers}  # (units, images, N)
        scored = {name: _dependence(value, wanted, settings) for name, value in values.items()}
        neurons = scored["fc2"]
        if settings.blend < 1:
            size = values["fc2"].abs().sum((1, 2))
            neurons = settings.blend * _to_unit(neurons) + (1 - settings.blend) * _to_unit(size)
        means = _by_head(values["proj"], block).mean(1)
        heads = _dependence(means, wanted, settings) - settings.redundancy * _redundancy(means, settings)
        found.append(Scores(neurons, heads, _by_head(scored["qkv"], block), _by_head(scored["proj"], block)))
    return found


def _dependence(values: Tensor, wanted: Tensor, settings: Criterion) -> Tensor:
    """HSIC of each unit's values (units, n, N) with the samples whose centred kernel is `wanted` (n, n): (units,)."""
    n = values.shape[1]
    chunks = values.split(max(1, CHUNK // n**2))
    kernels = (dependence.gaussian_mixture(dependence.standardised(chunk, settings.normalise)) for chunk in chunks)
    return torch.cat([(kernel * wanted).sum((-2, -1)) for kernel in kernels]) / (n - 1) ** 2


def _redundancy(means: Tensor, settings: Criterion) -> Tensor:
    """The mean HSIC of each head's values (heads, n, N) with those of the others: (heads,)."""
    if len(means) == 1:
        return torch.zeros(1)
    kernels = dependence.centred(
        dependence.gaussian_mixture(dependence.standardised(means, settings.normalise))
    ).flatten(1)
    pairs = kernels @ kernels.T / (means.shape[1] - 1) ** 2
    return (pairs.sum(1) - pairs.diagonal()) / (len(means) - 1)


def _to_unit(scores: Tensor) -> Tensor:
    """Scaled to [0, 1]."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low).clamp(min=1e-30)


@torch.inference_mode()
def positions(model: nn.Module, data: ImageData, index: int, settings: Criterion) -> Tensor:
    """A score in [0, 1] of each of the N tokens' positions: HSIC of the values there with the label, at one block.

    The features are the values v of all heads at that position, (images, attn_dim); the label is one-hot. Prefix tokens
    have 0, they always stay.
    """
    split = data.needs("calibration").some(settings.samples)
    block, seen, labels = model.blocks[index], [], []

    def see(name: str, x: Tensor, y: Tensor) -> None:
        seen.append(y[..., -block.attn.attn_dim :])

    with watching({"qkv": block.attn.qkv}, see):
        for x, y in eval_batches(split, model.recipe.preprocess, BATCH):
            model(x)
            labels.append(y)
    wanted = dependence.centred(dependence.linear(F.one_hot(torch.cat(labels)).float()))
    found = _dependence(torch.cat(seen).transpose(0, 1), wanted, settings)
    found[: model.num_prefix_tokens] = found.min()
    return _to_unit(found)


CRITERIA = {"magnitude": magnitude, "activation": activation, "taylor": taylor, "hsic": hsic}
