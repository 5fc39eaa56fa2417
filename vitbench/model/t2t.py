"""T2T-ViT's patch embedding: overlapping windows and two narrow attention layers instead of one convolution.

Yuan et al. 2021, "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (arXiv:2101.11986),
section 3. This is the variant with softmax attention (T2T-ViT_t), not the one with Performer. The blocks after it are
timm's, so every method for a ViT's blocks applies to T2T-ViT's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from vitbench.base.errors import InputError

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding of each soft split
REDUCTION = 16  # a token's side in pixels of the image: the product of the strides
WIDTH = 64  # dimensions of a token between two splits

T2T_VITS = {
    "t2t_vit_t_14": {"embed_dim": 384, "depth": 14, "num_heads": 6},
    "t2t_vit_t_19": {"embed_dim": 448, "depth": 19, "num_heads": 7},
    "t2t_vit_t_24": {"embed_dim": 512, "depth": 24, "num_heads": 8},
}


class TokenAttention(nn.Module):
    """Attention of one head from `dim` to `width` features. The values are the skip connection, because the widths differ."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.scale, self.fused_attn = width**-0.5, True
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, width)."""
        q, k, v = (
            self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        )  # (B, 1, N, width) each: the fused kernel needs an axis of heads
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            mixed = (self.scale * q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return (v + self.proj(mixed)).squeeze(1)


class TokenLayer(nn.Module):
    """One layer between two splits: attention and an MLP of ratio 1, each after a norm."""

    def __init__(self, dim: int, width: int = WIDTH):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), TokenAttention(dim, width)
        self.norm2, self.mlp = LayerNorm(width), Mlp(width, hidden_features=width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, width)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one image: q, k, v and the two products of attention, then three square layers."""
        dim, width = self.norm1.normalized_shape[0], self.norm2.normalized_shape[0]
        return tokens * 3 * dim * width + 2 * tokens**2 * width + 3 * tokens * width**2


class TokensToToken(nn.Module):
    """The embedding of T2T-ViT, for timm's `VisionTransformer(embed_layer=TokensToToken)`.

    A soft split makes one token from all pixels in a window; windows overlap. Two layers mix the tokens. After each layer
    the tokens are laid out as an image and split again. `proj` maps the last tokens to the width of the blocks.
    The first layer attends over (size / 4)^2 tokens: 3136 at 224 pixels, 39 MB for each image without the fused kernel.

    Args:
        img_size: height and width in pixels.
        patch_size: 16, which the splits fix.
        dynamic_img_pad: False; padding is not supported.

    Raises:
        InputError: the images are too small for the splits, or another patch size or padding is given.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = REDUCTION,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if patch_size != REDUCTION or dynamic_img_pad:
            raise InputError(
                f"T2T-ViT was given patch_size={patch_size} and dynamic_img_pad={dynamic_img_pad}; its splits allow "
                f"patch_size={REDUCTION} and no padding: leave both out and set img_size"
            )
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.patch_size, self.grids = (REDUCTION, REDUCTION), _grids(self.img_size)
        self.grid_size = self.grids[-1]
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [channels * kernel**2 for channels, (kernel, _, _) in zip((in_chans, WIDTH, WIDTH), SPLITS)]
        self.layers = nn.ModuleList(TokenLayer(width) for width in widths[:-1])
        self.proj = nn.Linear(widths[-1], embed_dim, bias=bias)
        self.to(device=device, dtype=dtype)

    def uncovered_pixels(self) -> int:
        """How many of the last rows and columns of pixels no window of the first split covers; later splits cover all."""
        kernel, stride, padding = SPLITS[0]
        return max(0, (self.img_size[0] + 2 * padding - kernel) % stride - padding)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """A token's side in pixels; timm calls this method."""
        return REDUCTION if as_scalar else self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, N, embed_dim).

        Raises:
            InputError: the images' size is not the model's.
        """
        if tuple(x.shape[-2:]) != self.img_size:
            input_size, model_size = (
                "x".join(str(pixels) for pixels in size) for size in (x.shape[-2:], self.img_size)
            )
            raise InputError(
                f"images of {input_size} pixels were given to a model for {model_size}; resize them, or set img_size"
            )
        x = _soft_split(x, *SPLITS[0])
        for layer, grid, split in zip(self.layers, self.grids, SPLITS[1:]):
            x = _soft_split(layer(x).transpose(1, 2).unflatten(2, grid), *split)
        return self.proj(x)

    def macs(self) -> int:
        """Multiply-accumulates for one image, from shapes alone; a split only moves values and has none."""
        tokens = [height * width for height, width in self.grids]
        inner = sum(layer.macs(n) for layer, n in zip(self.layers, tokens))
        return inner + tokens[-1] * self.proj.in_features * self.proj.out_features


def use_official_form(model: nn.Module) -> None:
    """Give a T2T-ViT the scale and the norms of the official code, in place.

    There the attention between two splits divides by the square root of its *input's* dimensions (147 and 576), not of its
    width, 64, and all norms add 1e-5 to the variance, where timm's add 1e-6.

    Raises:
        InputError: the model is no T2T-ViT.
    """
    if not isinstance(model.patch_embed, TokensToToken):
        raise InputError(
            f"token_attention is a form of T2T-ViT, and this is a {type(model).__name__} without its embedding"
        )
    for layer in model.patch_embed.layers:
        layer.attn.scale = layer.norm1.normalized_shape[0] ** -0.5
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def sinusoids(positions: int, width: int) -> Tensor:
    """Position embeddings (positions, width): sines in even columns, cosines in odd (Vaswani et al. 2017, section 3.5).

    T2T-ViT keeps them fixed; here timm's learned position embedding starts from them.
    """
    position, frequency_index = torch.arange(positions)[:, None], torch.arange(width) // 2
    angle = position / 10000 ** (2 * frequency_index / width)
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())


def _soft_split(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(B, C, H, W) -> one token (C * kernel^2 values) for each window, (B, N, C * kernel^2)."""
    return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2)


def _grids(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Tokens down and across after each split."""
    grids, (height, width) = [], size
    for kernel, stride, padding in SPLITS:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        grids.append((height, width))
    if min(min(grid) for grid in grids) < 1:
        kernel, _, padding = SPLITS[0]
        raise InputError(
            f"an image size of {min(size)} pixels is too small for the splits of T2T-ViT; "
            f"allowed: {kernel - 2 * padding} pixels or more, {REDUCTION} for each token on a side"
        )
    return grids
