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


class MultiHeadAttention(nn.Module, ABC):
    """timm's multi-head attention, with `attend` of a subclass instead of the softmax attention.

    `qkv` and `proj` may be linear layers of any kind. Shapes: x (B, N, dim) -> the same.

    Args:
        dim: the tokens' dimension.
        bias: whether `qkv` has a bias.
        proj_bias: whether `proj` has a bias.
    """

    exportable = True

    def __init__(self, dim: int, num_heads: int, head_dim: int, bias: bool = True, proj_bias: bool = True):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, head_dim, num_heads * head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=bias)
        self.proj = nn.Linear(self.attn_dim, dim, bias=proj_bias)
        self._spec = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim, "bias": bias, "proj_bias": proj_bias}

    @classmethod
    def from_attention(cls, attn: nn.Module, **options: Any) -> Self:
        """Make a layer with the sizes and the present linear layers, shared, of a timm attention layer.

        `options` are the arguments that only the subclass has.
        """
        biases = [getattr(layer, "bias", None) is not None for layer in (attn.qkv, attn.proj)]
        new = cls(attn.qkv.in_features, attn.num_heads, attn.head_dim, *biases, **options)
        new.qkv, new.proj = attn.qkv, attn.proj
        return new

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self._spec

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention itself: q, k, v (B, heads, N, head_dim) -> the same shape."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's blocks pass a mask and a flag, which are empty in Vision Transformers; both are ignored."""
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


@runtime_layer
class RoundedAttention(MultiHeadAttention):
    """Softmax attention with the submodules `q`, `k`, `v` and `softmax`, which may quantize its inner tensors.

    Each is an identity, a `Rounded`, a `Log2Rounded` or a `StaticInt8Rounding`. `q`, `k` and `v` get (B, heads, N, head_dim),
    `softmax` gets the attention probabilities (B, heads, N, N).
    """

    QUANTIZER_NAMES = ("q", "k", "v", "softmax")
    PRODUCTS = (("q", "k"), ("softmax", "v"))

    def __init__(self, dim: int, num_heads: int, head_dim: int, bias: bool = True, proj_bias: bool = True):
        super().__init__(dim, num_heads, head_dim, bias, proj_bias)
        self.q, self.k, self.v, self.softmax = (nn.Identity() for _ in self.QUANTIZER_NAMES)

    def int8_macs(self, x: Tensor, y: Tensor) -> int:
        """MACs of one call whose factors are both 8-bit codes."""
        is_int8 = [all(isinstance(getattr(self, side), StaticInt8Rounding) for side in pair) for pair in self.PRODUCTS]
        return sum(is_int8) * len(x) * x.shape[1] ** 2 * self.attn_dim

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.q(q), self.k(k), self.v(v)
        return self.softmax((self.scale * (q @ k.transpose(-2, -1))).softmax(-1)) @ v


