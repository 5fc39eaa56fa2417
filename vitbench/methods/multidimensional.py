"""Multi-dimensional pruning: heads, neurons and tokens together, by a policy that a search finds within a budget.

Hou and Kung (2022, arXiv 2201.00043): units are scored by their statistical dependence with the model's outputs
(`vitbench.removal.criteria`). A Gaussian process with expected improvement searches the ratios of all dimensions within a budget
of multiply-accumulates (`vitbench.removal.policy`, `vitbench.removal.search`), and the pruned model is fine-tuned. Their public code
minimises the improvement, searches on the validation set, and masks units. Here the improvement is maximised, candidates are
scored on the val split (a part of train) with their units removed, and the test split is not used.
"""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.base.store import Store, work_key
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import artifact, vit
from vitbench.model.tokens import TokenBlocks
from vitbench.removal import cut, knapsack
from vitbench.removal.policy import (
    PAPER_DIMENSIONS,
    Cost,
    PolicySpace,
    budget,
    counts_to_dict,
    mac_cost,
    single_ratio_policy,
)
from vitbench.removal.pruner import Pruner, RemovalConfig
from vitbench.removal.scores import Scores, top_units
from vitbench.removal.search import LatencyTable, SearchConfig, SearchResult, search
from vitbench.training import loop
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher, fine_tuned


