"""A model on disk: a folder with `model.safetensors` and `recipe.json`. Neither can hold code that runs."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vitbench.base.configs import Config, digest
from vitbench.base.errors import InputError, one_of
from vitbench.base.files import FolderKind, atomic_folder, write_tensors, write_text
from vitbench.model import vit
from vitbench.model.deflate import deflate, inflate
from vitbench.model.layers import RUNTIME_LAYERS
from vitbench.model.recipe import Recipe

WEIGHTS, RECIPE, SHARED = "model.safetensors", "recipe.json", "shared."
MAX_EXPANSION = 200  # of a file's coded tensors; weights that were trained expand less than twofold
MODEL_FOLDER = FolderKind("a saved model", RECIPE, frozenset({"recipe", "sha256"}), lambda _: [WEIGHTS])


class Manifest(Config):
    """The content of recipe.json: the recipe, the SHA-256 of the weights file, and `check`, a hash of these two.

    Files of early versions have no `check`.
    """

    recipe: Recipe
    sha256: str
    check: str = ""


def recipe_of(model: nn.Module) -> Recipe:
    """The model's recipe, with its present runtime layers filled in.

    Raises:
        InputError: the model was not made by vitbench, so it has no recipe to rebuild it from.
    """
    if not isinstance(getattr(model, "recipe", None), Recipe):
        raise InputError(
            f"this {type(model).__name__} has no recipe to rebuild it from; "
            "make the model with vitbench.create_model, vitbench.baseline or vitbench.load"
        )
    specs = {
        name: {"layer": type(module).__name__, **module.spec()}
        for name, module in model.named_modules()
        if type(module).__name__ in RUNTIME_LAYERS
    }
    shared = {name.removeprefix(SHARED): spec for name, spec in specs.items() if name.startswith(SHARED)}
    layers = {name: spec for name, spec in specs.items() if not name.startswith(SHARED)}
    return model.recipe.replace(layers=layers, shared=shared)


def save(model: nn.Module, path: str | Path) -> Path:
    """Write the model to the folder `path`, atomically. The same model gives the same bytes.

    Raises:
        InputError: the folder holds other files than a saved model's, or it cannot be written.
    """
    path, recipe = Path(path).expanduser(), recipe_of(model)
    storage_dtype = getattr(torch, recipe.storage)
    tensors = {
        key: (value.to(storage_dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in model.state_dict().items()
    }
    if recipe.deflate:
        tensors = {key: deflate(value, recipe.deflate) for key, value in tensors.items()}
    try:
        with atomic_folder(path, MODEL_FOLDER) as folder:
            write_tensors(folder / WEIGHTS, tensors)
            content = Manifest(recipe=recipe, sha256=_sha256(folder / WEIGHTS)).to_dict()
            content["check"] = _check(content)
            write_text(folder / RECIPE, json.dumps(content, sort_keys=True, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"the model could not be written to {str(path)!r} ({error.strerror}); free some space or choose another folder"
        ) from error
    return path


def load(path: str | Path) -> nn.Module:
    """Read a model that `save` wrote. Nothing in the folder is executed; sizes, names and checksums are checked.

    Raises:
        InputError: `path` is no saved model, a file is damaged, or the tensors do not fit the recipe.
    """
    path = Path(path).expanduser()
    manifest = read_manifest(path)
    recipe = manifest.recipe
    if _sha256(path / WEIGHTS) != manifest.sha256:
        raise InputError(
            f"{str(path / WEIGHTS)!r} is damaged (its checksum is not the recipe's); make or copy it again"
        )
    model = _build_model(path, recipe)
    try:
        tensors = load_file(path / WEIGHTS)
        if recipe.deflate:
            tensors = _inflated(tensors, model, getattr(torch, recipe.storage))
        model.load_state_dict(
            {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()},
            assign=True,
        )
    except (RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tensors in {str(path)!r} do not fit its recipe: {reason}") from None
    model.recipe = recipe
    return model.requires_grad_(False).eval()


def _inflated(
    tensors: dict[str, torch.Tensor], model: nn.Module, storage_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The decoded tensors, of the shapes and types of `model`'s; tensors that it does not know stay as they are.

    Raises:
        ValueError: a damaged tensor, or a recipe that claims far more bytes than such a file holds.
    """
    expected = model.state_dict()
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    stored = sum(tensor.numel() for tensor in tensors.values())
    if claimed > MAX_EXPANSION * stored:  # zeros take a thousandth, so a small file could fill the memory
        raise ValueError(f"the recipe claims {claimed:,} bytes of tensors, and the file holds {stored:,} coded ones")
    return {
        key: inflate(
            value, expected[key].shape, storage_dtype if expected[key].is_floating_point() else expected[key].dtype
        )
        if key in expected
        else value
        for key, value in tensors.items()
    }


