"""The Hilbert-Schmidt independence criterion (HSIC), and scores of units and token positions by it.

Gretton et al. (2005): HSIC = tr(K H L H) / (n - 1)^2 with the kernel matrices K and L of the n samples of each variable
and H = I - 1 1^T / n. With Gaussian kernels its limit for many samples is zero exactly if the variables are independent.

HSIC of standardized values, and CKA, do not depend on how large the values are, but what a removed unit costs does. The form
"cka" therefore multiplies the dependence by the energy of what the unit adds to its layer's output.
"""

import math
from collections.abc import Mapping, Sequence

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
    distances = squared_distances(x)
    mixture = torch.zeros_like(distances)
    for width in widths:
        mixture += torch.exp(distances * (-0.5 / width**2))
    return mixture / len(widths)


def gaussian_median(x: Tensor) -> Tensor:
    """exp(-||x_i - x_j||^2 / (2 m)), with m the median of ||x_i - x_j||^2 over pairs: (..., n, d) -> (..., n, n)."""
    distances = squared_distances(x)
    first, second = torch.triu_indices(x.shape[-2], x.shape[-2], 1)
    median = distances[..., first, second].median(-1).values.clamp(min=torch.finfo(x.dtype).tiny)
    return torch.exp(distances / (-2 * median[..., None, None]))


def squared_distances(x: Tensor) -> Tensor:
    """||x_i - x_j||^2: (..., n, d) -> (..., n, n)."""
    products = x @ x.transpose(-2, -1)
    squared_norms = products.diagonal(dim1=-2, dim2=-1)
    return (squared_norms[..., :, None] + squared_norms[..., None, :] - 2 * products).clamp_(min=0)


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


def cka(kernel: Tensor, target_kernel: Tensor) -> Tensor:
    """Centred kernel alignment of kernels (..., n, n): (...), in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414, section 3).

    It is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), and 0 for a variable that is constant.
    """
    kernel, target_kernel = centre_kernel(kernel), centre_kernel(target_kernel)
    norms = torch.linalg.matrix_norm(kernel) * torch.linalg.matrix_norm(target_kernel)
    return (kernel * target_kernel).sum((-2, -1)).clamp(min=0) / norms.clamp(min=1e-20)


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
    """HSIC of each unit's values with the model's softmax output, a Gaussian kernel against a linear one.

    The values of a neuron or a dimension are its activations of all tokens, (images, N), and those of a head the mean over
    its dimensions. `redundancy` times a head's mean HSIC with the other heads is subtracted from its score; with "cka" the score
    is reduced by this fraction. The blocks run one after the other on all images, so memory holds the values of one block.
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

        keys: list[Tensor] = []

        def on_call(name: str, x: Tensor, y: Tensor, activations=activations, keys=keys) -> None:
            values = y[..., : y.shape[-1] // 3] if name == "qkv" else x
            activations[name].append(values.transpose(1, 2).contiguous())
            if name == "qkv":
                keys.append(y.chunk(3, -1)[1].square().sum((0, 1)))

        layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc2": block.mlp.fc2}
        with forward_hooks(layers, on_call):
            tokens = [block(x) for x in tokens]
        values = {name: torch.cat(activations.pop(name)).transpose(0, 1) for name in layers}  # (units, images, N)
        dependences = {name: _dependence(value, target_kernel, criterion) for name, value in values.items()}
        means = by_head(values["proj"], block).mean(1)
        heads = _dependence(means, target_kernel, criterion)
        redundancy = criterion.redundancy * _redundancy(means, criterion)
        if criterion.normalise == "cka":
            energies = _energies(block, values, torch.stack(keys).sum(0))
            dependences = {name: dependence * energies[name] for name, dependence in dependences.items()}
            heads = heads * (1 - redundancy).clamp(min=0) * energies["heads"]
        else:
            heads = heads - redundancy
        neurons = dependences["fc2"]
        if criterion.blend < 1:
            size = values["fc2"].abs().sum((1, 2))
            neurons = criterion.blend * _scale_to_unit_interval(neurons)
            neurons = neurons + (1 - criterion.blend) * _scale_to_unit_interval(size)
        qk, v = by_head(dependences["qkv"], block), by_head(dependences["proj"], block)
        block_scores.append(Scores(neurons, heads, qk, v))
        del values  # so that memory never holds the values of two blocks
    return block_scores


def _dependence(values: Tensor, target_kernel: Tensor, criterion: Criterion) -> Tensor:
    """HSIC or CKA of each unit's values (units, n, N) with the samples of the centred `target_kernel`, (n, n): (units,)."""
    n = values.shape[1]
    chunks = values.split(max(1, CHUNK // n**2))
    if criterion.normalise == "cka":
        return torch.cat([cka(gaussian_median(chunk), target_kernel) for chunk in chunks])
    kernels = (gaussian_mixture(standardize(chunk, criterion.normalise)) for chunk in chunks)
    return torch.cat([(kernel * target_kernel).sum((-2, -1)) for kernel in kernels]) / (n - 1) ** 2


def _redundancy(means: Tensor, criterion: Criterion) -> Tensor:
    """The mean HSIC or CKA of each head's values (heads, n, N) with those of the others: (heads,)."""
    if len(means) == 1:
        return torch.zeros(1)
    if criterion.normalise == "cka":
        kernels = F.normalize(centre_kernel(gaussian_median(means)).flatten(1), dim=1)
        pairs = kernels @ kernels.T
    else:
        kernels = centre_kernel(gaussian_mixture(standardize(means, criterion.normalise))).flatten(1)
        pairs = kernels @ kernels.T / (means.shape[1] - 1) ** 2
    return (pairs.sum(1) - pairs.diagonal()) / (len(means) - 1)


def _energies(block: nn.Module, values: Mapping[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
    """The sum of squares, over tokens and images, of what each unit adds to the layer after it.

    A neuron and a dimension of the values add z w to the block's output, with w their column of fc2 or proj, and a head adds
    the sum over its dimensions. A dimension of queries and keys adds q_j k_j to the logits; their sums of squares multiply.

    Args:
        values: "qkv" (the queries), "proj" and "fc2" -> the units' values, (units, images, N).
        keys: the sum of squares of each dimension of the keys, (attn_dim,).
    """
    sums = {name: value.square().sum((1, 2)) for name, value in values.items()}
    columns = {}
    for name, layer, scale in (("proj", block.attn.proj, "ls1"), ("fc2", block.mlp.fc2, "ls2")):
        gamma = getattr(getattr(block, scale, None), "gamma", None)
        columns[name] = layer.weight.detach() if gamma is None else gamma.detach()[:, None] * layer.weight.detach()
    by_heads = by_head(values["proj"], block).flatten(2)  # (heads, head_dim, images N)
    weights = by_head(columns["proj"].T, block)  # (heads, head_dim, d)
    heads = ((by_heads @ by_heads.mT) * (weights @ weights.mT)).sum((1, 2))
    energies = {name: sums[name] * columns[name].square().sum(0) for name in columns}
    return {**energies, "qkv": sums["qkv"] * keys, "heads": heads}


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
