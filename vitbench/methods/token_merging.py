"""Token merging (ToMe, Bolya et al. 2023, arXiv 2210.09461): in every block the r most similar pairs of tokens become one.

Between attention and MLP the tokens are split in two by turns, each of one half looks for the most similar of the other,
by the cosine of the mean keys, and the r best pairs are averaged by size; from then on attention counts a token as often as
it has tokens in it (`vitbench.model.tokens`). Nothing has to be trained. It saves time and multiply-accumulates, and no bytes.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.tokens import TokenBlocks, max_merged
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tune

TRAIN = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)
Pairs = Annotated[int, Field(ge=0)]


class TokenMerging(FineTuneConfig):
    """How many pairs go together in which block; by default nothing is trained.

    Attributes:
        r: pairs that are merged in each block, or a number for every block. None: as many as halve the patches' tokens by
            the last block (8 for 196 in 12 blocks). Where fewer tokens are left, half of them go and no more (as in the
            paper); class and register tokens never do.
        schedule: "constant", r in each block, or "decreasing", from 2 r in the first in a straight line to none in the last,
            as many in all: it saves more and costs more.
    """

    r: Pairs | tuple[Pairs, ...] | None = None
    schedule: Literal["constant", "decreasing"] = "constant"
    train: TrainConfig = TRAIN


def merge_schedule(r: int, depth: int, kind: str) -> list[int]:
    """Pairs to merge in each of `depth` blocks."""
    if kind == "constant" or depth == 1:
        return [r] * depth
    return [int(2 * r * (1 - index / (depth - 1)) + 0.5) for index in range(depth)]


def tokens_after(pairs: Sequence[int], tokens: int, prefix: int) -> list[int]:
    """Tokens after each block that merges so many pairs, of which at most half of those that may go do, and two stay."""
    left = []
    for count in pairs:
        tokens -= max(0, min(count, max_merged(tokens, prefix), tokens - 2))
        left.append(tokens)
    return left


@register(
    TokenMerging,
    identity=TokenMerging(r=0),
    reduces="macs",
    operating_points=lambda model: [{"r": n} for n in range(model.patch_embed.num_patches // 2)],
)
def token_merging(model: nn.Module, config: TokenMerging, data: ImageData | None) -> nn.Module:
    """Let every block merge tokens, and train on if asked to."""
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    pairs, tokens = _pairs(model, config), vit.token_count(model)
    if any(pairs):
        _check(model)
        left = tokens_after(pairs, tokens, model.num_prefix_tokens)
        before = [tokens, *left]
        blocks.reduce_tokens(model, "merge", [m if m < n else None for n, m in zip(before, left)])
        blocks.record_block_shapes(model)
    model = model.requires_grad_(bool(config.train.epochs))
    fine_tune(model, config, data, teacher, title="training merged tokens")
    return model.cpu()


def _pairs(model: nn.Module, config: TokenMerging) -> list[int]:
    depth = len(model.blocks)
    if isinstance(config.r, tuple):
        if len(config.r) != depth:
            raise InputError(
                f"r = {config.r} has {len(config.r)} numbers and {model.recipe.architecture.name} {depth} blocks; give one "
                "number for all blocks, or one for each"
            )
        return list(config.r)
    r = max(1, model.patch_embed.num_patches // (2 * depth)) if config.r is None else config.r
    return merge_schedule(r, depth, config.schedule)


def _check(model: nn.Module) -> None:
    """Raise `InputError` unless every block is plain and no tokens are reduced yet."""
    name = model.recipe.architecture.name
    if isinstance(model.blocks, TokenBlocks):
        raise InputError(
            f"tokens of this {name} are reduced already ({model.blocks.reduction}); give the model before that, or r=0"
        )
    for index, block in enumerate(model.blocks):
        blocks.check_standard_attention(model, index)
        if block.attn.gate is not None:
            raise InputError(
                f"the attention in blocks.{index} of {name} has a gate, which merging does not know; give a plain ViT"
            )
