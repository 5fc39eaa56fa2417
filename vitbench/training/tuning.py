"""Training a compressed model further, with the model that it was made from, or another one, as the teacher."""

import copy
from typing import Any

from torch import nn

from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.training import loop
from vitbench.training.config import TrainConfig
from vitbench.training.distilling import caches_teacher_logits, load_teacher


class FineTuneConfig(Config):
    """What methods that train have in common.

    Attributes:
        train: with cross-entropy and distillation (`kd_weight`); 0 epochs trains nothing.
        teacher: "original" (the given model), "none", the folder of a saved model, a timm name (with timm's weights for
            it), or "NAME:FILE" (with those of a weights file).
    """

    train: TrainConfig = TrainConfig()
    teacher: str = "original"


def fine_tune(
    model: nn.Module, config: FineTuneConfig, data: ImageData | None, teacher: nn.Module | None, **how: Any
) -> None:
    """Train `model` in place by `config.train`, and set `model.history` (see `loop.train`); 0 epochs leave it empty.

    A killed run resumes from its last checkpoint. `how` are further arguments of `loop.train`: groups, penalty, title.
    """
    if not config.train.epochs:
        model.history = []
        return
    assert data is not None, "`find_teacher` refuses a training without images"
    checkpoint = loop.checkpoint_path(model, data, config, teacher)
    _, model.history = loop.train(model, data, config.train, teacher=teacher, checkpoint=checkpoint, **how)
    checkpoint.unlink(missing_ok=True)


def find_teacher(
    model: nn.Module, config: FineTuneConfig, data: ImageData | None, original: nn.Module | None = None
) -> nn.Module | None:
    """The teacher that `config` names, after checking that it and the images suit the student `model`.

    `original`, by default the model as it is now, is what that word means.

    Raises:
        InputError: no images to train on, or of other classes; a teacher of other classes, or one with another input
            that would have to answer the student's images.
    """
    own = model.recipe
    classes = own.architecture.num_classes
    if config.train.epochs and data is None:
        raise InputError("training needs images and no data set was given; give one, or train.epochs=0")
    if data is not None and config.train.epochs and len(data.classes) != classes:
        raise InputError(
            f"the model has {classes} outputs and {data.name} has {len(data.classes)} classes; give the images that the "
            "model was made for, or train.epochs=0"
        )
    if config.teacher == "none":
        return None
    if config.teacher == "original":
        found = copy.deepcopy(original or model).requires_grad_(False)
    else:
        found = load_teacher(config.teacher, classes)
    other = found.recipe
    if other.architecture.num_classes != classes:
        raise InputError(
            f"the teacher {config.teacher!r} answers {other.architecture.num_classes} classes and the student {classes}; "
            "give a teacher trained on the same classes, or teacher=original"
        )
    own_views = caches_teacher_logits(config.train) and config.train.augment != "timm"
    if other.preprocess != own.preprocess and not own_views:
        raise InputError(
            f"the teacher {config.teacher!r} takes images prepared in another way ({other.preprocess}) than the student "
            f"({own.preprocess}); give a teacher with the same input, or let it answer on its own: train.views of 1 or more, "
            "augment other than timm, no feature_weight and no attention_weight"
        )
    return found
