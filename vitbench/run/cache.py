"""Models that take work to make, baselines and compressed ones: made once, kept under the hash of all that made them."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitbench.base import paths, store
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.base.locks import locked
from vitbench.base.store import work_key
from vitbench.data.splits import ImageData
from vitbench.methods.registry import compress, method_of
from vitbench.model import artifact, vit
from vitbench.model.unpacked import load_unpacked
from vitbench.training import loop
from vitbench.training.config import TrainConfig

HISTORY = "history.json"  # written last: a folder that has it is finished
CHECKPOINT = "training.safetensors"


@dataclass(frozen=True)
class CachedModel:
    """A model that took work to make: loaded, as `model`, from the folder `path`.

    `history` is that of its training, `search` the policies that were scored for it; empty where there was none.
    """

    model: nn.Module
    path: Path
    history: list[dict[str, float]]
    search: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def baseline(
    model: str,
    data: ImageData,
    train: TrainConfig | None = None,
    *,
    pretrained: bool = False,
    checkpoint: str | Path = "",
    img_size: int | None = None,
    device: str = "auto",
) -> CachedModel:
    """Make, or take from the cache, the model `model` trained on `data`, for images of `img_size` pixels a side.

    `model` is a name that `create_model` takes, or a saved model: its folder, or the name of one that comes with the project.

    With `train.epochs` = 0 the pretrained or checkpoint weights are taken as they are, for the classes they know.
    The cache's key (`training.training_key`) is the hash of the model before training, the data's fingerprint, the training
    config, the code that trains with all that it imports, the versions, the thread count and the kind of device.
    A run that was killed goes on from its last checkpoint; two processes that ask for one baseline train it once.

    Raises:
        InputError: nothing to start from without training, or weights whose classes are not the data's.
    """
    train = train or TrainConfig()
    start = prepare(model, data, train, pretrained=pretrained, checkpoint=checkpoint, img_size=img_size)
    folder = (
        paths.model_cache()
        / f"{_plain(model)}-{_plain(data.name)}-{loop.training_key(start, data, train, device=device)}"
    )

    def make(folder: Path) -> nn.Module:
        if train.epochs:
            checkpoint, title = folder / CHECKPOINT, f"training {model}"
            _, start.history = loop.train(start, data, train, checkpoint=checkpoint, device=device, title=title)
        return start

    return _kept(folder, make)


def compressed(base: CachedModel, configs: Config | Sequence[Config], data: ImageData | None = None) -> CachedModel:
    """`compress` the model of `base`, save the result, and load it; or take it from the cache.

    The cache's key is the hash of the model of `base`, the configs, the data's fingerprint, the code of all methods with
    all that it imports, the versions, the thread count and the kind of device.
    """
    configs = [configs] if isinstance(configs, Config) else list(configs)
    names = "+".join(method_of(config).name for config in configs)
    steps = [[method_of(config).name, config.to_dict()] for config in configs]
    facts = {"model": artifact.model_digest(base.model), "steps": steps, "data": data.fingerprint if data else ""}
    architecture = base.model.recipe.architecture.name
    name = f"{_plain(architecture)}-{_plain(data.name if data else 'no-data')}-{_plain(names)}"
    key = work_key("methods", facts, loop.pick_device())

    folder = paths.model_cache() / f"{name}-{key}"
    return _kept(folder, lambda _: compress(base.model, configs, data))


def _kept(folder: Path, make: Callable[[Path], nn.Module]) -> CachedModel:
    """What `folder` holds, after making it if need be; two processes that ask for one thing make it once."""
    if found := _found(folder):
        return found
    paths.writable_folder(folder, "model cache")
    with locked(folder / "lock"):
        if found := _found(folder):
            return found
        model = make(folder)
        artifact.save(model, folder / "model")
        store.write_json(folder / HISTORY, {key: getattr(model, key, []) for key in ("history", "search")})
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return _read(folder)


def _found(folder: Path) -> CachedModel | None:
    """What a finished folder holds; None if it is not finished, or damaged, so that it is to be made anew."""
    if not (folder / HISTORY).is_file():
        return None
    try:
        return _read(folder)
    except (InputError, ValueError, TypeError) as error:
        print(f"the model in the cache {folder.name} is damaged and is made again ({str(error)[:160]})")
        (folder / HISTORY).unlink(missing_ok=True)
        shutil.rmtree(folder / "model", ignore_errors=True)  # a damaged one cannot be told from somebody else's folder
        return None


def _read(folder: Path) -> CachedModel:
    return CachedModel(artifact.load(folder / "model"), folder / "model", **store.read_json(folder / HISTORY))


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
    if not isinstance(pretrained, bool):
        raise InputError(f"pretrained = {pretrained!r} is a {type(pretrained).__name__}; give True or False")
    classes = len(data.classes)
    if folder := _saved_model(model):
        start = _saved_start(folder, data, img_size, pretrained or bool(checkpoint))
    else:
        start = vit.create_model(
            model,
            num_classes=classes,
            img_size=img_size or None,
            pretrained=pretrained,
            checkpoint=checkpoint,
            new_head=True,
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
        recipe = recipe.replace(preprocess=recipe.preprocess.replace(crop_pct=1.0))
    if train.epochs:
        recipe = recipe.replace(
            origin={
                **recipe.origin,
                "dataset": data.name,
                "data_fingerprint": data.fingerprint,
                "train": train.to_dict(),
            }
        )
    start.recipe = recipe
    return start


def _saved_model(model: str) -> Path | None:
    """The folder of a saved model, given by its path or by the name of one that comes with the project."""
    folder = paths.shipped(model) or Path(model).expanduser()
    return folder if (folder / artifact.RECIPE).is_file() else None


def _saved_start(folder: Path, data: ImageData, img_size: int | None, has_weights: bool) -> nn.Module:
    """The model of that folder with dense weights, checked against what else was asked for."""
    if has_weights:
        raise InputError(
            f"{str(folder)!r} has weights of its own; give it without pretrained=True and without a checkpoint"
        )
    start = load_unpacked(folder)
    architecture = start.recipe.architecture
    if img_size not in (None, 0, architecture.img_size):
        raise InputError(
            f"{str(folder)!r} takes images of {architecture.img_size} pixels and img_size = {img_size} was given; leave it out"
        )
    if architecture.num_classes != len(data.classes):
        raise InputError(
            f"{str(folder)!r} has {architecture.num_classes} classes and {data.name} has {len(data.classes)}; "
            "give the images that the model was made for"
        )
    return start


def _plain(text: str) -> str:
    """`text` with everything but letters, digits, '.', '_' and '-' turned into '-', for the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "unnamed"
