"""The Hilbert-Schmidt independence criterion (HSIC), and scores of units and positions by it against the model's logits.

Gretton et al. (2005): HSIC = tr(K H L H) / (n - 1)^2 with the kernel matrices K and L of the n samples of each variable
and H = I - 1 1^T / n. It is zero in the limit exactly when the variables are independent, if the kernels are Gaussian.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.calibration.moments import CALIBRATION_BATCH, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData
from vitbench.model import vit
from vitbench.removal.scores import Criterion, Scores, by_head, scoring_images

WIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


def gaussian_mixture(x: Tensor, widths: Sequence[float] = WIDTHS) -> Tensor:
    """The mean over sigma of exp(-||x_i - x_j||^2 / (2 sigma^2)): (..., n, d) -> (..., n, n)."""
    products = x @ x.transpose(-2, -1)
    power = products.diagonal(dim1=-2, dim2=-1)
    apart = (power[..., :, None] + power[..., None, :] - 2 * products).clamp_(min=0)
    mixture = torch.zeros_like(apart)
    for width in widths:
        mixture += torch.exp(apart * (-0.5 / width**2))
    return mixture / len(widths)


def linear(x: Tensor) -> Tensor:
    """x_i . x_j: (..., n, d) -> (..., n, n)."""
    return x @ x.transpose(-2, -1)


def centre_kernel(kernel: Tensor) -> Tensor:
    """H K H: (..., n, n) -> (..., n, n)."""
    rows = kernel.mean(-1, keepdim=True)
    return kernel - rows - rows.transpose(-2, -1) + rows.mean(-2, keepdim=True)


def hsic(kernel: Tensor, other: Tensor) -> Tensor:
    """tr(K H L H) / (n - 1)^2 of two kernel matrices (..., n, n), which may be broadcast: (...)."""
    n = kernel.shape[-1]
    return (kernel * centre_kernel(other)).sum((-2, -1)) / (n - 1) ** 2


def standardize(x: Tensor, how: str, eps: float = 1e-5) -> Tensor:
    """Samples (..., n, d) feature by feature, over the samples.

    "corrected": (x - mean) / (std + eps). "official": x - mean / (std + eps), as the paper's public code has it without
    the parentheses. "none": as they are.
    """
    if how == "none":
        return x
    mean, spread = x.mean(-2, keepdim=True), x.std(-2, keepdim=True) + eps
    return (x - mean) / spread if how == "corrected" else x - mean / spread


CHUNK = 2**24  # numbers in the kernel matrices that are held at once


@torch.inference_mode()
def unit_hsic(model: nn.Module, data: ImageData, settings: Criterion) -> list[Scores]:
    """HSIC of a unit's values over tokens with the model's softmax answer, a Gaussian mixture against a linear kernel.

    A neuron's values are its activations, a head's the mean over its dimensions, (images, N) each; heads lose
    `redundancy` times their mean HSIC with the other heads. Block after block is run on all images and let go again, so
    memory is that of one block's values.
    """
    split = scoring_images(data, settings)
    batches = eval_batches(split, model.recipe.preprocess, CALIBRATION_BATCH)
    tokens, answers = [], []
    for x, _ in progress.progress_bar(
        batches, "answers", total=math.ceil(len(split) / CALIBRATION_BATCH), unit="batch"
    ):
        tokens.append(vit.embed_patches(model, x))
        answers.append(model(x).softmax(-1))
    wanted = centre_kernel(linear(torch.cat(answers)))
    found = []
    for block in progress.progress_bar(model.blocks, "dependence", unit="block"):
        held: dict[str, list[Tensor]] = {"qkv": [], "proj": [], "fc2": []}

        def see(name: str, x: Tensor, y: Tensor, held=held) -> None:
            values = y[..., : y.shape[-1] // 3] if name == "qkv" else x
            held[name].append(values.transpose(1, 2).contiguous())

        layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc2": block.mlp.fc2}
        with forward_hooks(layers, see):
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
    kernels = (gaussian_mixture(standardize(chunk, settings.normalise)) for chunk in chunks)
    return torch.cat([(kernel * wanted).sum((-2, -1)) for kernel in kernels]) / (n - 1) ** 2


def _redundancy(means: Tensor, settings: Criterion) -> Tensor:
    """The mean HSIC of each head's values (heads, n, N) with those of the others: (heads,)."""
    if len(means) == 1:
        return torch.zeros(1)
    kernels = centre_kernel(gaussian_mixture(standardize(means, settings.normalise))).flatten(1)
    pairs = kernels @ kernels.T / (means.shape[1] - 1) ** 2
    return (pairs.sum(1) - pairs.diagonal()) / (len(means) - 1)


def _to_unit(scores: Tensor) -> Tensor:
    """Scaled to [0, 1]."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low).clamp(min=1e-30)


@torch.inference_mode()
def position_scores(model: nn.Module, data: ImageData, index: int, settings: Criterion) -> Tensor:
    """A score in [0, 1] of each of the N tokens' positions: HSIC of the values there with the label, at one block.

    The features are the values v of all heads at that position, (images, attn_dim); the label is one-hot. Prefix tokens
    have 0, they always stay.
    """
    split = scoring_images(data, settings)
    block, seen, labels = model.blocks[index], [], []

    def see(name: str, x: Tensor, y: Tensor) -> None:
        seen.append(y[..., -block.attn.attn_dim :])

    with forward_hooks({"qkv": block.attn.qkv}, see):
        for x, y in eval_batches(split, model.recipe.preprocess, CALIBRATION_BATCH):
            model(x)
            labels.append(y)
    wanted = centre_kernel(linear(F.one_hot(torch.cat(labels)).float()))
    found = _dependence(torch.cat(seen).transpose(0, 1), wanted, settings)
    found[: model.num_prefix_tokens] = found.min()
    return _to_unit(found)
