"""A Vision Transformer's blocks: their sizes and parts, read, built, replaced and counted. With vit.py, what knows timm's inside."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from timm.layers import Attention
from torch import nn

from vitbench.base.errors import InputError
from vitbench.model.layers import RoundedAttention, SplitLinear
from vitbench.model.recipe import Architecture, BlockShape
from vitbench.model.tokens import TokenBlocks, reachable_counts


def block_shapes(model: nn.Module) -> tuple[BlockShape, ...]:
    """The sizes of each block as they are now."""
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
    """How many outputs of `fc1` make one neuron: 2 in a gated MLP (SwiGLU), else 1."""
    return block.mlp.fc1.out_features // block.mlp.fc2.in_features


def check_standard_blocks(model: nn.Module) -> None:
    """Raise `InputError` unless each block has attention (qkv, proj) and behind it an MLP (fc1, fc2)."""
    for block in model.blocks:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if not all(hasattr(*part) for part in ((attn, "qkv"), (attn, "proj"), (mlp, "fc1"), (mlp, "fc2"))):
            raise InputError(
                f"the blocks of this {type(model).__name__} are of type {type(block).__name__}, not attention (qkv, proj) and "
                "behind it an MLP (fc1, fc2), which is what can be compressed and counted here; give a model of such blocks"
            )


def residual_source(block: nn.Module, name: str) -> str:
    """The module in `block` whose input is the residual stream that the output of the layer `name` is added to, as it is.

    "" for a layer whose output goes elsewhere, or is scaled first (LayerScale).
    """
    norm, scale = {"attn.proj": ("norm1", "ls1"), "mlp.fc2": ("norm2", "ls2")}.get(name, ("", ""))
    return norm if isinstance(getattr(block, scale, None), nn.Identity) else ""


def split_qkv_by_head(model: nn.Module) -> dict[str, slice]:
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


def evenly_spaced_blocks(depth: int, total: int) -> list[int]:
    """`depth` of `of` blocks, evenly spaced, the first and, of two or more, the last among them."""
    return [round(float(position)) for position in np.linspace(0, total - 1, depth)]


def matching_blocks(depth: int, total: int) -> list[int]:
    """For each of `depth` blocks the one of `of` blocks that lies at the same share of the depth, the last for the last."""
    return [-(-(block + 1) * total // depth) - 1 for block in range(depth)]


def keep_blocks(model: nn.Module, indices: Sequence[int]) -> None:
    """Leave only the blocks at `places`, with their weights, in place."""
    if isinstance(model.blocks, TokenBlocks):
        raise InputError(
            "blocks cannot be taken from a model with fewer tokens on the way; give one that keeps them all"
        )
    model.blocks = nn.Sequential(*(model.blocks[index] for index in indices))
    architecture = model.recipe.architecture
    sizes = tuple(architecture.blocks[index] for index in indices) if architecture.blocks else ()
    model.recipe = model.recipe.replace(architecture=architecture.replace(depth=len(indices), blocks=sizes))


def preceding_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Dense linear layer -> the LayerNorm whose output is its input and nothing else's, found by what the block computes.

    Post-norm blocks, for example, have the same names and another order: none of their norms is before a layer.
    """
    pairs = {"attn.qkv": "norm1", "mlp.fc1": "norm2"}
    norms = {}
    for index, block in enumerate(model.blocks):
        modules = dict(block.named_modules())
        for name, norm_name in pairs.items():
            layer, norm = modules.get(name), modules.get(norm_name)
            is_standard = isinstance(layer, nn.Linear) and isinstance(norm, nn.LayerNorm) and norm.weight is not None
            if is_standard and _scaling_cancels(block, norm_name, name):
                norms[f"blocks.{index}.{name}"] = norm
    return norms


@torch.no_grad()
def _scaling_cancels(block: nn.Module, norm: str, layer: str) -> bool:
    """Whether factors that divide the norm's channels and multiply the layer's inputs leave the block's answer as it is.

    Powers of two, which change no digit: where they cancel, the answer is the same to the last bit.
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
    """Give the blocks the sizes that `architecture` says, in place, with new weights; nothing if it says none.

    Raises:
        InputError: sizes of another number of blocks.
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
        reduce_tokens(model, architecture.reduction, [shape.tokens for shape in shapes])


def set_distilled_training(model: nn.Module, enabled: bool) -> None:
    """Whether a model with a distillation token answers with both heads apart while it trains, or with their mean."""
    for module in model.modules():
        if hasattr(module, "distilled_training"):
            module.distilled_training = enabled


