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
from vitbench.model.tokens import TokenBlocks, merged_counts


def shapes(model: nn.Module) -> tuple[BlockShape, ...]:
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


def gates(block: nn.Module) -> int:
    """How many outputs of `fc1` make one neuron: 2 in a gated MLP (SwiGLU), else 1."""
    return block.mlp.fc1.out_features // block.mlp.fc2.in_features


def check_plain(model: nn.Module) -> None:
    """Raise `InputError` unless each block has attention (qkv, proj) and behind it an MLP (fc1, fc2)."""
    for block in model.blocks:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if not all(hasattr(*part) for part in ((attn, "qkv"), (attn, "proj"), (mlp, "fc1"), (mlp, "fc2"))):
            raise InputError(
                f"the blocks of this {type(model).__name__} are of type {type(block).__name__}, not attention (qkv, proj) and "
                "behind it an MLP (fc1, fc2), which is what can be compressed and counted here; give a model of such blocks"
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
    model.recipe = model.recipe.replace(architecture=architecture.replace(depth=len(places), blocks=sizes))


def norms_before(model: nn.Module) -> dict[str, nn.Module]:
    """Dense linear layer -> the LayerNorm whose output is its input and nothing else's, found by what the block computes.

    Post-norm blocks, for example, have the same names and another order: none of their norms is before a layer.
    """
    pairs = {"attn.qkv": "norm1", "mlp.fc1": "norm2"}
    found = {}
    for index, block in enumerate(model.blocks):
        modules = dict(block.named_modules())
        for name, before in pairs.items():
            layer, norm = modules.get(name), modules.get(before)
            plain = isinstance(layer, nn.Linear) and isinstance(norm, nn.LayerNorm) and norm.weight is not None
            if plain and _cancels(block, before, name):
                found[f"blocks.{index}.{name}"] = norm
    return found


@torch.no_grad()
def _cancels(block: nn.Module, norm: str, layer: str) -> bool:
    """Whether factors that divide the norm's channels and multiply the layer's inputs leave the block's answer as it is.

    Powers of two, which change no digit: where they cancel, the answer is the same to the last bit.
    """
    changed, width = copy.deepcopy(block), block.get_submodule(norm).weight.numel()
    if block.get_submodule(layer).in_features != width:
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, width, generator=generator), changed.get_submodule(layer).weight
    factors = torch.exp2(torch.randint(-3, 4, (width,), generator=generator)).to(weight.device)
    x, wanted = x.to(weight.device), block(x.to(weight.device))
    for tensor in changed.get_submodule(norm).parameters():
        tensor.div_(factors)
    weight.mul_(factors)
    return float((changed(x) - wanted).abs().max()) <= 1e-4 * float((wanted - x).abs().max())


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
        attn, mlp, gated = block.attn, block.mlp, gates(block)
        size_attention(attn, shape.heads, shape.head_dim)
        attn.qkv = nn.Linear(attn.qkv.in_features, 3 * attn.attn_dim, bias=attn.qkv.bias is not None)
        attn.proj = nn.Linear(attn.attn_dim, attn.proj.out_features, bias=attn.proj.bias is not None)
        mlp.fc1 = nn.Linear(mlp.fc1.in_features, gated * shape.neurons, bias=mlp.fc1.bias is not None)
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
    """Leave `counts` tokens after each block's attention (`vitbench.model.tokens`), in place."""
    prefix, tokens = model.num_prefix_tokens, model.patch_embed.num_patches + model.num_prefix_tokens
    if min(count or tokens for count in counts) < prefix + 1:
        raise InputError(
            f"tokens left = {tuple(counts)}: the {prefix} class and register tokens and one more always stay"
        )
    counts = merged_counts(counts, tokens, prefix) if reduction == "merge" else counts
    model.blocks = TokenBlocks(model.blocks, reduction, counts, prefix, tokens)


