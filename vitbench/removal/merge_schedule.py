"""How many pairs of tokens to merge in each block: schedules within a budget of multiply-accumulates.

Merging k pairs early saves in more blocks than merging them late, and costs more: early tokens are told apart by little, and
what was merged stays merged. A calibrated schedule measures that on calibration images: the cost of merging in one block
alone is the KL divergence of the logits from the dense model's. From there a cost is taken to grow by a power of the merged
share, and the counts with the least sum of costs within the budget are found. A sum ignores that errors add up, so a few such
schedules and the uniform ones compete by what they cost together.
"""

import copy
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.base.progress import progress_bar
from vitbench.base.store import Store, work_key
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData, Split
from vitbench.model import blocks, vit
from vitbench.model.artifact import model_digest
from vitbench.model.tokens import max_merged
from vitbench.training.distilling import soft_loss

SHARES = (1 / 8, 1 / 4)  # of one block's tokens, at which the cost of merging is measured
POWERS = (2.0, 3.0)  # of the share, by which a cost grows; higher ones spread the pairs over more blocks
GROWTHS = (0.0, 1.0)  # powers of N / n by which a merge among n of N tokens costs more than the same share of all
TEMPERATURE = 4.0  # softens both logits, as a model is sure of images that it was trained on, and few of them tell much
STEPS = 40  # halvings of an interval
BATCH = 32
LEAST_COST = 1e-9  # nats; below it, a cost is the noise of float32

Schedule = Callable[[float, int], list[int]]  # mean pairs of a block and depth -> pairs of each block


def constant(r: float, depth: int) -> list[int]:
    """`r` pairs in each block, in the mean if `r` is no whole number."""
    return np.diff(np.floor(r * np.arange(depth + 1) + 0.5)).astype(int).tolist()


def decreasing(r: float, depth: int) -> list[int]:
    """From 2 `r` pairs in the first block linearly to none in the last; as many in all as `constant`."""
    if depth == 1:
        return constant(r, depth)
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


