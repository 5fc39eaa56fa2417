"""The registry of compression methods: imports every file of this folder, makes configs, and compresses models."""

import copy
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from vitbench.base.configs import Config
from vitbench.base.errors import InputError, one_of
from vitbench.data.splits import ImageData, WatchedData
from vitbench.methods.method import METHODS, Method
from vitbench.model.artifact import model_digest
from vitbench.model.recipe import Step
from vitbench.training.compressed import Compressed


def method_of(config: Config) -> Method:
    """The method of a config, by the config's class."""
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    kinds = ", ".join(method.config.__name__ for method in METHODS.values())
    raise InputError(f"{type(config).__name__} is not a method's config; allowed: {kinds}")


def make_config(name: str, values: dict[str, Any] | None = None) -> Config:
    """The config of the method `name`, with `values` in place of its defaults, also inside nested configs."""
    config = METHODS[one_of("method", name, METHODS)].config
    defaults, values = config().to_dict(), dict(values or {})
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            values[key] = {**defaults[key], **value}
    return config(**values)


def compress(model: nn.Module, configs: Config | Iterable[Config], data: ImageData | None = None) -> Compressed:
    """Apply one method, or several in order, to a copy of `model`.

    Args:
        model: a Vision Transformer made by vitbench; it is not changed.
        configs: one method's config, or a list of them (a combination).
        data: images for the methods that calibrate or train. The test split is never used.

    Returns:
        The compressed model with the history of its trainings and its search.

    Raises:
        InputError: a method that does not fit the model, lacks images, or changes nothing after the ones before it.
    """
    model = copy.deepcopy(model)
    history: list[dict[str, float]] = []
    searched: list[dict[str, Any]] = []
    for config in [configs] if isinstance(configs, Config) else configs:
        method = method_of(config)
        watched = WatchedData(data) if data else None
        before = model_digest(model) if model.recipe.methods and config != method.identity else ""
        result = method.handler(model, config, watched)
        if isinstance(result, nn.Module):
            result = Compressed(result)
        model, history, searched = result.model, history + result.history, searched + result.search
        if before and model_digest(model) == before:
            raise InputError(
                f"{method.name} after {model.recipe.method} changes nothing, since it finds nothing left that it could change; "
                "leave it out, or apply it first"
            )
        images = watched.identity() if watched and watched.was_used else {}
        steps = (*model.recipe.methods, Step(method=method.name, config=config.to_dict(), images=images))
        model.recipe = model.recipe.replace(methods=steps)
    return Compressed(model.requires_grad_(False).eval(), history, searched)


for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    importlib.import_module(f"vitbench.methods.{_module.name}")
_by_file = sorted(METHODS.items(), key=lambda item: item[1].handler.__module__)  # independent of the order of imports
METHODS.clear()
METHODS.update(_by_file)
