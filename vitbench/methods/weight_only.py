"""Weight-only quantization: weights in codes of a few bits, with a step for each output row or each group of its weights.

    W_ij ~ s_ig q_ij,    q_ij in [-2^(b-1), 2^(b-1) - 1], or in {-1, 0, 1}

and x stays in floating point. Rounding is to the nearest code, with the steps of least squared error, or second-order
(`vitbench.calibration.gptq`): it minimises the error of the layers' outputs on calibration images, and fits each layer to the
inputs that the rounded earlier layers produce (`vitbench.calibration.compensation`). Both can be followed by reconstruction,
block by block (`vitbench.calibration.reconstruction`), and by training of codes and steps (LSQ, Esser et al. 2020) under
cross-entropy and distillation. It is also the baseline for factored models of the same number of bytes.
"""

import copy
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import nn

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.base.store import StoredFile
from vitbench.calibration.allocation import BudgetUnreachable, greedy_allocation
from vitbench.calibration.coders import RowCoder, check_group, embedding_and_head_coders
from vitbench.calibration.gptq import gptq_layers
from vitbench.calibration.moments import collect_moments
from vitbench.calibration.quantizers import min_error_step, quantize
from vitbench.calibration.reconstruction import block_files, reconstruct
from vitbench.data.splits import ImageData, Split
from vitbench.methods.method import register
from vitbench.model import vit
from vitbench.model.layers.packed import TERNARY, Bits, coded_bytes
from vitbench.model.vit import LINEAR_TYPES
from vitbench.training.coded import CodedModel, CodedTrainingConfig, bytes_without, train_codes
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher

MIN_BITS, MAX_BITS = 2, 8


class WeightOnly(CodedTrainingConfig):
    """The linear layers of the blocks to quantize, and how; by default nothing is trained.

    Attributes:
        bits: bits of each code, 2 to 8; 1.58 takes ternary codes (-1, 0, 1), five in a byte.
        target_bytes: the bytes of all tensors of the compressed model. Each layer then gets 2 to 8 bits, chosen so that the
            expected rise of the calibration loss is small for the bytes that it frees; `bits` is not used.
        group: the number of inputs that share a step; each step takes 16 bits. None: a step for each output row.
        rounding: "nearest", or "second_order", which needs calibration images.
        damping: of second-order rounding, added to the covariance's diagonal, in units of its mean.
        ridge: the ridge penalty of the correction for the error of earlier layers, in the same units.
        reconstruction: the number of steps, for each block, that fit its codes together after rounding
            (`vitbench.calibration.reconstruction`); needs calibration images; 0: none.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    bits: Bits = 4
    target_bytes: int | None = Field(default=None, ge=1)
    group: int | None = Field(default=None, ge=2)
    rounding: Literal["nearest", "second_order"] = "nearest"
    damping: float = Field(default=0.01, gt=0)
    ridge: float = Field(default=1.0, gt=0)
    reconstruction: int = Field(default=0, ge=0)
    train: TrainConfig = TrainConfig(epochs=0, lr=2e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


@register(
    WeightOnly,
    identity=WeightOnly(layers=(), ends_bits=None, rest="float32"),
    operating_points=lambda model: [{"bits": n} for n in (*range(8, 1, -1), TERNARY)],
)
def weight_only(model: nn.Module, config: WeightOnly, data: ImageData | None) -> Compressed:
    """Round the blocks' linear layers to packed codes of a few bits, and train them if `train.epochs` is above 0."""
    vit.dense_layers_by_type(model, config.layers)
    layers = vit.linear_layers(model, config.layers)
    check_group({name: layer.in_features for name, layer in layers.items()}, config.group)
    teacher = find_teacher(model, config, data)
    bits: Mapping[str, float] = dict.fromkeys(layers, config.bits)
    if config.target_bytes:
        bits = _bits_per_layer(model, layers, config, data)
    original = copy.deepcopy(model)
    steps = {}
    if config.rounding == "second_order":
        split = _calibration(data, "rounding=second_order", "nearest")
        steps = gptq_layers(
            model, original, layers, bits, split, group=config.group, damping=config.damping, ridge=config.ridge
        )
    coders = {name: RowCoder(name, layer, bits[name], config.group, steps.get(name)) for name, layer in layers.items()}
    files: list[StoredFile] = []  # finished blocks of an interrupted reconstruction
    if config.reconstruction and coders:
        split = _calibration(data, "reconstruction", "0")
        assert data is not None
        files = block_files(original, data, config.to_dict())
        reconstruct(model, original, coders, split, config.reconstruction, block_file=files.__getitem__)
    all_coders = [*coders.values(), *embedding_and_head_coders(model, config.ends_bits)]
    if not all_coders:
        return Compressed(model)
    small = train_codes(CodedModel(model, all_coders), config, data, teacher)
    for file in files:
        file.remove()
    return small


def _calibration(data: ImageData | None, setting: str, alternative: str) -> Split:
    if data is None:
        raise InputError(f"{setting} needs calibration images and no data set was given; give one, or {alternative}")
    return data.require_split("calibration")


def _bits_per_layer(
    model: nn.Module, layers: Mapping[str, nn.Linear], config: WeightOnly, data: ImageData | None
) -> dict[str, int]:
    """The bits of each layer, by greedy allocation.

    The error of b bits is the second-order term of the loss, as in mixed rank: the layer's sensitivity times the squared error
    of its outputs with the nearest codes.
    """
    _calibration(data, "target_bytes", "bits")
    assert data is not None
    assert config.target_bytes is not None
    moments = collect_moments(model, dict(layers), data, gradients=True)
    choices: dict[str, list[tuple[float, float, int]]] = {}
    for name, layer in progress.progress_bar(layers.items(), "error by bits", unit="layer"):
        weight, covariance = layer.weight.detach(), moments[name].output_error_covariance(layer)
        groups, choices[name] = weight.reshape(-1, config.group or layer.in_features), []
        for bits in range(MAX_BITS, MIN_BITS - 1, -1):
            step = min_error_step(groups, bits, dim=1, signs=(1, -1))
            change = ((quantize(groups, step, bits) * step).view_as(weight) - weight).double()
            output_error = float(((change @ covariance) * change).sum())
            choices[name].append(((MAX_BITS - bits) * weight.numel(), moments[name].sensitivity * output_error, bits))
    max_bytes = _bytes(model, layers, MAX_BITS, config)
    try:
        return dict.fromkeys(layers, MAX_BITS) | greedy_allocation(choices, 8 * (max_bytes - config.target_bytes))
    except BudgetUnreachable:
        raise InputError(
            f"target_bytes = {config.target_bytes:,} is below the smallest size: with {MIN_BITS} bits in each of the {len(layers)} layers "
            f"all tensors take {_bytes(model, layers, MIN_BITS, config):,} bytes; give at least that, or a larger group"
        ) from None


def _bytes(model: nn.Module, layers: Mapping[str, nn.Linear], bits: int, config: WeightOnly) -> int:
    """The bytes of all tensors with `bits` bits in each of the layers, without the file's tensor names and recipe."""
    return bytes_without(model, config, layers) + sum(
        coded_bytes(layer.out_features, layer.in_features, bits, config.group, config.rest) for layer in layers.values()
    )
