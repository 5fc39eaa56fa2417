"""Distillation terms of a training's loss, and teachers: soft or hard labels, block features, saved models or any timm classifier.

The teacher runs beside the student on the very images that the student gets, or, where every epoch shows one of a few
fixed views of the images (`TrainConfig.views`), its logits for each view are computed once and read from disk from then on.
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
from vitbench.data import batches
from vitbench.data.splits import ImageData
from vitbench.model import artifact, names, vit
from vitbench.model.artifact import model_digest
from vitbench.model.blocks import matching_blocks
from vitbench.model.recipe import Architecture, Preprocess, Recipe
from vitbench.training.config import TrainConfig

BATCH = 256


def soft_loss(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) in nats, both softened by T, mean over the images (Hinton et al. 2015, section 2).

    logits, wanted: the student's and the teacher's answers, (B, C).
    """
    student, teacher = F.log_softmax(logits / temperature, 1), F.log_softmax(wanted / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def hard_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy with the teacher's first class as the label, in nats (DeiT, Touvron et al. 2021, equation 3)."""
    return F.cross_entropy(logits, wanted.argmax(1))


def feature_loss(tokens: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference of the student's tokens and the teacher's, both (B, N, d).

    Hints (Romero et al. 2015, equation 3), where the teacher's tokens are standardised one by one first, so that the
    loss has one scale for all models.
    """
    return F.mse_loss(tokens, standardize_tokens(wanted))


def attention_loss(tokens: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of the maps of where student and teacher are active, mean over the images.

    A map is the sum of squares over the channels of each patch, scaled to norm 1 (attention transfer, Zagoruyko &
    Komodakis 2017, equation 2); tokens (B, N, d) and (B, N, d'), patches only.
    """
    maps = (F.normalize(x.square().sum(-1), dim=1) for x in (tokens, wanted))
    return (next(maps) - next(maps)).square().sum(1).mean()


def standardize_tokens(tokens: Tensor) -> Tensor:
    """Each token with mean 0 and variance 1 over its channels."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def caches_teacher_logits(config: TrainConfig) -> bool:
    """Whether the teacher answers each view once; what its blocks hold would be too much to keep."""
    return config.views > 0 and not config.feature_weight and not config.attention_weight


class Distiller:
    """A teacher at work in one training.

    Args:
        student, teacher: the teacher answers the student's classes; neither is changed.

    Attributes:
        projections: of each block of a student of another width, a linear layer to the teacher's width. They are trained
            along and thrown away.
        answers: the teacher's logits of the epoch's view, (N, C) in the split's order; None where it answers as it goes.

    Raises:
        InputError: answers to be kept of images that are mixed anew at each step; block outputs of models without
            blocks, or with other numbers of patches.
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
        self.pairs: list[tuple[int, int]] = []
        self.answers: Tensor | None = None
        self.projections = nn.ModuleList()
        if caches_teacher_logits(config) and (config.mixup or config.cutmix):
            raise InputError(
                f"views = {config.views} keeps the teacher's answers, and mixup = {config.mixup:g} with cutmix = {config.cutmix:g} "
                "makes new images at every step; set both to 0, or views to 0 so that the teacher answers as it goes"
            )
        if config.feature_weight or config.attention_weight:
            self._pair(student)

    def _pair(self, student: nn.Module) -> None:
        """Pair each block of the student with the teacher's at the same share of the depth; make the projections."""
        own, other = _vit(student), _vit(self.teacher)
        if own is None or other is None:
            raise InputError(
                "feature_weight and attention_weight compare blocks, and the teacher has none; set both to 0"
            )
        self.vits = own, other
        counts = [model.patch_embed.num_patches for model in self.vits]
        if counts[0] != counts[1] or any(hasattr(model.blocks, "counts") for model in self.vits):
            raise InputError(
                f"feature_weight and attention_weight compare patches one by one, and the student has {counts[0]} and the teacher "
                f"{counts[1]} of them, or fewer on the way; give models with the same patches, or set both weights to 0"
            )
        self.pairs = list(enumerate(matching_blocks(len(own.blocks), len(other.blocks))))
        if own.embed_dim != other.embed_dim and self.config.feature_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                self.projections.extend(nn.Linear(own.embed_dim, other.embed_dim) for _ in self.pairs)
            self.projections.to(self.device)

    def begin(self, view: int | None) -> None:
        """Take up an epoch, whose images are augmented as the seed `view` says."""
        self.answers = None
        if caches_teacher_logits(self.config) and view is not None:
            self.answers = cached_teacher_logits(self.teacher, self.data, self.config, view, self.device, self.autocast)

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """While open, collect what the student's blocks answer."""
        with _watched(self.vits[0].blocks if self.pairs else [], [own for own, _ in self.pairs]) as seen:
            yield seen

    def join(self, loss: Tensor, heard: Tensor, x: Tensor, places: Tensor, seen: list[Tensor]) -> Tensor:
        """The loss of the labels and what the teacher says, together, for one batch.

        Args:
            loss: that of the labels.
            heard: the student's answers that follow the teacher, (B, C).
            x: the images as the student got them, and `places`, (B,), where they are in the split.
            seen: what `watch` collected.
        """
        config = self.config
        with _watched(self.vits[1].blocks if self.pairs else [], [other for _, other in self.pairs]) as shown:
            wanted = self._answers(x, places)
        if config.kd_labels == "hard":
            told = hard_loss(heard, wanted)
        else:
            told = soft_loss(heard, wanted, config.temperature)
        loss = (1 - config.kd_weight) * loss + config.kd_weight * told
        for place, (own, other) in enumerate(zip(seen, shown, strict=True)):
            loss = loss + self._hint(place, own.float(), other.float().clone()) / len(self.pairs)
        return loss

    def _answers(self, x: Tensor, places: Tensor) -> Tensor:
        if self.answers is not None:
            return self.answers[places.to(self.device)]
        with torch.inference_mode(), self.autocast():
            wanted = self.teacher(x).float()
        return wanted.clone()  # out here an ordinary tensor, which a loss may use

    def _hint(self, place: int, own: Tensor, other: Tensor) -> Tensor:
        """The terms of one pair of blocks, whose tokens are (B, N, d) and (B, N', d')."""
        config, (first, second) = self.config, (model.num_prefix_tokens for model in self.vits)
        loss = torch.zeros((), device=own.device)
        if config.attention_weight:
            loss = loss + config.attention_weight * attention_loss(own[:, first:], other[:, second:])
        if config.feature_weight:  # the class token, which the head reads, and the patches
            own, other = (torch.cat([x[:, : min(1, n)], x[:, n:]], 1) for x, n in ((own, first), (other, second)))
            own = self.projections[place](standardize_tokens(own)) if len(self.projections) else standardize_tokens(own)
            loss = loss + config.feature_weight * feature_loss(own, other)
        return loss


def cached_teacher_logits(
    teacher: nn.Module,
    data: ImageData,
    config: TrainConfig,
    view: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """The teacher's logits, (N, C) float32, for the training images in the split's order, augmented as `view` says.

    They are kept under the hash of the teacher's weights and recipe, the images, the augmentation and the view, and the
    precision; a file that is torn or damaged is made again. The teacher gets the raw images through its own
    preprocessing, which need not be the student's.
    """
    split, recipe = data.require_split("train"), teacher.recipe

    def answer() -> dict[str, Tensor]:
        made, found = batches.view_batches(split, recipe.preprocess, BATCH, config.augment, view, device), []
        with torch.inference_mode(), autocast():
            for x, _ in progress.progress_bar(made, "the teacher answers", total=-(-len(split) // BATCH), unit="batch"):
                found.append(teacher(x).float().cpu())
        return {"logits": torch.cat(found)}

    with autocast():
        precision = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "float32"
    facts = {"teacher": model_digest(teacher), "data": data.fingerprint, "augment": config.augment, "view": view}
    key = work_key("training", facts | {"precision": precision}, device)
    return Store("answers").tensors(key, answer)["logits"].to(device)


def _vit(model: nn.Module) -> nn.Module | None:
    """The Vision Transformer in what is trained, which may be wrapped."""
    return next((module for module in model.modules() if hasattr(module, "patch_embed")), None)


@contextmanager
def _watched(blocks: nn.Module | list, places: list[int]) -> Iterator[list[Tensor]]:
    """While open, collect what the blocks at `places` answer, in order."""
    seen: list[Tensor] = []
    handles = [blocks[place].register_forward_hook(lambda _, x, y: seen.append(y)) for place in places]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def load_teacher(name: str, classes: int) -> nn.Module:
    """A saved model from its folder, or one of timm's by its name, with timm's weights or those of "NAME:FILE".

    The file's are for `classes`. The teacher need not be a Vision Transformer.

    Raises:
        InputError: no such folder or name, weights that cannot be fetched or do not fit.
    """
    timms, _, file = name.partition(":")
    plain = timms.split(".")[0]
    if Path(name).expanduser().is_dir() or not (timm.is_model(plain) or timms in names.VITBENCH_MODELS):
        return artifact.load(Path(name))
    count = classes if file else None
    if plain in names.VITBENCH_MODELS or names.is_compressible(plain):
        teacher = vit.create_model(timms, num_classes=count, pretrained=not file, checkpoint=file)
    else:
        teacher = _other_kind(timms, file, count)
    return teacher.requires_grad_(False).eval()


def _other_kind(name: str, file: str, classes: int | None) -> nn.Module:
    """A timm model that is no Vision Transformer, with a recipe that says how it takes images."""
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
            "NAME:FILE with a safetensors file of this very model"
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
