"""Simulated integer arithmetic: weights, linear layers' inputs, and the tensors in attention and LayerNorm in few bits.

Two methods without training improve on one uniform quantizer for each tensor:

- FQ-ViT (Lin et al. 2022, arXiv 2111.13824). LayerNorm's inputs have a few channels with much larger values than the others.
  Channel c gets the step 2^a_c s with a_c in {0, 1, 2, 3}, so that its factor is a bit shift. Attention probabilities are coded
  as powers of two.
- RepQ-ViT (Li et al. 2023, arXiv 2212.08254). LayerNorm's outputs are coded with a step and a zero point for each channel.
  These become one step and one zero point for the tensor, as LayerNorm and the next layer absorb the difference
  (`reparameterise`). Attention probabilities are coded as powers of sqrt(2).

Integer arithmetic is simulated: weights are packed on disk, but activations are rounded to the values of their codes and
multiplied in floating point. Values are those of integers, times are not. Additions (residuals, biases), GELU, softmax and the
pixels stay in floating point.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.base.store import StoredFile
from vitbench.calibration import quantizers, rotation
from vitbench.calibration.coders import FakeQuantLinear, RowCoder, embedding_and_head_coders
from vitbench.calibration.gptq import gptq_layers
from vitbench.calibration.reconstruction import block_files, reconstruct
from vitbench.data.splits import ImageData, Split
from vitbench.methods.method import register
from vitbench.model import blocks, vit
from vitbench.model.layers import Log2Rounded, RMSNorm, Rounded, RoundedNorm
from vitbench.model.vit import LINEAR_TYPES, replace_module
from vitbench.training.coded import CodedModel, CodedTrainingConfig, train_codes
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher

FACTORS = (0.125, 0.25, 0.5, 1.0)  # the fractions of the range of LayerNorm's inputs that a channel's codes may span
OCTAVES, BINS = 24, 960  # the range and bins of the histogram of attention probabilities, on a logarithmic axis


class SimulatedInteger(CodedTrainingConfig):
    """The bits of all tensors, and how LayerNorm and softmax are quantized.

    Attributes:
        layers: the blocks' linear layers to quantize; if empty, nothing in the blocks changes.
        weight_bits: bits of the weights, with a step for each output row.
        activation_bits: bits of the linear layers' inputs, of q, k and v, and of LayerNorm's inputs where those are rounded,
            with one step and one zero point for each tensor.
        attention_bits: bits of the attention probabilities.
        softmax: codes of the attention probabilities: powers of 2 ("log2") or of sqrt(2) ("log_sqrt2"), or "uniform".
        norms: "power_of_two" rounds LayerNorm's inputs (FQ-ViT); "reparameterised" rounds its outputs and leaves its inputs in
            floating point (RepQ-ViT); "plain" does neither.
        rotate: whether tokens, queries, keys and values are rotated before anything is calibrated, so that no channel is much
            larger than the others (`vitbench.calibration.rotation`). The unquantized model's outputs do not change. The inputs
            of fc2 are not rotated, since GELU is not linear.
        range: "mse", the range of least squared rounding error, or "minmax", the range of all calibration values.
        rounding: rounding of the weights: "nearest", or "second_order", which also fits each layer to the inputs that the
            rounded earlier layers produce, after its own rounding (`vitbench.calibration.gptq`,
            `vitbench.calibration.compensation`).
        ridge: the ridge penalty of that fit, in units of the inputs' mean variance.
        reconstruction: steps that fit each block's codes, biases, norms and ranges to the block's outputs after that, with all
            rounding in the loop (`vitbench.calibration.reconstruction`); 0: none.
        train: a fit of all codes, ranges, biases and norms together, after that, on the calibration images. The unquantized
            model is the teacher, and with `kd_weight` 1 no label is used. 0 epochs: none.
        ends_bits: bits of the weights of the patch embedding and the head, and of the head's inputs; None leaves them dense.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    weight_bits: int = Field(default=8, ge=2, le=8)
    activation_bits: int = Field(default=8, ge=2, le=8)
    attention_bits: int = Field(default=4, ge=2, le=8)
    softmax: Literal["log2", "log_sqrt2", "uniform"] = "log2"
    norms: Literal["power_of_two", "reparameterised", "plain"] = "power_of_two"
    rotate: bool = False
    range: Literal["mse", "minmax"] = "mse"
    rounding: Literal["nearest", "second_order"] = "nearest"
    ridge: float = Field(default=1.0, gt=0)
    reconstruction: int = Field(default=0, ge=0)
    train: TrainConfig = TrainConfig(epochs=0, batch_size=32, lr=1e-3, warmup_epochs=0, kd_weight=1.0, mixup=0.0)


