"""Removal and masking of units in the blocks: neurons, heads and dimensions of heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.model import blocks


@dataclass(frozen=True)
class KeptUnits:
    """The units of one block that are kept, as ascending indices.

    Attributes:
        neurons: neurons of the MLP's hidden layer, (n,).
        heads: attention heads, (h,).
        qk, v: dimensions of the queries and keys, and of the values, of each head, (all heads, d') each; None keeps all. The
            indices of the two may differ, their number d' may not.
    """

    neurons: Tensor
    heads: Tensor
    qk: Tensor | None = None
    v: Tensor | None = None


def check_prunable(model: nn.Module) -> None:
    """Raise `InputError` unless heads and neurons can be removed from plain linear layers in each block."""
    for index, block in enumerate(model.blocks):
        blocks.check_standard_attention(model, index)
        attn, mlp = block.attn, block.mlp
        layers = {"attn.qkv": attn.qkv, "attn.proj": attn.proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
        not_dense = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
        if not_dense:
            raise InputError(
                f"blocks.{index}.{not_dense[0]} is a {type(layers[not_dense[0]]).__name__}, not a plain linear layer; prune first, "
                "then factorise or quantize"
            )
        if blocks.fc1_rows_per_neuron(block) > 1:
            raise InputError(
                f"the MLP in blocks.{index} of {model.recipe.architecture.name} is a {type(mlp).__name__}, whose neurons are "
                "pairs of outputs; give a ViT with a plain MLP"
            )
        inner = {"attn.norm": attn.norm, "attn.gate": getattr(attn, "gate", None), "mlp.norm": mlp.norm}
        mixing_layers = [name for name, module in inner.items() if not isinstance(module, nn.Identity | None)]
        if mixing_layers:
            raise InputError(
                f"{model.recipe.architecture.name} has {mixing_layers[0]} inside its blocks, which mixes the units, so the "
                "removal of one changes the others; give a ViT without it"
            )


@torch.no_grad()
def remove_units(model: nn.Module, kept_units: Sequence[KeptUnits]) -> None:
    """Remove the units outside `kept_units` from the blocks, in place; the matrices become smaller, and nothing is masked.

    The softmax keeps the scale of the old head width. timm's fused kernel scales by the new width, so the quotient of the two
    scales is multiplied into the queries' weights.

    Raises:
        InputError: see `check_prunable`; fewer dimensions of heads whose queries are normalised.
    """
    check_prunable(model)
    for index, (block, kept) in enumerate(zip(model.blocks, kept_units, strict=True)):
        attn, mlp = block.attn, block.mlp
        rows_qk, rows_v = _rows(attn, kept, "qk"), _rows(attn, kept, "v")
        heads, width = len(kept.heads), len(rows_v) // len(kept.heads)
        if width != attn.head_dim and not isinstance(attn.q_norm, nn.Identity):
            raise InputError(
                f"blocks.{index}.attn normalises queries over a head's {attn.head_dim} dimensions, so none of them can be "
                "removed; prune whole heads"
            )
        qkv = torch.cat([rows_qk, attn.attn_dim + rows_qk, 2 * attn.attn_dim + rows_v])
        old_scale = attn.scale
        attn.qkv, attn.proj = _slice_linear(attn.qkv, rows=qkv), _slice_linear(attn.proj, columns=rows_v)
        blocks.set_attention_shape(attn, heads, width)
        for tensor in attn.qkv.parameters():
            tensor[: attn.attn_dim] *= old_scale / attn.scale
        mlp.fc1, mlp.fc2 = _slice_linear(mlp.fc1, rows=kept.neurons), _slice_linear(mlp.fc2, columns=kept.neurons)
    blocks.record_block_shapes(model)


def _rows(attn: nn.Module, kept: KeptUnits, part: str) -> Tensor:
    """The kept rows of one third of qkv: of the queries or the keys if `part` is "qk", of the values if it is "v"."""
    kept_dims = getattr(kept, part)
    if kept_dims is None:
        kept_dims = torch.arange(attn.head_dim).expand(attn.num_heads, -1)
    return (kept.heads[:, None] * attn.head_dim + kept_dims[kept.heads]).flatten()


def _slice_linear(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
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


def value_rows(attn: nn.Module, kept: KeptUnits) -> Tensor:
    """The inputs of `proj` that are kept, as indices."""
    return _rows(attn, kept, "v")


def masks(block: nn.Module, kept: KeptUnits) -> tuple[Tensor, Tensor]:
    """Masks of qkv's outputs (3 a,) and of fc2's inputs (h,): 1 for units that are kept, 0 for the others."""
    qkv, hidden = torch.zeros(3, block.attn.attn_dim), torch.zeros(block.mlp.fc1.out_features)
    for mask, part in zip(qkv, ("qk", "qk", "v"), strict=True):
        mask[_rows(block.attn, kept, part)] = 1
    hidden[kept.neurons] = 1
    return qkv.flatten(), hidden


@contextmanager
def masked(model: nn.Module, kept_units: Sequence[KeptUnits]) -> Iterator[None]:
    """While open, units outside `kept_units` have outputs of zero; they still cost time and memory."""
    handles = []
    for block, kept in zip(model.blocks, kept_units, strict=True):
        qkv, hidden = (mask.to(block.attn.qkv.weight.device) for mask in masks(block, kept))
        handles.append(block.attn.qkv.register_forward_hook(lambda _, x, y, mask=qkv: y * mask))
        handles.append(block.mlp.fc2.register_forward_pre_hook(lambda _, x, mask=hidden: (x[0] * mask,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
