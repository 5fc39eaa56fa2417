"""Attention layers that replace timm's: linear attention, and Nystroem attention through m landmarks.

Nystroem attention (Xiong et al. 2021, arXiv 2102.03902, eq. 13): with Q~, K~ the means of m segments of the queries and keys,

    softmax(Q K^T / sqrt c) V ~ softmax(Q K~^T / sqrt c) A^+ (softmax(Q~ K^T / sqrt c) V),    A = softmax(Q~ K~^T / sqrt c)
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.model.layers.int8 import StaticInt8Rounding
from vitbench.model.layers.registry import runtime_layer


class OwnAttention(nn.Module, ABC):
    """Multi-head attention as timm has it around a `mix` of queries, keys and values that a subclass gives.

    In the places of `qkv` and `proj` any linear layer may stand. Shapes: x (B, N, dim) -> the same.

    Args:
        dim: of a token.
        bias: whether `qkv` has one.
        proj_bias: whether `proj` has one.
    """

    portable = True

    def __init__(self, dim: int, num_heads: int, head_dim: int, bias: bool = True, proj_bias: bool = True):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, head_dim, num_heads * head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=bias)
        self.proj = nn.Linear(self.attn_dim, dim, bias=proj_bias)
        self._spec = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim, "bias": bias, "proj_bias": proj_bias}

    @classmethod
    def like(cls, attn: nn.Module, **own: Any) -> Self:
        """The same with a timm attention layer's sizes and linear layers, shared, whatever these are by now.

        `own` are the arguments that only the subclass has.
        """
        biases = [getattr(layer, "bias", None) is not None for layer in (attn.qkv, attn.proj)]
        new = cls(attn.qkv.in_features, attn.num_heads, attn.head_dim, *biases, **own)
        new.qkv, new.proj = attn.qkv, attn.proj
        return new

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self._spec

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, N, head_dim) three times -> the same."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's blocks pass a mask and a flag on, which Vision Transformers leave empty; they are not used."""
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))


@runtime_layer
class RoundedAttention(OwnAttention):
    """Softmax attention written out, with a place for a rounding layer at each of its inner tensors.

    `q`, `k`, `v` see (B, heads, N, head_dim) and `softmax` the shares (B, heads, N, N); in their places a `Rounded` or a
    `Log2Rounded` may stand.
    """

    PLACES = ("q", "k", "v", "softmax")
    PRODUCTS = (("q", "k"), ("softmax", "v"))

    def __init__(self, dim: int, num_heads: int, head_dim: int, bias: bool = True, proj_bias: bool = True):
        super().__init__(dim, num_heads, head_dim, bias, proj_bias)
        self.q, self.k, self.v, self.softmax = (nn.Identity() for _ in self.PLACES)

    def code_macs(self, x: Tensor, y: Tensor) -> int:
        """MACs of one call whose factors are both 8-bit codes."""
        coded = [all(isinstance(getattr(self, side), StaticInt8Rounding) for side in pair) for pair in self.PRODUCTS]
        return sum(coded) * len(x) * x.shape[1] ** 2 * self.attn_dim

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.q(q), self.k(k), self.v(v)
        return self.softmax((self.scale * (q @ k.transpose(-2, -1))).softmax(-1)) @ v


