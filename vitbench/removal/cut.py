"""Units of the blocks, neurons, heads, their dimensions: which stay, and how the others are taken out or masked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.model import blocks


@dataclass(frozen=True)
class KeptUnits:
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


def check_prunable(model: nn.Module) -> None:
    """Raise `InputError` unless heads and neurons can be taken out of each block's plain layers."""
    for index, block in enumerate(model.blocks):
        blocks.check_standard_attention(model, index)
        attn, mlp = block.attn, block.mlp
        layers = {"attn.qkv": attn.qkv, "attn.proj": attn.proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
        coded = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
        if coded:
            raise InputError(
                f"blocks.{index}.{coded[0]} is a {type(layers[coded[0]]).__name__}, not a plain linear layer; prune first, "
                "then factorise or quantize"
            )
        if blocks.fc1_rows_per_neuron(block) > 1:
            raise InputError(
                f"the MLP in blocks.{index} of {model.recipe.architecture.name} is a {type(mlp).__name__}, whose neurons are "
                "pairs of outputs; give a ViT with a plain MLP"
            )
        inner = {"attn.norm": attn.norm, "attn.gate": getattr(attn, "gate", None), "mlp.norm": mlp.norm}
        odd = [name for name, module in inner.items() if not isinstance(module, nn.Identity | None)]
        if odd:
            raise InputError(
                f"{model.recipe.architecture.name} has {odd[0]} inside its blocks, which mixes the units; no unit of it can "
                "be taken out without changing the others"
            )


@torch.no_grad()
def remove_units(model: nn.Module, kept: Sequence[KeptUnits]) -> None:
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
        blocks.set_attention_shape(attn, heads, width)
        for tensor in attn.qkv.parameters():
            tensor[: attn.attn_dim] *= old_scale / attn.scale
        mlp.fc1, mlp.fc2 = _cut(mlp.fc1, rows=keep.neurons), _cut(mlp.fc2, columns=keep.neurons)
    blocks.record_block_shapes(model)


def _rows(attn: nn.Module, keep: KeptUnits, which: str) -> Tensor:
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


def value_rows(attn: nn.Module, keep: KeptUnits) -> Tensor:
    """The inputs of `proj` that stay."""
    return _rows(attn, keep, "v")


def masks(block: nn.Module, keep: KeptUnits) -> tuple[Tensor, Tensor]:
    """1 for what stays, 0 for what goes: of qkv's outputs (3 a,) and of fc2's inputs (h,)."""
    qkv, hidden = torch.zeros(3, block.attn.attn_dim), torch.zeros(block.mlp.fc1.out_features)
    for part, which in zip(qkv, ("qk", "qk", "v"), strict=True):
        part[_rows(block.attn, keep, which)] = 1
    hidden[keep.neurons] = 1
    return qkv.flatten(), hidden


@contextmanager
def masked(model: nn.Module, kept: Sequence[KeptUnits]) -> Iterator[None]:
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
