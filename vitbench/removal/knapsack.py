"""A policy by one exact choice: options for the parts of all blocks whose measured losses have the least sum within the budget.

HALP (Shen et al., arXiv 2110.10811) prunes to a latency as a knapsack problem: it keeps the filters of the highest summed importance
whose times, from a table of the target, fit the budget. MDP (Sun et al. 2025, arXiv 2504.02168) chooses one option for each block of
a transformer by a mixed-integer nonlinear program. Here the importance is measured: attention and MLP of each block are pruned alone
to each option, and the option's loss is the Kullback-Leibler divergence of the model's outputs from the dense model's. Losses and
costs of the parts are added up, and the choice is exact for these sums.

The number of tokens enters the cost of all blocks, so it is no option of one block. There is one choice for each of a few numbers
of tokens, and the one with the least sum, the tokens' own loss included, is taken.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.base.store import Store, work_key
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData
from vitbench.model import vit
from vitbench.model.artifact import model_digest
from vitbench.model.tokens import TokenBlocks
from vitbench.removal.policy import DIMENSIONS, Cost, PolicySpace
from vitbench.removal.pruner import Pruner
from vitbench.removal.search import LatencyTable, SearchResult
from vitbench.training import loop

LEVELS = 4  # ratios of neurons, of dimensions of heads and of tokens, beside 0
IMAGES = 64  # calibration images on which losses are measured
MICROSECONDS = 1e6  # in a second


@dataclass(frozen=True)
class OptionLosses:
    """What the model loses if one thing alone is pruned to one of its options, in nats; the first option removes nothing.

    Attributes:
        tokens: of all blocks together, (T,).
        attention, mlp: of each block, (L, J) each.
    """

    tokens: np.ndarray
    attention: np.ndarray
    mlp: np.ndarray


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
    tokens, attention, mlp = (space.expand_dimensions(ratios) for ratios in removal_options(space))
    part_policies = [*_by_block(space, attention), *_by_block(space, mlp)]
    option_loss = option_losses(pruner, space)
    part_losses = [*option_loss.attention, *option_loss.mlp]
    best_loss, best = math.inf, None
    for token_policy, loss in zip(tokens, option_loss.tokens, strict=True):
        costs, budget_left = _whole_costs(space, cost, budget, token_policy, part_policies)
        if sum(int(values.min()) for values in costs) > budget_left:
            continue
        chosen = choose(part_losses, costs, budget_left)
        loss = loss + sum(values[index] for values, index in zip(part_losses, chosen, strict=True))
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


def removal_options(space: PolicySpace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The options of the tokens, of a block's attention and of its MLP, (J, 4) each: a ratio for each of `DIMENSIONS`."""
    ratios = [_removal_ratios(space, name) for name in DIMENSIONS]
    neurons, attention, tokens = ratios[0], itertools.product(*ratios[1:3]), ratios[3]
    return (
        np.array([(0.0, 0.0, 0.0, ratio) for ratio in tokens]),
        np.array([(0.0, *heads_and_dims, 0.0) for heads_and_dims in attention]),
        np.array([(ratio, 0.0, 0.0, 0.0) for ratio in neurons]),
    )


def _removal_ratios(space: PolicySpace, dimension: str) -> np.ndarray:
    """The ratios of one dimension, 0 first: every number of units where there are few, else `LEVELS` beside 0."""
    if dimension not in space.dimensions:
        return np.zeros(1)
    total = int(np.max(getattr(space, dimension)))
    removable = min(total - 1, math.ceil(total * space.max_ratio))
    if removable <= LEVELS:
        return np.minimum(np.arange(removable + 1) / total, space.max_ratio)
    return np.linspace(0, space.max_ratio, LEVELS + 1)


def _by_block(space: PolicySpace, policies: np.ndarray) -> np.ndarray:
    """Policies (J, 3 L + 1) without tokens, each in one block alone: (L, J, 3 L + 1)."""
    block_of_ratio = np.append(np.tile(np.arange(space.depth), 3), -1)
    in_block = block_of_ratio == np.arange(space.depth)[:, None]
    return policies * in_block[:, None]


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


def option_losses(pruner: Pruner, space: PolicySpace) -> OptionLosses:
    """Measure the losses of all `removal_options` on calibration images, or load them from the cache; no budget changes them.

    The loss is the mean KL(dense || pruned) of the softmax outputs. The pruned models are compensated as the pruner's are.

    Raises:
        InputError: no calibration images, or a model whose tokens are reduced already.
    """
    if isinstance(pruner.model.blocks, TokenBlocks):
        raise InputError(
            "search.how = knapsack measures each block with all tokens, and the tokens of this model are reduced already; give "
            "the model before the reduction, or how = gp"
        )
    data = pruner.data
    if data is None:
        raise InputError(
            "search.how = knapsack measures losses on calibration images and no data set was given; give one"
        )
    settings = pruner.config.to_dict()
    key_inputs = {
        "model": model_digest(pruner.model),
        "data": data.fingerprint,
        "settings": {name: settings[name] for name in ("criterion", "reduction", "compensation", "ridge")},
        "token_blocks": list(pruner.token_blocks),
        "options": [ratios.tolist() for ratios in removal_options(space)],
    }
    key = work_key("removal", key_inputs, loop.pick_device())
    tensors = Store("option_losses").tensors(key, lambda: _measure(pruner, space, data))
    return OptionLosses(**{name: tensor.numpy() for name, tensor in tensors.items()})


def _measure(pruner: Pruner, space: PolicySpace, data: ImageData) -> dict[str, Tensor]:
    """The fields of `OptionLosses`."""
    device = loop.pick_device()
    model = copy.deepcopy(pruner.model).to(device).eval()
    split = data.require_split("calibration").subset(IMAGES)
    images, _ = next(iter(eval_batches(split, model.recipe.preprocess, len(split), device=device)))
    blocks = list(model.blocks)
    with torch.inference_mode():
        states = [vit.embed_patches(model, images)]
        for block in blocks:
            states.append(block(states[-1]))
        dense_log_probabilities = model(images).log_softmax(1)

    @torch.inference_mode()
    def loss(model: nn.Module, x: Tensor) -> float:
        log_probabilities = model(x).log_softmax(1)
        return float(F.kl_div(log_probabilities, dense_log_probabilities, reduction="batchmean", log_target=True))

    policies = dict(
        zip(("tokens", "attention", "mlp"), map(space.expand_dimensions, removal_options(space)), strict=True)
    )
    tables = {name: np.zeros((len(blocks), len(values))) for name, values in policies.items()}
    removals = [(name, j) for name, values in policies.items() for j in range(1, len(values))]
    for name, j in progress.progress_bar(removals, "losses of options", unit="option"):
        pruned = pruner.prune(space.counts(policies[name][j])).to(device)
        if name == "tokens":
            tables[name][:, j] = loss(pruned, images)
            continue
        # a block is pruned and compensated alike whatever the others are, so one model that is pruned everywhere gives all
        for index, block in enumerate(pruned.blocks):
            model.blocks = nn.Sequential(_Replay(states[index]), block, *blocks[index + 1 :])
            tables[name][index, j] = loss(model, images[:1])
    tables["tokens"] = tables["tokens"][0]
    return {name: torch.from_numpy(table) for name, table in tables.items()}


class _Replay(nn.Module):
    """Gives a stored state instead of running the blocks that computed it."""

    def __init__(self, state: Tensor):
        super().__init__()
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return self.state
