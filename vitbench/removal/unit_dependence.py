"""Scores of units and of positions by their statistical dependence with the model's answer (`vitbench.removal.dependence`)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench import progress, vit
from vitbench.batches import eval_batches
from vitbench.data import ImageData
from vitbench.moments import BATCH, watching
from vitbench.removal import dependence
from vitbench.removal.scores import Criterion, Scores, by_head, seen_by

CHUNK = 2**24  # numbers in the kernel matrices that are held at once


@torch.inference_mode()
def hsic(model: nn.Module, data: ImageData, settings: Criterion) -> list[Scores]:
    """HSIC of a unit's values over tokens with the model's softmax answer, a Gaussian mixture against a linear kernel.

    A neuron's values are its activations, a head's the mean over its dimensions, (images, N) each; heads lose
    `redundancy` times their mean HSIC with the other heads. Block after block is run on all images and let go again, so
    memory is that of one block's values.
    """
    split = seen_by(data, settings)
    batches = eval_batches(split, model.recipe.preprocess, BATCH)
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
        means = by_head(values["proj"], block).mean(1)
        heads = _dependence(means, wanted, settings) - settings.redundancy * _redundancy(means, settings)
        found.append(Scores(neurons, heads, by_head(scored["qkv"], block), by_head(scored["proj"], block)))
        del values  # else the next block's come beside them
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
    split = seen_by(data, settings)
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
