"""Sizes of a Vision Transformer's blocks: read, built, cut, masked and counted. With vit.py, what knows timm's inside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitbench.errors import InputError
from vitbench.layers import SplitLinear
from vitbench.recipe import Architecture, BlockShape
from vitbench.tokens import TokenBlocks


@dataclass(frozen=True)
class Kept:
    """What stays of one block: ascending indices of its units.

    Attributes:
        neurons: of the MLP's hidden layer, (n,).
        heads: (h,).
        qk, v: of each head's dimensions, (all heads, d') each, or None for all. The two may differ, their number may not.
    """

    neurons: Tensor
    heads: Tensor
    qk: Tensor | None = None
    v: Tensor | None = None


def shapes(model: nn.Module) -> tuple[BlockShape, ...]:
    """The sizes of each block as they are now."""
    counts = model.blocks.counts if isinstance(model.blocks, TokenBlocks) else [None] * len(model.blocks)
    return tuple(
        BlockShape(
            heads=block.attn.num_heads,
            head_dim=block.attn.head_dim,
            neurons=block.mlp.fc1.out_features,
            tokens=count,
        )
        for block, count in zip(model.blocks, counts, strict=True)
    )


def stream(block: nn.Module, name: str) -> str:
    """The module in `block` whose input is the residual stream that the output of the layer `name` is added to, as it is.

    "" for a layer whose output goes elsewhere, or is scaled first (LayerScale).
    """
    norm, scale = {"attn.proj": ("norm1", "ls1"), "mlp.fc2": ("norm2", "ls2")}.get(name, ("", ""))
    return norm if isinstance(getattr(block, scale, None), nn.Identity) else ""


def split_heads(model: nn.Module) -> dict[str, slice]:
    """Cut each dense qkv layer into q, k and v of every head, in place. Returns the rows of the old layer by part's name."""
    rows = {}
    for index, block in enumerate(model.blocks):
        linear, heads = block.attn.qkv, block.attn.num_heads
        if isinstance(linear, nn.Linear):
            size = linear.out_features // (3 * heads)
            split = SplitLinear(linear.in_features, [size] * 3 * heads, bias=linear.bias is not None)
            block.attn.qkv = split.fill(linear)
            rows |= {f"blocks.{index}.attn.qkv.parts.{i}": slice(i * size, (i + 1) * size) for i in range(3 * heads)}
    return rows


def spread(depth: int, of: int) -> list[int]:
    """`depth` of `of` blocks, evenly spaced, the first and, of two or more, the last among them."""
    return [round(float(place)) for place in np.linspace(0, of - 1, depth)]


