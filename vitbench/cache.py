"""Models that take work to make, baselines and compressed ones: made once, kept under the hash of all that made them."""

import ast
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock
from torch import nn

from vitbench import artifact, batches, image_sources, paths, train_config, training, vit
from vitbench import data as data_module
from vitbench.configs import Config
from vitbench.data import ImageData
from vitbench.errors import InputError
from vitbench.methods import compress, method_of
from vitbench.recipe import Recipe
from vitbench.training import TrainConfig

# sources that measure and show, and so do not decide what a model becomes
SHOWING = re.compile(
    r".*/vitbench/(measurement/.*|sweep/.*|(attention_figures|backends|bench|cli|closeups|comparison|environment|equal_budgets|figures|knobs|labels|lessons|policy_figures|progress|records|report|row_table|runs|statistics|suite|verify|version)\.py)$"
)

HISTORY = "history.json"  # written last: a folder that has it is finished


@dataclass(frozen=True)
class Made:
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
) -> Made:
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

    def make(folder: Path) -> nn.Module:
        if train.epochs:
            checkpoint, title = folder / "training.pt", f"training {model}"
            _, start.history = training.train(start, data, train, checkpoint=checkpoint, device=device, title=title)
        return start

    return _kept(folder, make)


def compressed(base: Made, configs: Config | Sequence[Config], data: ImageData | None = None) -> Made:
    """`compress` the model of `base`, save the result, and load it; or take it from the cache.

    The cache's key is the hash of the weights and recipe of `base`, the configs, the data's fingerprint, the versions
    of torch and timm, the thread count, and the sources of this package that can decide the result.
    """
    configs = [configs] if isinstance(configs, Config) else list(configs)
    names = "+".join(method_of(config).name for config in configs)
    manifest = artifact.read_manifest(base.path)
    facts = {
        "base": manifest.to_dict(),
        "configs": [config.to_dict() for config in configs],
        "data": data.fingerprint if data else "",
        "versions": [torch.__version__, timm.__version__],
        "threads": torch.get_num_threads(),
        "device": training.pick_device("auto").type,
        "sources": _sources(path for path in _package() if not SHOWING.match(path.as_posix())),
    }
    name = f"{_plain(manifest.recipe.architecture.name)}-{_plain(data.name if data else 'no-data')}-{_plain(names)}"

    folder = paths.model_cache() / f"{name}-{_digest(facts)}"
    return _kept(folder, lambda _: compress(base.model, configs, data))


def _kept(folder: Path, make: Callable[[Path], nn.Module]) -> Made:
    """What `folder` holds, after making it if need be; two processes that ask for one thing make it once."""
    if found := _found(folder):
        return found
    paths.writable_folder(folder, "model cache")
    with FileLock(folder / "lock"):
        if found := _found(folder):
            return found
        model = make(folder)
        artifact.save(model, folder / "model")
        part = folder / f"{HISTORY}.part"
        part.write_text(json.dumps({key: getattr(model, key, []) for key in ("history", "search")}))
        part.rename(folder / HISTORY)
        (folder / "training.pt").unlink(missing_ok=True)
    return _read(folder)


def _found(folder: Path) -> Made | None:
    """What a finished folder holds; None if it is not finished, or damaged, so that it is to be made anew."""
    if not (folder / HISTORY).is_file():
        return None
    try:
        return _read(folder)
    except (InputError, ValueError, TypeError) as error:
        print(f"the model in the cache {folder.name} cannot be used and is made again ({str(error)[:160]})")
        (folder / HISTORY).unlink(missing_ok=True)
        return None


def _read(folder: Path) -> Made:
    return Made(artifact.load(folder / "model"), folder / "model", **json.loads((folder / HISTORY).read_text()))


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


def _plain(text: str) -> str:
    """`text` with everything but letters, digits, '.', '_' and '-' turned into '-', for the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "unnamed"


def _key(recipe: Recipe, device: str) -> str:
    modules = (vit, training, train_config, batches, data_module, image_sources)
    facts = {
        "recipe": recipe.to_dict(),
        "versions": [torch.__version__, timm.__version__],
        "threads": torch.get_num_threads(),
        "device": training.pick_device(device).type,
        "sources": _sources(Path(module.__file__) for module in modules),
    }
    return _digest(facts)


def _digest(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _package() -> list[Path]:
    return sorted(Path(__file__).parent.rglob("*.py"))


def _sources(files: Iterable[Path]) -> str:
    """A hash of what the files do: comments, docstrings and layout do not change it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(_code(file))
    return digest.hexdigest()


@functools.cache  # a process runs the code that it began with
def _code(file: Path) -> bytes:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()
