"""How far the weights of a compressed model are from those it was made from."""

from collections.abc import Iterator
from pathlib import Path

import torch

from vitbench import artifact, vit
from vitbench.layers.registry import matrix
from vitbench.measurement.value import Value
from vitbench.recipe import Recipe


def coded_layers(recipe: Recipe) -> list[str]:
    """Names of the blocks' linear layers that something stands in for, block by block."""
    return [name for name in recipe.layers if vit.layer_type(name) == name.rpartition(".")[-1]]


@torch.inference_mode()
def weight_error(path: Path, versus: Path, names: list[str]) -> Iterator[Value]:
    """||W' - W|| / ||W|| over the named layers together; the samples are those of each layer."""
    own, other = artifact.load(path), artifact.load(versus)
    errors, norms = [], []
    for name in names:
        new, old = matrix(own.get_submodule(name)), matrix(other.get_submodule(name))
        errors.append(float((new - old).square().sum()))
        norms.append(float(old.square().sum()))
    each = [(error / norm) ** 0.5 if norm else 0.0 for error, norm in zip(errors, norms, strict=True)]
    overall = (sum(errors) / sum(norms)) ** 0.5
    yield Value("weight_error", overall, "measured: Frobenius norms of the loaded weights", samples=each)