def _build_model(path: Path, recipe: Recipe) -> nn.Module:
    """Build the model that a recipe describes, on the meta device: timm's structure with runtime layers."""
    model = vit.meta_model(recipe.architecture)
    for name in recipe.shared:
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise InputError(f"the recipe of {str(path)!r} has a shared module {name!r}; allowed are plain names")
    if recipe.shared:
        model.shared = nn.ModuleDict({name: _empty_layer(path, spec) for name, spec in recipe.shared.items()})
    for name, spec in sorted(recipe.layers.items()):  # sorted: a layer comes before the layers inside it
        one_of("layer in the recipe", name, dict(model.named_modules()))
        layer = _empty_layer(path, spec)
        vit.replace_module(model, name, layer)
        if hasattr(layer, "bind_shared"):
            one_of("shared module in the recipe", layer.shared, recipe.shared)
            layer.bind_shared(model.shared)
    return model


def _empty_layer(path: Path, spec: dict[str, Any]) -> nn.Module:
    layer = RUNTIME_LAYERS[one_of("runtime layer", spec.get("layer"), RUNTIME_LAYERS)]
    try:
        with torch.device("meta"):
            return layer(**{key: value for key, value in spec.items() if key != "layer"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the recipe of {str(path)!r} does not fit {layer.__name__} ({error})") from None


def read_manifest(path: str | Path) -> Manifest:
    """Read a saved model's recipe and checksums, without its weights.

    Raises:
        InputError: `path` is no saved model, or recipe.json is damaged.
    """
    path = Path(path).expanduser()
    if not (path / RECIPE).is_file() or not (path / WEIGHTS).is_file():
        raise InputError(f"{str(path)!r} is not a saved model; give a folder with {WEIGHTS} and {RECIPE}")
    try:
        content = json.loads((path / RECIPE).read_text(encoding="utf-8"))
        manifest = Manifest(**content)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{str(path / RECIPE)!r} is damaged ({error}); make or copy the model again") from None
    if manifest.check and manifest.check != _check(content):
        raise InputError(f"{str(path / RECIPE)!r} is damaged (its checksum is another); make or copy the model again")
    return manifest


def _check(content: dict[str, Any]) -> str:
    """A hash of recipe.json's content without the field `check`."""
    checked_content = {key: value for key, value in content.items() if key != "check"}
    return digest(checked_content)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the model's tensors in memory."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """16 hex digits of all that decides a model's outputs: its recipe, its modules with their settings, its tensors.

    Models with the same tensors but with other attention, fewer tokens or other wrappers have different digests.
    """
    modules = [
        [name, f"{type(module).__module__}.{type(module).__qualname__}", _module_settings(module)]
        for name, module in model.named_modules()
    ]
    return digest([model.recipe.to_dict(), modules, weights_hash(model)])


def _module_settings(module: nn.Module) -> list[Any]:
    """The settings that a module shows, without memory addresses, which differ in each process."""
    return [re.sub(r"0x[0-9a-f]+", "", module.extra_repr()), module.spec() if hasattr(module, "spec") else None]


def size_on_disk(path: str | Path) -> int:
    """Bytes of the model's files."""
    return sum((Path(path) / name).stat().st_size for name in (WEIGHTS, RECIPE))


def bytes_by_part(path: str | Path) -> dict[str, int]:
    """Bytes on disk of each part of the model; their sum is `size_on_disk`."""
    part_bytes = dict.fromkeys(
        ("block weights", "shared factors", "patch embedding and head", "norms, biases, embeddings"), 0
    )
    for key, tensor in load_file(Path(path) / WEIGHTS).items():
        parent, _, last = key.rpartition(".")
        if key.startswith(SHARED):
            part = "shared factors"
        elif parent in vit.EMBEDDING_AND_HEADS and last != "bias":
            part = "patch embedding and head"
        elif vit.layer_type(parent) and last != "bias":
            part = "block weights"
        else:
            part = "norms, biases, embeddings"
        part_bytes[part] += tensor.numel() * tensor.element_size()
    return {**part_bytes, "names and recipe": size_on_disk(path) - sum(part_bytes.values())}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