class MergeBudget:
    """The multiply-accumulates of one model with merged tokens, and schedules that keep as many as they may.

    Args:
        model: a dense model.
        reduction: one of `vitbench.model.tokens.MERGING`.
    """

    def __init__(self, model: nn.Module, reduction: str):
        self.depth, self.tokens, self.prefix = len(model.blocks), vit.token_count(model), model.num_prefix_tokens
        self.name, self.reduction = model.recipe.architecture.name, reduction
        self._shapes, self._width = blocks.block_shapes(model), model.embed_dim
        self._gates = [blocks.fc1_rows_per_neuron(block) for block in model.blocks]
        self._attended = blocks.reads_class_token(model)
        self.dense = vit.analytic_macs(model)
        self._others = self.dense - self._block_macs([self.tokens] * self.depth)

    def _block_macs(self, after: Sequence[int]) -> int:
        return int(sum(self.of_block(index, *n) for index, n in enumerate(zip([self.tokens, *after], after))))

    def of_block(self, index: int, tokens_in: ArrayLike, tokens_out: ArrayLike) -> np.ndarray:
        """Multiply-accumulates of a block, for numbers or arrays of tokens before and after its attention."""
        shape = self._shapes[index]
        sizes = shape.heads, shape.head_dim, shape.neurons
        before, after = np.broadcast_arrays(tokens_in, tokens_out)
        return blocks.block_macs(
            *sizes,
            before[..., None],
            after[..., None],
            self._width,
            self.reduction,
            prefix=self.prefix,
            gates=self._gates[index],
            attended=self._attended,
        )

    def macs(self, pairs: Sequence[int]) -> int:
        """Of the model that merges `pairs`."""
        return self._others + self._block_macs(tokens_after(pairs, self.tokens, self.prefix))

    def check(self, macs: float, schedule: Schedule) -> None:
        """Raise `InputError` if `schedule` keeps more than `macs` multiply-accumulates however many pairs it merges."""
        least = self.macs(schedule(self.tokens, self.depth)) / self.dense
        if macs / self.dense < least:
            raise InputError(
                f"keep = {macs / self.dense:.3g} is below {least:.3f}, the share of the multiply-accumulates that {self.name} keeps "
                f"where each block merges as many of its tokens as it can (at most half, and by the schedule); give {least + 5e-4:.3f} to 1"
            )

    def uniform(self, macs: float, schedule: Schedule) -> list[int]:
        """The pairs of `constant` or `decreasing` that keep `macs` multiply-accumulates, or as little less as possible."""
        low, high = 0.0, float(self.tokens)
        for _ in range(STEPS):
            r = (low + high) / 2
            low, high = (r, high) if self.macs(schedule(r, self.depth)) > macs else (low, r)
        return schedule(high, self.depth)

    def cheapest(self, costs: np.ndarray, macs: float, power: float, growth: float) -> list[int]:
        """The pairs with the least sum of costs among those that keep `macs` multiply-accumulates.

        A merge of k pairs in block l, among n of the N tokens without prefix, costs c_l (k / n)^power (N / n)^growth. At a price
        for each multiply-accumulate, dynamic programming over blocks and tokens finds the cheapest counts; the price is the
        lowest that meets the budget (Lagrange relaxation: nothing that keeps as much as the result costs less).

        Args:
            costs: c_l, (depth,).
        """
        tokens = np.arange(self.tokens + 1)[:, None]
        pairs = np.arange(max_merged(self.tokens, self.prefix) + 1)[None]
        mergeable, after = np.maximum(tokens - self.prefix, 1), np.maximum(tokens - pairs, 0)
        allowed = (pairs == 0) | ((pairs <= mergeable // 2) & (after >= 2))
        relative = (pairs / mergeable) ** power * ((self.tokens - self.prefix) / mergeable) ** growth
        losses = [np.where(allowed, cost * relative, np.inf) for cost in costs]
        shares = [self.of_block(index, tokens, after) / self.dense for index in range(self.depth)]

        def at_price(price: float) -> list[int]:
            later, choices = np.zeros(self.tokens + 1), []
            for loss, share in zip(reversed(losses), reversed(shares), strict=True):
                total = loss + price * share + later[after]
                choices.append(total.argmin(1))
                later = total.min(1)
            left, result = self.tokens, []
            for choice in reversed(choices):
                result.append(int(choice[left]))
                left -= result[-1]
            return result

        low, high = -30.0, 30.0  # logarithms of the price, in nats for the model's multiply-accumulates
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.macs(at_price(np.exp(middle))) > macs else (low, middle)
        return at_price(np.exp(high))


@torch.inference_mode()
def calibrated(
    model: nn.Module, budget: MergeBudget, macs: float, data: ImageData, samples: int
) -> tuple[list[int], dict[str, float]]:
    """The pairs for each block with the least KL divergence from the dense logits that was found.

    What merging in one block costs is kept in the cache, for other budgets.

    Args:
        model: the dense model; it is not changed.
        macs: the multiply-accumulates to keep.
        samples: how many of the calibration images of `data` decide.

    Returns:
        The pairs, and the KL divergence in nats of each schedule that competed, by its name.
    """
    merging = copy.deepcopy(model).eval()
    blocks.reduce_tokens(merging, budget.reduction, [None] * budget.depth)
    mergeable, depth = budget.tokens - budget.prefix, budget.depth
    counts = sorted({max(1, int(share * mergeable)) for share in SHARES})
    alone = [[k if index == block else 0 for index in range(depth)] for block in range(depth) for k in counts]
    split = data.calibration.subset(samples)
    inputs = {"model": model_digest(model), "data": data.fingerprint, "reduction": budget.reduction, "samples": samples}

    def measure_blocks() -> dict[str, Tensor]:
        return {"costs": torch.from_numpy(_divergences(merging, budget, split, alone, "measuring blocks"))}

    stored = Store("merge_costs").tensors(work_key("removal", inputs), measure_blocks)
    measured = stored["costs"].numpy().reshape(depth, len(counts))
    # no block costs less than a later one, which noise on few images may say; 0 in the last if the class token is read alone
    measured = np.maximum(np.maximum.accumulate(measured[::-1])[::-1], LEAST_COST)
    found = {"constant": budget.uniform(macs, constant), "decreasing": budget.uniform(macs, decreasing)}
    for power, growth in itertools.product(POWERS, GROWTHS):
        costs = np.exp(np.log(measured / (np.array(counts) / mergeable) ** power).mean(1))
        found[f"power {power:g}, growth {growth:g}"] = budget.cheapest(costs, macs, power, growth)
    found = {
        name: pairs for name, pairs in found.items() if budget.macs(pairs) <= macs
    }  # "decreasing" may not get there
    losses = _divergences(merging, budget, split, list(found.values()), "measuring schedules")
    return list(found.values())[int(losses.argmin())], dict(zip(found, losses.tolist(), strict=True))


def _divergences(
    merging: nn.Module, budget: MergeBudget, split: Split, schedules: Sequence[Sequence[int]], title: str
) -> np.ndarray:
    """The KL divergence from the dense logits of each of the `schedules`, mean over the images."""
    totals = np.zeros(len(schedules))
    batches = eval_batches(split, merging.recipe.preprocess, BATCH)
    for x, _ in progress_bar(batches, title, total=-(-len(split) // BATCH), unit="batch"):
        states = [vit.embed_patches(merging, x)]
        for block in merging.blocks:
            states.append(block(states[-1]))
        dense = _logits(merging, states[-1])
        for index, pairs in enumerate(schedules):
            first = next((block for block, count in enumerate(pairs) if count), budget.depth - 1)
            after = tokens_after(pairs, budget.tokens, budget.prefix)
            logits = _logits(merging, merging.blocks.resume(states[first], first, after))
            totals[index] += len(x) * float(soft_loss(logits, dense, TEMPERATURE))
    return totals / len(split)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.forward_head(model.norm(tokens))
