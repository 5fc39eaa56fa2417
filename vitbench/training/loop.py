"""The one training loop, and `evaluate`. Every method that trains goes through `train`."""

import math
import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.base.store import Store, StoredFile, work_key
from vitbench.data.batches import epoch_order, eval_batches, train_batches
from vitbench.data.splits import ImageData, Split
from vitbench.model.artifact import model_digest
from vitbench.model.blocks import set_distilled_training
from vitbench.model.vit import set_fused_attention
from vitbench.training.config import TrainConfig
from vitbench.training.distilling import Distiller

CHECKPOINT_SECONDS = 5.0

SCORING_BATCH = 128  # images scored at once: where activations share a range, answers hang on it


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a split, image by image in the split's order.

    Whether the right class was first / among five, and its cross-entropy, -log p(right class), in nats.
    """

    top1: np.ndarray
    top5: np.ndarray
    loss: np.ndarray


def pick_device(device: str = "auto") -> torch.device:
    """The named device, or with "auto" a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"device {device!r} cannot be used here ({reason}); allowed: auto, cpu, or a GPU that torch sees"
        ) from None
    return torch.device(device)


def training_key(
    model: nn.Module, data: ImageData, config: Config, teacher: nn.Module | None = None, device: str = "auto"
) -> str:
    """The key of a training that starts from this very model, with these images, config and teacher."""
    facts = {"model": model_digest(model), "data": data.fingerprint, "config": config.to_dict()}
    facts |= {"kind": type(config).__name__, "teacher": model_digest(teacher) if teacher is not None else ""}
    return work_key("training", facts, pick_device(device))


def checkpoint_path(model: nn.Module, data: ImageData, config: Config, teacher: nn.Module | None = None) -> Path:
    """Where the run of a key keeps its checkpoint."""
    return Store("unfinished").file(training_key(model, data, config, teacher)).path


