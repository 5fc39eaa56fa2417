"""The uncompressed model that every method starts from: trained once, kept under the hash of all that made it."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from filelock import FileLock
from torch import nn

from vitbench import artifact, batches, image_sources, paths, training, vit
from vitbench import data as data_module
from vitbench.data import ImageData
from vitbench.errors import InputError
from vitbench.recipe import Recipe
from vitbench.training import TrainConfig


@dataclass(frozen=True)
class Baseline:
    """A baseline: the loaded `model`, the folder `path` it was loaded from, and the training `history`, one dict an epoch."""

    model: nn.Module
    path: Path
    history: list[dict[str, float]]


def baseline(
    model: str,
    data: ImageData,
    train: TrainConfig | None = None,
    *,
    pretrained: bool = False,
    checkpoint: str | Path = "",
    img_size: int | None = None,
    device: str = "auto",
) -> Baseline:
    """Make, or take from the cache, the model `model` trained on `data`, for images of `img_size` pixels a side.

    With `train.epochs` = 0 the pretrained or checkpoint weights are taken as they are, for the classes they know.
    The cache's key is the hash of the architecture, the starting weights, the data's fingerprint, the training config,
    the versions of torch and timm, the kind of device, the thread count, and the sources that decide the result.
    A run that was killed goes on from its last checkpoint; two processes that ask for one baseline train it once.

    Raises:
        InputError: nothing to start from without training, or weights whose classes are not the data's.
    """
    train = train or TrainConfig()
    start = prepare(model, data, train, pretrained=pretrained, checkpoint=checkpoint, img_size=img_size)
    folder = paths.model_cache() / f"{_plain(model)}-{_plain(data.name)}-{_key(start.recipe, device)}"
    if folder.is_dir() and (folder / "history.json").is_file():
        return _read(folder)
    paths.writable_folder(folder, "model cache")
    with FileLock(folder / "lock"):
        if not (folder / "history.json").is_file():
            checkpoint_file, history = folder / "training.pt", []
            if train.epochs:
                start, history = training.train(
                    start, data, train, checkpoint=checkpoint_file, device=device, title=f"training {model}"
                )
            artifact.save(start, folder / "model")
            part = folder / "history.json.part"
            part.write_text(json.dumps(history))
            part.rename(folder / "history.json")
            checkpoint_file.unlink(missing_ok=True)
    return _read(folder)


def prepare(
    model: str,
    data: ImageData,
    train: TrainConfig,
    *,
    pretrained: bool = False,
    checkpoint: str | Path = "",
    img_size: int | None = None,
) -> nn.Module:
    """The model as it is before training, checked against the data, with its recipe; errors as `baseline`'s."""
    classes = len(data.classes)
    start = vit.create_model(
        model,
        num_classes=classes,
        img_size=img_size or None,
        pretrained=pretrained,
        checkpoint=checkpoint,
        seed=train.seed,
    )
    if train.epochs == 0 and start.recipe.origin["head"] == "random":
        given = (
            "the weights were made for another number of classes"
            if pretrained or checkpoint
            else "no weights were given"
        )
        raise InputError(
            f"train.epochs = 0 would leave a random head for the {classes} classes of {data.name} ({given}); "
            f"set train.epochs above 0, or give pretrained=True or a checkpoint for these classes"
        )
    recipe = start.recipe
    if max(data.image_size) < recipe.preprocess.size:  # nothing to crop away in an image smaller than the input
        recipe = recipe.having(preprocess=recipe.preprocess.having(crop_pct=1.0))
    if train.epochs:
        recipe = recipe.having(
            origin={
                **recipe.origin,
                "dataset": data.name,
                "data_fingerprint": data.fingerprint,
                "train": train.to_dict(),
            }
        )
    start.recipe = recipe
    return start


def _read(folder: Path) -> Baseline:
    return Baseline(
        artifact.load(folder / "model"), folder / "model", json.loads((folder / "history.json").read_text())
    )


def _plain(text: str) -> str:
    """`text` with everything but letters, digits, '.', '_' and '-' turned into '-', for the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "unnamed"


def _key(recipe: Recipe, device: str) -> str:
    sources = [Path(module.__file__).read_bytes() for module in (vit, training, batches, data_module, image_sources)]
    facts = {
        "recipe": recipe.to_dict(),
        "versions": [torch.__version__, timm.__version__],
        "threads": torch.get_num_threads(),
        "device": training.pick_device(device).type,
        "sources": hashlib.sha256(b"\0".join(sources)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