def ends_of_stages(depth: int, of: int) -> list[int]:
    """For each of `depth` blocks the one of `of` blocks that lies at the same share of the depth, the last for the last."""
    return [-(-(block + 1) * of // depth) - 1 for block in range(depth)]


def keep_blocks(model: nn.Module, places: Sequence[int]) -> None:
    """Leave only the blocks at `places`, with their weights, in place."""
    if isinstance(model.blocks, TokenBlocks):
        raise InputError(
            "blocks cannot be taken from a model with fewer tokens on the way; give one that keeps them all"
        )
    model.blocks = nn.Sequential(*(model.blocks[place] for place in places))
    architecture = model.recipe.architecture
    sizes = tuple(architecture.blocks[place] for place in places) if architecture.blocks else ()
    model.recipe = model.recipe.having(architecture=architecture.having(depth=len(places), blocks=sizes))


def norms_before(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layer -> the LayerNorm whose output is its input and nothing else's."""
    pairs = {"attn.qkv": "norm1", "mlp.fc1": "norm2"}
    return {
        f"blocks.{index}.{layer}": block.get_submodule(norm)
        for index, block in enumerate(model.blocks)
        for layer, norm in pairs.items()
        if isinstance(block.get_submodule(norm), nn.LayerNorm)
    }


def build(model: nn.Module, architecture: Architecture) -> None:
    """Give the blocks the sizes that `architecture` says, in place, with new weights; nothing if it says none.

    Raises:
        InputError: sizes of another number of blocks.
    """
    wanted = architecture.blocks
    if not wanted:
        return
    if len(wanted) != len(model.blocks):
        raise InputError(f"sizes of {len(wanted)} blocks were given and {architecture.name} has {len(model.blocks)}")
    for block, shape in zip(model.blocks, wanted, strict=True):
        attn, mlp = block.attn, block.mlp
        size_attention(attn, shape.heads, shape.head_dim)
        attn.qkv = nn.Linear(attn.qkv.in_features, 3 * attn.attn_dim, bias=attn.qkv.bias is not None)
        attn.proj = nn.Linear(attn.attn_dim, attn.proj.out_features, bias=attn.proj.bias is not None)
        mlp.fc1 = nn.Linear(mlp.fc1.in_features, shape.neurons, bias=mlp.fc1.bias is not None)
        mlp.fc2 = nn.Linear(shape.neurons, mlp.fc2.out_features, bias=mlp.fc2.bias is not None)
    if architecture.reduction:
        reduce_tokens(model, architecture.reduction, [shape.tokens for shape in wanted])


def answer_apart(model: nn.Module, apart: bool) -> None:
    """Whether a model with a distillation token answers with both heads apart while it trains, or with their mean."""
    for module in model.modules():
        if hasattr(module, "distilled_training"):
            module.distilled_training = apart


def size_attention(attn: nn.Module, heads: int, head_dim: int) -> None:
    """Tell a timm attention layer its heads and their width; its matrices are the caller's."""
    attn.num_heads, attn.head_dim, attn.attn_dim = heads, head_dim, heads * head_dim
    attn.scale = head_dim**-0.5  # what the fused kernel uses by itself


def reduce_tokens(model: nn.Module, reduction: str, counts: Sequence[int | None]) -> None:
    """Leave `counts` tokens after each block's attention (`vitbench.tokens`), in place."""
    prefix, tokens = model.num_prefix_tokens, model.patch_embed.num_patches + model.num_prefix_tokens
    if min(count or tokens for count in counts) < prefix + 1:
        raise InputError(
            f"tokens left = {tuple(counts)}: the {prefix} class and register tokens and one more always stay"
        )
    model.blocks = TokenBlocks(model.blocks, reduction, counts, prefix, tokens)


def check_prunable(model: nn.Module) -> None:
    """Raise `InputError` unless heads and neurons can be taken out of each block's plain layers."""
    for index, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        layers = {"attn.qkv": attn.qkv, "attn.proj": attn.proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
        coded = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
        if coded:
            raise InputError(
                f"blocks.{index}.{coded[0]} is a {type(layers[coded[0]]).__name__}, not a plain linear layer; prune first, "
                "then factorise or quantize"
            )
        inner = {"attn.norm": attn.norm, "attn.gate": getattr(attn, "gate", None), "mlp.norm": mlp.norm}
        odd = [name for name, module in inner.items() if not isinstance(module, nn.Identity | None)]
        if odd:
            raise InputError(
                f"{model.recipe.architecture.name} has {odd[0]} inside its blocks, which mixes the units; no unit of it can "
                "be taken out without changing the others"
            )


@torch.no_grad()
def prune(model: nn.Module, kept: Sequence[Kept]) -> None:
    """Take everything but `kept` out of the blocks, in place: matrices become smaller, nothing is masked.

    The softmax scale stays that of the old head width: timm's fused kernel scales by the new one, so the difference goes
    into the queries' weights.

    Raises:
        InputError: see `check_prunable`; fewer dimensions of heads whose queries are normalised.
    """
    check_prunable(model)
    for index, (block, keep) in enumerate(zip(model.blocks, kept, strict=True)):
        attn, mlp = block.attn, block.mlp
        rows_qk, rows_v = _rows(attn, keep, "qk"), _rows(attn, keep, "v")
        heads, width = len(keep.heads), len(rows_v) // len(keep.heads)
        if width != attn.head_dim and not isinstance(attn.q_norm, nn.Identity):
            raise InputError(
                f"blocks.{index}.attn normalises queries over a head's {attn.head_dim} dimensions, so none can go; prune "
                "whole heads"
            )
        qkv = torch.cat([rows_qk, attn.attn_dim + rows_qk, 2 * attn.attn_dim + rows_v])
        old_scale = attn.scale
        attn.qkv, attn.proj = _cut(attn.qkv, rows=qkv), _cut(attn.proj, columns=rows_v)
        size_attention(attn, heads, width)
        for tensor in attn.qkv.parameters():
            tensor[: attn.attn_dim] *= old_scale / attn.scale
        mlp.fc1, mlp.fc2 = _cut(mlp.fc1, rows=keep.neurons), _cut(mlp.fc2, columns=keep.neurons)
    note_shapes(model)


def note_shapes(model: nn.Module) -> None:
    """Write the blocks' present sizes into the model's recipe."""
    reduction = model.blocks.reduction if isinstance(model.blocks, TokenBlocks) else None
    changed = model.recipe.architecture.having(blocks=shapes(model), reduction=reduction)
    model.recipe = model.recipe.having(architecture=changed)


def _rows(attn: nn.Module, keep: Kept, which: str) -> Tensor:
    """Rows of the queries' part (likewise the keys', the values') of qkv that stay."""
    inside = getattr(keep, which)
    if inside is None:
        inside = torch.arange(attn.head_dim).expand(attn.num_heads, -1)
    return (keep.heads[:, None] * attn.head_dim + inside[keep.heads]).flatten()


def _cut(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    weight, bias = layer.weight.detach(), layer.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias.detach()[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.weight.requires_grad)
    return new


def value_rows(attn: nn.Module, keep: Kept) -> Tensor:
    """The inputs of `proj` that stay."""
    return _rows(attn, keep, "v")


def masks(block: nn.Module, keep: Kept) -> tuple[Tensor, Tensor]:
    """1 for what stays, 0 for what goes: of qkv's outputs (3 a,) and of fc2's inputs (h,)."""
    qkv, hidden = torch.zeros(3, block.attn.attn_dim), torch.zeros(block.mlp.fc1.out_features)
    for part, which in zip(qkv, ("qk", "qk", "v"), strict=True):
        part[_rows(block.attn, keep, which)] = 1
    hidden[keep.neurons] = 1
    return qkv.flatten(), hidden


@contextmanager
def masked(model: nn.Module, kept: Sequence[Kept]) -> Iterator[None]:
    """While open, the units outside `kept` answer zero, and cost as much as before."""
    handles = []
    for block, keep in zip(model.blocks, kept, strict=True):
        qkv, hidden = (mask.to(block.attn.qkv.weight.device) for mask in masks(block, keep))
        handles.append(block.attn.qkv.register_forward_hook(lambda _, x, y, mask=qkv: y * mask))
        handles.append(block.mlp.fc2.register_forward_pre_hook(lambda _, x, mask=hidden: (x[0] * mask,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tokens_through(wanted: Sequence[BlockShape], tokens: int) -> tuple[list[int], list[int]]:
    """How many of `tokens` are there before each block, and after its attention."""
    before, after = [], []
    for shape in wanted:
        before.append(after[-1] if after else tokens)
        after.append(min(shape.tokens or before[-1], before[-1]))
    return before, after


def macs(heads, head_dim, neurons, before, after, width: int, reduction: str | None = None) -> np.ndarray:
    """Multiply-accumulates of blocks for one image, summed over the last axis of the arguments (numbers or arrays).

    With a = heads x head_dim, h neurons, N tokens before and M after the attention, and tokens of `width` d:
    4 N d a + 2 N^2 a + 2 M d h, plus N a for the class token's attention where tokens are chosen by it, or
    (N / 2)^2 head_dim for the similarities where they are merged.
    """
    n, m, a = np.asarray(before, dtype=np.int64), np.asarray(after, dtype=np.int64), np.asarray(heads) * head_dim
    total = 4 * n * width * a + 2 * n * n * a + 2 * m * width * np.asarray(neurons)
    if reduction in ("cls_attention", "hsic_cls"):
        total = total + np.where(m < n, n * a, 0)
    if reduction == "merge":
        total = total + np.where(m < n, (n - n // 2) * (n // 2) * head_dim, 0)
    return total.sum(-1)