FQ_VIT = SimulatedInteger(range="minmax")
REPQ_VIT = SimulatedInteger(weight_bits=4, activation_bits=4, softmax="log_sqrt2", norms="reparameterised")


@register(SimulatedInteger, identity=SimulatedInteger(layers=(), ends_bits=None, rest="float32"))
def simulated_integer(model: nn.Module, config: SimulatedInteger, data: ImageData | None) -> Compressed:
    """Round weights and activations of the blocks, the patch embedding and the head."""
    if config.layers:
        _check(model, config)
    if config.rotate:
        _rotate(model)
    # a copy with the same coordinates, so that losses on the blocks' tokens can compare them
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    layers, end_coders = vit.linear_layers(model, config.layers), embedding_and_head_coders(model, config.ends_bits)
    if not layers and not end_coders:
        return Compressed(model)
    if data is None:
        raise InputError("simulated_integer fixes ranges on calibration images and no data set was given; give one")
    split, input_quantizers, block_quantizers = data.require_split("calibration"), {}, {}
    if layers and config.norms == "reparameterised":
        input_quantizers = _reparameterised(model, layers, split, config)
    original = copy.deepcopy(model)
    if layers:
        block_quantizers = _attention_and_norm_quantizers(model, split, config)
    bits = {name: config.activation_bits for name in layers if name not in input_quantizers}
    if config.ends_bits:
        heads = (name for coder in end_coders for name in coder.names if name.startswith("head"))
        bits |= dict.fromkeys(heads, config.ends_bits)
    input_quantizers |= _uniform_quantizers(model, bits, split, config)
    for name, module in block_quantizers.items():
        replace_module(model, name, module)
    steps = (
        _round_weights(model, original, layers, input_quantizers, split, config)
        if config.rounding == "second_order"
        else {}
    )
    coders = {name: RowCoder(name, layer, config.weight_bits, None, steps.get(name)) for name, layer in layers.items()}
    fitted = bool(config.reconstruction or config.train.epochs)
    for name, quantizer in input_quantizers.items():
        replace_module(model, name, FakeQuantLinear(model.get_submodule(name), quantizer))
    quantizer_names = [*block_quantizers, *(f"{name}.input" for name in input_quantizers)]
    if fitted:
        _replace_each(model, quantizer_names, quantizers.trainable)
    files: list[StoredFile] = []  # finished blocks of an interrupted reconstruction
    if config.reconstruction and layers:
        files = block_files(original, data, config.to_dict())
        reconstruct(model, original, coders, split, config.reconstruction, block_file=files.__getitem__)
    coded = CodedModel(model, [*coders.values(), *end_coders])
    images = data.train_on("calibration")
    compressed = train_codes(
        coded,
        config,
        images,
        teacher,
        before_packing=lambda: _replace_each(model, quantizer_names, quantizers.runtime),
    )
    for file in files:
        file.remove()
    return compressed


def _check(model: nn.Module, config: SimulatedInteger) -> None:
    """Raise `InputError` unless the blocks have the dense layers and LayerNorms that `config` quantizes."""
    vit.dense_layers_by_type(model, config.layers)
    for index, block in enumerate(model.blocks):
        if config.norms != "plain" and not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
            raise InputError(
                f"blocks.{index} of {model.recipe.architecture.name} has no LayerNorm for norms={config.norms}; give "
                "norms=plain"
            )


def _replace_each(model: nn.Module, names: Sequence[str], change: Callable[[nn.Module], nn.Module]) -> None:
    """Replace each of the named modules by what `change` makes of it, in place."""
    for name in names:
        replace_module(model, name, change(model.get_submodule(name)))


def _rotate(model: nn.Module) -> None:
    """Rotate the model in place, and warn of the parts that keep their coordinates."""
    skipped = rotation.rotate(model)
    if skipped:
        name, reason = next(iter(skipped.items()))
        warnings.warn(f"{len(skipped)} parts keep their coordinates, such as {name}: {reason}", stacklevel=2)


