"""Ranges of activations: what passes through layers on calibration images, and which part of it the codes should cover."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitbench import progress
from vitbench.batches import eval_batches
from vitbench.data import Split
from vitbench.moments import BATCH, watching

BINS, SHARES = 2048, 25  # of the histograms; shares of a range's ends that are tried


@dataclass
class Channels:
    """The least and the largest value of each of a layer's inputs, (in,)."""

    low: Tensor
    high: Tensor


@torch.inference_mode()
def channels(model: nn.Module, layers: Mapping[str, nn.Module], split: Split) -> dict[str, Channels]:
    """The extremes of each layer's inputs on the images of `split`, channel by channel."""
    found: dict[str, Channels] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        x = x.flatten(0, -2)
        low, high = x.amin(0), x.amax(0)  # several times faster than aminmax along a dimension
        if name in found:
            low, high = torch.minimum(low, found[name].low), torch.maximum(high, found[name].high)
        found[name] = Channels(low, high)

    watch(model, layers, split, see, "ranges of inputs")
    return found


def ranges(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    seen: Mapping[str, Channels],
    split: Split,
    rule: Literal["mse", "minmax"] = "mse",
    bits: int = 8,
) -> dict[str, tuple[float, float]]:
    """The range of each layer's inputs that the 2^bits codes cover: of least squared error, or all; 0 is always in it."""
    whole = {name: (min(0.0, float(c.low.min())), max(1e-6, float(c.high.max()))) for name, c in seen.items()}
    if rule == "minmax":
        return whole
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in layers}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        counts[name] += torch.histc(x.float(), BINS, *whole[name]).double()

    watch(model, layers, split, see, "histograms of inputs")
    return {name: least_error_range(counts[name], *whole[name], bits) for name in layers}


def least_error_range(counts: Tensor, low: float, high: float, bits: int = 8) -> tuple[float, float]:
    """The part of [low, high], which holds 0, whose 2^bits values round a histogram with the least squared error.

    Args:
        counts: of equal bins over [low, high].
    """
    most, width = 2**bits - 1, (high - low) / len(counts)
    values = low + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5)
    shares = torch.linspace(0.1, 1, SHARES, dtype=torch.float64)
    lows, highs = (end.flatten()[:, None] for end in torch.meshgrid(low * shares, high * shares, indexing="ij"))
    steps = (highs - lows) / most
    zeros = (-lows / steps).round()
    rounded = ((values / steps).round().clamp(-zeros, most - zeros)) * steps
    best = int(((rounded - values).square() * counts).sum(1).argmin())
    return float(lows[best]), float(highs[best])


@torch.inference_mode()
def watch(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    split: Split,
    see: Callable[[str, Tensor, Tensor], None],
    title: str,
) -> None:
    """Let `see` have the name, the input and the output of every call of the layers on the images of `split`."""
    batches = eval_batches(split, model.recipe.preprocess, BATCH)
    with watching(dict(layers), see):
        for x, _ in progress.bar(batches, title, total=-(-len(split) // BATCH), unit="batch"):
            model(x)