def set_attention_shape(attn: nn.Module, heads: int, head_dim: int) -> None:
    """Tell a timm attention layer its heads and their width; its matrices are the caller's."""
    attn.num_heads, attn.head_dim, attn.attn_dim = heads, head_dim, heads * head_dim
    attn.scale = head_dim**-0.5  # what the fused kernel uses by itself


def reduce_tokens(model: nn.Module, reduction: str, counts: Sequence[int | None]) -> None:
    """Leave `counts` tokens after each block's attention (`vitbench.model.tokens`), in place."""
    prefix, tokens = model.num_prefix_tokens, model.patch_embed.num_patches + model.num_prefix_tokens
    if min(count or tokens for count in counts) < prefix + 1:
        raise InputError(
            f"tokens left = {tuple(counts)}: the {prefix} class and register tokens and one more always stay"
        )
    counts = reachable_counts(counts, tokens, prefix) if reduction == "merge" else counts
    model.blocks = TokenBlocks(model.blocks, reduction, counts, prefix, tokens)


def replace_attention(
    model: nn.Module, block_indices: Sequence[int] | None, make_attention: Callable[[nn.Module], nn.Module]
) -> None:
    """Put `make(attention)` in the place of the attention of the `chosen` blocks (None: of all), in place.

    Raises:
        InputError: no such block, attention that is not timm's plain one, or tokens that are reduced on the way.
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
            f"{name} reduces tokens ({model.blocks.reduction}) by the keys and shares of softmax attention, so its attention "
            "has to stay; give the model before its tokens were reduced"
        )
    for index in block_indices:
        check_standard_attention(model, index)
        parts = ("q_norm", "k_norm", "norm", "gate")
        unsupported = [
            part for part in parts if not isinstance(getattr(model.blocks[index].attn, part), nn.Identity | None)
        ]
        if unsupported:
            raise InputError(
                f"the attention in blocks.{index} of {name} has a {unsupported[0]}, which its replacement has not; give a plain ViT"
            )
    for index in block_indices:
        model.blocks[index].attn = make_attention(model.blocks[index].attn)


def make_attention_quantizable(model: nn.Module) -> dict[str, list[str]]:
    """Put attention with places for roundings into every block, in place; errors as `replace_attention`'s.

    Returns q, k, v, softmax -> their places in the blocks.
    """
    replace_attention(model, None, RoundedAttention.like)
    return {
        part: [f"blocks.{index}.attn.{part}" for index in range(len(model.blocks))] for part in RoundedAttention.PLACES
    }


def check_standard_attention(model: nn.Module, index: int) -> None:
    """Raise `InputError` unless block `index` is one that calls a timm attention layer, with whatever linear layers."""
    block = model.blocks[index]
    attn = getattr(block, "attn", None)
    if type(attn) is not Attention or not hasattr(block, "ls1"):
        inside = "" if attn is None else f" with a {type(attn).__name__}"
        raise InputError(
            f"blocks.{index} of {model.recipe.architecture.name} is a {type(block).__name__}{inside}, not a plain block with "
            "softmax attention; give a plain ViT, before its attention was replaced"
        )


def record_block_shapes(model: nn.Module) -> None:
    """Write the blocks' present sizes into the model's recipe."""
    reduction = model.blocks.reduction if isinstance(model.blocks, TokenBlocks) else None
    architecture = model.recipe.architecture.replace(blocks=block_shapes(model), reduction=reduction)
    model.recipe = model.recipe.replace(architecture=architecture)


def tokens_per_block(shapes: Sequence[BlockShape], tokens: int) -> tuple[list[int], list[int]]:
    """How many of `tokens` are there before each block, and after its attention."""
    tokens_in, tokens_out = [], []
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
) -> np.ndarray:
    """Multiply-accumulates of blocks for one image, summed over the last axis of the arguments (numbers or arrays).

    With a = heads x head_dim, h neurons of g `gates`, N tokens before and M after the attention, and tokens of `width` d:
    4 N d a + 2 N^2 a + (1 + g) M d h, plus N a for the class token's attention where tokens are chosen by it, or
    (n / 2)^2 head_dim for the similarities of the n tokens behind the `prefix` where they are merged.
    """
    n, m, a = (
        np.asarray(tokens_in, dtype=np.int64),
        np.asarray(tokens_out, dtype=np.int64),
        np.asarray(heads) * head_dim,
    )
    total = 4 * n * width * a + 2 * n * n * a + (1 + np.asarray(gates)) * m * width * np.asarray(neurons)
    if reduction in ("cls_attention", "hsic_cls"):
        total = total + np.where(m < n, n * a, 0)
    if reduction == "merge":
        mergeable = n - prefix
        total = total + np.where(m < n, (mergeable - mergeable // 2) * (mergeable // 2) * head_dim, 0)
    return total.sum(-1)
