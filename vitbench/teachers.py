"""Teachers that are not the model at hand: saved ones, and any of timm's classifiers."""

import contextlib
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vitbench import artifact, vit
from vitbench.base import hub
from vitbench.errors import InputError
from vitbench.model import names
from vitbench.recipe import Architecture, Preprocess, Recipe


def load_teacher(name: str, classes: int) -> nn.Module:
    """A saved model from its folder, or one of timm's by its name, with timm's weights or those of "NAME:FILE".

    The file's are for `classes`. The teacher need not be a Vision Transformer.

    Raises:
        InputError: no such folder or name, weights that cannot be fetched or do not fit.
    """
    timms, _, file = name.partition(":")
    plain = timms.split(".")[0]
    if Path(name).expanduser().is_dir() or not (timm.is_model(plain) or timms in names.OWN_VITS):
        return artifact.load(Path(name))
    count = classes if file else None
    if plain in names.OWN_VITS or names.fits(plain):
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
