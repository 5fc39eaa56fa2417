"""Attention whose queries, keys, values and shares can be rounded."""

from typing import Any

from torch import Tensor, nn

from vitbench.layers.registry import runtime_layer


@runtime_layer
class RoundedAttention(nn.Module):
    """Multi-head attention as timm has it, written out, with a place for a rounding layer at each of its inner tensors.

    `q`, `k`, `v` see (B, heads, N, head_dim) and `softmax` the shares (B, heads, N, N); in their places a `Rounded` or a
    `Log2Rounded` may stand, and in those of `qkv` and `proj` any linear layer.
    Shapes: x (B, N, dim) -> the same.

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
        self.q, self.k, self.v, self.softmax = (nn.Identity() for _ in range(4))
        self._spec = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim, "bias": bias, "proj_bias": proj_bias}

    @classmethod
    def like(cls, attn: nn.Module) -> "RoundedAttention":
        """The same with a timm attention layer's sizes and matrices, shared."""
        biases = [layer.bias is not None for layer in (attn.qkv, attn.proj)]
        new = cls(attn.qkv.in_features, attn.num_heads, attn.head_dim, *biases)
        new.qkv, new.proj = attn.qkv, attn.proj
        return new

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self._spec

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's blocks pass a mask and a flag on, which Vision Transformers leave empty; they are not used."""
        parts = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = (module(part) for module, part in zip((self.q, self.k, self.v), parts, strict=True))
        shares = self.softmax((self.scale * (q @ k.transpose(-2, -1))).softmax(-1))
        return self.proj((shares @ v).transpose(1, 2).flatten(2))