def _uniform_quantizers(
    model: nn.Module, bits_by_name: Mapping[str, int], split: Split, config: SimulatedInteger
) -> dict[str, Rounded]:
    """Quantizers with one step and one zero point for the inputs of the modules in `bits_by_name` (name -> bits)."""
    modules = {name: model.get_submodule(name) for name in bits_by_name}
    result: dict[str, Rounded] = {}
    channel_ranges = quantizers.channel_ranges(model, modules, split)
    for bits in sorted(set(bits_by_name.values())):
        modules_of_width = {name: module for name, module in modules.items() if bits_by_name[name] == bits}
        ranges_of_width = {name: channel_ranges[name] for name in modules_of_width}
        input_ranges = quantizers.input_ranges(model, modules_of_width, ranges_of_width, split, config.range, bits)
        result |= {name: Rounded(bits).set_range(*input_range) for name, input_range in input_ranges.items()}
    return result


def _attention_and_norm_quantizers(model: nn.Module, split: Split, config: SimulatedInteger) -> dict[str, nn.Module]:
    """Insert submodules for quantizers into attention and LayerNorm, in place. Returns submodule name -> quantizer."""
    quantizer_names = blocks.make_attention_quantizable(model)
    uniform = dict.fromkeys(quantizer_names["q"] + quantizer_names["k"] + quantizer_names["v"], config.activation_bits)
    if config.softmax == "uniform":
        uniform |= dict.fromkeys(quantizer_names["softmax"], config.attention_bits)
    result = _uniform_quantizers(model, uniform, split, config)
    if config.softmax == "log2":
        result |= {name: Log2Rounded(config.attention_bits) for name in quantizer_names["softmax"]}
    if config.softmax == "log_sqrt2":
        result |= _log_quantizers(model, quantizer_names["softmax"], split, config.attention_bits)
    if config.norms == "power_of_two":
        result |= _power_of_two_quantizers(model, split, config.activation_bits)
    return result


def _log_quantizers(model: nn.Module, names: Sequence[str], split: Split, bits: int) -> dict[str, Log2Rounded]:
    """Quantizers with codes in powers of sqrt(2), with the scale of least squared error for each tensor."""
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in names}

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        counts[name] += torch.histc(-x.float().log2().clamp(-OCTAVES, 0), BINS, 0, OCTAVES).double()

    quantizers.run_calibration(
        model, {name: model.get_submodule(name) for name in names}, split, on_call, "histograms of attention"
    )
    return {name: Log2Rounded(bits, 2**0.5).fit_scale(counts[name], OCTAVES) for name in names}


def _power_of_two_quantizers(model: nn.Module, split: Split, bits: int) -> dict[str, Rounded]:
    """Quantizers of LayerNorms' inputs with channel steps 2^a s (FQ-ViT's power-of-two factor). Changes the LayerNorms in place.

    With s = (high - low) / (2^b - 1) / 8 of the complete tensor, channel c gets the step 2^a s with the a in {0, 1, 2, 3} of
    least squared error. All channels get the zero point round(-low / 8 s).
    """
    names = [f"blocks.{i}.{norm}" for i in range(len(model.blocks)) for norm in ("norm1", "norm2")]
    names += [name for name in ("norm", "fc_norm") if isinstance(model.get_submodule(name), nn.LayerNorm | RMSNorm)]
    for name in names:
        norm = model.get_submodule(name)
        if not isinstance(norm, RMSNorm):  # which has a place for a quantizer
            replace_module(model, name, RoundedNorm.from_norm(norm))
    channel_ranges = quantizers.channel_ranges(model, {name: model.get_submodule(name) for name in names}, split)
    tensor_range = {
        name: (min(0.0, float(ranges.low.min())), max(1e-6, float(ranges.high.max())))
        for name, ranges in channel_ranges.items()
    }
    errors = {
        name: torch.zeros(len(FACTORS), len(ranges.low), dtype=torch.float64) for name, ranges in channel_ranges.items()
    }

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        for factor_errors, factor in zip(errors[name], FACTORS):
            candidate = Rounded(bits).set_range(*(factor * bound for bound in tensor_range[name]))
            factor_errors += (candidate(x) - x).flatten(0, -2).square().sum(0).double()

    quantizers.run_calibration(
        model, {name: model.get_submodule(name) for name in names}, split, on_call, "factors of two"
    )
    result = {}
    for name in names:
        factors = torch.tensor(FACTORS)[errors[name].argmin(0)]
        bounds = (factors * bound for bound in tensor_range[name])
        result[f"{name}.input"] = Rounded(bits, len(factors)).set_range(*bounds)
    return result


