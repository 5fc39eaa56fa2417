"""A whole ViT in few bits: weights, what the linear layers are given, and what attention and LayerNorm work on.

Two ways to do without training what uniform codes for a tensor do badly:

- FQ-ViT (Lin et al. 2022, arXiv 2111.13824). LayerNorm's inputs have a few channels far above the others; channel c gets the
  step 2^a_c s with a_c in {0, 1, 2, 3}, whose factor is a shift. Softmax's shares are coded as powers of two.
- RepQ-ViT (Li et al. 2023, arXiv 2212.08254). LayerNorm's outputs are coded with a step and a zero point for each channel,
  which become one for all as LayerNorm and the next layer take the difference (`reparameterise`). Shares are powers of
  sqrt(2).

Integer arithmetic is simulated: weights are packed on disk, but activations are rounded to what their codes stand for and
multiplied in floating point. The numbers are those of integers, the time is not. Additions (residuals, biases), GELU,
softmax and the pixels stay in floating point.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.calibration import quantizers
from vitbench.calibration.coders import RowCoder, embedding_and_head_coders
from vitbench.calibration.gptq import gptq_layers
from vitbench.data.splits import ImageData, Split
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.layers import Log2Rounded, Rounded, RoundedNorm
from vitbench.model.vit import LINEAR_TYPES, replace_module
from vitbench.training.coded import CodedModel

FACTORS = (0.125, 0.25, 0.5, 1.0)  # of the range of LayerNorm's inputs that a channel's codes may span
OCTAVES, BINS = 24, 960  # of the histogram of softmax's shares, on a logarithmic axis


class SimulatedInteger(Config):
    """Bits of everything, and what is done about LayerNorm and softmax.

    Attributes:
        layers: the blocks' linear layers that get codes; with none, nothing in the blocks is changed.
        weight_bits: a step for each output row.
        activation_bits: of the linear layers' inputs, q, k, v, and LayerNorm's inputs where those are rounded; a step and a
            zero point for the tensor.
        attention_bits: of softmax's shares.
        softmax: "log2" or "log_sqrt2", powers of that base, or "uniform".
        norms: "power_of_two" rounds LayerNorm's inputs as FQ-ViT does, "reparameterised" its outputs as RepQ-ViT does with
            its inputs in floating point; "plain" does neither.
        range: "mse", the range whose rounding has the least squared error, or "minmax", all that was seen.
        rounding: of the weights: "nearest", or "second_order", where each layer is also fitted to what the rounded layers
            before it give it, by its own input's codes (`vitbench.calibration.gptq`, `vitbench.calibration.compensation`).
        ridge: of that fit, in units of the inputs' mean variance.
        ends_bits: weights of the patch embedding and the head, and the head's inputs; None leaves them as they are.
        rest: how all that has no codes is stored.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    weight_bits: int = Field(default=8, ge=2, le=8)
    activation_bits: int = Field(default=8, ge=2, le=8)
    attention_bits: int = Field(default=4, ge=2, le=8)
    softmax: Literal["log2", "log_sqrt2", "uniform"] = "log2"
    norms: Literal["power_of_two", "reparameterised", "plain"] = "power_of_two"
    range: Literal["mse", "minmax"] = "mse"
    rounding: Literal["nearest", "second_order"] = "nearest"
    ridge: float = Field(default=1.0, gt=0)
    ends_bits: int | None = Field(default=8, ge=2, le=8)
    rest: Literal["float16", "float32"] = "float16"


FQ_VIT = SimulatedInteger(range="minmax")
REPQ_VIT = SimulatedInteger(weight_bits=4, activation_bits=4, softmax="log_sqrt2", norms="reparameterised")


