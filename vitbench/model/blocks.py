"""A Vision Transformer's blocks: reading, building, replacing and counting them. Like vit.py, this file uses timm's internals."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.layers import Attention
from torch import nn

from vitbench.base.errors import InputError
from vitbench.model.layers import RMSNorm, RoundedAttention, SplitLinear
from vitbench.model.recipe import Architecture, BlockShape
from vitbench.model.tokens import MERGING, TokenBlocks, reachable_counts


def block_shapes(model: nn.Module) -> tuple[BlockShape, ...]:
    """The present sizes of each block."""
    counts = model.blocks.counts if isinstance(model.blocks, TokenBlocks) else [None] * len(model.blocks)
    return tuple(
        BlockShape(
            heads=block.attn.num_heads,
            head_dim=block.attn.head_dim,
            neurons=block.mlp.fc2.in_features,
            tokens=count,
        )
        for block, count in zip(model.blocks, counts, strict=True)
    )


def fc1_rows_per_neuron(block: nn.Module) -> int:
    """How many outputs of `fc1` belong to one neuron: 2 in a gated MLP (SwiGLU), else 1."""
    return block.mlp.fc1.out_features // block.mlp.fc2.in_features


def check_standard_blocks(model: nn.Module) -> None:
    """Raise `InputError` unless each block has attention (qkv, proj) and then an MLP (fc1, fc2)."""
    for block in model.blocks:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if not all(hasattr(*part) for part in ((attn, "qkv"), (attn, "proj"), (mlp, "fc1"), (mlp, "fc2"))):
            raise InputError(
                f"the blocks of this {type(model).__name__} are of type {type(block).__name__}, not attention (qkv, proj) and "
                "then an MLP (fc1, fc2); vitbench can compress and count only such blocks, so give a model that has them"
            )


def residual_source(block: nn.Module, name: str) -> str:
    """The norm in `block` whose input is the residual stream that the layer `name` adds its output to.

    "" for a layer whose output is used otherwise, or is scaled first (LayerScale).
    """
    norm, scale = {"attn.proj": ("norm1", "ls1"), "mlp.fc2": ("norm2", "ls2")}.get(name, ("", ""))
    return norm if isinstance(getattr(block, scale, None), nn.Identity) else ""


def split_qkv_by_head(model: nn.Module) -> dict[str, slice]:
    """Split each dense qkv layer into q, k and v of every head, in place. Returns part's name -> its rows in the old layer."""
    rows: dict[str, slice] = {}
    for index, block in enumerate(model.blocks):
        linear, heads = block.attn.qkv, block.attn.num_heads
        if isinstance(linear, nn.Linear):
            size = linear.out_features // (3 * heads)
            split = SplitLinear(linear.in_features, [size] * 3 * heads, bias=linear.bias is not None)
            block.attn.qkv = split.set_rows(linear)
            rows |= {f"blocks.{index}.attn.qkv.parts.{i}": slice(i * size, (i + 1) * size) for i in range(3 * heads)}
    return rows


def evenly_spaced_blocks(depth: int, total: int) -> list[int]:
    """The indices of `depth` evenly spaced blocks among `total`: with the first and, for two or more, the last."""
    return [round(float(position)) for position in np.linspace(0, total - 1, depth)]


