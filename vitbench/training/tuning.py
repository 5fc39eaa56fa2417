"""Fine-tuning of a compressed model, with the original or another model as the teacher."""

import copy
from typing import Any

from torch import nn

from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.training import loop
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.distilling import caches_teacher_logits, load_teacher


class FineTuneConfig(Config):
    """Settings shared by the methods that train.

    Attributes:
        train: the training, with cross-entropy and distillation (`kd_weight`); with 0 epochs there is none.
        teacher: "original" (the input model), "none", the folder of a saved model, a timm name (with timm's weights), or
            "NAME:FILE" (with the weights in a file).
    """

    train: TrainConfig = TrainConfig()
    teacher: str = "original"


def fine_tune(
    model: nn.Module, config: FineTuneConfig, data: ImageData | None, teacher: nn.Module | None, **train_options: Any
) -> list[dict[str, float]]:
    """Train `model` in place by `config.train`, and return the history (see `loop.train`), which is empty with 0 epochs.

    A killed run resumes from its last checkpoint. `train_options` are further arguments of `loop.train`: groups, penalty,
    title.
    """
    if not config.train.epochs:
        return []
    assert data is not None, "`find_teacher` refuses a training without images"
    checkpoint = loop.checkpoint_path(model, data, config, teacher)
    _, history = loop.train(model, data, config.train, teacher=teacher, checkpoint=checkpoint, **train_options)
    checkpoint.unlink(missing_ok=True)
    return history


def fine_tuned(
    model: nn.Module, config: FineTuneConfig, data: ImageData | None, teacher: nn.Module | None, title: str
) -> Compressed:
    """The model after `fine_tune` of all its parameters, on the CPU, with the history."""
    model = model.requires_grad_(bool(config.train.epochs))
    history = fine_tune(model, config, data, teacher, title=title)
    return Compressed(model.cpu(), history)


def find_teacher(
    model: nn.Module, config: FineTuneConfig, data: ImageData | None, original: nn.Module | None = None
) -> nn.Module | None:
    """The teacher that `config` names, after a check that it and the images suit the student `model`.

    The teacher "original" is a copy of `original`, by default of the student itself.

    Raises:
        InputError: no images to train on, or images of other classes; a teacher with other classes, or with another
            preprocessing where it has to run on the student's images.
    """
    student_recipe = model.recipe
    classes = student_recipe.architecture.num_classes
    if config.train.epochs and data is None:
        raise InputError("training needs images and no data set was given; give one, or train.epochs=0")
    if data is not None and config.train.epochs and len(data.classes) != classes:
        raise InputError(
            f"the model has {classes} outputs and {data.name} has {len(data.classes)} classes; give the images that the "
            "model was trained for, or train.epochs=0"
        )
    if config.teacher == "none":
        return None
    if config.teacher == "original":
        teacher = copy.deepcopy(original or model).requires_grad_(False)
    else:
        teacher = load_teacher(config.teacher, classes)
    teacher_recipe = teacher.recipe
    if teacher_recipe.architecture.num_classes != classes:
        raise InputError(
            f"the teacher {config.teacher!r} has {teacher_recipe.architecture.num_classes} classes and the student {classes}; "
            "give a teacher trained on the same classes, or teacher=original"
        )
    uses_own_preprocessing = caches_teacher_logits(config.train) and config.train.augment != "timm"
    if teacher_recipe.preprocess != student_recipe.preprocess and not uses_own_preprocessing:
        raise InputError(
            f"the teacher {config.teacher!r} has another preprocessing ({teacher_recipe.preprocess}) than the student "
            f"({student_recipe.preprocess}); give a teacher with the same one, or settings with which the teacher prepares its "
            "own images: train.views of 1 or more, augment other than timm, no feature_weight and no attention_weight"
        )
    return teacher