@register(SimulatedInteger, identity=SimulatedInteger(layers=(), ends_bits=None, rest="float32"))
def simulated_integer(model: nn.Module, config: SimulatedInteger, data: ImageData | None) -> nn.Module:
    """Round weights and activations of the blocks and the two ends."""
    if config.layers:
        _check(model, config)
    layers, outer = vit.linear_layers(model, config.layers), embedding_and_head_coders(model, config.ends_bits)
    if not layers and not outer:
        return model
    if data is None:
        raise InputError("simulated_integer fixes ranges on calibration images and no data set was given; give one")
    split, inputs, inside = data.require_split("calibration"), {}, {}
    if layers and config.norms == "reparameterised":
        inputs = _reparameterised(model, layers, split, config)
    given = copy.deepcopy(model)
    if layers:
        inside = _inside(model, split, config)
    bits = {name: config.activation_bits for name in layers if name not in inputs}
    if config.ends_bits:
        heads = (name for coder in outer for name in coder.names if name.startswith("head"))
        bits |= dict.fromkeys(heads, config.ends_bits)
    inputs |= _uniform(model, bits, split, config)
    for name, module in inside.items():
        replace_module(model, name, module)
    steps = _fit(model, given, layers, inputs, split, config) if config.rounding == "second_order" else {}
    coders = [RowCoder(name, layer, config.weight_bits, None, steps.get(name)) for name, layer in layers.items()]
    for coder in [*coders, *outer]:
        coder.install_packed(model)
    for name, module in inputs.items():
        model.get_submodule(name).input = module
    return CodedModel(model, []).to_packed_model(config.rest)


def _check(model: nn.Module, config: SimulatedInteger) -> None:
    """Raise `InputError` unless the blocks have the dense layers and norms that get codes."""
    vit.dense_layers_by_type(model, config.layers)
    for index, block in enumerate(model.blocks):
        if config.norms != "plain" and not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
            raise InputError(
                f"blocks.{index} of {model.recipe.architecture.name} has no LayerNorm that could be {config.norms}; give "
                "norms=plain"
            )


def _uniform(model: nn.Module, widths: Mapping[str, int], split: Split, config: SimulatedInteger) -> dict[str, Rounded]:
    """Roundings with one step and one zero point for what the modules in `widths` (name -> bits) are given."""
    modules = {name: model.get_submodule(name) for name in widths}
    found: dict[str, Rounded] = {}
    seen = quantizers.channel_ranges(model, modules, split)
    for bits in sorted(set(widths.values())):
        own = {name: module for name, module in modules.items() if widths[name] == bits}
        spans = quantizers.input_ranges(model, own, {name: seen[name] for name in own}, split, config.range, bits)
        found |= {name: Rounded(bits).set_range(*span) for name, span in spans.items()}
    return found


def _inside(model: nn.Module, split: Split, config: SimulatedInteger) -> dict[str, nn.Module]:
    """Make places for roundings in attention and LayerNorm, in place. Returns place -> what is to stand there."""
    places = blocks.make_attention_quantizable(model)
    uniform = dict.fromkeys(places["q"] + places["k"] + places["v"], config.activation_bits)
    if config.softmax == "uniform":
        uniform |= dict.fromkeys(places["softmax"], config.attention_bits)
    found = _uniform(model, uniform, split, config)
    if config.softmax == "log2":
        found |= {name: Log2Rounded(config.attention_bits) for name in places["softmax"]}
    if config.softmax == "log_sqrt2":
        found |= _powers(model, places["softmax"], split, config.attention_bits)
    return found | (_factors(model, split, config.activation_bits) if config.norms == "power_of_two" else {})


def _powers(model: nn.Module, names: Sequence[str], split: Split, bits: int) -> dict[str, Log2Rounded]:
    """Codes in powers of sqrt(2), with the scale of least squared error for each tensor."""
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in names}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        counts[name] += torch.histc(-x.float().log2().clamp(-OCTAVES, 0), BINS, 0, OCTAVES).double()

    quantizers.run_calibration(
        model, {name: model.get_submodule(name) for name in names}, split, see, "histograms of attention"
    )
    return {name: Log2Rounded(bits, 2**0.5).fit_scale(counts[name], OCTAVES) for name in names}


def _factors(model: nn.Module, split: Split, bits: int) -> dict[str, Rounded]:
    """Make room before each LayerNorm, in place. Returns roundings whose steps are powers of two times one (FQ-ViT's PTF).

    With s = (high - low) / (2^b - 1) / 8 of the whole tensor, channel c gets 2^a s with the a in {0, 1, 2, 3} of least
    squared error, and all channels the zero point round(-low / 8 s).
    """
    names = [f"blocks.{i}.{norm}" for i in range(len(model.blocks)) for norm in ("norm1", "norm2")]
    names += [name for name in ("norm", "fc_norm") if isinstance(model.get_submodule(name), nn.LayerNorm)]
    for name in names:
        replace_module(model, name, RoundedNorm.from_norm(model.get_submodule(name)))
    seen = quantizers.channel_ranges(model, {name: model.get_submodule(name) for name in names}, split)
    ends = {name: (min(0.0, float(c.low.min())), max(1e-6, float(c.high.max()))) for name, c in seen.items()}
    lost = {name: torch.zeros(len(FACTORS), len(c.low), dtype=torch.float64) for name, c in seen.items()}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        for errors, factor in zip(lost[name], FACTORS):
            tried = Rounded(bits).set_range(*(factor * end for end in ends[name]))
            errors += (tried(x) - x).flatten(0, -2).square().sum(0).double()

    quantizers.run_calibration(model, {name: model.get_submodule(name) for name in names}, split, see, "factors of two")
    found = {}
    for name in names:
        factors = torch.tensor(FACTORS)[lost[name].argmin(0)]
        found[f"{name}.input"] = Rounded(bits, len(factors)).set_range(*(factors * end for end in ends[name]))
    return found