def matching_blocks(depth: int, total: int) -> list[int]:
    """For each of `depth` blocks the index among `total` blocks at the same fraction of the depth; the last gets the last."""
    return [-(-(block + 1) * total // depth) - 1 for block in range(depth)]


def keep_blocks(model: nn.Module, indices: Sequence[int]) -> None:
    """Keep only the blocks at `indices`, with their weights, in place."""
    if isinstance(model.blocks, TokenBlocks):
        raise InputError("blocks cannot be taken from a model that reduces its tokens; give one that keeps all tokens")
    model.blocks = nn.Sequential(*(model.blocks[index] for index in indices))
    architecture = model.recipe.architecture
    sizes = tuple(architecture.blocks[index] for index in indices) if architecture.blocks else ()
    model.recipe = model.recipe.replace(architecture=architecture.replace(depth=len(indices), blocks=sizes))


def preceding_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Dense linear layer -> the LayerNorm, or `RMSNorm`, whose output only this layer takes as its input.

    It is found by what the block computes, because names do not tell: post-norm blocks have the same names, and none of
    their norms precedes a layer.
    """
    pairs = {"attn.qkv": "norm1", "mlp.fc1": "norm2"}
    norms = {}
    for index, block in enumerate(model.blocks):
        modules = dict(block.named_modules())
        for name, norm_name in pairs.items():
            layer, norm = modules.get(name), modules.get(norm_name)
            if not isinstance(layer, nn.Linear) or not isinstance(norm, nn.LayerNorm | RMSNorm):
                continue
            if norm.weight is not None and _scaling_cancels(block, norm_name, name):
                norms[f"blocks.{index}.{name}"] = norm
    return norms


@torch.no_grad()
def _scaling_cancels(block: nn.Module, norm: str, layer: str) -> bool:
    """Whether factors that divide the norm's channels and multiply the layer's inputs leave the block's output unchanged.

    The factors are powers of two, which round nothing: where they cancel, the output is the same to the last bit.
    """
    scaled_block, width = copy.deepcopy(block), block.get_submodule(norm).weight.numel()
    if block.get_submodule(layer).in_features != width:
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, width, generator=generator), scaled_block.get_submodule(layer).weight
    channel_factors = torch.exp2(torch.randint(-3, 4, (width,), generator=generator)).to(weight.device)
    x, expected = x.to(weight.device), block(x.to(weight.device))
    for tensor in scaled_block.get_submodule(norm).parameters():
        tensor.div_(channel_factors)
    weight.mul_(channel_factors)
    return float((scaled_block(x) - expected).abs().max()) <= 1e-4 * float((expected - x).abs().max())


def resize_blocks(model: nn.Module, architecture: Architecture) -> None:
    """Give the blocks the sizes in `architecture`, in place, with new weights; without sizes, change nothing.

    Raises:
        InputError: the number of sizes is not the number of blocks.
    """
    shapes = architecture.blocks
    if not shapes:
        return
    if len(shapes) != len(model.blocks):
        raise InputError(f"sizes of {len(shapes)} blocks were given and {architecture.name} has {len(model.blocks)}")
    for block, shape in zip(model.blocks, shapes, strict=True):
        attn, mlp, gated = block.attn, block.mlp, fc1_rows_per_neuron(block)
        set_attention_shape(attn, shape.heads, shape.head_dim)
        attn.qkv = nn.Linear(attn.qkv.in_features, 3 * attn.attn_dim, bias=attn.qkv.bias is not None)
        attn.proj = nn.Linear(attn.attn_dim, attn.proj.out_features, bias=attn.proj.bias is not None)
        mlp.fc1 = nn.Linear(mlp.fc1.in_features, gated * shape.neurons, bias=mlp.fc1.bias is not None)
        mlp.fc2 = nn.Linear(shape.neurons, mlp.fc2.out_features, bias=mlp.fc2.bias is not None)
    if architecture.reduction:
        counts = [shape.tokens for shape in shapes]
        reduce_tokens(model, architecture.reduction, counts, pool_by_size=architecture.pool_weights == "size")


def set_distilled_training(model: nn.Module, enabled: bool) -> None:
    """Whether a model with a distillation token, while it trains, returns both heads' logits or their mean; in place."""
    for module in model.modules():
        if hasattr(module, "distilled_training"):
            module.distilled_training = enabled


def set_attention_shape(attn: nn.Module, heads: int, head_dim: int) -> None:
    """Set the heads and their width in a timm attention layer, in place; the caller replaces its matrices."""
    attn.num_heads, attn.head_dim, attn.attn_dim = heads, head_dim, heads * head_dim
    attn.scale = head_dim**-0.5  # the fused kernel's own scale


def reads_class_token(model: nn.Module) -> bool:
    """Whether the head reads the class token alone, and not a pool of the tokens."""
    return model.global_pool == "token"


def reduce_tokens(
    model: nn.Module, reduction: str, counts: Sequence[int | None], *, pool_by_size: bool | None = None
) -> None:
    """Keep `counts` tokens after each block's attention (`vitbench.model.tokens`), in place.

    With `pool_by_size` the head's pooling weights a merged token by the number of tokens that it stands for. None: if the
    tokens are merged and the head reads more than the class token. Models of early versions weight all tokens equally.
    """
    prefix, tokens = model.num_prefix_tokens, model.patch_embed.num_patches + model.num_prefix_tokens
    if min(count or tokens for count in counts) < prefix + 1:
        raise InputError(
            f"tokens left = {tuple(counts)}: give at least {prefix + 1}, for the {prefix} class and register tokens and one more"
        )
    counts = reachable_counts(counts, tokens, prefix) if reduction in MERGING else counts
    if pool_by_size is None:
        pool_by_size = reduction in MERGING and not reads_class_token(model)
    model.blocks = TokenBlocks(model.blocks, reduction, counts, prefix, tokens, restores=pool_by_size)


def replace_attention(
    model: nn.Module, block_indices: Sequence[int] | None, make_attention: Callable[[nn.Module], nn.Module]
) -> None:
    """Replace the attention of the blocks at `block_indices` (None: of all) by `make_attention(attention)`, in place.

    Raises:
        InputError: there is no such block, the attention is not timm's plain one, or the model reduces its tokens.
    """
    name, valid_indices = model.recipe.architecture.name, range(len(model.blocks))
    block_indices = valid_indices if block_indices is None else block_indices
    invalid = [index for index in block_indices if index not in valid_indices]
    if invalid:
        raise InputError(
            f"blocks = {tuple(block_indices)}: {name} has blocks 0 to {len(valid_indices) - 1}; name some of those"
        )
    if block_indices and isinstance(model.blocks, TokenBlocks):
        raise InputError(
            f"{name} reduces tokens ({model.blocks.reduction}) by the keys and probabilities of softmax attention, so its "
            "attention cannot be replaced; give the model before its tokens were reduced"
        )
    for index in block_indices:
        check_standard_attention(model, index)
        parts = ("q_norm", "k_norm", "norm", "gate")
        unsupported = [
            part for part in parts if not isinstance(getattr(model.blocks[index].attn, part), nn.Identity | None)
        ]
        if unsupported:
            raise InputError(
                f"the attention in blocks.{index} of {name} has a {unsupported[0]}, which its replacement does not have; "
                "give a plain ViT"
            )
    for index in block_indices:
        model.blocks[index].attn = make_attention(model.blocks[index].attn)


def make_attention_quantizable(model: nn.Module) -> dict[str, list[str]]:
    """Give every block attention whose inner tensors can be quantized (`RoundedAttention`), in place.

    Returns q, k, v and softmax -> the names of their quantizers in all blocks.

    Raises:
        InputError: as `replace_attention`.
    """
    replace_attention(model, None, RoundedAttention.from_attention)
    return {
        part: [f"blocks.{index}.attn.{part}" for index in range(len(model.blocks))]
        for part in RoundedAttention.QUANTIZER_NAMES
    }


def check_standard_attention(model: nn.Module, index: int) -> None:
    """Raise `InputError` unless block `index` calls a timm attention layer; its linear layers may be of any kind."""
    block = model.blocks[index]
    attn = getattr(block, "attn", None)
    if type(attn) is not Attention or not hasattr(block, "ls1"):
        inside = "" if attn is None else f" with a {type(attn).__name__}"
        raise InputError(
            f"blocks.{index} of {model.recipe.architecture.name} is a {type(block).__name__}{inside}, not a plain block with "
            "softmax attention; give a plain ViT, before its attention was replaced"
        )


def record_block_shapes(model: nn.Module) -> None:
    """Write the blocks' present sizes into the model's recipe, in place."""
    changes: dict[str, Any] = {"blocks": block_shapes(model), "reduction": None, "pool_weights": None}
    if isinstance(model.blocks, TokenBlocks):
        changes |= {"reduction": model.blocks.reduction, "pool_weights": "size" if model.blocks.restores else None}
    model.recipe = model.recipe.replace(architecture=model.recipe.architecture.replace(**changes))


def tokens_per_block(shapes: Sequence[BlockShape], tokens: int) -> tuple[list[int], list[int]]:
    """How many of `tokens` enter each block, and how many are left after its attention."""
    tokens_in: list[int] = []
    tokens_out: list[int] = []
    for shape in shapes:
        tokens_in.append(tokens_out[-1] if tokens_out else tokens)
        tokens_out.append(min(shape.tokens or tokens_in[-1], tokens_in[-1]))
    return tokens_in, tokens_out


def block_macs(
    heads,
    head_dim,
    neurons,
    tokens_in,
    tokens_out,
    width: int,
    reduction: str | None = None,
    *,
    gates=1,
    prefix: int = 1,
    attended: bool = True,
) -> np.ndarray:
    """Multiply-accumulates of blocks for one image, summed over the last axis of the arguments (numbers or arrays).

    With a = heads x head_dim, h neurons of g `gates`, N tokens before and M after the attention, and tokens of `width` d:
    4 N d a + 2 N^2 a + (1 + g) M d h. A block that chooses tokens by the class token's attention adds N a; one that merges
    tokens adds (n / 2)^2 head_dim for the similarities of the n tokens after the `prefix`, and one that merges them by
    Ward's error (n / 2)^2 d, and N a if `attended`, where the class token's attention weights it.
    """
    n, m, a = (
        np.asarray(tokens_in, dtype=np.int64),
        np.asarray(tokens_out, dtype=np.int64),
        np.asarray(heads) * head_dim,
    )
    total = 4 * n * width * a + 2 * n * n * a + (1 + np.asarray(gates)) * m * width * np.asarray(neurons)
    if reduction in ("cls_attention", "hsic_cls"):
        total = total + np.where(m < n, n * a, 0)
    if reduction in MERGING:
        mergeable, compared = n - prefix, head_dim if reduction == "merge" else width
        total = total + np.where(m < n, (mergeable - mergeable // 2) * (mergeable // 2) * compared, 0)
    if reduction == "ward" and attended:
        total = total + np.where(m < n, n * a, 0)
    return total.sum(-1)
