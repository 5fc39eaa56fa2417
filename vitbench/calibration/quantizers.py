"""Uniform quantizers: steps of least squared error, learned steps (LSQ), and ranges of activations on calibration images.

A code is an integer q in [-2^(b-1), 2^(b-1) - 1]. It stands for s (q - z), with step s and zero point z.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.calibration.moments import CALIBRATION_BATCH, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.data.splits import Split
from vitbench.model.layers import Rounded
from vitbench.model.layers.packed import TERNARY

CANDIDATES = 64  # steps that `min_error_step` tries for each slice


def code_range(bits: float) -> tuple[int, int]:
    """The lowest and the highest signed code; -1 and 1 for ternary codes, which are called 1.58 bits."""
    return (-1, 1) if bits == TERNARY else (-(2 ** (int(bits) - 1)), 2 ** (int(bits) - 1) - 1)


def quantize(x: Tensor, step: Tensor, bits: float) -> Tensor:
    """The nearest codes, integers in x's type; `step` is broadcast to x."""
    return (x / step).round().clamp(*code_range(bits))


def min_error_step(
    x: Tensor, bits: float, dim: int, importance: Tensor | None = None, signs: tuple[int, ...] = (1,)
) -> Tensor:
    """The step with the least squared rounding error of each slice, among `CANDIDATES` fractions of its largest value.

    Args:
        x: (rows, columns).
        dim: 1 gives every row a step, (rows, 1); 0 gives every column one, (1, columns).
        importance: weights of the squared errors, broadcast to x; None: all are 1.
        signs: of the candidate steps. There is one more code below zero than above, so a negative step fits a slice whose
            largest values are positive; this matters at 2 and 3 bits.
    """
    high = code_range(bits)[1]
    max_abs = x.abs().amax(dim=dim, keepdim=True).clamp(min=1e-8)
    best, min_error = max_abs / high, torch.full_like(max_abs, float("inf"))
    for fraction in torch.linspace(0.2, 1.1, CANDIDATES).tolist():
        for sign in signs:
            step = sign * fraction * max_abs / high
            error = (quantize(x, step, bits) * step - x).square()
            error = (error if importance is None else error * importance).sum(dim=dim, keepdim=True)
            best, min_error = torch.where(error < min_error, step, best), torch.minimum(error, min_error)
    return best


