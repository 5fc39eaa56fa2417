"""The cache of baselines and compressed models: each is made once and stored under the hash of all that decides it."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig

HISTORY = "history.json"  # written last: a folder that has it is finished
CHECKPOINT = "training.safetensors"


@dataclass(frozen=True)
class CachedModel(Compressed):
    """A baseline or a compressed model that was loaded from the folder `path`."""

    path: Path = Path()


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

    `model` is a name for `create_model`, the folder of a saved model that is uncompressed or has packed weights, or the name of
    the model that comes with the project: "deit_tiny_patch16_96", fine-tuned on CIFAR-10 at 96 pixels.

    With `train.epochs` = 0 the pretrained or checkpoint weights are used unchanged, for their own classes.
    The cache's key (`vitbench.training.loop.training_key`) is the hash of the model before training, the data's fingerprint, the training
    config, the code that trains with its imports, the versions, the thread count and the kind of device.
    A killed run resumes from its last checkpoint; two processes that need one baseline train it once.

    Raises:
        InputError: no weights and no training, or weights for other classes than the data's.
    """
    train = train or TrainConfig()
    initial_model = create_initial_model(
        model, data, train, pretrained=pretrained, checkpoint=checkpoint, img_size=img_size
    )
    folder = (
        paths.model_cache()
        / f"{_safe_folder_name(model)}-{_safe_folder_name(data.name)}-{loop.training_key(initial_model, data, train, device=device)}"
    )

    def make(folder: Path) -> Compressed:
        if not train.epochs:
            return Compressed(initial_model)
        checkpoint, title = folder / CHECKPOINT, f"training {model}"
        return Compressed(*loop.train(initial_model, data, train, checkpoint=checkpoint, device=device, title=title))

    return _load_or_make(folder, make)


def compress_cached(
    base: CachedModel, configs: Config | Sequence[Config], data: ImageData | None = None
) -> CachedModel:
    """`compress` the model of `base`, save and load the result; or load it from the cache.

    The cache's key is the hash of the model of `base`, the configs, the data's fingerprint, the code of all methods
    with its imports, the versions, the thread count and the kind of device.
    """
    configs = [configs] if isinstance(configs, Config) else list(configs)
    names = "+".join(method_of(config).name for config in configs)
    steps = [[method_of(config).name, config.to_dict()] for config in configs]
    key_inputs = {"model": artifact.model_digest(base.model), "steps": steps, "data": data.fingerprint if data else ""}
    parts = base.model.recipe.architecture.name, data.name if data else "no-data", names
    name = "-".join(map(_safe_folder_name, parts))
    key = work_key("methods", key_inputs, loop.pick_device())

    folder = paths.model_cache() / f"{name}-{key}"
    return _load_or_make(folder, lambda _: compress(base.model, configs, data))


def _load_or_make(folder: Path, make: Callable[[Path], Compressed]) -> CachedModel:
    """Load the model of `folder`, or make and save it; two processes that need it make it once."""
    if cached := _load_if_finished(folder):
        return cached
    paths.writable_folder(folder, "model cache")
    with locked(folder / "lock"):
        if cached := _load_if_finished(folder):
            return cached
        made = make(folder)
        artifact.save(made.model, folder / "model")
        store.write_json(folder / HISTORY, {"history": made.history, "search": made.search})
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return _load_folder(folder)


def _load_if_finished(folder: Path) -> CachedModel | None:
    """The model of a finished folder; None if the folder is unfinished or damaged, so that the model is rebuilt."""
    if not (folder / HISTORY).is_file():
        return None
    try:
        return _load_folder(folder)
    except (InputError, ValueError, TypeError) as error:
        print(f"the model in the cache {folder.name} is damaged and is rebuilt ({str(error)[:160]})")
        (folder / HISTORY).unlink(missing_ok=True)
        shutil.rmtree(folder / "model", ignore_errors=True)  # `save` would refuse to overwrite a damaged folder
        return None


def _load_folder(folder: Path) -> CachedModel:
    return CachedModel(artifact.load(folder / "model"), path=folder / "model", **store.read_json(folder / HISTORY))


def create_initial_model(
    model: str,
    data: ImageData,
    train: TrainConfig,
    *,
    pretrained: bool = False,
    checkpoint: str | Path = "",
    img_size: int | None = None,
) -> nn.Module:
    """The model before training, checked against the data, with its recipe; it raises what `baseline` raises."""
    if not isinstance(pretrained, bool):
        raise InputError(f"pretrained = {pretrained!r} is a {type(pretrained).__name__}; give True or False")
    classes = len(data.classes)
    if folder := _saved_model(model):
        initial_model = _load_initial_model(folder, data, img_size, pretrained or bool(checkpoint))
    else:
        initial_model = vit.create_model(
            model,
            num_classes=classes,
            img_size=img_size or None,
            pretrained=pretrained,
            checkpoint=checkpoint,
            new_head=True,
            seed=train.seed,
        )
    if train.epochs == 0 and initial_model.recipe.origin["head"] == "random":
        reason = (
            "the weights were made for another number of classes"
            if pretrained or checkpoint
            else "no weights were given"
        )
        raise InputError(
            f"train.epochs = 0 would leave a random head for the {classes} classes of {data.name} ({reason}); "
            f"set train.epochs above 0, or give pretrained=True or a checkpoint for these classes; if they are some of the "
            f"model's, name all of its outputs in order (classes=[NAME, ...] of load_data and of --splits)"
        )
    recipe = initial_model.recipe
    if max(data.image_size) < recipe.preprocess.size:  # an image smaller than the input is not cropped
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
    initial_model.recipe = recipe
    return initial_model


def _saved_model(model: str) -> Path | None:
    """The folder `model`, or the shipped one of that name, if it holds a saved model; otherwise None."""
    folders = (Path(model).expanduser(), paths.shipped(model))
    return next((folder for folder in folders if folder and (folder / artifact.RECIPE).is_file()), None)


def _load_initial_model(folder: Path, data: ImageData, img_size: int | None, has_weights: bool) -> nn.Module:
    """The model of that folder with dense weights, checked against the other settings."""
    if has_weights:
        raise InputError(
            f"{str(folder)!r} has weights of its own; give it without pretrained=True and without a checkpoint"
        )
    initial_model = load_unpacked(folder)
    architecture = initial_model.recipe.architecture
    if img_size not in (None, 0, architecture.img_size):
        raise InputError(
            f"{str(folder)!r} takes images of {architecture.img_size} pixels and img_size = {img_size} was given; leave it out"
        )
    if architecture.num_classes != len(data.classes):
        raise InputError(
            f"{str(folder)!r} has {architecture.num_classes} classes and {data.name} has {len(data.classes)}; "
            "give the images that the model was made for, or, if they are of some of its classes, name all of them in the order "
            "of its outputs (classes=[NAME, ...] of load_data and of --splits)"
        )
    return initial_model


def _safe_folder_name(text: str) -> str:
    """`text` with '-' for all characters but letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "unnamed"
