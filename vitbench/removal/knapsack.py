"""A policy by one exact choice: options for the parts of all blocks whose measured losses have the least sum within the budget.

HALP (Shen et al., arXiv 2110.10811) prunes to a latency as a knapsack problem: it keeps the filters of the highest summed importance
whose times, from a table of the target, fit the budget. MDP (Sun et al. 2025, arXiv 2504.02168) chooses one option for each block of
a transformer by a mixed-integer nonlinear program. Here the importance is measured. Attention and MLP of each block are pruned alone to each
option, and the loss of the option is the Kullback-Leibler divergence of the model's outputs from the dense model's. Losses and
costs of the parts are added up, and the choice is exact for these sums.

The number of tokens enters the cost of all blocks, so it is no option of one block. There is one choice for each of a few numbers
of tokens, and the one with the least sum, the tokens' own loss included, is taken.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.data.batches import eval_batches
from vitbench.model import vit
from vitbench.model.tokens import TokenBlocks
from vitbench.removal.policy import DIMENSIONS, Cost, PolicySpace
from vitbench.removal.pruner import Pruner
from vitbench.removal.search import LatencyTable, SearchResult
from vitbench.training import loop

LEVELS = 4  # ratios of neurons, of dimensions of heads and of tokens, beside 0
IMAGES = 64  # calibration images on which losses are measured
MICROSECONDS = 1e6  # in a second


def search(
    pruner: Pruner, space: PolicySpace, cost: Cost, budget: float, evaluate: Callable[[np.ndarray], float]
) -> SearchResult:
    """The policy (3 L + 1,) of the least summed loss whose cost is at most `budget`, and its score.

    Args:
        cost: a sum over the blocks, in multiply-accumulates or, of a `LatencyTable`, in seconds.
        evaluate: policy -> score. It decides nothing.

    Raises:
        InputError: no policy is cheap enough, or the tokens of the model are reduced already.
    """
    parts, tokens_alone = part_options(space), space.expand_dimensions(np.isin(DIMENSIONS, ["tokens"]))
    token_policies = _removal_ratios(space, "tokens")[:, None] * tokens_alone
    token_losses, losses = measured_losses(pruner, space, token_policies, parts)
    part_policies = [policies for options in parts for policies in _policies_of_blocks(space, options)]
    best_loss, best = math.inf, None
    for token_policy, loss in zip(token_policies, token_losses, strict=True):
        costs, budget_left = _whole_costs(space, cost, budget, token_policy, part_policies)
        if sum(int(values.min()) for values in costs) > budget_left:
            continue
        chosen = choose(losses, costs, budget_left)
        loss += sum(float(values[index]) for values, index in zip(losses, chosen, strict=True))
        if loss < best_loss:
            chosen_policies = [policies[index] for policies, index in zip(part_policies, chosen, strict=True)]
            best_loss, best = loss, token_policy + sum(chosen_policies)
    if best is None:
        min_cost = float(cost(space.counts(space.max_ratio * space.prunable))[0])
        raise InputError(
            f"no policy costs at most {budget:.4g}: with {space.max_ratio:g} of all {', '.join(space.dimensions)} removed it is "
            f"{min_cost:.4g}; give a larger keep, a larger ratio (most), or more dimensions"
        )
    return SearchResult(best[None], np.array([evaluate(best)]))


def choose(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: int) -> list[int]:
    """The option of each part so that the sum of the losses is least and the sum of the costs at most `budget`.

    It is a multiple-choice knapsack: minimise sum l_ij x_ij with sum_j x_ij = 1 for each part i, sum c_ij x_ij <= budget and x
    in {0, 1}. HiGHS solves it by branch and bound without a gap.

    Args:
        losses, costs: of each part an array of one number an option; the costs are whole numbers.

    Raises:
        InputError: a table that is no table of finite losses and whole costs, or a budget below the least sum of costs.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    _check_table(losses, costs)
    least = sum(int(values.min()) for values in costs)
    if least > budget:
        raise InputError(
            f"the cheapest options cost {least} and the budget is {budget}; give a budget of at least {least}"
        )
    sizes = [len(values) for values in losses]
    all_losses, all_costs = np.concatenate(losses).astype(float), np.concatenate(costs).astype(np.int64)
    unit = math.gcd(*(int(value) for value in all_costs)) or 1  # small whole numbers stay exact in the solver
    one_option_a_part = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    solution = milp(
        1e3 * all_losses / max(float(np.abs(all_losses).max()), 1e-300),  # the solver's absolute gap is 1e-6
        integrality=np.ones(len(all_losses)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_option_a_part, 1, 1),
            LinearConstraint(all_costs[None] / unit, -np.inf, budget // unit),
        ],
        options={"mip_rel_gap": 0},
    )
    if solution.x is None:
        raise RuntimeError(f"the solver found no choice: {solution.message}")
    chosen = [int(part.argmax()) for part in np.split(solution.x, np.cumsum(sizes)[:-1])]
    if sum(int(values[index]) for values, index in zip(costs, chosen, strict=True)) > budget:
        raise RuntimeError(f"the solver's choice is above the budget of {budget}: {chosen}")
    return chosen