class MultiDimensional(RemovalConfig):
    """Settings of multi-dimensional pruning, beside those of `RemovalConfig`.

    Attributes:
        keep: the fraction of the budget that is kept.
        budget: "macs" of the complete model for one image, or "latency", from a table measured on this machine's CPU
            for `batch` images.
        tolerance: the largest difference of a policy's cost from `keep`, as a fraction of it.
        dimensions: the kinds of units to remove: the paper's three, or also dimensions of heads, which are finer than heads.
        most: the largest ratio of any dimension.
        search: settings of the search.
        objective: the score of a candidate on the val split: "top1", or "cross_entropy" (its negative), which ranks
            candidates more finely if there are few images.
        sharing: training before the search, under policies drawn from the budget, so that the weights adapt to removed
            units; 0 epochs skip it.
    """

    keep: float = Field(default=0.6, gt=0, le=1)
    budget: Literal["macs", "latency"] = "macs"
    batch: int = Field(default=1, ge=1)
    tolerance: float = Field(default=0.02, gt=0, le=0.2)
    dimensions: tuple[Literal["neurons", "heads", "head_dims", "tokens"], ...] = PAPER_DIMENSIONS
    most: float = Field(default=0.5, gt=0, lt=1)
    search: SearchConfig = SearchConfig()
    objective: Literal["top1", "cross_entropy"] = "top1"
    sharing: TrainConfig = TrainConfig(epochs=0, lr=3e-4, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


@register(MultiDimensional, identity=MultiDimensional(keep=1.0))
def multidimensional(model: nn.Module, config: MultiDimensional, data: ImageData | None) -> Compressed:
    """Search for a policy, prune the model by it, compensate, and fine-tune if `train.epochs` is above 0."""
    if config.keep == 1:
        return Compressed(model)
    if data is None:
        raise InputError("multidimensional scores policies on images and no data set was given; give one")
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    policy_search = PolicySearch(model, config, data)
    search_result = policy_search.search()
    counts = policy_search.space.counts(search_result.best)
    small = fine_tuned(policy_search.pruner.prune(counts), config, data, teacher, title="recovering")
    return dataclasses.replace(small, search=policy_search.history(search_result))


class PolicySearch:
    """One search: the space of policies, its budget, and the score of a policy. `search` may be called several times.

    Raises:
        InputError: a budget that no policy meets, no val images, or units that cannot be removed.
    """

    def __init__(self, model: nn.Module, config: MultiDimensional, data: ImageData):
        self.config, self.data, self.val = config, data, data.require_split("val")
        self.pruner = Pruner(model, config, data, tokens="tokens" in config.dimensions)
        self.space = self.pruner.space(config.dimensions, config.most)
        self.cost = self._cost(model)
        self.limits = budget(self.space, self.cost, config.keep, config.tolerance)
        self._prepared: list[tuple[Tensor, Tensor]] | None = None
        if config.sharing.epochs:
            self.pruner = self.pruner.with_weights(self._train_under_policies(model))

    def _cost(self, model: nn.Module) -> Cost:
        if self.config.budget == "latency":
            return LatencyTable.measure(model, self.space, self.config.batch)
        dense_counts = self.space.counts(np.zeros(self.space.size))
        block_macs = mac_cost(model.embed_dim, self.config.reduction, model.num_prefix_tokens)
        other_macs = vit.analytic_macs(model) - int(block_macs(dense_counts)[0])
        return lambda counts: other_macs + block_macs(counts)

    def search(self, config: SearchConfig | None = None) -> SearchResult:
        """Search with `config` (default: that of the method's config). Stored scores are reused."""
        config = config or self.config.search
        if config.how == "one_ratio":
            best = single_ratio_policy(self.space, self.cost, *self.limits)
            return SearchResult(best[None], np.array([self.evaluate(best)]))
        if config.how == "knapsack":
            return knapsack.search(self.pruner, self.space, self.cost, sum(self.limits) / 2, self.evaluate)
        search_settings = self.config.replace(
            search=config, train=TrainConfig(), teacher="none"
        ).to_dict()  # training comes later
        key_inputs = {
            "model": artifact.model_digest(self.pruner.model),
            "data": self.data.fingerprint,
            "settings": search_settings,
        }
        key = work_key("methods", key_inputs, loop.pick_device(), packages=("scipy", "sklearn"))
        return search(self.space, self.cost, self.limits, self.evaluate, config, Store("searches").journal(key))

    def evaluate(self, policy: np.ndarray) -> float:
        """The score on the val split of the model pruned by `policy` (3 L + 1,); higher is better."""
        small = self.pruner.prune(self.space.counts(policy))
        return _score(small.to(loop.pick_device()), self._batches(), self.config.objective)

    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of the val split, prepared once if they take less than 1 GiB."""
        preprocess = self.pruner.model.recipe.preprocess
        batches = eval_batches(self.val, preprocess, device=loop.pick_device())
        if self._prepared is None and 12 * len(self.val) * preprocess.size**2 < 2**30:
            self._prepared = list(batches)
        return batches if self._prepared is None else self._prepared

    def history(self, search_result: SearchResult) -> list[dict[str, Any]]:
        """All scored policies, with the counts that remain, the cost and the score."""
        return [
            {
                "policy": policy.tolist(),
                **counts_to_dict(self.space.counts(policy)),
                "cost": float(self.cost(self.space.counts(policy))[0]),
                "score": float(score),
            }
            for policy, score in zip(search_result.policies, search_result.scores, strict=True)
        ]

    def _train_under_policies(self, model: nn.Module) -> nn.Module:
        """A copy of the model, trained under masks of a random policy within the budget at every step."""
        rng = np.random.default_rng(self.config.search.seed)
        policies = self.space.scale_to_budget(self.space.sample(rng, 512), self.cost, *self.limits)
        shared = copy.deepcopy(model).requires_grad_(True)
        if "tokens" in self.space.dimensions:
            self.pruner.reduce_tokens(shared, [None] * self.space.depth)
        teacher = find_teacher(model, self.config, self.data)
        masks = _RandomPolicyMasks(shared, self.pruner.scores, self.space, policies, self.config.sharing.seed)
        loop.train(shared, self.data, self.config.sharing, teacher=teacher, title="sharing weights")
        masks.remove()
        if isinstance(shared.blocks, TokenBlocks):
            shared.blocks = nn.Sequential(*shared.blocks)
        return shared.cpu().requires_grad_(False)


class _RandomPolicyMasks:
    """Draws one of `policies` before every training step: units that it removes give zero, and its tokens are removed."""

    def __init__(self, model: nn.Module, scores: list[Scores], space: PolicySpace, policies: np.ndarray, seed: int):
        self.model, self.scores, self.space, self.policies = model, scores, space, policies
        self.rng = np.random.default_rng(seed)
        self.masks: list[tuple[Tensor, Tensor]] = []
        self.handles = [model.register_forward_pre_hook(lambda *_: self._sample_policy())]
        for index, block in enumerate(model.blocks):
            self.handles.append(block.attn.qkv.register_forward_hook(self._after_qkv(index)))
            self.handles.append(block.mlp.fc2.register_forward_pre_hook(self._before_fc2(index)))

    def _sample_policy(self) -> None:
        counts = self.space.counts(self.policies[self.rng.integers(len(self.policies))])
        self.masks, token_counts = [], [None] * self.space.depth
        if self.model.training:
            token_counts = counts.tokens_out[0].tolist()
            device = next(self.model.parameters()).device
            for block, kept_units in zip(self.model.blocks, top_units(self.scores, counts.units_left()), strict=True):
                self.masks.append(tuple(mask.to(device) for mask in cut.masks(block, kept_units)))
        if isinstance(self.model.blocks, TokenBlocks):
            self.model.blocks.counts = tuple(token_counts)

    def _after_qkv(self, index: int):
        return lambda _, x, y: y * self.masks[index][0] if self.masks else None

    def _before_fc2(self, index: int):
        return lambda _, x: (x[0] * self.masks[index][1],) if self.masks else None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def _score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], objective: str) -> float:
    total, count = 0.0, 0
    for x, y in batches:
        logits = model(x)
        if objective == "top1":
            total += int((logits.argmax(1) == y).sum())
        else:
            total -= float(F.cross_entropy(logits, y, reduction="sum"))
        count += len(y)
    return total / count
