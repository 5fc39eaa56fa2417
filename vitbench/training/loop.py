"""The training loop, `train`, and the scoring of a model on a split, `evaluate`."""

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

SCORING_BATCH = 128  # images scored at once; where a batch shares the range of its activations, the logits depend on it


@dataclass(frozen=True)
class Evaluation:
    """The results of a model on a split, one for each image in the split's order.

    `top1` and `top5` say whether the right class is the first or among the first five; `loss` is the cross-entropy in nats.
    """

    top1: np.ndarray
    top5: np.ndarray
    loss: np.ndarray


def pick_device(device: str = "auto") -> torch.device:
    """The named device; "auto" is a GPU if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"device {device!r} cannot be used ({reason}); allowed: auto, cpu, or a GPU that torch finds"
        ) from None
    return torch.device(device)


def training_key(
    model: nn.Module, data: ImageData, config: Config, teacher: nn.Module | None = None, device: str = "auto"
) -> str:
    """The key of a training: it hashes the initial model, the images, the config and the teacher."""
    key_inputs = {"model": model_digest(model), "data": data.fingerprint, "config": config.to_dict()}
    key_inputs |= {"kind": type(config).__name__, "teacher": model_digest(teacher) if teacher is not None else ""}
    return work_key("training", key_inputs, pick_device(device))


def checkpoint_path(model: nn.Module, data: ImageData, config: Config, teacher: nn.Module | None = None) -> Path:
    """The file of the checkpoint of a training, named by its key."""
    return Store("unfinished").file(training_key(model, data, config, teacher)).path


@torch.inference_mode()
def evaluate(
    model: nn.Module, split: Split, *, batch_size: int = SCORING_BATCH, device: str = "cpu", title: str = ""
) -> Evaluation:
    """Score `model` on all images of `split`, with the preprocessing of its recipe and the same batch size everywhere."""
    model = model.to(device).eval()
    top1_hits, top5_hits, losses = [], [], []
    batches: Iterable = eval_batches(split, model.recipe.preprocess, batch_size, device)
    if title:
        batches = progress.progress_bar(batches, title, total=math.ceil(len(split) / batch_size), unit="batch")
    for x, y in batches:
        logits = model(x).float()
        ranked = logits.topk(min(5, model.recipe.architecture.num_classes), dim=1).indices
        hits = ranked == y[:, None]
        top1_hits.append(hits[:, 0].cpu())
        top5_hits.append(hits.any(dim=1).cpu())
        losses.append(F.cross_entropy(logits, y, reduction="none").cpu())
    return Evaluation(*(torch.cat(parts).numpy() for parts in (top1_hits, top5_hits, losses)))


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

    The order of the images and all random draws of an epoch depend on (seed, epoch) alone, so a killed run that resumes from
    `checkpoint` ends with the same weights as an uninterrupted one.

    Args:
        teacher: adds a distillation term to the loss (see `TrainConfig`), and is not trained.
        checkpoint: a file to save the state of the run to and to resume from; the caller removes it.
        groups: parameter groups for the optimiser in place of all of the model's, each with an `lr_scale`.
        penalty: computes a term that is added to the loss, after each forward pass.

    Returns:
        The trained model (its moving average where `ema` > 0) and the history, one dict for each epoch: `epoch`, `steps`
        (since the start), `loss`, `lr`, `val_top1` (a fraction; NaN without a val split). The model is that of the last epoch;
        val accuracy selects none.

    Raises:
        InputError: fewer images than a batch; a teacher that the settings do not allow (see `distilling.Distiller`); a
            loss that is not finite. The last checkpoint stays on disk.
    """
    split, target_device = data.require_split("train"), pick_device(device)
    key = training_key(model, data, config, teacher, device) if checkpoint else ""
    if len(split) < config.batch_size:
        raise InputError(
            f"batch_size = {config.batch_size} is more than the {len(split)} training images; give a smaller one"
        )
    set_fused_attention(model, target_device.type != "cpu")  # on a CPU the fused kernel's backward pass is slower
    run = _TrainingRun(model.to(target_device), data, config, teacher, target_device, groups, penalty)
    checkpoint_file = StoredFile(checkpoint, "checkpoint")
    history = run.resume(checkpoint_file, key) if checkpoint else []
    last_save_time = time.monotonic()
    with progress.progress_bar(None, title, total=config.epochs * run.steps, unit="step") as bar:
        bar.update(len(history) * run.steps)
        for epoch in range(len(history), config.epochs):
            loss = run.epoch(epoch, bar)
            val_top1 = float("nan")
            if len(data.val):
                evaluation = evaluate(
                    run.eval_model(), data.val, batch_size=4 * config.batch_size, device=target_device
                )
                val_top1 = float(evaluation.top1.mean())
            bar.set_postfix(loss=f"{loss:.3f}", val_top1=f"{val_top1:.3f}")
            steps_done = run.steps * (epoch + 1)
            lr = run.learning_rate(steps_done)
            history.append({"epoch": epoch + 1, "steps": steps_done, "loss": loss, "lr": lr, "val_top1": val_top1})
            if checkpoint and time.monotonic() - last_save_time > CHECKPOINT_SECONDS:
                run.save(checkpoint_file, key, history)
                last_save_time = time.monotonic()
    trained = run.eval_model()
    if trained is not model:
        model.load_state_dict(trained.state_dict())
    set_fused_attention(model, True)
    set_distilled_training(model, False)
    return model.eval(), history


