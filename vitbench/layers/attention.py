"""Attention layers of our own: what stands in the place of a timm attention layer and mixes the tokens in another way."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.layers.int8 import StaticInt8Rounding
from vitbench.layers.registry import runtime_layer


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
