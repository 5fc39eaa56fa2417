"""Nystroem attention: each block's attention goes through a few landmarks (`vitbench.model.layers.attention`).

The survey (Chen et al. 2024, arXiv 2404.10407) puts it into a trained ViT and trains nothing, with two iterations of the
pseudo-inverse and the class token averaged into the first landmark. That is `iterations=2, class_token="averaged"` here.
It saves multiply-accumulates and memory where tokens are many, and no bytes.
"""

from typing import Literal

from pydantic import Field, field_validator
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.layers import ExactNystroemAttention, NystroemAttention
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tune

USUAL, SHARE = 32, 4  # landmarks, and tokens for each at least
TRAIN = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


class Nystroem(FineTuneConfig):
    """Settings of Nystroem attention; by default nothing is trained.

    Attributes:
        landmarks: m, those of class and register tokens included; None: 32, or a quarter of the tokens if that is less.
        iterations: of the pseudo-inverse; None: exact, by singular values, a slow control.
        class_token: "apart", a landmark by itself with full attention's answer, or "averaged" with its neighbours.
        residual: odd width of a depthwise convolution of the values that is added, which only training can make use of; 0:
            none.
        blocks: which blocks, counted from 0; None: all.
    """

    landmarks: int | None = Field(default=None, ge=1)
    iterations: int | None = Field(default=6, ge=1)
    class_token: Literal["apart", "averaged"] = "apart"
    residual: int = Field(default=0, ge=0)
    blocks: tuple[int, ...] | None = None
    train: TrainConfig = TRAIN

    @field_validator("residual")
    @classmethod
    def _odd(cls, width: int) -> int:
        if width and width % 2 == 0:
            raise ValueError("give an odd width, so that a token has as many neighbours on either side, or 0")
        return width


@register(
    Nystroem,
    identity=Nystroem(blocks=()),
    reduces="macs",
    operating_points=lambda model: [{"landmarks": n} for n in range(vit.token_count(model), 1, -1)],
)
def nystroem(model: nn.Module, config: Nystroem, data: ImageData | None) -> nn.Module:
    """Put Nystroem attention in the place of the blocks' softmax attention, and train on if asked to."""
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    tokens, prefix = vit.token_count(model), model.num_prefix_tokens if config.class_token == "apart" else 0
    count = config.landmarks or max(prefix + 1, min(USUAL, tokens // SHARE))
    if not prefix < count <= tokens:
        raise InputError(
            f"landmarks = {count}: {model.recipe.architecture.name} has {tokens} tokens, of which {prefix} are landmarks by "
            f"themselves; take {prefix + 1} to {tokens}"
        )
    own = {"landmarks": count, "prefix": prefix, "residual": config.residual}
    kind = NystroemAttention if config.iterations else ExactNystroemAttention
    own |= {"iterations": config.iterations} if config.iterations else {}
    blocks.replace_attention(model, config.blocks, lambda attn: kind.from_attention(attn, **own))
    model = model.requires_grad_(bool(config.train.epochs))
    fine_tune(model, config, data, teacher, title="training Nystroem attention")
    return model.cpu()