@runtime_layer
class LinearAttention(MultiHeadAttention):
    """Attention with feature maps instead of softmax (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5 and 7).

        out_i = phi(q_i)^T S / (phi(q_i)^T z),    S = sum_j phi(k_j) v_j^T,    z = sum_j phi(k_j),    phi = elu + 1

    The N x N attention probabilities are never built: a head of width c takes 2 N c^2 + N c multiply-accumulates instead
    of 2 N^2 c.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
class NystroemAttention(MultiHeadAttention):
    """Attention through landmarks, with an iterative pseudo-inverse.

    It takes 4 N m + 2 m^2 multiply-accumulates for each dimension of each head, and 4 m^3 for each head and iteration;
    full attention takes 2 N^2 for each dimension.

    Args:
        landmarks: m, from prefix + 1 to the number of tokens.
        iterations: of the pseudo-inverse (`iterative_inverse`).
        prefix: how many class and register tokens come first and are landmarks by themselves. Their output is full
            attention's, which the landmarks' attention to all tokens already gives. With 0, as in the paper and the
            survey, they are averaged with their neighbours.
        residual: width of a depthwise convolution of the values over the tokens, with one kernel for each head, that is
            added to the output (the paper's skip connection, width 33); it starts at zero and leaves out prefix tokens.
            0: none.
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
        options = {"landmarks": landmarks, "iterations": iterations, "prefix": prefix, "residual": residual}
        self._spec = {**self._spec, **options}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        landmark_q, landmark_k = (landmarks(part, self.landmarks, self.prefix) for part in (q, k))
        landmark_output = softmax_attention(landmark_q, k, v, self.scale, self.fused_attn)  # (B, heads, m, head_dim)
        landmark_attention = (self.scale * (landmark_q @ landmark_k.transpose(-2, -1))).softmax(-1)  # A
        values = self.apply_pseudo_inverse(landmark_attention, landmark_output).to(v.dtype)
        out = softmax_attention(q[:, :, self.prefix :], landmark_k, values, self.scale, self.fused_attn)
        if self.residual is not None:
            out = out + self.residual(v[:, :, self.prefix :].to(self.residual.weight.dtype))
        return torch.cat([landmark_output[:, :, : self.prefix].to(out.dtype), out], dim=2) if self.prefix else out

    def apply_pseudo_inverse(self, landmark_attention: Tensor, landmark_output: Tensor) -> Tensor:
        """A^+ times the landmarks' output: (B, heads, m, m), (B, heads, m, head_dim) -> (B, heads, m, head_dim)."""
        with torch.autocast(landmark_attention.device.type, enabled=False):  # in bf16 the iterations do not converge
            return iterative_inverse(landmark_attention.float(), self.iterations) @ landmark_output.float()


@runtime_layer
class ExactNystroemAttention(NystroemAttention):
    """Nystroem attention with the pseudo-inverse by singular values in float64: a slow control that runs only in PyTorch."""

    exportable = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "iterations": 0})

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {key: value for key, value in self._spec.items() if key != "iterations"}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return super().attend(q.double(), k.double(), v.double()).to(v.dtype)

    def apply_pseudo_inverse(self, landmark_attention: Tensor, landmark_output: Tensor) -> Tensor:
        # singular values below this are rounding errors of the float32 queries and keys
        rtol = landmark_attention.shape[-1] * torch.finfo(torch.float32).eps
        return torch.linalg.pinv(landmark_attention, rtol=rtol) @ landmark_output


def landmarks(x: Tensor, count: int, prefix: int = 0) -> Tensor:
    """The first `prefix` tokens and the means of `count - prefix` segments of the others: (B, heads, N, c) -> (B, heads, count, c).

    Segments are consecutive, and their lengths differ by at most one token; the longer ones come last.
    """
    first, rest, segments = x[:, :, :prefix], x[:, :, prefix:], count - prefix
    length, longer = divmod(rest.shape[2], segments)
    short = (segments - longer) * length
    means = [*([first] if prefix else []), rest[:, :, :short].unflatten(2, (-1, length)).mean(3)]
    if longer:
        means.append(rest[:, :, short:].unflatten(2, (-1, length + 1)).mean(3))
    return torch.cat(means, dim=2)


def iterative_inverse(landmark_attention: Tensor, iterations: int) -> Tensor:
    """A^+ of matrices A (..., m, m) whose rows sum to 1, by Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4.

    Xiong et al. 2021, eq. 11, after Razavi et al. 2014. The start is A^T over the largest sums of a column and of a row
    (here 1), for each matrix by itself. Convergence is of third order.
    """
    unit = torch.eye(landmark_attention.shape[-1], dtype=landmark_attention.dtype, device=landmark_attention.device)
    inverse = landmark_attention.transpose(-2, -1) / landmark_attention.sum(-2).amax(-1)[..., None, None]
    for _ in range(iterations):
        product = landmark_attention @ inverse
        inner = 15 * unit - product @ (7 * unit - product)
        inverse = 0.25 * inverse @ (13 * unit - product @ inner)
    return inverse
