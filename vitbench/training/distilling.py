"""Distillation: loss terms from a teacher's logits and block features, and loading of teachers.

The teacher runs at each step on the same augmented images as the student. If the epochs repeat a fixed number of augmented
views (`TrainConfig.views`), its logits are computed once for each view and read from disk afterwards.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitbench.base import hub, progress
from vitbench.base.errors import InputError
from vitbench.base.store import Store, work_key
from vitbench.data.batches import view_batches
from vitbench.data.splits import ImageData
from vitbench.model import artifact, names, vit
from vitbench.model.artifact import model_digest
from vitbench.model.blocks import matching_blocks
from vitbench.model.recipe import Architecture, Preprocess, Recipe
from vitbench.training.config import TrainConfig

BATCH = 256


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) in nats, both softened by T, mean over the images (Hinton et al. 2015, section 2).

    Both logits are (B, C).
    """
    student = F.log_softmax(student_logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def hard_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's top class as the label, in nats (DeiT, Touvron et al. 2021, equation 3)."""
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


def feature_loss(student_tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """Mean squared difference of the student's tokens and the standardized tokens of the teacher, both (B, N, d).

    These are hints (Romero et al. 2015, equation 3). Standardizing each teacher token gives the loss the same scale for
    all models.
    """
    return F.mse_loss(student_tokens, standardize_tokens(teacher_tokens))


def attention_loss(student_tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """Squared distance of the activation maps of student and teacher, mean over the images.

    A map is the sum of squares over the channels of each patch, scaled to norm 1 (attention transfer, Zagoruyko &
    Komodakis 2017, equation 2). The tokens are patches only, (B, N, d) and (B, N, d').
    """
    maps = (F.normalize(x.square().sum(-1), dim=1) for x in (student_tokens, teacher_tokens))
    return (next(maps) - next(maps)).square().sum(1).mean()


def standardize_tokens(tokens: Tensor) -> Tensor:
    """Scale and shift each token to mean 0 and variance 1 over its channels."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def caches_teacher_logits(config: TrainConfig) -> bool:
    """Whether the teacher's logits are computed once for each view; block features are too large to cache."""
    return config.views > 0 and not config.feature_weight and not config.attention_weight


class Distiller:
    """Adds the distillation terms to the loss of one training, without changing student or teacher.

    Args:
        student, teacher: models with the same classes.

    Attributes:
        projections: one linear layer for each block of a student whose width differs from the teacher's, to the teacher's
            width. They are trained with the student and discarded afterwards.
        teacher_logits: the teacher's cached logits for the epoch's view, (N, C) in the split's order; None if the teacher
            runs at each step.

    Raises:
        InputError: cached logits with mixup or cutmix, which change the images at each step; block losses for a model
            without blocks, or for models with different numbers of patches.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: TrainConfig,
        data: ImageData,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.config, self.data, self.device, self.autocast = config, data, device, autocast
        self.teacher = teacher.to(device).eval()
        self.block_pairs: list[tuple[int, int]] = []
        self.teacher_logits: Tensor | None = None
        self.projections = nn.ModuleList()
        if caches_teacher_logits(config) and (config.mixup or config.cutmix):
            raise InputError(
                f"views = {config.views} caches the teacher's logits, and mixup = {config.mixup:g} with cutmix = {config.cutmix:g} "
                "makes new images at every step; set both to 0, or views to 0 so that the teacher runs at every step"
            )
        if config.feature_weight or config.attention_weight:
            self._pair_blocks(student)

    def _pair_blocks(self, student_model: nn.Module) -> None:
        """Pair each block of the student with the teacher's block at the same relative depth, and make the projections."""
        student, teacher = _find_vit(student_model), _find_vit(self.teacher)
        if student is None or teacher is None:
            raise InputError(
                "feature_weight and attention_weight compare blocks, and the teacher has none; set both to 0"
            )
        self.vits = student, teacher
        patches = student.patch_embed.num_patches, teacher.patch_embed.num_patches
        if patches[0] != patches[1] or any(hasattr(model.blocks, "counts") for model in (student, teacher)):
            raise InputError(
                "feature_weight and attention_weight compare the same patches in all blocks; the student has "
                f"{patches[0]} and the teacher {patches[1]} of them, and neither may reduce tokens; give models with the same "
                "patches, or set both weights to 0"
            )
        self.block_pairs = list(enumerate(matching_blocks(len(student.blocks), len(teacher.blocks))))
        if student.embed_dim != teacher.embed_dim and self.config.feature_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                self.projections.extend(nn.Linear(student.embed_dim, teacher.embed_dim) for _ in self.block_pairs)
            self.projections.to(self.device)

    def start_epoch(self, view: int | None) -> None:
        """Load the teacher's logits for an epoch whose images are augmented with the seed `view`, or compute them."""
        self.teacher_logits = None
        if caches_teacher_logits(self.config) and view is not None:
            self.teacher_logits = cached_teacher_logits(
                self.teacher, self.data, self.config, view, self.device, self.autocast
            )

    @contextmanager
    def capture_features(self) -> Iterator[list[Tensor]]:
        """While open, collect the outputs of the student's blocks."""
        blocks = self.vits[0].blocks if self.block_pairs else []
        with _capture_outputs(blocks, [student for student, _ in self.block_pairs]) as student_features:
            yield student_features

    def total_loss(
        self, label_loss: Tensor, student_logits: Tensor, x: Tensor, indices: Tensor, student_features: list[Tensor]
    ) -> Tensor:
        """The weighted sum of the loss on labels and the distillation terms, for one batch.

        Args:
            label_loss: the loss on labels.
            student_logits: the logits that the distillation loss compares with the teacher's, (B, C).
            x: the images as the student got them.
            indices: the images' indices in the split, (B,).
            student_features: what `capture_features` collected.
        """
        config = self.config
        blocks = self.vits[1].blocks if self.block_pairs else []
        with _capture_outputs(blocks, [teacher for _, teacher in self.block_pairs]) as teacher_features:
            teacher_logits = self._teacher_logits(x, indices)
        if config.kd_labels == "hard":
            kd_loss = hard_loss(student_logits, teacher_logits)
        else:
            kd_loss = soft_loss(student_logits, teacher_logits, config.temperature)
        loss = (1 - config.kd_weight) * label_loss + config.kd_weight * kd_loss
        for pair_index, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
            terms = self._feature_loss_terms(pair_index, student.float(), teacher.float().clone())
            loss = loss + terms / len(self.block_pairs)
        return loss

    def _teacher_logits(self, x: Tensor, indices: Tensor) -> Tensor:
        if self.teacher_logits is not None:
            return self.teacher_logits[indices.to(self.device)]
        with torch.inference_mode(), self.autocast():
            teacher_logits = self.teacher(x).float()
        return teacher_logits.clone()  # a loss cannot use an inference tensor; its clone is an ordinary one

    def _feature_loss_terms(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The feature and attention losses of one pair of blocks, whose tokens are (B, N, d) and (B, N', d')."""
        config, (student_prefix, teacher_prefix) = self.config, (model.num_prefix_tokens for model in self.vits)
        loss = torch.zeros((), device=student.device)
        if config.attention_weight:
            patches = student[:, student_prefix:], teacher[:, teacher_prefix:]
            loss = loss + config.attention_weight * attention_loss(*patches)
        if config.feature_weight:
            student, teacher = _class_and_patches(student, student_prefix), _class_and_patches(teacher, teacher_prefix)
            student = standardize_tokens(student)
            if len(self.projections):
                student = self.projections[pair_index](student)
            loss = loss + config.feature_weight * feature_loss(student, teacher)
        return loss


def _class_and_patches(tokens: Tensor, prefix: int) -> Tensor:
    """The class token, which the head reads, and the patches: of `prefix` other tokens only the first is kept."""
    return torch.cat([tokens[:, : min(1, prefix)], tokens[:, prefix:]], 1)


def cached_teacher_logits(
    teacher: nn.Module,
    data: ImageData,
    config: TrainConfig,
    view: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """The teacher's logits, (N, C) float32, for the training images in the split's order, augmented with the seed `view`.

    Their key hashes the teacher's weights and recipe, the images, the augmentation, the view and the precision; an incomplete
    or damaged file is computed again. The teacher gets the raw images through its own preprocessing, which may differ from
    the student's.
    """
    split, recipe = data.require_split("train"), teacher.recipe

    def compute() -> dict[str, Tensor]:
        images, logits = view_batches(split, recipe.preprocess, BATCH, config.augment, view, device), []
        with torch.inference_mode(), autocast():
            for x, _ in progress.progress_bar(images, "teacher logits", total=-(-len(split) // BATCH), unit="batch"):
                logits.append(teacher(x).float().cpu())
        return {"logits": torch.cat(logits)}

    with autocast():
        precision = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "float32"
    key_inputs = {"teacher": model_digest(teacher), "data": data.fingerprint, "augment": config.augment, "view": view}
    key = work_key("training", key_inputs | {"precision": precision}, device)
    return Store("answers").tensors(key, compute)["logits"].to(device)


def _find_vit(model: nn.Module) -> nn.Module | None:
    """The Vision Transformer in a model, which may wrap it."""
    return next((module for module in model.modules() if hasattr(module, "patch_embed")), None)


@contextmanager
def _capture_outputs(blocks: nn.Module | list, indices: list[int]) -> Iterator[list[Tensor]]:
    """While open, collect the outputs of the blocks at `indices`, in the order in which they run."""
    outputs: list[Tensor] = []
    handles = [blocks[index].register_forward_hook(lambda _, x, y: outputs.append(y)) for index in indices]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def load_teacher(name: str, classes: int) -> nn.Module:
    """Load a saved model from its folder, or a timm model by its name, with timm's weights or, for "NAME:FILE", the file's.

    The file's weights are for `classes`. The teacher need not be a Vision Transformer.

    Raises:
        InputError: no such folder or name; weights that cannot be fetched, or that do not fit the model.
    """
    timm_name, _, file = name.partition(":")
    base_name = timm_name.split(".")[0]
    if Path(name).expanduser().is_dir() or not (timm.is_model(base_name) or timm_name in names.VITBENCH_MODELS):
        return artifact.load(Path(name))
    count = classes if file else None
    if base_name in names.VITBENCH_MODELS or names.is_compressible(base_name):
        teacher = vit.create_model(timm_name, num_classes=count, pretrained=not file, checkpoint=file)
    else:
        teacher = _timm_classifier(timm_name, file, count)
    return teacher.requires_grad_(False).eval()


def _timm_classifier(name: str, file: str, classes: int | None) -> nn.Module:
    """A timm model of another architecture, with a recipe that holds its preprocessing."""
    try:
        changes = {} if classes is None else {"num_classes": classes}
        with contextlib.nullcontext() if file else hub.fetching(f"the weights of the teacher {name!r}", "NAME:FILE"):
            model = timm.create_model(name, pretrained=not file, **changes)
        if file:
            model.load_state_dict(load_file(file))
    except (RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the teacher {name!r} could not be made ({reason}); give a name with weights that can be fetched, or "
            "NAME:FILE with a safetensors file of this model"
        ) from None
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][-1]
    names = ("mean", "std", "interpolation", "crop_pct")
    model.recipe = Recipe(
        architecture=Architecture(name=name, num_classes=model.num_classes, img_size=size),
        preprocess=Preprocess(size=size, **{key: config[key] for key in names}),
        origin={"start": Path(file).name or f"timm:{name}"},
    )
    return model
