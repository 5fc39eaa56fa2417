"""Alignment of blocks: a change of the weights that leaves every output as it was, and makes the blocks' weights alike.

A factor that all blocks share (`vitbench.calibration.shared`) suits weights whose outputs mean the same in each block. The
coordinates inside a head and the order of the neurons are arbitrary, so each block is free to choose them:

- per head, q' = T^-T q and k' = T k leave q . k unchanged for every invertible T. With E[q q^T] = A A^T, Cov(k) = B B^T and
  the singular value decomposition B^T A = U S V^T, T = S^(1/2) U^T B^-1 gives both the second moment S: the coordinates are
  uncorrelated, equally large in q and k, and sorted. (The bias of k drops out of the softmax, so k counts about its mean.)
- per head, v' = U^T v and W_proj' = W_proj U with the eigenvectors U of Cov(v). A rotation keeps the size of the columns of
  W_proj, which may get codes of its own; the T above would not.
- neurons are sorted by E[gelu'(z)^2] ||w||^2, with the input z of the activation and the neuron's column w of fc2: by what a
  small error of z costs in the output.
"""

import torch
from timm.layers import Attention
from torch import Tensor, nn

from vitbench.calibration.moments import forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.data.splits import Split
from vitbench.model import blocks
from vitbench.model.layers import ExactNystroemAttention, NystroemAttention
from vitbench.model.tokens import TokenBlocks

DAMPING = 1e-4  # added to the diagonals of moments, in units of their mean: T stays well conditioned


@torch.no_grad()
def align_blocks(model: nn.Module, split: Split, batch_size: int = 32) -> dict[str, str]:
    """Align the blocks' heads and neurons in place, by the images of `split`. Returns what was left alone -> the reason.

    Shapes, and outputs up to rounding, stay as they are. What depends on the coordinates, such as normalised keys, attention
    without a softmax, and tokens that are matched by their keys, is left alone, as are layers that are not plain linear ones.
    """
    skipped = {name: reason for index in range(len(model.blocks)) for name, reason in _obstacles(model, index)}
    moments = _collect(model, split, batch_size)
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}"
        if f"{prefix}.attn" not in skipped:
            attn, sums = block.attn, moments[f"{prefix}.attn.qkv"]
            if f"{prefix}.attn: q, k" not in skipped:
                _align_queries_and_keys(attn, sums)
            _align_values(attn, sums)
        if f"{prefix}.mlp" not in skipped:
            _sort_neurons(block.mlp, moments[f"{prefix}.mlp.fc1"])
    return skipped


def _obstacles(model: nn.Module, index: int) -> list[tuple[str, str]]:
    """(part, reason) of each part of block `index` that alignment would change."""
    block = model.blocks[index]
    found, attn, mlp, prefix = [], block.attn, block.mlp, f"blocks.{index}"

    def inside(part: nn.Module, *names: str) -> list[str]:
        return [name for name in names if not isinstance(getattr(part, name, None), nn.Identity | None)]

    if not isinstance(attn, Attention | NystroemAttention | ExactNystroemAttention):
        found.append((f"{prefix}.attn", f"it is a {type(attn).__name__}, whose output depends on the coordinates"))
    elif mixing := inside(attn, "norm", "gate"):
        found.append((f"{prefix}.attn", f"it has a {mixing[0]}"))
    elif not all(isinstance(layer, nn.Linear) for layer in (attn.qkv, attn.proj)):
        found.append((f"{prefix}.attn", "qkv or proj is not a plain linear layer"))
    elif normed := inside(attn, "q_norm", "k_norm"):
        found.append((f"{prefix}.attn: q, k", f"it has a {normed[0]}, which depends on the coordinates"))
    elif isinstance(model.blocks, TokenBlocks) and model.blocks.reduction == "merge":
        found.append((f"{prefix}.attn: q, k", "tokens are matched by their keys"))
    dense = all(isinstance(layer, nn.Linear) for layer in (mlp.fc1, mlp.fc2))
    if not dense or blocks.fc1_rows_per_neuron(block) > 1 or inside(mlp, "norm"):
        found.append((f"{prefix}.mlp", "its neurons are not single outputs of a plain linear layer"))
    return found


