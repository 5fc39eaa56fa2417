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

    Norms, softmax and GELU are not counted, as is usual. Replaced attention and factored layers are counted as the dense
    ones that they replaced. `measurement.cost.count_macs` counts what really runs.

    Raises:
        InputError: there is no formula for the blocks or for the pooling.
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
        attended=not getattr(model.blocks, "restores", False),
    )
    pooled = before[0] if getattr(model.blocks, "restores", False) else after[-1]
    pooled -= 0 if model.pool_include_prefix else prefix
    classifiers = 2 if hasattr(model, "head_dist") else 1
    return (
        _embedding_macs(model)
        + int(inner)
        + (0 if model.attn_pool is None else _pooling_macs(model, pooled))
        + classifiers * model.embed_dim * model.num_classes
    )


def _embedding_macs(model: VisionTransformer) -> int:
    """MACs of the patch embedding, with a hybrid's convolutions before it."""
    embed = model.patch_embed
    if hasattr(embed, "macs"):  # T2T-ViT's
        return embed.macs()
    stem = _stem_macs(embed.backbone, embed.img_size) if hasattr(embed, "backbone") else 0
    if isinstance(embed.proj, nn.Identity):
        return stem
    shape = embed.proj.weight.shape if hasattr(embed.proj, "weight") else embed.proj.shape  # packed layers have `shape`
    return stem + math.prod(shape) * embed.num_patches


def _stem_macs(stem: nn.Module, size: tuple[int, int]) -> int:
    """MACs of a stem's convolutions and linear layers, from the shapes of their outputs for an image of `size`."""
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


def _pooling_macs(model: VisionTransformer, tokens: int) -> int:
    """MACs of pooling by the attention of a few learned queries over the `tokens` (SigLIP's "map" pooling)."""
    pool = model.attn_pool
    if not isinstance(pool, AttentionPoolLatent):
        raise InputError(
            f"there is no formula for the multiply-accumulates of a {type(pool).__name__}, which pools the tokens of "
            f"{model.recipe.architecture.name}; use `count_macs`, which counts what runs"
        )
    queries, width = pool.latent_len, pool.kv.in_features
    dense = [layer for layer in pool.modules() if isinstance(layer, nn.Linear) and layer is not pool.kv]
    return (
        pool.kv.weight.numel() * tokens
        + 2 * queries * tokens * width
        + queries * sum(layer.weight.numel() for layer in dense)
    )
