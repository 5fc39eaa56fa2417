"""What reads and writes the tokens of a ViT, and whether their coordinates can be changed. This file uses timm's internals."""

from timm.layers import Attention, LayerNorm, LayerScale
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vitbench.model.layers import LinearAttention, NystroemAttention

PLAIN_NORMS = (nn.LayerNorm, LayerNorm)
LINEAR_POOLS = ("", "token", "avg")


def obstacles(model: nn.Module) -> list[str]:
    """Why the tokens of `model` cannot be rotated; empty if they can."""
    found = []
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return [f"it is a {type(model).__name__}"]
    if not isinstance(getattr(model.patch_embed, "proj", None), nn.Linear | nn.Conv2d):
        found.append("patch_embed.proj is not a dense layer")
    for name in ("patch_embed.norm", "norm_pre"):
        parent, _, child = name.rpartition(".")
        if not isinstance(getattr(model.get_submodule(parent), child, None), nn.Identity | None):
            found.append(f"{name} writes the tokens, and its weight cannot absorb a rotation")
    for index, block in enumerate(model.blocks):
        found += [f"blocks.{index} {problem}" for problem in _block_obstacles(block)]
    norms = last_norms(model)
    if len(norms) != 1:
        found.append(f"there are {len(norms)} norms before the head, not one")
    found += [
        f"{name} is a {type(norm).__name__}" for name in norms if type(norm := getattr(model, name)) not in PLAIN_NORMS
    ]
    if model.attn_pool is not None:
        found.append("attn_pool reads the tokens")
    elif model.global_pool not in LINEAR_POOLS:
        found.append(f"the pooling {model.global_pool!r} depends on the coordinates")
    for name in ("head", "head_dist"):
        if hasattr(model, name) and not isinstance(getattr(model, name), nn.Linear):
            found.append(f"{name} is not a dense linear layer")
    return found


def _block_obstacles(block: nn.Module) -> list[str]:
    """Why the tokens that enter and leave `block` cannot be rotated."""
    if type(block) is not Block:
        return [f"is a {type(block).__name__}"]
    found = []
    for name in ("norm1", "norm2"):
        if type(getattr(block, name)) not in PLAIN_NORMS:
            found.append(f"has a {type(getattr(block, name)).__name__} as {name}")
    if not isinstance(block.attn, Attention | NystroemAttention | LinearAttention):
        found.append(f"has a {type(block.attn).__name__}")
    elif getattr(block.attn, "gate", None) is not None:
        found.append("has a gate, which reads the tokens")
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        parent, child = name.split(".")
        if not isinstance(getattr(getattr(block, parent), child, None), nn.Linear):
            found.append(f"has no dense linear layer {name}")
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(block, name), nn.Identity | LayerScale):
            found.append(f"has a {type(getattr(block, name)).__name__} as {name}")
    return found


def last_norms(model: nn.Module) -> list[str]:
    """The names of the norms between the last block and the head."""
    return [name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity)]