def _reparameterised(
    model: nn.Module, layers: Mapping[str, nn.Linear], split: Split, config: SimulatedInteger
) -> dict[str, Rounded]:
    """Give each channel after a LayerNorm a step and a zero point, and make them one for all, in place.

    Returns the roundings of the layers' inputs by layer.
    """
    norms = {
        name: norm for name, norm in blocks.preceding_norms(model).items() if name in layers and norm.bias is not None
    }
    each = _each_channel(model, list(norms), split, config)
    return {name: reparameterise(norm, layers[name], each[name]) for name, norm in norms.items()}


@torch.no_grad()
def reparameterise(norm: nn.LayerNorm, layer: nn.Linear, each: Rounded) -> Rounded:
    """Change a LayerNorm and the layer it feeds, in place, so that one step and zero point do what `each` did (RepQ-ViT).

    With steps s_c and zero points z_c, s and z their means (z a whole number among the codes), r_c = s_c / s and
    m_c = s_c (z_c - z): LayerNorm gives x' = (x + m) / r in the place of x, so its codes round(x' / s) + z are
    round(x / s_c) + z_c; the layer takes W' = W diag(r) and b' = b - W m, so that W' x' + b' = W x + b.

    Returns:
        The rounding of x', which `layer` is given.
    """
    one = Rounded(each.bits)
    # channels that hardly change have zero points far outside of the codes; their mean might not be whole in float16
    one.step, one.zero = each.step.mean(), each.zero.mean().round().clamp(0, 2**each.bits - 1)
    ratio, moved = each.step / one.step, each.step * (each.zero - one.zero)
    norm.bias.copy_((norm.bias + moved) / ratio)
    norm.weight.div_(ratio)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
    layer.bias.sub_(layer.weight @ moved)
    layer.weight.mul_(ratio)
    return one


def _each_channel(model: nn.Module, names: Sequence[str], split: Split, config: SimulatedInteger) -> dict[str, Rounded]:
    """Roundings with a step and a zero point for each channel of what the modules are given.

    No channel's range is less than a hundredth of the mean one, so that constant channels do no harm.
    """
    seen = quantizers.channel_ranges(model, {name: model.get_submodule(name) for name in names}, split)
    spans = {name: (c.low, c.high.maximum(c.low + 0.01 * (c.high - c.low).mean())) for name, c in seen.items()}
    found = {
        name: Rounded(config.activation_bits, len(low)).set_range(low, high) for name, (low, high) in spans.items()
    }
    if config.range == "minmax":
        return found
    bins = max(512, 8 * 2**config.activation_bits)
    counts = {name: torch.zeros(len(low), bins) for name, (low, _) in spans.items()}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        low, high = spans[name]
        place = ((x.flatten(0, -2) - low) / (high - low) * bins).long().clamp(0, bins - 1)
        place += bins * torch.arange(len(low))  # of all channels in a row
        counts[name] += torch.bincount(place.flatten(), minlength=counts[name].numel()).view(-1, bins)

    quantizers.run_calibration(
        model, {name: model.get_submodule(name) for name in names}, split, see, "histograms of channels"
    )
    return {name: found[name].fit_range(counts[name], *spans[name]) for name in names}


def _fit(
    model: nn.Module,
    given: nn.Module,
    layers: Mapping[str, nn.Linear],
    inputs: Mapping[str, Rounded],
    split: Split,
    config: SimulatedInteger,
) -> dict[str, Tensor]:
    """Round the weights in place, first to last, so that they answer to rounded inputs as in `given`. Returns their steps."""
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: (inputs[name](x[0]),)) for name, layer in layers.items()
    ]
    steps = gptq_layers(model, given, layers, dict.fromkeys(layers, config.weight_bits), split, ridge=config.ridge)
    for handle in handles:
        handle.remove()
    return steps
