"""Uniform quantizers: steps of least squared error, learned steps (LSQ), and ranges of activations on calibration images.

A code is a whole number q in [-2^(b-1), 2^(b-1) - 1]; it stands for s (q - z), with step s and zero point z.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.calibration.moments import BATCH, watching
from vitbench.data.batches import eval_batches
from vitbench.data.splits import Split

CANDIDATES = 64  # steps tried for each row by `best_step`


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest signed code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def to_codes(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest codes, whole numbers in x's type; `step` is broadcast to x."""
    return (x / step).round().clamp(*code_range(bits))


def best_step(
    x: Tensor, bits: int, dim: int, importance: Tensor | None = None, signs: tuple[int, ...] = (1,)
) -> Tensor:
    """The step with the least squared rounding error of each slice, among `CANDIDATES` shares of its largest value.

    Args:
        x: (rows, columns).
        dim: 1 gives every row a step (rows, 1), 0 every column one (1, columns).
        importance: what a squared error counts, like x or broadcast to it; None: all count the same.
        signs: of the steps tried. There is one code more below zero than above, so with a negative step the longer side
            of a slice's values may be the positive one; it matters at 2 and 3 bits.
    """
    high = code_range(bits)[1]
    top = x.abs().amax(dim=dim, keepdim=True).clamp(min=1e-8)
    best, least = top / high, torch.full_like(top, float("inf"))
    for share in torch.linspace(0.2, 1.1, CANDIDATES).tolist():
        for sign in signs:
            step = sign * share * top / high
            error = (to_codes(x, step, bits) * step - x).square()
            error = (error if importance is None else error * importance).sum(dim=dim, keepdim=True)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


class LearnedStep(nn.Module):
    """A quantizer of a matrix whose steps, and zero points where it has some, are learned (LSQ, Esser et al. 2020).

    Forward, with s the steps and z the zero points: x -> s (round(clamp(x / s + z, lowest, highest)) - z), where the
    gradient passes through the rounding as if it were not there, and that of s is scaled by 1 / sqrt(count highest).

    Args:
        size: how many slices have a step of their own.
        dim: 1 if the slices are rows, 0 if they are columns.
        zero_point: whether a zero point is learned as well.
    """

    def __init__(self, size: int, bits: int, dim: int, zero_point: bool = False):
        super().__init__()
        self.bits, self.dim = bits, dim
        shape = (size, 1) if dim == 1 else (1, size)
        self.step = nn.Parameter(torch.ones(shape))
        self.zero = nn.Parameter(torch.zeros(shape)) if zero_point else None

    @torch.no_grad()
    def start(self, x: Tensor, rule: str = "mse") -> None:
        """Set the steps from the matrix to be quantized: "mse" by `best_step`; "lsq" by 2 mean|x| / sqrt(highest).

        "lsq" also starts the zero points as the official UCT code does, at a tenth of (min x - s lowest).
        """
        low, high = code_range(self.bits)
        if rule == "mse":
            self.step.copy_(best_step(x, self.bits, self.dim))
            return
        self.step.copy_((2 * x.abs().mean(dim=self.dim, keepdim=True) / high**0.5).clamp(min=1e-8))
        if self.zero is not None:
            self.zero.copy_(0.1 * (x.amin(dim=self.dim, keepdim=True) - self.step * low))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        low, high = code_range(self.bits)
        scale = (x.numel() * high) ** -0.5
        step = _scale_gradient(torch.where(self.step < 0, -1, 1) * self.step.abs().clamp(min=1e-8), scale)
        zero = 0.0 if self.zero is None else _round(_scale_gradient(self.zero, scale))
        return _round((x / step + zero).clamp(low, high)), step, zero

    def forward(self, x: Tensor) -> Tensor:
        codes, step, zero = self._parts(x)
        return (codes - zero) * step

    @torch.no_grad()
    def export(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (whole numbers, x's shape), steps and zero points (flat), with x ~ step (codes - zero)."""
        codes, step, zero = self._parts(x)
        zero = zero if isinstance(zero, Tensor) else torch.zeros_like(step)
        return codes.round().to(torch.int64), step.flatten().clone(), zero.flatten().round().to(torch.int64)


class LearnedRange(nn.Module):
    """A quantizer of activations whose range is learned (LSQ+, Bhalgat et al. 2020, arXiv 2004.09576).

    x -> s (q - z) with q = round(clamp(x / s + z, 0, 2^b - 1)), for the whole tensor. The step is trained as a multiple of
    its start, so that one learning rate suits all; gradients as in `LearnedStep`, with the count of one image's values.
    """

    def __init__(self, bits: int, low: float, high: float):
        super().__init__()
        self.bits, start = bits, (high - low) / (2**bits - 1)
        self.register_buffer("start", torch.tensor([start]))
        self.factor = nn.Parameter(torch.ones(1))
        self.zero = nn.Parameter(torch.tensor([-low / start]))

    def forward(self, x: Tensor) -> Tensor:
        most = 2**self.bits - 1
        scale = (x[0].numel() * most) ** -0.5
        step = self.start * _scale_gradient(self.factor.clamp(min=1e-4), scale)
        zero = _round(_scale_gradient(self.zero, scale))
        return (_round((x / step + zero).clamp(0, most)) - zero) * step

    @torch.no_grad()
    def ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value that a code stands for."""
        step, zero = self.start * self.factor.clamp(min=1e-4), self.zero.round()
        return -zero * step, (2**self.bits - 1 - zero) * step


def _round(x: Tensor) -> Tensor:
    """Rounding whose gradient is 1."""
    return x + (x.round() - x).detach()


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, with its gradient times `scale`."""
    return (x - x * scale).detach() + x * scale


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
        for x, _ in progress.progress_bar(batches, title, total=-(-len(split) // BATCH), unit="batch"):
            model(x)
