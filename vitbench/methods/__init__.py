"""The compression methods: one file each, found by themselves, all with one signature.

A method is a config class and a handler `(model, config, data) -> model`, tied together by `register`.
"""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vitbench.configs import Config
from vitbench.data import ImageData
from vitbench.errors import InputError, one_of
from vitbench.recipe import Step

Saves = Literal["bytes", "macs"]
Handler = Callable[[nn.Module, Config, ImageData | None], nn.Module]
Ladder = Callable[[nn.Module], list[dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    """A registered method; see `register`."""

    name: str
    config: type[Config]
    handler: Handler
    identity: Config
    saves: Saves
    ladder: Ladder | None = None


METHODS: dict[str, Method] = {}


def register(
    config: type[Config], *, identity: Config, saves: Saves = "bytes", ladder: Ladder | None = None
) -> Callable[[Handler], Handler]:
    """Register a handler under its function's name.

    Args:
        config: the class of its configs; all fields have defaults, which are the method's usual setting.
        identity: the config at which nothing is compressed (tests hold every method to it).
        saves: what the usual setting has less of, a file's bytes or multiply-accumulates (likewise).
        ladder: for a model, settings from the one that saves least to the one that saves most; a budget picks one of them
            (`budget_fit`).
    """

    def add(handler: Handler) -> Handler:
        METHODS[handler.__name__] = Method(handler.__name__, config, handler, identity, saves, ladder)
        return handler

    return add


def method_of(config: Config) -> Method:
    """The method that a config belongs to."""
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    kinds = ", ".join(method.config.__name__ for method in METHODS.values())
    raise InputError(f"{type(config).__name__} is not a method's config; allowed: {kinds}")


def make_config(name: str, values: dict[str, Any] | None = None) -> Config:
    """The config of the method `name` with `values` in place of its defaults, inside nested configs too."""
    config = METHODS[one_of("method", name, METHODS)].config
    defaults, values = config().to_dict(), dict(values or {})
    for key, given in values.items():
        if isinstance(given, dict) and isinstance(defaults.get(key), dict):
            values[key] = {**defaults[key], **given}
    return config(**values)


def compress(model: nn.Module, configs: Config | Iterable[Config], data: ImageData | None = None) -> nn.Module:
    """Apply one method, or several in order, to a copy of `model`.

    Args:
        model: a Vision Transformer made by vitbench; it is not changed.
        configs: one method's config, or a list of them (a combination).
        data: images for the methods that calibrate or train; never its test split.

    Returns:
        The compressed model; one that a method trained has a `history`, as `training.train` returns it.
    """
    result = copy.deepcopy(model)
    for config in [configs] if isinstance(configs, Config) else configs:
        method = method_of(config)
        result = method.handler(result, config, data)
        steps = (*result.recipe.methods, Step(method=method.name, config=config.to_dict()))
        result.recipe = result.recipe.having(methods=steps)
    return result.requires_grad_(False).eval()


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
