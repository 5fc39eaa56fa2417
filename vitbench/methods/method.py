"""What a method is: a config class and a handler `(model, config, data) -> model`, tied together by `register`.

`METHODS` is whole once `vitbench.methods.registry` is imported, which imports every file of the folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData

Saves = Literal["bytes", "macs"]


Handler = Callable[[nn.Module, Any, ImageData | None], nn.Module]  # each handler takes its own config class


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
            (`vitbench.run.combinations.fit_budget`).
    """

    def add(handler: Handler) -> Handler:
        METHODS[handler.__name__] = Method(handler.__name__, config, handler, identity, saves, ladder)
        return handler

    return add
