"""Distillation: a smaller student learns from the labels and from what a teacher says of the same images.

What the teacher gives (`train`, see `vitbench.training.config`): its softened answers (Hinton et al. 2015), its first class (DeiT,
Touvron et al. 2021), and what its blocks hold (hints, Romero et al. 2015; attention transfer, Zagoruyko & Komodakis 2017).
As Beyer et al. 2022 have it, both see the very same view of an image. The survey's (Chen et al. 2024, arXiv 2404.10407)
distillation rows are DeiTs that were fine-tuned without a teacher.

The student is a part of the model that came in, another Vision Transformer, or, with `depth` 0, that model itself: a
compressed one that learns from its original (`teacher`). With teacher "none" all but the teacher is the same.
"""

import copy
from pathlib import Path

from pydantic import Field
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import artifact, blocks, vit
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tune


class Distillation(FineTuneConfig):
    """Who learns, from whom, and how.

    Attributes:
        student: a name that `create_model` takes (from random weights), or the folder of a saved model; "" takes the
            student out of the model that came in.
        depth: of "", how many of its blocks, evenly spaced, with their weights; of a name, how many blocks; 0: all.
        img_size: of a name, the height and width of its input; 0: as the model that came in.
        token: give the student a distillation token, whose head follows the teacher while the other follows the labels; the
            answer is the mean of both (DeiT).
        teacher: as for all methods that train; "original" is the model that came in.
    """

    student: str = ""
    depth: int = Field(default=2, ge=0)
    img_size: int = Field(default=0, ge=0)
    token: bool = False
    train: TrainConfig = TrainConfig(
        epochs=10, lr=2e-3, warmup_epochs=0, kd_weight=0.75, temperature=2.0, mixup=0.0, views=1
    )


@register(
    Distillation,
    identity=Distillation(depth=0, train=TrainConfig(epochs=0)),
    operating_points=lambda model: [{"depth": n} for n in range(len(model.blocks), 0, -1)],
)
def distillation(model: nn.Module, config: Distillation, data: ImageData | None) -> nn.Module:
    """Make the student, and train it. The teacher is thrown away, and so is what only served to compare with it."""
    student = _student(model, config)
    teacher = find_teacher(student, config, data, original=model)
    student.requires_grad_(bool(config.train.epochs))
    fine_tune(student, config, data, teacher, title="distilling" if teacher else "training alone")
    return student.cpu()


def _student(model: nn.Module, config: Distillation) -> nn.Module:
    if not config.student:
        student, count = model, len(model.blocks)
        if config.depth > count:
            raise InputError(
                f"depth = {config.depth} is more than the {count} blocks of the model that came in; give at most {count}, or a "
                "student by name"
            )
        if config.depth not in (0, count):
            student = copy.deepcopy(model)
            blocks.keep_blocks(student, blocks.evenly_spaced_blocks(config.depth, count))
    else:
        student = _another(model, config)
    if config.token:
        student = copy.deepcopy(student)
        vit.add_distillation_token(student)
        student.recipe = student.recipe.replace(
            architecture=student.recipe.architecture.replace(distillation_token=True)
        )
    return student


def _another(model: nn.Module, config: Distillation) -> nn.Module:
    """A student of another architecture, which keeps the story of the model that came in."""
    given = model.recipe
    if Path(config.student).expanduser().is_dir():
        student = artifact.load(config.student)
        own = student.recipe
    else:
        if not config.train.epochs:
            raise InputError(f"student = {config.student!r} starts from random weights; set train.epochs above 0")
        size = config.img_size or given.architecture.img_size
        classes, depth = given.architecture.num_classes, config.depth or None
        student = vit.create_model(
            config.student, num_classes=classes, img_size=size, depth=depth, seed=config.train.seed
        )
        own = student.recipe.replace(preprocess=given.preprocess.replace(size=size))
    original = given.original or given.architecture.name
    student.recipe = own.replace(origin=given.origin, original=original, methods=given.methods)
    return student
