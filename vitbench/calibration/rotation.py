"""Rotation: an exact change of the weights that spreads a few large channels over all channels.

One step for a tensor suits values that are alike in all channels. In a ViT a few channels of the tokens are much larger than the
others. Rotated by an orthogonal matrix R, tokens x' = x R have no such channels, and all that reads or writes tokens can absorb R
(QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024, for the norms):

- The weight gamma and the bias beta of a LayerNorm go to the layers after it: W' = W diag(gamma) and b' = b + W beta.
- What writes to the tokens (patch embedding, tokens that are parameters, position embeddings, proj, fc2) writes values whose mean over
  the channels is 0: LayerNorm subtracts the mean, so nothing else sees it. Then LayerNorm is RMSNorm, and RMSNorm(x R) = RMSNorm(x) R.
- With C = I - 1 1^T / d, writers become W' = (C R)^T W and b' = b C R, readers W' = W C R. (Normed tokens have mean 0 too, so C changes
  no output of a reader; it takes what is not needed from the weight.)
- Per head, q R2 . k R2 = q . k, and v R3 is undone in proj, R3^T W_proj.

R is a Hadamard matrix over sqrt(d), with the signs of its rows drawn at random, where this file can build one, and else the Q of a random
matrix: it mixes all channels in equal parts. The inputs of fc2 are not rotated, because the activation before it is not linear.
"""

import math

import torch
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.model import coordinates, vit
from vitbench.model.layers import BiasedLinear, LinearAttention, RMSNorm

TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")  # parameters that are added to the tokens, or are tokens


@torch.no_grad()
def rotate(model: nn.Module, seed: int = 0) -> dict[str, str]:
    """Rotate the tokens and the heads' queries, keys and values in place. Returns what was left alone -> the reason.

    Shapes, and outputs up to rounding, stay as they are. LayerNorms become `RMSNorm`, and layers without a bias that follow a norm
    with one become `BiasedLinear`; factors of LayerScale become 1.

    Args:
        seed: of the signs, or of the random matrices.

    Raises:
        InputError: something reads or writes the tokens that cannot absorb a rotation; the model is then unchanged.
    """
    if problem := next(iter(coordinates.obstacles(model)), ""):
        raise InputError(
            f"{model.recipe.architecture.name} cannot be rotated: {problem}; give a plain ViT whose layers are dense and whose "
            "tokens pass a LayerNorm before each of them, or leave its coordinates as they are (rotate=False)"
        )
    generator = torch.Generator().manual_seed(seed)
    rotation = orthogonal(model.embed_dim, generator)
    centred = rotation - rotation.mean(0)
    for name in TOKENS:
        if getattr(model, name, None) is not None:
            token = getattr(model, name)
            token.copy_(token.double() @ centred)
    _rotate_outputs(model.patch_embed.proj, centred)
    skipped: dict[str, str] = {}
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}"
        for layer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
            _fold_scale(layer, scale)
            _rotate_outputs(layer, centred)
        for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            _fold_norm(model, f"{prefix}.{norm}", [f"{prefix}.{layer}"], centred)
        skipped |= {f"{prefix}.attn: {part}": reason for part, reason in _rotate_heads(block.attn, generator).items()}
    _fold_norm(
        model,
        coordinates.last_norms(model)[0],
        [name for name in ("head", "head_dist") if hasattr(model, name)],
        centred,
    )
    return skipped


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, (size, size) in float64: a Hadamard matrix with random signs of its rows, if there is one.

    If `hadamard` has none of this size, it is drawn evenly from all orthogonal matrices.
    """
    plain = hadamard(size)
    if plain is not None:
        signs = 2.0 * torch.randint(2, (size, 1), generator=generator, dtype=torch.float64) - 1
        return signs * plain / math.sqrt(size)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix H (entries 1 and -1, H H^T = size I) in float64; None if neither construction gives one.

    Sylvester's doubles a matrix: [[H, H], [H, -H]]. Paley's first gives size q + 1 for a prime q of the form 4 n + 3: 4, 8, 12, 20, ...
    192, 384 and 768 are 12 times a power of two.
    """
    core = size
    while core % 2 == 0 and core > 1:
        core //= 2
    while core <= size:
        start = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
        if start is not None:
            pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            while len(start) < size:
                start = torch.kron(pair, start)
            return start
        core *= 2
    return None


