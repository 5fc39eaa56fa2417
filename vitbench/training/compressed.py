"""What compressing a model gives: the model, and how its training and its search went."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Compressed:
    """A compressed `model`.

    Attributes:
        history: of the trainings, in order, one entry an epoch (see `training.train`); empty without one.
        search: the policies that were scored for it; empty without a search.
    """

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
