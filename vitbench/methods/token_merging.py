"""Token merging (ToMe, Bolya et al. 2023, arXiv 2210.09461): every block averages its r most similar pairs of tokens.

Between attention and MLP the tokens are split alternately into two sets. Each token of one set is matched with the most
similar token of the other, by the cosine of the mean keys, and the r most similar pairs are averaged, weighted by size.
Later attention weights each token by the number of tokens merged into it (`vitbench.model.tokens`). A head that pools the
tokens does the same; the paper's models read a class token and need no such weights. No training is needed.
It reduces time and multiply-accumulates, but not bytes.

Two settings are not in the paper. A calibrated schedule chooses the pairs of each block on calibration images
(`vitbench.removal.merge_schedule`), and the matching "ward" merges the pairs whose mean loses least of the tokens
(`vitbench.model.tokens.ward_matching`).
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.tokens import TokenBlocks
from vitbench.removal import merge_schedule
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tuned

TRAIN = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)
REDUCTIONS = {"cosine": "merge", "ward": "ward"}  # a matching -> the name in a recipe
Pairs = Annotated[int, Field(ge=0)]


class TokenMerging(FineTuneConfig):
    """The number of pairs to merge in each block; by default nothing is trained.

    Attributes:
        r: the number of pairs to merge in each block, or one number for every block. None: the number that halves the patch
            tokens by the last block (8 for 196 tokens in 12 blocks). A block merges at most half of its remaining tokens
            (as in the paper); class and register tokens are never merged.
        schedule: "constant", r in each block, or "decreasing", linearly from 2 r in the first block to 0 in the last, with
            the same total. "decreasing" reduces more multiply-accumulates and loses more accuracy. "calibrated": the numbers
            that change the outputs least on calibration images, with no more multiply-accumulates than `keep` or, without
            it, than r in each block.
        keep: the share of the model's multiply-accumulates to keep, in (0, 1], instead of r; blocks then merge r pairs
            in the mean, where r need not be a whole number.
        matching: how pairs are chosen: by the "cosine" of their keys (the paper), or by "ward": the least error of a pair's
            mean, weighted by the class token's attention.
        samples: how many calibration images a calibrated schedule sees.
    """

    r: Pairs | tuple[Pairs, ...] | None = None
    schedule: Literal["constant", "decreasing", "calibrated"] = "constant"
    keep: float | None = Field(default=None, gt=0, le=1)
    matching: Literal["cosine", "ward"] = "cosine"
    samples: int = Field(default=64, ge=1)
    train: TrainConfig = TRAIN


@register(
    TokenMerging,
    identity=TokenMerging(r=0),
    reduces="macs",
    operating_points=lambda model: [{"r": n} for n in range(model.patch_embed.num_patches // 2)],
)
def token_merging(model: nn.Module, config: TokenMerging, data: ImageData | None) -> Compressed:
    """Merge tokens in every block, and fine-tune if `train.epochs` is above 0."""
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    pairs, tokens = _pairs(model, config, data), vit.token_count(model)
    if any(pairs):
        _check(model)
        after = merge_schedule.tokens_after(pairs, tokens, model.num_prefix_tokens)
        tokens_before = [tokens, *after]
        counts = [m if m < n else None for n, m in zip(tokens_before, after)]
        blocks.reduce_tokens(model, REDUCTIONS[config.matching], counts)
        blocks.record_block_shapes(model)
    return fine_tuned(model, config, data, teacher, title="training merged tokens")


def _pairs(model: nn.Module, config: TokenMerging, data: ImageData | None) -> list[int]:
    depth, name = len(model.blocks), model.recipe.architecture.name
    if config.r is not None and config.keep is not None:
        raise InputError(f"r = {config.r} and keep = {config.keep:g} are both given; give the one or the other")
    if isinstance(config.r, tuple):
        if config.schedule == "calibrated":
            raise InputError(
                f"r = {config.r} is a schedule already, and schedule is 'calibrated'; give one number, or another schedule"
            )
        if len(config.r) != depth:
            raise InputError(
                f"r = {config.r} has {len(config.r)} numbers and {name} has {depth} blocks; give one number for all blocks, or "
                "one for each"
            )
        return list(config.r)
    r = max(1, model.patch_embed.num_patches // (2 * depth)) if config.r is None else config.r
    uniform = merge_schedule.decreasing if config.schedule == "decreasing" else merge_schedule.constant
    if r == 0 or (config.keep is None and config.schedule != "calibrated"):
        return uniform(r, depth)
    if config.keep == 1:
        return [0] * depth
    _check(model)
    budget = merge_schedule.MergeBudget(model, REDUCTIONS[config.matching])
    macs = budget.macs(uniform(r, depth)) if config.keep is None else config.keep * budget.dense
    budget.check(macs, uniform)
    if config.schedule != "calibrated":
        return budget.uniform(macs, uniform)
    if data is None:
        raise InputError("schedule = calibrated needs calibration images and no data set was given; give one")
    return merge_schedule.calibrated(model, budget, macs, data, config.samples)[0]


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