@torch.inference_mode()
def evaluate(
    model: nn.Module, split: Split, *, batch_size: int = SCORING_BATCH, device: str = "cpu", title: str = ""
) -> Evaluation:
    """Score `model` on every image of `split` with the preprocessing of its recipe, in batches of one size everywhere."""
    model = model.to(device).eval()
    first, fifth, lost = [], [], []
    batches: Iterable = eval_batches(split, model.recipe.preprocess, batch_size, device)
    if title:
        batches = progress.progress_bar(batches, title, total=math.ceil(len(split) / batch_size), unit="batch")
    for x, y in batches:
        logits = model(x).float()
        ranked = logits.topk(min(5, model.recipe.architecture.num_classes), dim=1).indices
        hits = ranked == y[:, None]
        first.append(hits[:, 0].cpu())
        fifth.append(hits.any(dim=1).cpu())
        lost.append(F.cross_entropy(logits, y, reduction="none").cpu())
    return Evaluation(*(torch.cat(parts).numpy() for parts in (first, fifth, lost)))


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    checkpoint: str | Path = "",
    groups: list[dict[str, Any]] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    device: str = "auto",
    title: str = "training",
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train `model` in place on `data.train`; on one CPU the same config gives the same weights, bit for bit.

    Every epoch's order and random draws come from (seed, epoch) alone, so a run that was killed and goes on from
    `checkpoint` ends with the weights of a run that was not.

    Args:
        teacher: what it says joins the loss (see `TrainConfig`); not trained.
        checkpoint: a file to save the state of the run to and to resume from; removed by whoever keeps the result.
        groups: parameter groups for the optimiser in place of all of the model's, each with an `lr_scale`.
        penalty: a term to add to the loss, called after each forward pass.

    Returns:
        The trained model (its moving average where `ema` > 0) and the history: one dict an epoch with `epoch`,
        `steps` (since the start), `loss`, `lr`, `val_top1` (a fraction; NaN without a val split). The last epoch is the result: no epoch is chosen.

    Raises:
        InputError: fewer images than a batch, a teacher that cannot teach like that (see `distilling.Distiller`), or a
            loss that is no longer finite; the last checkpoint is kept.
    """
    split, target = data.require_split("train"), pick_device(device)
    key = training_key(model, data, config, teacher, device) if checkpoint else ""
    if len(split) < config.batch_size:
        raise InputError(
            f"batch_size = {config.batch_size} is more than the {len(split)} training images; give a smaller one"
        )
    set_fused_attention(model, target.type != "cpu")  # on a CPU the fused kernel's backward pass is the slower one
    run = _TrainingRun(model.to(target), data, config, teacher, target, groups, penalty)
    kept = StoredFile(checkpoint, "checkpoint")
    history = run.resume(kept, key) if checkpoint else []
    saved = time.monotonic()
    with progress.progress_bar(None, title, total=config.epochs * run.steps, unit="step") as bar:
        bar.update(len(history) * run.steps)
        for epoch in range(len(history), config.epochs):
            loss = run.epoch(epoch, bar)
            result = float("nan")
            if len(data.val):
                result = float(
                    evaluate(run.result(), data.val, batch_size=4 * config.batch_size, device=target).top1.mean()
                )
            bar.set_postfix(loss=f"{loss:.3f}", val_top1=f"{result:.3f}")
            done = run.steps * (epoch + 1)
            history.append({"epoch": epoch + 1, "steps": done, "loss": loss, "lr": run.rate(done), "val_top1": result})
            if checkpoint and time.monotonic() - saved > CHECKPOINT_SECONDS:
                run.save(kept, key, history)
                saved = time.monotonic()
    trained = run.result()
    if trained is not model:
        model.load_state_dict(trained.state_dict())
    set_fused_attention(model, True)
    set_distilled_training(model, False)
    return model.eval(), history


class _TrainingRun:
    """The moving parts of one training run."""

    def __init__(self, model, data, config, teacher, device, groups, penalty):
        from timm.data import Mixup
        from timm.optim import param_groups_weight_decay
        from timm.utils import ModelEmaV3

        self.model, self.config, self.split, self.device = model, config, data.train, device
        self.steps = len(self.split) // config.batch_size
        self.classes = model.recipe.architecture.num_classes
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and _bf16_pays(model, device))
        self.teaching = None
        if teacher is not None:
            self.teaching = Distiller(model, teacher, config, data, device, self.autocast)
        set_distilled_training(model, teacher is not None)
        groups = list(groups or param_groups_weight_decay(model, config.weight_decay))
        if self.teaching:
            groups.append({"params": list(self.teaching.projections.parameters()), "weight_decay": config.weight_decay})
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True
        )
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.penalty = penalty
        self.ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=self.classes
            )

    def rate(self, step: int) -> float:
        """The learning rate before optimiser step `step`: linear warm-up, then a cosine to a hundredth."""
        warm, total = self.config.warmup_epochs * self.steps, max(1, self.config.epochs * self.steps)
        if step < warm:
            return self.config.lr * (step + 1) / (warm + 1)
        done = (step - warm) / max(1.0, total - warm)
        return self.config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def epoch(self, epoch: int, bar) -> float:
        """Train one epoch; returns the mean loss."""
        seed, views = self._seed(epoch), self.config.views
        view = self._seed(epoch % views) if views else None
        if self.teaching:
            self.teaching.begin(view)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.model.train()
        total, config = torch.zeros((), device=self.device), self.config
        preprocess, order = self.model.recipe.preprocess, epoch_order(len(self.split), config.batch_size, seed)
        batches = train_batches(self.split, preprocess, config.batch_size, config.augment, seed, self.device, view)
        for i, (x, y) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(epoch * self.steps + i) * group.get("lr_scale", 1.0)
            loss = self._loss(x, y, order[i])
            if not torch.isfinite(loss):
                raise InputError(
                    f"the loss is {loss.item()} at step {epoch * self.steps + i + 1} (epoch {epoch + 1}): training diverged; "
                    f"give a smaller lr than {config.lr} (what was saved of the epochs before is kept)"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, config.clip_norm)
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model)
            total += loss.detach()
            bar.update(1)
        return float(total) / self.steps

    def _seed(self, epoch: int) -> int:
        """What the order and the draws of an epoch, or of a view, come from."""
        return (self.config.seed * 100_003 + epoch) % 2**31

    def _loss(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        labels = y
        if self.mixup:
            x, labels = self.mixup(x, y)
        smoothing = 0.0 if self.mixup else self.config.label_smoothing  # Mixup has smoothed its labels itself
        with self.autocast(), self.teaching.watch() if self.teaching else nullcontext() as seen:
            answers = self.model(x)
        own, heard = answers if isinstance(answers, tuple) else (answers, answers)
        loss = F.cross_entropy(own.float(), labels, label_smoothing=smoothing)
        if self.teaching:
            loss = self.teaching.join(loss, heard.float(), x, places, seen)
        return loss + self.penalty() if self.penalty else loss

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def result(self) -> nn.Module:
        return self.ema.module if self.ema else self.model

    def save(self, kept: StoredFile, key: str, history: list[dict[str, float]]) -> None:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        kept.save({"key": key, "parts": parts, "history": history})

    def resume(self, kept: StoredFile, key: str) -> list[dict[str, float]]:
        """Take up the run that `kept` holds; a damaged checkpoint, or one of another run, is named and left aside."""
        state = kept.load()
        if state is None:
            return []
        if not isinstance(state, dict) or state.get("key") != key:
            print(f"the checkpoint {str(kept.path)!r} is of another training; this one starts at the beginning")
            return []
        for name, part in self._parts().items():
            part.load_state_dict(state["parts"][name])
        return state["history"]

    def _parts(self) -> dict[str, Any]:
        """What changes while it trains."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        if self.ema:
            parts["ema"] = self.ema.module
        if self.teaching:
            parts["projections"] = self.teaching.projections
        return parts


def _bf16_pays(model: nn.Module, device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_bf16 and model.embed_dim >= 192
