"""Nystroem attention: each block's attention is approximated with a few landmarks (`vitbench.model.layers.attention`).

The survey (Chen et al. 2024, arXiv 2404.10407) puts it into a trained ViT without further training, with two iterations for
the pseudo-inverse and the class token averaged into the first landmark. Here these are `iterations=2, class_token="averaged"`.
With many tokens it needs fewer multiply-accumulates and less memory; the bytes on disk do not change.
"""

from typing import Literal

from pydantic import Field, field_validator
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.layers import ExactNystroemAttention, NystroemAttention
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tuned

DEFAULT_LANDMARKS, MIN_TOKENS_PER_LANDMARK = 32, 4
TRAIN = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


class Nystroem(FineTuneConfig):
    """Settings of Nystroem attention; by default nothing is trained.

    Attributes:
        landmarks: m, including those of class and register tokens; None: 32, or a quarter of the tokens if that is less.
        iterations: iterations for the pseudo-inverse; None: exact, by singular values, a slow control.
        class_token: "apart", a landmark by itself with the output of full attention, or "averaged" with its neighbours.
        residual: the odd width of a depthwise convolution of the values that is added to the output; it helps only after
            training; 0: none.
        blocks: the blocks to change, counted from 0; None: all.
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
            raise ValueError("give an odd width, which has as many neighbours on either side of a token, or 0")
        return width


@register(
    Nystroem,
    identity=Nystroem(blocks=()),
    reduces="macs",
    operating_points=lambda model: [{"landmarks": n} for n in range(vit.token_count(model), 1, -1)],
)
def nystroem(model: nn.Module, config: Nystroem, data: ImageData | None) -> Compressed:
    """Replace the blocks' softmax attention by Nystroem attention, and fine-tune if `train.epochs` is above 0."""
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    tokens, prefix = vit.token_count(model), model.num_prefix_tokens if config.class_token == "apart" else 0
    count = config.landmarks or max(prefix + 1, min(DEFAULT_LANDMARKS, tokens // MIN_TOKENS_PER_LANDMARK))
    if not prefix < count <= tokens:
        raise InputError(
            f"landmarks = {count}: {model.recipe.architecture.name} has {tokens} tokens, of which {prefix} are landmarks by "
            f"themselves; give {prefix + 1} to {tokens}"
        )
    options = {"landmarks": count, "prefix": prefix, "residual": config.residual}
    layer_class = NystroemAttention if config.iterations else ExactNystroemAttention
    options |= {"iterations": config.iterations} if config.iterations else {}
    blocks.replace_attention(model, config.blocks, lambda attn: layer_class.from_attention(attn, **options))
    return fine_tuned(model, config, data, teacher, title="training Nystroem attention")
