"""Entropy coding: the file's tensors are coded without loss (DEFLATE), so the model is the same and its file is smaller.

The model in memory, its outputs and its multiply-accumulates stay as they are; loading takes the time to decode. It goes
last, after the codes: `[WeightOnly(bits=4), Deflate()]`.
"""

from pydantic import Field
from torch import nn

from vitbench.base.configs import Config
from vitbench.data.splits import ImageData
from vitbench.methods.method import register


class Deflate(Config):
    """How hard to look for a short code: zlib's level, 1 to 9; 0 leaves the file as it is."""

    level: int = Field(default=9, ge=0, le=9)


@register(Deflate, identity=Deflate(level=0))
def deflate(model: nn.Module, config: Deflate, data: ImageData | None) -> nn.Module:
    """Code the tensors of the model's file. `data` is not used."""
    model.recipe = model.recipe.replace(deflate=config.level)
    return model
