"""Multi-dimensional pruning: heads, neurons and tokens together, by a policy that a search finds for a budget.

Hou and Kung (2022, arXiv 2201.00043): units are scored by their statistical dependence with the model's answer
(`vitbench.removal.criteria`), a Gaussian process with expected improvement seeks the ratios of all dimensions under a budget of
multiply-accumulates (`vitbench.removal.policy`, `vitbench.removal.search`), and what is left is fine-tuned. Their public code minimises
the improvement, searches on the validation set and masks; here it is maximised, the val split (a part of train) scores
the candidates, each of which is really cut, and the test split is not seen.
"""

import copy
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
from vitbench.removal import cut
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
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher, fine_tune


class MultiDimensional(RemovalConfig):
    """Settings of multi-dimensional pruning, beside those of `RemovalConfig`.

    Attributes:
        keep: the share of the budget that is left.
        budget: "macs" of the whole model for one image, or "latency": that of a table measured on this machine's CPU
            for `batch` images.
        tolerance: how far from `keep` a policy may be, as a share of it.
        dimensions: what may be cut; the paper's three, and dimensions of heads, which are finer than whole heads.
        most: the largest ratio of any dimension.
        search: how to search.
        objective: what scores a candidate on the val split: "top1", or "cross_entropy" (its negative), which tells
            candidates apart where there are few images.
        sharing: training under policies drawn from the budget before the search, so that what is cut has learned to be
            without what goes; 0 epochs skip it.
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
def multidimensional(model: nn.Module, config: MultiDimensional, data: ImageData | None) -> nn.Module:
    """Search for a policy, cut the model by it, make up for what went, and train on if asked to."""
    if config.keep == 1:
        return model
    if data is None:
        raise InputError("multidimensional scores policies on images and no data set was given; give one")
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    task = PolicySearch(model, config, data)
    found = task.search()
    counts = task.space.counts(found.best)
    small = task.pruner.prune(counts).requires_grad_(bool(config.train.epochs))
    fine_tune(small, config, data, teacher, title="recovering")
    small.search = task.history(found)
    return small.cpu()


class PolicySearch:
    """One search: the space, its budget, and what scores a policy. `search` may be asked for several times.

    Raises:
        InputError: a budget that no policy meets, no val images, units that cannot be cut.
    """

    def __init__(self, model: nn.Module, config: MultiDimensional, data: ImageData):
        self.config, self.data, self.val = config, data, data.require_split("val")
        self.pruner = Pruner(model, config, data, tokens="tokens" in config.dimensions)
        self.space = self.pruner.space(config.dimensions, config.most)
        self.cost = self._cost(model)
        self.limits = budget(self.space, self.cost, config.keep, config.tolerance)
        self._prepared: list[tuple[Tensor, Tensor]] | None = None
        if config.sharing.epochs:
            self.pruner = self.pruner.with_weights(self._shared(model))

    def _cost(self, model: nn.Module) -> Cost:
        if self.config.budget == "latency":
            return LatencyTable.measure(model, self.space, self.config.batch)
        whole = self.space.counts(np.zeros(self.space.size))
        inner = mac_cost(model.embed_dim, self.config.reduction, model.num_prefix_tokens)
        fixed = vit.analytic_macs(model) - int(inner(whole)[0])
        return lambda counts: fixed + inner(counts)

    def search(self, config: SearchConfig | None = None) -> SearchResult:
        """Search as `config` (by default the task's) says; what was scored before is not scored again."""
        config = config or self.config.search
        if config.how == "one_ratio":
            best = single_ratio_policy(self.space, self.cost, *self.limits)
            return SearchResult(best[None], np.array([self.evaluate(best)]))
        decides = self.config.replace(
            search=config, train=TrainConfig(), teacher="none"
        ).to_dict()  # training comes later
        facts = {"model": artifact.model_digest(self.pruner.model), "data": self.data.fingerprint, "settings": decides}
        key = work_key("methods", facts, loop.pick_device(), packages=("scipy", "sklearn"))
        return search(self.space, self.cost, self.limits, self.evaluate, config, Store("searches").journal(key))

    def evaluate(self, policy: np.ndarray) -> float:
        """The score on the val split of the model cut by `policy` (3 L + 1,); higher is better."""
        small = self.pruner.prune(self.space.counts(policy))
        return _score(small.to(loop.pick_device()), self._batches(), self.config.objective)

    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The val images, prepared once if they fit into a gigabyte."""
        preprocess = self.pruner.model.recipe.preprocess
        batches = eval_batches(self.val, preprocess, device=loop.pick_device())
        if self._prepared is None and 12 * len(self.val) * preprocess.size**2 < 2**30:
            self._prepared = list(batches)
        return batches if self._prepared is None else self._prepared

    def history(self, found: SearchResult) -> list[dict[str, Any]]:
        """Each policy that was scored, with what it leaves, its cost and its score."""
        return [
            {
                "policy": policy.tolist(),
                **counts_to_dict(self.space.counts(policy)),
                "cost": float(self.cost(self.space.counts(policy))[0]),
                "score": float(score),
            }
            for policy, score in zip(found.policies, found.scores, strict=True)
        ]

    def _shared(self, model: nn.Module) -> nn.Module:
        """A copy of the model, trained while at every step another policy within the budget masks it."""
        rng = np.random.default_rng(self.config.search.seed)
        pool = self.space.scale_to_budget(self.space.sample(rng, 512), self.cost, *self.limits)
        shared = copy.deepcopy(model).requires_grad_(True)
        if "tokens" in self.space.dimensions:
            self.pruner.reduce_tokens(shared, [None] * self.space.depth)
        teacher = find_teacher(model, self.config, self.data)
        masks = _Masks(shared, self.pruner.scores, self.space, pool, self.config.sharing.seed)
        loop.train(shared, self.data, self.config.sharing, teacher=teacher, title="sharing weights")
        masks.remove()
        if isinstance(shared.blocks, TokenBlocks):
            shared.blocks = nn.Sequential(*shared.blocks)
        return shared.cpu().requires_grad_(False)


class _Masks:
    """Before every training step a policy is drawn from the pool: units that it lacks answer zero, tokens really go."""

    def __init__(self, model: nn.Module, scores: list[Scores], space: PolicySpace, pool: np.ndarray, seed: int):
        self.model, self.scores, self.space, self.pool = model, scores, space, pool
        self.rng = np.random.default_rng(seed)
        self.masks: list[tuple[Tensor, Tensor]] = []
        self.handles = [model.register_forward_pre_hook(lambda *_: self._draw())]
        for index, block in enumerate(model.blocks):
            self.handles.append(block.attn.qkv.register_forward_hook(self._after_qkv(index)))
            self.handles.append(block.mlp.fc2.register_forward_pre_hook(self._before_fc2(index)))

    def _draw(self) -> None:
        counts = self.space.counts(self.pool[self.rng.integers(len(self.pool))])
        self.masks, after = [], [None] * self.space.depth
        if self.model.training:
            after = counts.tokens_out[0].tolist()
            device = next(self.model.parameters()).device
            for block, keep in zip(self.model.blocks, top_units(self.scores, counts.units_left()), strict=True):
                self.masks.append(tuple(mask.to(device) for mask in cut.masks(block, keep)))
        if isinstance(self.model.blocks, TokenBlocks):
            self.model.blocks.counts = tuple(after)

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