@runtime_layer
class LinearAttention(OwnAttention):
    """Attention whose softmax became a product of feature maps (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5 and 7).

        out_i = phi(q_i)^T S / (phi(q_i)^T z),    S = sum_j phi(k_j) v_j^T,    z = sum_j phi(k_j),    phi = elu + 1

    The N x N shares are never built: 2 N c^2 + N c multiply-accumulates a head of width c, against 2 N^2 c.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weights = q @ k.sum(-2, keepdim=True).transpose(-2, -1)  # (B, heads, N, 1), positive
        return (q @ (k.transpose(-2, -1) @ v)) / weights


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool, bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v, in one kernel if `fused`.

    Shapes: q (B, heads, n, c), k (B, heads, m, c), v (B, heads, m, c'), bias broadcast to (B, heads, n, m) -> (B, heads, n, c').
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    logits = scale * (q @ k.transpose(-2, -1))
    return (logits if bias is None else logits + bias).softmax(-1) @ v


@runtime_layer
class NystroemAttention(OwnAttention):
    """Attention through landmarks, the pseudo-inverse by iteration.

    4 N m + 2 m^2 multiply-accumulates for each of the heads' dimensions and 4 m^3 a head for each iteration, against
    2 N^2 of full attention.

    Args:
        landmarks: m, from prefix + 1 to the number of tokens.
        iterations: of the pseudo-inverse (`iterative_inverse`).
        prefix: how many class and register tokens come first and are handled apart: each is a landmark by itself and gets
            full attention's answer, which the landmarks' attention to all tokens holds already. With 0, as in the paper
            and the survey, they are averaged with their neighbours.
        residual: width of a depthwise convolution of the values over the tokens, one kernel a head, whose answer is
            added (the paper's skip connection, there 33); it starts at zero. 0: none. Prefix tokens take no part.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        bias: bool = True,
        proj_bias: bool = True,
        landmarks: int = 32,
        iterations: int = 6,
        prefix: int = 0,
        residual: int = 0,
    ):
        super().__init__(dim, num_heads, head_dim, bias, proj_bias)
        self.landmarks, self.iterations, self.prefix, self.fused_attn = landmarks, iterations, prefix, True
        self.residual = None
        if residual:
            shape = {"kernel_size": (residual, 1), "padding": (residual // 2, 0), "groups": num_heads, "bias": False}
            self.residual = nn.Conv2d(num_heads, num_heads, **shape)
            nn.init.zeros_(self.residual.weight)
        own = {"landmarks": landmarks, "iterations": iterations, "prefix": prefix, "residual": residual}
        self._spec = {**self._spec, **own}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        few_q, few_k = (landmarks(part, self.landmarks, self.prefix) for part in (q, k))
        seen = softmax_attention(few_q, k, v, self.scale, self.fused_attn)  # (B, heads, m, head_dim)
        shares = (self.scale * (few_q @ few_k.transpose(-2, -1))).softmax(-1)  # A
        values = self.solved(shares, seen).to(v.dtype)
        out = softmax_attention(q[:, :, self.prefix :], few_k, values, self.scale, self.fused_attn)
        if self.residual is not None:
            out = out + self.residual(v[:, :, self.prefix :].to(self.residual.weight.dtype))
        return torch.cat([seen[:, :, : self.prefix].to(out.dtype), out], dim=2) if self.prefix else out

    def solved(self, shares: Tensor, seen: Tensor) -> Tensor:
        """A^+ times what the landmarks saw: (B, heads, m, m), (B, heads, m, head_dim) -> (B, heads, m, head_dim)."""
        with torch.autocast(shares.device.type, enabled=False):  # bf16 would not let the iterations converge
            return iterative_inverse(shares.float(), self.iterations) @ seen.float()


@runtime_layer
class ExactNystroemAttention(NystroemAttention):
    """The same with the pseudo-inverse by singular values in float64: a control, slow, which no other backend has."""

    portable = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "iterations": 0})

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {key: value for key, value in self._spec.items() if key != "iterations"}

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return super().mix(q.double(), k.double(), v.double()).to(v.dtype)

    def solved(self, shares: Tensor, seen: Tensor) -> Tensor:
        # below this the singular values are rounding errors of float32's queries and keys
        least = shares.shape[-1] * torch.finfo(torch.float32).eps
        return torch.linalg.pinv(shares, rtol=least) @ seen


def landmarks(x: Tensor, count: int, prefix: int = 0) -> Tensor:
    """The first `prefix` tokens and the means of `count - prefix` segments of the others: (B, heads, N, c) -> (B, heads, count, c).

    Segments follow one another and differ by one token at most, the longer ones last.
    """
    first, rest, segments = x[:, :, :prefix], x[:, :, prefix:], count - prefix
    length, longer = divmod(rest.shape[2], segments)
    short = (segments - longer) * length
    means = [*([first] if prefix else []), rest[:, :, :short].unflatten(2, (-1, length)).mean(3)]
    if longer:
        means.append(rest[:, :, short:].unflatten(2, (-1, length + 1)).mean(3))
    return torch.cat(means, dim=2)


def iterative_inverse(shares: Tensor, iterations: int) -> Tensor:
    """A^+ of matrices A (..., m, m) whose rows sum to 1, by Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4.

    Xiong et al. 2021, eq. 11, after Razavi et al. 2014: it starts from A^T over the largest sums of a column and of a row
    (here 1), for each matrix by itself, and the error's power is tripled at each step.
    """
    unit = torch.eye(shares.shape[-1], dtype=shares.dtype, device=shares.device)
    inverse = shares.transpose(-2, -1) / shares.sum(-2).amax(-1)[..., None, None]
    for _ in range(iterations):
        product = shares @ inverse
        inner = 15 * unit - product @ (7 * unit - product)
        inverse = 0.25 * inverse @ (13 * unit - product @ inner)
    return inverse
