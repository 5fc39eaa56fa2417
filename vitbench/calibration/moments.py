"""Moments of what passes through linear layers, collected in one pass over the calibration images.

Sums are added batch by batch, so memory does not grow with the images. For DeiT-B's twelve blocks the inputs' moments
(float64) take 1.1 GB, all but a sixth of it at fc2, and the gradients' (float32) 0.8 GB.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.base.store import Store, work_key
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData, Split
from vitbench.model import artifact
from vitbench.model.vit import set_fused_attention

BATCH = 16


@dataclass(frozen=True)
class Moments:
    """What one linear layer sees on the calibration images, as means over `tokens` tokens, float64.

    Attributes:
        tokens: how many tokens were seen.
        second: C = E[x x^T] of the inputs, (in, in).
        mean: E[x], (in,).
        magnitude: E[|x|], (in,).
        gradient: Gamma = E[g g^T] of the gradient g of the loss at the layer's outputs, (out, out) in float32, a sum
            over the tokens of an image and a mean over images; empty where gradients were not asked for. The loss is
            the cross-entropy with a class drawn from the model's own answer: no label is used.
    """

    tokens: int
    second: Tensor
    mean: Tensor
    magnitude: Tensor
    gradient: Tensor

    @property
    def sensitivity(self) -> float:
        """The mean of Gamma's diagonal: what one unit of squared error costs at an output of this layer, on average."""
        return float(self.gradient.diagonal().double().mean())

    def centred(self, shrinkage: float = 0.0) -> Tensor:
        """The covariance E[x x^T] - E[x] E[x]^T, drawn towards a multiple of the identity by `shrinkage` in [0, 1]."""
        return shrunk(self.second - torch.outer(self.mean, self.mean), shrinkage)

    def unbiased(self, layer: nn.Module, shrinkage: float = 0.0) -> Tensor:
        """The moments that count errors of this layer's outputs: about the mean where it has a bias, which takes the
        mean error, else about 0; drawn towards a multiple of the identity likewise.
        """
        return shrunk(self.second, shrinkage) if layer.bias is None else self.centred(shrinkage)


def shrunk(second: Tensor, shrinkage: float) -> Tensor:
    """(1 - s) C + s tr(C) / n I."""
    size = len(second)
    return (1 - shrinkage) * second + shrinkage * second.trace() / size * torch.eye(size, dtype=second.dtype)


@contextmanager
def watching(layers: dict[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While open, `see(name, x, y)` is told the input and the output of every call of the layers."""

    def hook(name: str) -> Callable:
        return lambda _, x, y: see(name, x[0], y)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect(
    model: nn.Module, layers: dict[str, nn.Module], data: ImageData, *, gradients: bool = False, seed: int = 0
) -> dict[str, Moments]:
    """The moments at each of `layers` on the calibration images, taken from the cache where this was done before.

    Args:
        model: a ViT that holds the layers; it is not changed.
        layers: layer name -> linear layer.
        gradients: whether to fill `gradient`, which takes a backward pass.
        seed: of the classes drawn for the gradients.
    """
    split = data.require_split("calibration")

    def make() -> dict[str, Tensor]:
        found = _Sums(model, layers, gradients, seed).over(split)
        return {
            f"{name}:{field}": torch.as_tensor(value)
            for name, moments in found.items()
            for field, value in vars(moments).items()
        }

    facts = {"model": artifact.model_digest(model), "data": data.fingerprint, "layers": sorted(layers)}
    facts |= {"gradients": gradients, "seed": seed}
    tensors = Store("moments").tensors(work_key("calibration", facts), make)
    fields = ("second", "mean", "magnitude", "gradient")
    return {
        name: Moments(int(tensors[f"{name}:tokens"]), **{field: tensors[f"{name}:{field}"] for field in fields})
        for name in layers
    }


class _Sums:
    """Running sums over tokens."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], gradients: bool, seed: int):
        self.model, self.layers, self.gradients, self.tokens = model, layers, gradients, dict.fromkeys(layers, 0)
        self.generator = torch.Generator().manual_seed(seed)
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        self.sums = {
            name: {
                "second": zeros(layer.in_features, layer.in_features),
                "mean": zeros(layer.in_features),
                "magnitude": zeros(layer.in_features),
                "gradient": torch.zeros(*[layer.out_features if gradients else 0] * 2),
            }
            for name, layer in layers.items()
        }

    def over(self, split: Split) -> dict[str, Moments]:
        batches = eval_batches(split, self.model.recipe.preprocess, BATCH)
        bar = progress.progress_bar(
            batches, "moments of the layers' inputs", total=math.ceil(len(split) / BATCH), unit="batch"
        )
        set_fused_attention(self.model, not self.gradients)  # the fused kernel's backward pass is the slower one here
        with torch.set_grad_enabled(self.gradients), watching(self.layers, self._see):
            for x, _ in bar:
                logits = self.model(x.requires_grad_(self.gradients))
                if self.gradients:
                    answer = torch.multinomial(logits.detach().softmax(1), 1, generator=self.generator).flatten()
                    F.cross_entropy(logits, answer, reduction="sum").backward(inputs=[x])
        set_fused_attention(self.model, True)
        return {name: self._moments(name, len(split)) for name in self.layers}

    def _see(self, name: str, x: Tensor, y: Tensor) -> None:
        sums = self.sums[name]
        x = x.detach().flatten(0, -2).double()  # products in float32 would blur small eigenvalues
        self.tokens[name] += len(x)
        sums["second"] += x.T @ x
        sums["mean"] += x.sum(0)
        sums["magnitude"] += x.abs().sum(0)
        if y.requires_grad:
            y.register_hook(lambda gradient: self._add(name, gradient))

    def _add(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.flatten(0, -2)
        self.sums[name]["gradient"] += gradient.T @ gradient

    def _moments(self, name: str, images: int) -> Moments:
        sums, tokens = self.sums.pop(name), self.tokens[name]
        inputs = {key: sums[key].div_(tokens) for key in ("second", "mean", "magnitude")}
        if not all(torch.isfinite(value).all() for value in inputs.values()):
            raise InputError(
                f"the inputs of {name} are not finite on the calibration images; check the model's weights and the images"
            )
        return Moments(tokens, **inputs, gradient=sums["gradient"] / images)