class LearnedStep(nn.Module):
    """A quantizer of a matrix with learned steps and, optionally, zero points (LSQ, Esser et al. 2020).

    Forward, with steps s and zero points z: x -> s (round(clamp(x / s + z, lowest, highest)) - z). Rounding has the
    straight-through gradient, and the gradient of s is scaled by 1 / sqrt(count highest).

    Args:
        size: the number of slices, each with its own step.
        dim: 1 if the slices are rows, 0 if they are columns.
        zero_point: whether zero points are learned too.
    """

    def __init__(self, size: int, bits: float, dim: int, zero_point: bool = False):
        super().__init__()
        self.bits, self.dim = bits, dim
        shape = (size, 1) if dim == 1 else (1, size)
        self.step = nn.Parameter(torch.ones(shape))
        self.zero = nn.Parameter(torch.zeros(shape)) if zero_point else None

    @torch.no_grad()
    def init_from(self, x: Tensor, rule: str = "mse") -> None:
        """Set the steps for the matrix x, in place: "mse" by `min_error_step`; "lsq" to 2 mean|x| / sqrt(highest).

        "lsq" also sets the zero points to a tenth of (min x - s lowest), as the official UCT code does.
        """
        low, high = code_range(self.bits)
        if rule == "mse":
            signs = (1, -1) if self.zero is None else (1,)  # a zero point moves the codes already
            self.step.copy_(min_error_step(x, self.bits, self.dim, signs=signs))
            return
        self.step.copy_((2 * x.abs().mean(dim=self.dim, keepdim=True) / high**0.5).clamp(min=1e-8))
        if self.zero is not None:
            self.zero.copy_(0.1 * (x.amin(dim=self.dim, keepdim=True) - self.step * low))

    def _step_and_zero(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Step and zero point, with the scale of the gradients for a matrix of `count` values."""
        scale = (count * code_range(self.bits)[1]) ** -0.5
        step = _scale_gradient(torch.where(self.step < 0, -1, 1) * self.step.abs().clamp(min=1e-8), scale)
        zero = None if self.zero is None else _round_straight_through(_scale_gradient(self.zero, scale))
        return step, zero

    def forward(self, x: Tensor) -> Tensor:
        return learnable_fake_quantize(x, *self._step_and_zero(x.numel()), *code_range(self.bits))

    @torch.no_grad()
    def codes_and_steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (integers, x's shape), steps and zero points (flat), with x ~ step (codes - zero)."""
        step, zero = self._step_and_zero(x.numel())
        zero = torch.zeros_like(step) if zero is None else zero.round()
        codes = (x / step).add_(zero).round_().clamp_(*code_range(self.bits))
        return codes.to(torch.int64), step.flatten().clone(), zero.flatten().to(torch.int64)


class LearnedRange(nn.Module):
    """A quantizer of activations whose range is learned (LSQ+, Bhalgat et al. 2020, arXiv 2004.09576).

    x -> s (q - z) with q = round(clamp(x / s + z, 0, 2^b - 1)), with one s and z for the whole tensor. The step is trained
    as a multiple of its start, so one learning rate suits all. Gradients are those of `LearnedStep`, with the count of one
    image's values.
    """

    def __init__(self, bits: int, low: float, high: float):
        super().__init__()
        self.bits, start = bits, (high - low) / (2**bits - 1)
        self.register_buffer("start", torch.tensor([start]))
        self.factor = nn.Parameter(torch.ones(1))
        self.zero = nn.Parameter(torch.tensor([-low / start]))

    def forward(self, x: Tensor) -> Tensor:
        max_code = 2**self.bits - 1
        scale = (x[0].numel() * max_code) ** -0.5
        step = self.start * _scale_gradient(self.factor.clamp(min=1e-4), scale)
        zero = _round_straight_through(_scale_gradient(self.zero, scale))
        return learnable_fake_quantize(x, step, zero, 0, max_code)

    @torch.no_grad()
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value that codes stand for."""
        step, zero = self.start * self.factor.clamp(min=1e-4), self.zero.round()
        return -zero * step, (2**self.bits - 1 - zero) * step


class StraightThrough(nn.Module):
    """A quantizer whose rounding has the gradient 1 (Bengio et al. 2013); its own tensors are fixed."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.quantizer(x) - x).detach()


def trainable(quantizer: nn.Module) -> nn.Module:
    """A form of a runtime quantizer that has gradients: a `LearnedRange` of a `Rounded` for whole tensors, else `StraightThrough`."""
    if isinstance(quantizer, Rounded) and quantizer.channels is None:
        return LearnedRange(quantizer.bits, *map(float, quantizer.bounds()))
    return StraightThrough(quantizer)


def runtime(quantizer: nn.Module) -> nn.Module:
    """The runtime form of a quantizer that `trainable` may have made, with its present range."""
    if isinstance(quantizer, LearnedRange):
        return Rounded(quantizer.bits).set_range(*quantizer.bounds())
    return quantizer.quantizer if isinstance(quantizer, StraightThrough) else quantizer


def learnable_fake_quantize(x: Tensor, step: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """s (q - z) with q = round(clamp(x / s + z, low, high)); rounding has the gradient 1 (Bengio et al. 2013).

    The gradient of x is 0 where the clamp cuts, and those of s and z are LSQ+'s. Step and zero point are broadcast to x;
    None is a zero point of 0.
    """
    return _LearnableFakeQuantize.apply(x, step, zero, low, high)


class _LearnableFakeQuantize(torch.autograd.Function):
    """`learnable_fake_quantize` as one operation, which takes fewer passes over x than its single ones.

    With v = x / s + z: dy/dx = 1 inside [low, high], else 0; dy/ds = q - v inside, else q - z; dy/dz = 0 inside, else -s.
    """

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        v = x / step if zero is None else (x / step).add_(zero)
        codes = v.clamp(low, high)
        inside = codes == v
        codes.round_()
        shifted = codes if zero is None else codes - zero
        if any(ctx.needs_input_grad):
            # inside: q - v; outside: q - z
            slope = torch.where(inside, codes - v, shifted) if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(inside, slope, step)
            ctx.zero_shape = None if zero is None else zero.shape
        return shifted * step

    @staticmethod
    def backward(ctx, grad: Tensor):
        inside, slope, step = ctx.saved_tensors
        x_grad = grad * inside if ctx.needs_input_grad[0] else None
        step_grad = (grad * slope).sum_to_size(step.shape) if ctx.needs_input_grad[1] else None
        zero_grad = None
        if ctx.needs_input_grad[2]:
            zero_grad = -((grad * ~inside) * step).sum_to_size(ctx.zero_shape)
        return x_grad, step_grad, zero_grad, None, None


def _round_straight_through(x: Tensor) -> Tensor:
    """Rounding with the straight-through gradient, 1 (Bengio et al. 2013)."""
    return x + (x.round() - x).detach()


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x unchanged, with its gradient multiplied by `scale`."""
    return (x - x * scale).detach() + x * scale


BINS, RANGE_CANDIDATES = 2048, 25  # bins of a histogram; candidates for each end of a range


@dataclass
class ChannelRanges:
    """The lowest and the highest value of each input channel of a layer, (in,)."""

    low: Tensor
    high: Tensor


@torch.inference_mode()
def channel_ranges(model: nn.Module, layers: Mapping[str, nn.Module], split: Split) -> dict[str, ChannelRanges]:
    """The range of each layer's inputs on the images of `split`, channel by channel."""
    by_layer: dict[str, ChannelRanges] = {}

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        x = x.flatten(0, -2)
        low, high = x.amin(0), x.amax(0)  # several times faster than aminmax along a dimension
        if name in by_layer:
            low, high = torch.minimum(low, by_layer[name].low), torch.maximum(high, by_layer[name].high)
        by_layer[name] = ChannelRanges(low, high)

    run_calibration(model, layers, split, on_call, "ranges of inputs")
    return by_layer


def input_ranges(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    channel_ranges: Mapping[str, ChannelRanges],
    split: Split,
    rule: Literal["mse", "minmax"] = "mse",
    bits: int = 8,
) -> dict[str, tuple[float, float]]:
    """The range of each layer's inputs for 2^bits codes: of least squared error ("mse"), or all ("minmax"); it contains 0."""
    full_range = {
        name: (min(0.0, float(channel_range.low.min())), max(1e-6, float(channel_range.high.max())))
        for name, channel_range in channel_ranges.items()
    }
    if rule == "minmax":
        return full_range
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in layers}

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        counts[name] += torch.histc(x.float(), BINS, *full_range[name]).double()

    run_calibration(model, layers, split, on_call, "histograms of inputs")
    return {name: least_error_range(counts[name], *full_range[name], bits) for name in layers}


def least_error_range(counts: Tensor, low: float, high: float, bits: int = 8) -> tuple[float, float]:
    """The part of [low, high], which contains 0, with the least squared error of rounding a histogram to 2^bits values.

    Args:
        counts: a histogram of equal bins over [low, high], (bins,).
    """
    max_code, width = 2**bits - 1, (high - low) / len(counts)
    values = low + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5)
    fractions = torch.linspace(0.1, 1, RANGE_CANDIDATES, dtype=torch.float64)
    lows, highs = (end.flatten()[:, None] for end in torch.meshgrid(low * fractions, high * fractions, indexing="ij"))
    steps = (highs - lows) / max_code
    zeros = (-lows / steps).round()
    rounded = ((values / steps).round().clamp(-zeros, max_code - zeros)) * steps
    best = int(((rounded - values).square() * counts).sum(1).argmin())
    return float(lows[best]), float(highs[best])


@torch.inference_mode()
def run_calibration(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    split: Split,
    on_call: Callable[[str, Tensor, Tensor], None],
    title: str,
) -> None:
    """Run the model on the images of `split` and call `on_call(name, x, y)` for every call of the layers (`forward_hooks`)."""
    batches = eval_batches(split, model.recipe.preprocess, CALIBRATION_BATCH)
    with forward_hooks(dict(layers), on_call):
        for x, _ in progress.progress_bar(batches, title, total=-(-len(split) // CALIBRATION_BATCH), unit="batch"):
            model(x)