def _paley(size: int) -> Tensor | None:
    """Paley's first construction: I + [[0, 1], [-1, Q]] with Q_ij = 1 if i - j is a square modulo q = size - 1, else -1, and Q_ii = 0."""
    q = size - 1
    if q % 4 != 3 or any(q % divisor == 0 for divisor in range(2, math.isqrt(q) + 1)):
        return None
    symbol = -torch.ones(q, dtype=torch.float64)
    symbol[[i * i % q for i in range(1, q)]] = 1
    symbol[0] = 0
    positions = torch.arange(q)
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += symbol[(positions[:, None] - positions) % q]
    return matrix


def _fold_scale(layer: nn.Linear, scale: nn.Module) -> None:
    """Multiply the outputs of `layer` by the factors of a LayerScale after it, which become 1, in place."""
    if hasattr(scale, "gamma"):
        layer.weight.mul_(scale.gamma[:, None])
        if layer.bias is not None:
            layer.bias.mul_(scale.gamma)
        scale.gamma.fill_(1)


def _rotate_outputs(layer: nn.Linear | nn.Conv2d, matrix: Tensor) -> None:
    """Multiply the outputs of `layer`, rows, by `matrix` (out, out), in place."""
    layer.weight.copy_((matrix.T @ layer.weight.flatten(1).double()).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() @ matrix)


def _fold_norm(model: nn.Module, norm_name: str, layer_names: list[str], matrix: Tensor) -> None:
    """Make a LayerNorm an RMSNorm, and let the layers after it take its weight, its bias and `matrix` (in, in), in place."""
    norm = model.get_submodule(norm_name)
    for name in layer_names:
        layer = model.get_submodule(name)
        weight = layer.weight.double()
        if norm.bias is not None:
            if layer.bias is None:
                layer = BiasedLinear.from_linear(layer)
                vit.replace_module(model, name, layer)
            layer.bias.add_(weight @ norm.bias.double())
        weight = weight if norm.weight is None else weight * norm.weight.double()
        layer.weight.copy_(weight @ matrix)
    new = RMSNorm(norm.normalized_shape[0], norm.eps).to(matrix.device).requires_grad_(layer.weight.requires_grad)
    vit.replace_module(model, norm_name, new)


def _rotate_heads(attn: nn.Module, generator: torch.Generator) -> dict[str, str]:
    """Rotate the queries, keys and values of all heads in place. Returns the part that was left alone -> the reason."""
    heads, size, skipped = attn.num_heads, attn.proj.in_features // attn.num_heads, {}
    normed = [
        name for name in ("q_norm", "k_norm", "norm") if not isinstance(getattr(attn, name, None), nn.Identity | None)
    ]
    if isinstance(attn, LinearAttention):
        skipped["q, k"] = "its feature maps depend on the coordinates"
    elif {"q_norm", "k_norm"} & {*normed}:
        skipped["q, k"] = f"it has a {normed[0]}, which depends on the coordinates"
    if "norm" in normed:
        skipped["v"] = "it has a norm, which depends on the coordinates"
    # one rotation for all heads: tokens are merged by the mean of their keys over heads
    unit = torch.eye(size, dtype=torch.float64)
    keys, values = (unit if part in skipped else orthogonal(size, generator) for part in ("q, k", "v"))
    _rotate_outputs(attn.qkv, torch.block_diag(*[keys] * 2 * heads, *[values] * heads))
    attn.proj.weight.copy_(attn.proj.weight.double() @ torch.block_diag(*[values] * heads))
    return skipped
