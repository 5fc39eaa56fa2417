"""Token merging (ToMe, Bolya et al. 2023, arXiv 2210.09461): every block averages its r most similar pairs of tokens.

Between attention and MLP the tokens are split alternately into two sets. Each token of one set is matched with the most
similar token of the other, by the cosine of the mean keys, and the r most similar pairs are averaged, weighted by size.
Later attention weights each token by the number of tokens merged into it (`vitbench.model.tokens`). A head that pools the
tokens does the same; the paper's models read a class token and need no such weights. No training is needed.
It reduces time and multiply-accumulates, but not bytes.
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
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tuned

TRAIN = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)
Pairs = Annotated[int, Field(ge=0)]


class TokenMerging(FineTuneConfig):
    """The number of pairs to merge in each block; by default nothing is trained.

    Attributes:
        r: the number of pairs to merge in each block, or one number for every block. None: the number that halves the patch
            tokens by the last block (8 for 196 tokens in 12 blocks). A block merges at most half of its remaining tokens
            (as in the paper); class and register tokens are never merged.
        schedule: "constant", r in each block, or "decreasing", linearly from 2 r in the first block to 0 in the last, with
            the same total. "decreasing" reduces more multiply-accumulates and loses more accuracy.
    """

    r: Pairs | tuple[Pairs, ...] | None = None
    schedule: Literal["constant", "decreasing"] = "constant"
    train: TrainConfig = TRAIN


def merge_schedule(r: int, depth: int, schedule_name: str) -> list[int]:
    """The number of pairs to merge in each of `depth` blocks."""
    if schedule_name == "constant" or depth == 1:
        return [r] * depth
    return [int(2 * r * (1 - index / (depth - 1)) + 0.5) for index in range(depth)]


def tokens_after(pairs: Sequence[int], tokens: int, prefix: int) -> list[int]:
    """The number of tokens after each block.

    Args:
        pairs: for each block, the pairs to merge; a block merges fewer if they are more than half of its mergeable tokens.
        tokens: the tokens before the first block; at least two are kept.
        prefix: class and register tokens, which are not merged.
    """
    result = []
    for count in pairs:
        tokens -= max(0, min(count, max_merged(tokens, prefix), tokens - 2))
        result.append(tokens)
    return result


@register(
    TokenMerging,
    identity=TokenMerging(r=0),
    reduces="macs",
    operating_points=lambda model: [{"r": n} for n in range(model.patch_embed.num_patches // 2)],
)
def token_merging(model: nn.Module, config: TokenMerging, data: ImageData | None) -> Compressed:
    """Merge tokens in every block, and fine-tune if `train.epochs` is above 0."""
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    pairs, tokens = _pairs(model, config), vit.token_count(model)
    if any(pairs):
        _check(model)
        after = tokens_after(pairs, tokens, model.num_prefix_tokens)
        tokens_before = [tokens, *after]
        blocks.reduce_tokens(model, "merge", [m if m < n else None for n, m in zip(tokens_before, after)])
        blocks.record_block_shapes(model)
    return fine_tuned(model, config, data, teacher, title="training merged tokens")


def _pairs(model: nn.Module, config: TokenMerging) -> list[int]:
    depth = len(model.blocks)
    if isinstance(config.r, tuple):
        if len(config.r) != depth:
            raise InputError(
                f"r = {config.r} has {len(config.r)} numbers and {model.recipe.architecture.name} has {depth} blocks; give one "
                "number for all blocks, or one for each"
            )
        return list(config.r)
    r = max(1, model.patch_embed.num_patches // (2 * depth)) if config.r is None else config.r
    return merge_schedule(r, depth, config.schedule)


def _check(model: nn.Module) -> None:
    """Raise `InputError` unless every block has standard attention and no tokens are reduced yet."""
    name = model.recipe.architecture.name
    if isinstance(model.blocks, TokenBlocks):
        raise InputError(
            f"this {name} reduces tokens already ({model.blocks.reduction}); give the model before that step, or r=0"
        )
    for index, block in enumerate(model.blocks):
        blocks.check_standard_attention(model, index)
        if block.attn.gate is not None:
            raise InputError(
                f"the attention in blocks.{index} of {name} has a gate, which token merging does not support; give a ViT without gates"
            )
