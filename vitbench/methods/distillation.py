"""Distillation: a smaller student learns from the labels and from a teacher's outputs for the same images.

The student can match the teacher's softened probabilities (Hinton et al. 2015), its predicted class (DeiT, Touvron et al. 2021),
and its blocks' outputs (hints, Romero et al. 2015; attention transfer, Zagoruyko & Komodakis 2017); see `train` and
`vitbench.training.config`. Both models get the same augmented view of an image (Beyer et al. 2022). In the survey
(Chen et al. 2024, arXiv 2404.10407), the distillation rows are DeiTs that were fine-tuned without a teacher.

The student is some blocks of the input model, another Vision Transformer, or, with `depth` 0, the input model itself. In the
last case it is a compressed model that learns from its original (`teacher`). With teacher "none" the same training runs
without the distillation loss.
"""

import copy
from pathlib import Path

from pydantic import Field
from torch import nn

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import artifact, blocks, vit
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tuned


class Distillation(FineTuneConfig):
    """The student, the teacher and the training.

    Attributes:
        student: a name that `create_model` accepts (random weights), the folder of a saved model, or "": blocks of the input
            model.
        depth: for student "", the number of the input model's blocks to keep, evenly spaced, with their weights; for a name,
            the number of blocks; 0: all.
        img_size: for a name, the height and width of its input (pixels); 0: those of the input model.
        token: give the student a distillation token. Its head learns from the teacher and the other head from the labels;
            the logits are the mean of both heads (DeiT).
        teacher: as for all methods that train; "original" is the input model.
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
def distillation(model: nn.Module, config: Distillation, data: ImageData | None) -> Compressed:
    """Make the student and train it. The teacher is not kept, nor are layers that only compare the two."""
    student = _student(model, config)
    teacher = find_teacher(student, config, data, original=model)
    return fine_tuned(student, config, data, teacher, title="distilling" if teacher else "training alone")


def _student(model: nn.Module, config: Distillation) -> nn.Module:
    if not config.student:
        student, count = model, len(model.blocks)
        if config.depth > count:
            raise InputError(
                f"depth = {config.depth} is more than the {count} blocks of the input model; give at most {count}, or a "
                "student by name"
            )
        if config.depth not in (0, count):
            student = copy.deepcopy(model)
            blocks.keep_blocks(student, blocks.evenly_spaced_blocks(config.depth, count))
    else:
        student = _new_student(model, config)
    if config.token:
        student = copy.deepcopy(student)
        vit.add_distillation_token(student)
        student.recipe = student.recipe.replace(
            architecture=student.recipe.architecture.replace(distillation_token=True)
        )
    return student


def _new_student(model: nn.Module, config: Distillation) -> nn.Module:
    """A student of another architecture, whose recipe keeps the input model's origin and methods."""
    input_recipe = model.recipe
    if Path(config.student).expanduser().is_dir():
        student = artifact.load(config.student)
        student_recipe = student.recipe
    else:
        if not config.train.epochs:
            raise InputError(f"student = {config.student!r} starts from random weights; set train.epochs above 0")
        size = config.img_size or input_recipe.architecture.img_size
        classes, depth = input_recipe.architecture.num_classes, config.depth or None
        student = vit.create_model(
            config.student, num_classes=classes, img_size=size, depth=depth, seed=config.train.seed
        )
        student_recipe = student.recipe.replace(preprocess=input_recipe.preprocess.replace(size=size))
    original = input_recipe.original or input_recipe.architecture.name
    student.recipe = student_recipe.replace(origin=input_recipe.origin, original=original, methods=input_recipe.methods)
    return student
