"""Moments of linear layers' inputs and gradients, from one pass over the calibration images.

Sums are added batch by batch, so memory does not grow with the number of images. For DeiT-B's twelve blocks the inputs'
moments (float64) take 1.1 GB, five sixths of it for fc2, and the gradients' (float32) 0.8 GB.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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

CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Moments:
    """Moments of one linear layer on the calibration images, means over all tokens, float64.

    Attributes:
        tokens: the number of tokens.
        second_moment: C = E[x x^T] of the inputs, (in, in).
        mean: E[x], (in,).
        mean_abs: E[|x|], (in,).
        gradient: Gamma = E[g g^T] of the gradient g of the loss at the layer's outputs, (out, out) in float32, a sum
            over the tokens of an image and a mean over images; empty without `gradients`. The loss is the cross-entropy
            with a class drawn from the model's own output probabilities: no label is used.
    """

    tokens: int
    second_moment: Tensor
    mean: Tensor
    mean_abs: Tensor
    gradient: Tensor

    @property
    def sensitivity(self) -> float:
        """The mean of Gamma's diagonal: the mean cost of one unit of squared error at an output of this layer."""
        return float(self.gradient.diagonal().double().mean())

    def covariance(self, shrinkage: float = 0.0) -> Tensor:
        """The covariance E[x x^T] - E[x] E[x]^T, shrunk towards a multiple of the identity by `shrinkage` in [0, 1]."""
        return shrink_towards_identity(self.second_moment - torch.outer(self.mean, self.mean), shrinkage)

    def output_error_covariance(self, layer: nn.Module, shrinkage: float = 0.0) -> Tensor:
        """The moments with which the layer's output errors are measured, shrunk like `covariance`.

        They are about the mean if the layer has a bias, which takes the mean error, and else about 0.
        """
        return (
            shrink_towards_identity(self.second_moment, shrinkage) if layer.bias is None else self.covariance(shrinkage)
        )


def shrink_towards_identity(second: Tensor, shrinkage: float) -> Tensor:
    """(1 - s) C + s tr(C) / n I, for C (n, n) and s in [0, 1]."""
    size = len(second)
    return (1 - shrinkage) * second + shrinkage * second.trace() / size * torch.eye(size, dtype=second.dtype)


@contextmanager
def forward_hooks(layers: dict[str, nn.Module], on_call: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While open, call `on_call(name, x, y)` with the input and output of every call of the layers."""

    def hook(name: str) -> Callable:
        return lambda _, x, y: on_call(name, x[0], y)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect_moments(
    model: nn.Module, layers: dict[str, nn.Module], data: ImageData, *, gradients: bool = False, seed: int = 0
) -> dict[str, Moments]:
    """The moments of each layer on the calibration images, from the cache if they are there.

    Args:
        model: a ViT with these layers; it is not changed.
        layers: layer name -> linear layer.
        gradients: whether to fill `gradient`, which needs a backward pass.
        seed: of the classes drawn for the gradients.

    Raises:
        InputError: there is no calibration set, or inputs are not finite.
    """
    split = data.require_split("calibration")

    def compute() -> dict[str, Tensor]:
        by_layer = _MomentSums(model, layers, gradients, seed).accumulate(split)
        return {
            f"{name}:{field}": torch.as_tensor(value)
            for name, moments in by_layer.items()
            for field, value in vars(moments).items()
        }

    key_inputs: dict[str, Any] = {
        "model": artifact.model_digest(model),
        "data": data.fingerprint,
        "layers": sorted(layers),
    }
    key_inputs |= {"gradients": gradients, "seed": seed}
    tensors = Store("moments").tensors(work_key("calibration", key_inputs), compute)
    fields = ("second_moment", "mean", "mean_abs", "gradient")
    return {
        name: Moments(int(tensors[f"{name}:tokens"]), **{field: tensors[f"{name}:{field}"] for field in fields})
        for name in layers
    }


class _MomentSums:
    """Running sums over tokens."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], gradients: bool, seed: int):
        self.model, self.layers, self.gradients, self.tokens = model, layers, gradients, dict.fromkeys(layers, 0)
        self.generator = torch.Generator().manual_seed(seed)
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        self.sums = {
            name: {
                "second_moment": zeros(layer.in_features, layer.in_features),
                "mean": zeros(layer.in_features),
                "mean_abs": zeros(layer.in_features),
                "gradient": torch.zeros(*[layer.out_features if gradients else 0] * 2),
            }
            for name, layer in layers.items()
        }

    def accumulate(self, split: Split) -> dict[str, Moments]:
        batches = eval_batches(split, self.model.recipe.preprocess, CALIBRATION_BATCH)
        bar = progress.progress_bar(
            batches, "moments of the layers' inputs", total=math.ceil(len(split) / CALIBRATION_BATCH), unit="batch"
        )
        set_fused_attention(self.model, not self.gradients)  # the fused kernel's backward pass is the slower one here
        with torch.set_grad_enabled(self.gradients), forward_hooks(self.layers, self._on_call):
            for x, _ in bar:
                logits = self.model(x.requires_grad_(self.gradients))
                if self.gradients:
                    sampled_class = torch.multinomial(logits.detach().softmax(1), 1, generator=self.generator).flatten()
                    F.cross_entropy(logits, sampled_class, reduction="sum").backward(inputs=[x])
        set_fused_attention(self.model, True)
        return {name: self._moments(name, len(split)) for name in self.layers}

    def _on_call(self, name: str, x: Tensor, y: Tensor) -> None:
        sums = self.sums[name]
        x = x.detach().flatten(0, -2).double()  # float32 products would lose small eigenvalues
        self.tokens[name] += len(x)
        sums["second_moment"] += x.T @ x
        sums["mean"] += x.sum(0)
        sums["mean_abs"] += x.abs().sum(0)
        if y.requires_grad:
            y.register_hook(lambda gradient: self._add(name, gradient))

    def _add(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.flatten(0, -2)
        self.sums[name]["gradient"] += gradient.T @ gradient

    def _moments(self, name: str, images: int) -> Moments:
        sums, tokens = self.sums.pop(name), self.tokens[name]
        inputs = {key: sums[key].div_(tokens) for key in ("second_moment", "mean", "mean_abs")}
        if not all(torch.isfinite(value).all() for value in inputs.values()):
            raise InputError(
                f"the inputs of {name} are not finite on the calibration images; check the model's weights and the images"
            )
        return Moments(tokens, **inputs, gradient=sums["gradient"] / images)