def _collect(model: nn.Module, split: Split, batch_size: int) -> dict[str, dict[str, Tensor]]:
    """Sums over tokens: of qkv's outputs y and y y^T per head (3 heads, d), (3 heads, d, d); of act'(z)^2 of fc1's outputs."""
    sums: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, nn.Module] = {}
    parts: dict[str, int] = {}
    activations: dict[str, nn.Module] = {}
    for index, block in enumerate(model.blocks):
        layers |= {f"blocks.{index}.attn.qkv": block.attn.qkv, f"blocks.{index}.mlp.fc1": block.mlp.fc1}
        parts[f"blocks.{index}.attn.qkv"] = 3 * block.attn.num_heads
        activations[f"blocks.{index}.mlp.fc1"] = block.mlp.act

    def add(name: str, _: Tensor, y: Tensor) -> None:
        y = y.flatten(0, -2)
        if name in parts:
            heads = y.unflatten(-1, (parts[name], -1)).transpose(0, 1)
            new = {"outer": (heads.mT @ heads).double(), "sum": heads.sum(1).double()}
        else:
            with torch.enable_grad():
                z = y.detach().requires_grad_()
                (slope,) = torch.autograd.grad(activations[name](z).sum(), z)
            new = {"slope": slope.square().sum(0).double()}
        new["tokens"] = torch.tensor(float(len(y)), dtype=torch.float64)
        old = sums.get(name)
        sums[name] = new if old is None else {key: old[key] + value for key, value in new.items()}

    with forward_hooks(layers, add):
        for x, _ in eval_batches(split, model.recipe.preprocess, batch_size):
            model(x)
    return sums


def _balancing(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """T and T^-1, (d, d), with T second T^T = T^-T first T^-1 = S, diagonal and sorted."""
    a, b = (torch.linalg.cholesky(_damped(moment)) for moment in (first, second))
    u, s, _ = torch.linalg.svd(b.T @ a)
    inverse = b @ u / s.sqrt()
    return torch.linalg.inv(inverse), inverse


def _damped(moment: Tensor) -> Tensor:
    size = DAMPING * moment.diagonal().mean().clamp(min=1e-12)
    return moment + size * torch.eye(len(moment), dtype=moment.dtype)


def _align_queries_and_keys(attn: nn.Module, sums: dict[str, Tensor]) -> None:
    heads = attn.num_heads
    for head in range(heads):
        query, key = sums["outer"][head] / sums["tokens"], _covariance(sums, heads + head)
        matrix, inverse = _balancing(query, key)
        _transform_rows(attn.qkv, head, 3 * heads, inverse.T)
        _transform_rows(attn.qkv, heads + head, 3 * heads, matrix)


def _align_values(attn: nn.Module, sums: dict[str, Tensor]) -> None:
    heads = attn.num_heads
    for head in range(heads):
        size = attn.proj.in_features // heads
        columns = slice(head * size, (head + 1) * size)
        rotation = torch.linalg.eigh(_covariance(sums, 2 * heads + head)).eigenvectors.flip(1)
        _transform_rows(attn.qkv, 2 * heads + head, 3 * heads, rotation.T)
        attn.proj.weight.data[:, columns] = (attn.proj.weight.data[:, columns].double() @ rotation).float()


def _covariance(sums: dict[str, Tensor], part: int) -> Tensor:
    mean = sums["sum"][part] / sums["tokens"]
    return sums["outer"][part] / sums["tokens"] - torch.outer(mean, mean)


def _transform_rows(layer: nn.Linear, part: int, parts: int, matrix: Tensor) -> None:
    """Multiply the outputs of one of the layer's `parts` equal parts by `matrix`, in place."""
    size = layer.out_features // parts
    rows = slice(part * size, (part + 1) * size)
    layer.weight.data[rows] = (matrix @ layer.weight.data[rows].double()).float()
    if layer.bias is not None:
        layer.bias.data[rows] = (matrix @ layer.bias.data[rows].double()).float()


def _sort_neurons(mlp: nn.Module, sums: dict[str, Tensor]) -> None:
    order = (sums["slope"] * mlp.fc2.weight.data.double().square().sum(0)).argsort(descending=True)
    mlp.fc1.weight.data = mlp.fc1.weight.data[order]
    if mlp.fc1.bias is not None:
        mlp.fc1.bias.data = mlp.fc1.bias.data[order]
    mlp.fc2.weight.data = mlp.fc2.weight.data[:, order]