def _reparameterised(
    model: nn.Module, layers: Mapping[str, nn.Linear], split: Split, config: SimulatedInteger
) -> dict[str, Rounded]:
    """Quantize LayerNorms' outputs for each channel, then reparameterise to one step and one zero point, in place.

    Returns layer name -> the quantizer of its input.
    """
    norms = {
        name: norm for name, norm in blocks.preceding_norms(model).items() if name in layers and norm.bias is not None
    }
    per_channel = _channel_quantizers(model, list(norms), split, config)
    return {name: reparameterise(norm, layers[name], per_channel[name]) for name, norm in norms.items()}


@torch.no_grad()
def reparameterise(norm: nn.LayerNorm | RMSNorm, layer: nn.Linear, per_channel: Rounded) -> Rounded:
    """Change a LayerNorm and the layer after it, in place, so that one step and zero point replace `per_channel` (RepQ-ViT).

    With steps s_c and zero points z_c, s and z their means (z an integer in the range of the codes), r_c = s_c / s and
    m_c = s_c (z_c - z): LayerNorm gives x' = (x + m) / r instead of x, so its codes round(x' / s) + z are
    round(x / s_c) + z_c; the layer takes W' = W diag(r) and b' = b - W m, so that W' x' + b' = W x + b.

    Returns:
        The quantizer of x', the input of `layer`.
    """
    per_tensor = Rounded(per_channel.bits)
    # nearly constant channels have zero points far outside the range of codes; their mean might not be an integer in float16
    max_code = 2**per_channel.bits - 1
    per_tensor.step, per_tensor.zero = per_channel.step.mean(), per_channel.zero.mean().round().clamp(0, max_code)
    ratio, shift = per_channel.step / per_tensor.step, per_channel.step * (per_channel.zero - per_tensor.zero)
    norm.bias.copy_((norm.bias + shift) / ratio)
    norm.weight.div_(ratio)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
    layer.bias.sub_(layer.weight @ shift)
    layer.weight.mul_(ratio)
    return per_tensor


def _channel_quantizers(
    model: nn.Module, names: Sequence[str], split: Split, config: SimulatedInteger
) -> dict[str, Rounded]:
    """Quantizers with a step and a zero point for each channel of the modules' inputs.

    Each channel's range is at least a hundredth of the mean range, so that constant channels get a valid step.
    """
    modules = {name: model.get_submodule(name) for name in names}
    channel_ranges = {
        name: (ranges.low, ranges.high.maximum(ranges.low + 0.01 * (ranges.high - ranges.low).mean()))
        for name, ranges in quantizers.channel_ranges(model, modules, split).items()
    }
    result = {
        name: Rounded(config.activation_bits, len(low)).set_range(low, high)
        for name, (low, high) in channel_ranges.items()
    }
    if config.range == "minmax":
        return result
    bins = max(512, 8 * 2**config.activation_bits)
    counts = {name: torch.zeros(len(low), bins) for name, (low, _) in channel_ranges.items()}

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        low, high = channel_ranges[name]
        bin_index = ((x.flatten(0, -2) - low) / (high - low) * bins).long().clamp(0, bins - 1)
        bin_index += bins * torch.arange(len(low))  # one bincount for all channels
        counts[name] += torch.bincount(bin_index.flatten(), minlength=counts[name].numel()).view(-1, bins)

    quantizers.run_calibration(model, modules, split, on_call, "histograms of channels")
    return {name: result[name].fit_range(counts[name], *channel_ranges[name]) for name in names}


def _round_weights(
    model: nn.Module,
    original: nn.Module,
    layers: Mapping[str, nn.Linear],
    input_quantizers: Mapping[str, Rounded],
    split: Split,
    config: SimulatedInteger,
) -> dict[str, Tensor]:
    """Round the weights in place, first layer to last, with rounded inputs, to the outputs of `original`. Returns their steps."""
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: (input_quantizers[name](x[0]),))
        for name, layer in layers.items()
    ]
    steps = gptq_layers(model, original, layers, dict.fromkeys(layers, config.weight_bits), split, ridge=config.ridge)
    for handle in handles:
        handle.remove()
    return steps
