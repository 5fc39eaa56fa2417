"""Multiply-accumulates of a Vision Transformer for one image, from shapes alone."""

import copy
import math

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.model import blocks


def analytic_macs(model: VisionTransformer) -> int:
    """Multiply-accumulates for one image: patch embedding, blocks (`blocks.block_macs`), pooling and heads.

    Norms, softmax and GELU are not counted, as is usual. Blocks count as dense ones of their sizes: attention that a method
    replaced, and factors in the place of a layer, count as what they replaced. `measurement.cost.count_macs` counts what
    really runs.

    Raises:
        InputError: blocks or pooling of a kind that no formula is known for.
    """
    blocks.check_standard_blocks(model)
    shapes, prefix = blocks.block_shapes(model), model.num_prefix_tokens
    before, after = blocks.tokens_per_block(shapes, model.patch_embed.num_patches + prefix)
    heads = np.array([shape.heads for shape in shapes])
    widths = np.array([block.attn.proj.in_features for block in model.blocks])
    inner = blocks.block_macs(
        heads,
        widths // heads,
        np.array([shape.neurons for shape in shapes]),
        before,
        after,
        model.embed_dim,
        getattr(model.blocks, "reduction", None),
        gates=np.array([blocks.fc1_rows_per_neuron(block) for block in model.blocks]),
        prefix=prefix,
    )
    pooled = after[-1] if model.pool_include_prefix else after[-1] - prefix
    classifiers = 2 if hasattr(model, "head_dist") else 1
    return (
        _embedding(model)
        + int(inner)
        + (0 if model.attn_pool is None else _pool(model, pooled))
        + classifiers * model.embed_dim * model.num_classes
    )


def _embedding(model: VisionTransformer) -> int:
    """Of the patch embedding, with the convolutions before it in a hybrid."""
    embed = model.patch_embed
    if hasattr(embed, "macs"):  # T2T-ViT's
        return embed.macs()
    stem = _convolutions(embed.backbone, embed.img_size) if hasattr(embed, "backbone") else 0
    if isinstance(embed.proj, nn.Identity):
        return stem
    shape = embed.proj.weight.shape if hasattr(embed.proj, "weight") else embed.proj.shape  # the latter of packed codes
    return stem + math.prod(shape) * embed.num_patches


def _convolutions(stem: nn.Module, size: tuple[int, int]) -> int:
    """Of a stem's convolutions and linear layers, from the shapes of their outputs for an image of `size`."""
    counts = []

    def count(layer: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> None:
        outputs = layer.weight.shape[0]
        counts.append(y.numel() * (layer.weight.numel() // outputs))

    shapes = copy.deepcopy(stem).to("meta").eval()
    for layer in shapes.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    shapes(torch.zeros(1, 3, *size, device="meta"))
    return sum(counts)


def _pool(model: VisionTransformer, tokens: int) -> int:
    """Of attention of a few learned queries over the `tokens` (SigLIP's "map" pooling)."""
    pool = model.attn_pool
    if not isinstance(pool, AttentionPoolLatent):
        raise InputError(
            f"multiply-accumulates of a {type(pool).__name__}, which pools the tokens of "
            f"{model.recipe.architecture.name}, have no formula here; `count_macs` counts what runs"
        )
    queries, width = pool.latent_len, pool.kv.in_features
    dense = [layer for layer in pool.modules() if isinstance(layer, nn.Linear) and layer is not pool.kv]
    return (
        pool.kv.weight.numel() * tokens
        + 2 * queries * tokens * width
        + queries * sum(layer.weight.numel() for layer in dense)
    )