def replace_attention(model: nn.Module, chosen: Sequence[int] | None, make: Callable[[nn.Module], nn.Module]) -> None:
    """Put `make(attention)` in the place of the attention of the `chosen` blocks (None: of all), in place.

    Raises:
        InputError: no such block, attention that is not timm's plain one, or tokens that are reduced on the way.
    """
    name, places = model.recipe.architecture.name, range(len(model.blocks))
    chosen = places if chosen is None else chosen
    wrong = [index for index in chosen if index not in places]
    if wrong:
        raise InputError(f"blocks = {tuple(chosen)}: {name} has blocks 0 to {len(places) - 1}; name some of those")
    if chosen and isinstance(model.blocks, TokenBlocks):
        raise InputError(
            f"{name} reduces tokens ({model.blocks.reduction}) by the keys and shares of softmax attention, so its attention "
            "has to stay; give the model before its tokens were reduced"
        )
    for index in chosen:
        check_attention(model, index)
        parts = ("q_norm", "k_norm", "norm", "gate")
        odd = [part for part in parts if not isinstance(getattr(model.blocks[index].attn, part), nn.Identity | None)]
        if odd:
            raise InputError(
                f"the attention in blocks.{index} of {name} has a {odd[0]}, which its replacement has not; give a plain ViT"
            )
    for index in chosen:
        model.blocks[index].attn = make(model.blocks[index].attn)


def round_attention(model: nn.Module) -> dict[str, list[str]]:
    """Put attention with places for roundings into every block, in place; errors as `replace_attention`'s.

    Returns q, k, v, softmax -> their places in the blocks.
    """
    replace_attention(model, None, RoundedAttention.like)
    return {
        part: [f"blocks.{index}.attn.{part}" for index in range(len(model.blocks))] for part in RoundedAttention.PLACES
    }


def check_attention(model: nn.Module, index: int) -> None:
    """Raise `InputError` unless block `index` is one that calls a timm attention layer, with whatever linear layers."""
    block = model.blocks[index]
    attn = getattr(block, "attn", None)
    if type(attn) is not Attention or not hasattr(block, "ls1"):
        inside = "" if attn is None else f" with a {type(attn).__name__}"
        raise InputError(
            f"blocks.{index} of {model.recipe.architecture.name} is a {type(block).__name__}{inside}, not a plain block with "
            "softmax attention; give a plain ViT, before its attention was replaced"
        )


def note_shapes(model: nn.Module) -> None:
    """Write the blocks' present sizes into the model's recipe."""
    reduction = model.blocks.reduction if isinstance(model.blocks, TokenBlocks) else None
    changed = model.recipe.architecture.replace(blocks=shapes(model), reduction=reduction)
    model.recipe = model.recipe.replace(architecture=changed)


def tokens_through(wanted: Sequence[BlockShape], tokens: int) -> tuple[list[int], list[int]]:
    """How many of `tokens` are there before each block, and after its attention."""
    before, after = [], []
    for shape in wanted:
        before.append(after[-1] if after else tokens)
        after.append(min(shape.tokens or before[-1], before[-1]))
    return before, after


def macs(
    heads, head_dim, neurons, before, after, width: int, reduction: str | None = None, *, gates=1, prefix: int = 1
) -> np.ndarray:
    """Multiply-accumulates of blocks for one image, summed over the last axis of the arguments (numbers or arrays).

    With a = heads x head_dim, h neurons of g `gates`, N tokens before and M after the attention, and tokens of `width` d:
    4 N d a + 2 N^2 a + (1 + g) M d h, plus N a for the class token's attention where tokens are chosen by it, or
    (n / 2)^2 head_dim for the similarities of the n tokens behind the `prefix` where they are merged.
    """
    n, m, a = np.asarray(before, dtype=np.int64), np.asarray(after, dtype=np.int64), np.asarray(heads) * head_dim
    total = 4 * n * width * a + 2 * n * n * a + (1 + np.asarray(gates)) * m * width * np.asarray(neurons)
    if reduction in ("cls_attention", "hsic_cls"):
        total = total + np.where(m < n, n * a, 0)
    if reduction == "merge":
        free = n - prefix
        total = total + np.where(m < n, (free - free // 2) * (free // 2) * head_dim, 0)
    return total.sum(-1)
