"""The Hilbert-Schmidt independence criterion (HSIC), and scores of units and token positions by it.

Gretton et al. (2005): HSIC = tr(K H L H) / (n - 1)^2 with the kernel matrices K and L of the n samples of each variable
and H = I - 1 1^T / n. With Gaussian kernels its limit for many samples is zero exactly if the variables are independent.
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
    squared_norms = products.diagonal(dim1=-2, dim2=-1)
    squared_distances = (squared_norms[..., :, None] + squared_norms[..., None, :] - 2 * products).clamp_(min=0)
    mixture = torch.zeros_like(squared_distances)
    for width in widths:
        mixture += torch.exp(squared_distances * (-0.5 / width**2))
    return mixture / len(widths)


def linear(x: Tensor) -> Tensor:
    """x_i . x_j: (..., n, d) -> (..., n, n)."""
    return x @ x.transpose(-2, -1)


def centre_kernel(kernel: Tensor) -> Tensor:
    """H K H: (..., n, n) -> (..., n, n)."""
    rows = kernel.mean(-1, keepdim=True)
    return kernel - rows - rows.transpose(-2, -1) + rows.mean(-2, keepdim=True)


def hsic(kernel: Tensor, target_kernel: Tensor) -> Tensor:
    """tr(K H L H) / (n - 1)^2 of two kernel matrices (..., n, n), which may be broadcast: (...)."""
    n = kernel.shape[-1]
    return (kernel * centre_kernel(target_kernel)).sum((-2, -1)) / (n - 1) ** 2


def standardize(x: Tensor, mode: str, eps: float = 1e-5) -> Tensor:
    """Standardize each feature of the samples (..., n, d) over the samples.

    "corrected": (x - mean) / (std + eps). "official": x - mean / (std + eps), without the parentheses, as in the paper's
    public code. "none": x itself.
    """
    if mode == "none":
        return x
    mean, std = x.mean(-2, keepdim=True), x.std(-2, keepdim=True) + eps
    return (x - mean) / std if mode == "corrected" else x - mean / std


CHUNK = 2**24  # numbers in the kernel matrices that are in memory at once


@torch.inference_mode()
def unit_hsic(model: nn.Module, data: ImageData, criterion: Criterion) -> list[Scores]:
    """HSIC of each unit's values with the model's softmax output, a Gaussian mixture kernel against a linear one.

    The values of a neuron or a dimension are its activations of all tokens, (images, N), and those of a head the mean over
    its dimensions. `redundancy` times a head's mean HSIC with the other heads is subtracted from its score. The blocks run
    one after the other on all images, so memory holds the values of one block.
    """
    split = scoring_images(data, criterion)
    batches = eval_batches(split, model.recipe.preprocess, CALIBRATION_BATCH)
    tokens, probabilities = [], []
    for x, _ in progress.progress_bar(batches, "logits", total=math.ceil(len(split) / CALIBRATION_BATCH), unit="batch"):
        tokens.append(vit.embed_patches(model, x))
        probabilities.append(model(x).softmax(-1))
    target_kernel = centre_kernel(linear(torch.cat(probabilities)))
    block_scores = []
    for block in progress.progress_bar(model.blocks, "dependence", unit="block"):
        activations: dict[str, list[Tensor]] = {"qkv": [], "proj": [], "fc2": []}

        def on_call(name: str, x: Tensor, y: Tensor, activations=activations) -> None:
            values = y[..., : y.shape[-1] // 3] if name == "qkv" else x
            activations[name].append(values.transpose(1, 2).contiguous())

        layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc2": block.mlp.fc2}
        with forward_hooks(layers, on_call):
            tokens = [block(x) for x in tokens]
        values = {name: torch.cat(activations.pop(name)).transpose(0, 1) for name in layers}  # (units, images, N)
        dependences = {name: _dependence(value, target_kernel, criterion) for name, value in values.items()}
        neurons = dependences["fc2"]
        if criterion.blend < 1:
            size = values["fc2"].abs().sum((1, 2))
            neurons = criterion.blend * _scale_to_unit_interval(neurons)
            neurons = neurons + (1 - criterion.blend) * _scale_to_unit_interval(size)
        means = by_head(values["proj"], block).mean(1)
        heads = _dependence(means, target_kernel, criterion) - criterion.redundancy * _redundancy(means, criterion)
        qk, v = by_head(dependences["qkv"], block), by_head(dependences["proj"], block)
        block_scores.append(Scores(neurons, heads, qk, v))
        del values  # so that memory never holds the values of two blocks
    return block_scores


def _dependence(values: Tensor, target_kernel: Tensor, criterion: Criterion) -> Tensor:
    """HSIC of each unit's values (units, n, N) with the samples of the centred kernel `target_kernel`, (n, n): (units,)."""
    n = values.shape[1]
    chunks = values.split(max(1, CHUNK // n**2))
    kernels = (gaussian_mixture(standardize(chunk, criterion.normalise)) for chunk in chunks)
    return torch.cat([(kernel * target_kernel).sum((-2, -1)) for kernel in kernels]) / (n - 1) ** 2


def _redundancy(means: Tensor, criterion: Criterion) -> Tensor:
    """The mean HSIC of each head's values (heads, n, N) with those of the others: (heads,)."""
    if len(means) == 1:
        return torch.zeros(1)
    kernels = centre_kernel(gaussian_mixture(standardize(means, criterion.normalise))).flatten(1)
    pairs = kernels @ kernels.T / (means.shape[1] - 1) ** 2
    return (pairs.sum(1) - pairs.diagonal()) / (len(means) - 1)


def _scale_to_unit_interval(scores: Tensor) -> Tensor:
    """Scale and shift scores linearly to [0, 1]."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low).clamp(min=1e-30)


@torch.inference_mode()
def position_scores(model: nn.Module, data: ImageData, index: int, criterion: Criterion) -> Tensor:
    """A score in [0, 1] for each of the N token positions: HSIC of its values in block `index` with the labels.

    The features are the values v of all heads at a position, (images, attn_dim); the labels are one-hot. Prefix tokens are
    always kept, and their score is 0.
    """
    split = scoring_images(data, criterion)
    block, values, labels = model.blocks[index], [], []

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        values.append(y[..., -block.attn.attn_dim :])

    with forward_hooks({"qkv": block.attn.qkv}, on_call):
        for x, y in eval_batches(split, model.recipe.preprocess, CALIBRATION_BATCH):
            model(x)
            labels.append(y)
    target_kernel = centre_kernel(linear(F.one_hot(torch.cat(labels)).float()))
    scores = _dependence(torch.cat(values).transpose(0, 1), target_kernel, criterion)
    scores[: model.num_prefix_tokens] = scores.min()
    return _scale_to_unit_interval(scores)