class _TrainingRun:
    """The state of one training: model, optimiser, moving average and distillation."""

    def __init__(self, model, data, config, teacher, device, groups, penalty):
        from timm.data import Mixup
        from timm.optim import param_groups_weight_decay
        from timm.utils import ModelEmaV3

        self.model, self.config, self.split, self.device = model, config, data.train, device
        self.steps = len(self.split) // config.batch_size
        self.classes = model.recipe.architecture.num_classes
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and _bf16_is_faster(model, device))
        self.distiller = None
        if teacher is not None:
            self.distiller = Distiller(model, teacher, config, data, device, self.autocast)
        set_distilled_training(model, teacher is not None)
        groups = list(groups or param_groups_weight_decay(model, config.weight_decay))
        if self.distiller:
            groups.append(
                {"params": list(self.distiller.projections.parameters()), "weight_decay": config.weight_decay}
            )
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True
        )
        by_scale = {}  # codes and other parameters have gradients of other sizes
        for group in self.optimizer.param_groups:
            by_scale.setdefault(group.get("lr_scale", 1.0), []).extend(group["params"])
        self.clipped_together = list(by_scale.values())
        self.penalty = penalty
        self.ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=self.classes
            )

    def learning_rate(self, step: int) -> float:
        """The learning rate before optimiser step `step`: linear warm-up, then a cosine to a hundredth."""
        warmup_steps, total = self.config.warmup_epochs * self.steps, max(1, self.config.epochs * self.steps)
        if step < warmup_steps:
            return self.config.lr * (step + 1) / (warmup_steps + 1)
        progress_share = (step - warmup_steps) / max(1.0, total - warmup_steps)
        return self.config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress_share))))

    def epoch(self, epoch: int, bar) -> float:
        """Train one epoch, and return its mean loss."""
        seed, views = self._seed(epoch), self.config.views
        view = self._seed(epoch % views) if views else None
        if self.distiller:
            self.distiller.start_epoch(view)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.model.train()
        total, config = torch.zeros((), device=self.device), self.config
        preprocess, order = self.model.recipe.preprocess, epoch_order(len(self.split), config.batch_size, seed)
        batches = train_batches(self.split, preprocess, config.batch_size, config.augment, seed, self.device, view)
        for i, (x, y) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(epoch * self.steps + i) * group.get("lr_scale", 1.0)
            loss = self._loss(x, y, order[i])
            if not torch.isfinite(loss):
                raise InputError(
                    f"the loss is {loss.item()} at step {epoch * self.steps + i + 1} (epoch {epoch + 1}): training diverged; "
                    f"give a smaller lr than {config.lr} (the checkpoint of an earlier epoch stays on disk)"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for params in self.clipped_together:
                nn.utils.clip_grad_norm_(params, config.clip_norm)
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model)
            total += loss.detach()
            bar.update(1)
        return float(total) / self.steps

    def _seed(self, epoch: int) -> int:
        """The seed of the order and the random draws of an epoch, or of a view."""
        return (self.config.seed * 100_003 + epoch) % 2**31

    def _loss(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        labels = y
        if self.mixup:
            x, labels = self.mixup(x, y)
        smoothing = 0.0 if self.mixup else self.config.label_smoothing  # Mixup has smoothed its labels already
        with self.autocast(), self.distiller.capture_features() if self.distiller else nullcontext() as features:
            logits = self.model(x)
        label_logits, student_logits = logits if isinstance(logits, tuple) else (logits, logits)
        loss = F.cross_entropy(label_logits.float(), labels, label_smoothing=smoothing)
        if self.distiller:
            loss = self.distiller.total_loss(loss, student_logits.float(), x, indices, features)
        return loss + self.penalty() if self.penalty else loss

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def eval_model(self) -> nn.Module:
        """The moving average of the weights if there is one, else the model."""
        return self.ema.module if self.ema else self.model

    def save(self, checkpoint_file: StoredFile, key: str, history: list[dict[str, float]]) -> None:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        checkpoint_file.save({"key": key, "parts": parts, "history": history})

    def resume(self, checkpoint_file: StoredFile, key: str) -> list[dict[str, float]]:
        """Restore the state in a checkpoint and return its history; a damaged one, or one of another run, gives a warning."""
        state = checkpoint_file.load()
        if state is None:
            return []
        if not isinstance(state, dict) or state.get("key") != key:
            print(
                f"the checkpoint {str(checkpoint_file.path)!r} is of another training; this training starts at the beginning"
            )
            return []
        for name, part in self._parts().items():
            part.load_state_dict(state["parts"][name])
        return state["history"]

    def _parts(self) -> dict[str, Any]:
        """The modules and the optimiser whose state a checkpoint holds."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        if self.ema:
            parts["ema"] = self.ema.module
        if self.distiller:
            parts["projections"] = self.distiller.projections
        return parts


def _bf16_is_faster(model: nn.Module, device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_bf16 and model.embed_dim >= 192