def _check_table(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> None:
    if not len(losses) or [np.shape(values) for values in losses] != [np.shape(values) for values in costs]:
        raise InputError(
            f"{len(losses)} parts with losses and {len(costs)} with costs have not the same options; give one loss and one cost "
            "for each option of each part"
        )
    for name, table in (("loss", losses), ("cost", costs)):
        for index, values in enumerate(table):
            wrong = ~np.isfinite(values) if name == "loss" else ~np.isfinite(values) | (values != np.round(values))
            if not len(values) or wrong.any():
                given = f"is {values[wrong.argmax()]}" if len(values) else "has no option"
                allowed = "a finite number" if name == "loss" else "a whole number"
                raise InputError(
                    f"the {name} of an option of part {index} {given}; give {allowed} for each of its options"
                )


def part_options(space: PolicySpace) -> tuple[np.ndarray, np.ndarray]:
    """The options of a block's attention and of its MLP, (J, 4) each: a ratio for each of `DIMENSIONS`. The first removes nothing."""
    ratios = {name: _removal_ratios(space, name) for name in DIMENSIONS}
    attention = [
        (0.0, heads, head_dims, 0.0) for heads, head_dims in itertools.product(ratios["heads"], ratios["head_dims"])
    ]
    return np.array(attention), np.array([(neurons, 0.0, 0.0, 0.0) for neurons in ratios["neurons"]])


def _removal_ratios(space: PolicySpace, dimension: str) -> np.ndarray:
    """The ratios of one dimension: every number of units where there are few, else `LEVELS` beside 0."""
    if dimension not in space.dimensions:
        return np.zeros(1)
    total = int(np.max(getattr(space, dimension)))
    removable = math.ceil(total * space.max_ratio)
    if removable <= LEVELS:
        return np.minimum(np.arange(removable + 1) / total, space.max_ratio)
    return np.linspace(0, space.max_ratio, LEVELS + 1)


def _policies_of_blocks(space: PolicySpace, options: np.ndarray) -> np.ndarray:
    """Policies with one option in one block alone, (L, J, 3 L + 1)."""
    block_of_ratio = np.append(np.tile(np.arange(space.depth), 3), -1)
    in_block = block_of_ratio == np.arange(space.depth)[:, None]
    return space.expand_dimensions(options) * in_block[:, None]


def _whole_costs(
    space: PolicySpace, cost: Cost, budget: float, token_policy: np.ndarray, part_policies: list[np.ndarray]
) -> tuple[list[np.ndarray], int]:
    """By how much each option changes the cost beside `token_policy`, and how much of the budget that leaves.

    In whole microseconds, or multiply-accumulates; the options' are rounded up and the budget down.
    """
    scale = MICROSECONDS if isinstance(cost, LatencyTable) else 1
    dense_cost = float(cost(space.counts(token_policy))[0])
    costs = cost(space.counts(token_policy + np.concatenate(part_policies))) - dense_cost
    whole = np.ceil(scale * costs - 1e-6).astype(np.int64)
    return np.split(whole, np.cumsum([len(one) for one in part_policies])[:-1]), math.floor(
        scale * (budget - dense_cost)
    )


@torch.inference_mode()
def measured_losses(
    pruner: Pruner, space: PolicySpace, token_policies: np.ndarray, parts: Sequence[np.ndarray]
) -> tuple[list[float], list[np.ndarray]]:
    """What each policy of tokens alone, and each option of each part of each block alone, loses on calibration images.

    The loss is the mean KL(dense || pruned) of the softmax outputs, in nats. The pruned model is compensated as the pruner's are.

    Args:
        parts: options (J, 4) of each part of a block.

    Returns:
        The losses of `token_policies`; and those of the options, (J,) each: of the first part in all blocks, then the next.
    """
    if isinstance(pruner.model.blocks, TokenBlocks):
        raise InputError(
            "how = knapsack measures each block with all tokens, and the tokens of this model are reduced already; give the "
            "model before the reduction, or how = gp"
        )
    assert pruner.data is not None, "the method has checked it"
    device = loop.pick_device()
    model = copy.deepcopy(pruner.model).to(device).eval()
    split = pruner.data.require_split("calibration").subset(IMAGES)
    images, _ = next(iter(eval_batches(split, model.recipe.preprocess, len(split), device=device)))
    states = [vit.embed_patches(model, images)]
    for block in model.blocks:
        states.append(block(states[-1]))
    dense = model(images).log_softmax(1)

    def divergence(logits: Tensor) -> float:
        return float(F.kl_div(logits.log_softmax(1), dense, reduction="batchmean", log_target=True))

    token_losses = [
        divergence(pruner.prune(space.counts(policy)).to(device)(images)) if policy.any() else 0.0
        for policy in token_policies
    ]
    blocks, losses = list(model.blocks), []
    bar = progress.progress_bar(range(sum(len(options) for options in parts)), "losses of options", unit="option")
    for options in parts:
        table = np.zeros((len(blocks), len(options)))
        for j, policy in enumerate(space.expand_dimensions(options)):
            # a block does not see how others are pruned or compensated, so one model pruned everywhere gives all of them
            pruned = pruner.prune(space.counts(policy)).to(device).blocks if policy.any() else ()
            for index, block in enumerate(pruned):
                model.blocks = nn.Sequential(_Replay(states[index]), block, *blocks[index + 1 :])
                table[index, j] = divergence(model(images[:1]))
            bar.update()
        losses += list(table)
    bar.close()
    return token_losses, losses


class _Replay(nn.Module):
    """Gives a stored state in the place of the blocks that computed it."""

    def __init__(self, state: Tensor):
        super().__init__()
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return self.state
