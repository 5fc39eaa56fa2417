"""What a method is: a config class and a handler `(model, config, data) -> model`, which `register` joins under one name.

A handler whose training or search has a history returns `Compressed`, the model with that history.

`METHODS` is complete once `vitbench.methods.registry` is imported, because that imports every file of the folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData
from vitbench.training.compressed import Compressed

Reduces = Literal["bytes", "macs"]


# each handler takes its own config class
Handler = Callable[[nn.Module, Any, ImageData | None], nn.Module | Compressed]


OperatingPoints = Callable[[nn.Module], list[dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    """A registered method; see `register`."""

    name: str
    config: type[Config]
    handler: Handler
    identity: Config
    reduces: Reduces
    operating_points: OperatingPoints | None = None


METHODS: dict[str, Method] = {}


def register(
    config: type[Config],
    *,
    identity: Config,
    reduces: Reduces = "bytes",
    operating_points: OperatingPoints | None = None,
) -> Callable[[Handler], Handler]:
    """Register a handler under its function's name.

    Args:
        config: the method's config class. All its fields have defaults, which are the method's default setting.
        identity: the config that compresses nothing. A test checks this for every method.
        reduces: what the default setting reduces: the bytes of the file, or the multiply-accumulates. A test checks this
            for every method.
        operating_points: a function that lists settings for a model, in the order of how much they reduce, least first.
            A budget picks one of them (`vitbench.run.combinations.fit_budget`).
    """

    def add(handler: Handler) -> Handler:
        METHODS[handler.__name__] = Method(handler.__name__, config, handler, identity, reduces, operating_points)
        return handler

    return add
