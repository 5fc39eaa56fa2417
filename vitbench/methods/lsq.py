"""LSQ: weights and activations in few bits, trained with rounding in the forward pass (quantization-aware training).

Learned step size quantization (Esser et al. 2020, arXiv 1902.08153) makes the steps parameters. Weights have a step for each
output row; the inputs of each layer have one step and one zero point (LSQ+, Bhalgat et al. 2020, arXiv 2004.09576), since
GELU's outputs are asymmetric about 0. All steps start at the least squared rounding error on calibration images, and are
trained together with the weights under cross-entropy and distillation. The survey's 4-bit row quantizes only the weights
(`weight_only` with training).

Weights are packed on disk. Activations are rounded and then multiplied in floating point: values are those of integer
arithmetic, times are not.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from vitbench.base.errors import InputError
from vitbench.calibration import quantizers
from vitbench.calibration.coders import FakeQuantLinear, RowCoder, embedding_and_head_coders
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import vit
from vitbench.model.vit import LINEAR_TYPES
from vitbench.training.coded import CodedModel, CodedTrainingConfig, train_codes
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher


class LSQ(CodedTrainingConfig):
    """Bits of the weights and of the inputs of the blocks' linear layers; attention's own products stay in floating point.

    With `train.epochs` 0 it is post-training quantization; the difference is the effect of training.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    weight_bits: int = Field(default=4, ge=2, le=8)
    activation_bits: int = Field(default=4, ge=2, le=8)
    train: TrainConfig = TrainConfig(epochs=5, lr=2e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


@register(
    LSQ,
    identity=LSQ(layers=(), ends_bits=None, rest="float32"),
    operating_points=lambda model: [{"weight_bits": n} for n in range(8, 1, -1)],
)
def lsq(model: nn.Module, config: LSQ, data: ImageData | None) -> Compressed:
    """Round weights and activations of the blocks' linear layers, and train with rounding in the forward pass."""
    vit.dense_layers_by_type(model, config.layers)
    layers, teacher = vit.linear_layers(model, config.layers), find_teacher(model, config, data)
    torch.manual_seed(config.train.seed)
    if layers:
        if data is None:
            raise InputError("lsq takes its first ranges from calibration images and no data set was given; give one")
        split = data.require_split("calibration")
        channel_ranges = quantizers.channel_ranges(model, layers, split)
        input_ranges = quantizers.input_ranges(model, layers, channel_ranges, split, bits=config.activation_bits)
        for name, layer in layers.items():
            quantizer = quantizers.LearnedRange(config.activation_bits, *input_ranges[name])
            vit.replace_module(model, name, FakeQuantLinear(layer, quantizer))
    coders = [RowCoder(name, layer, config.weight_bits) for name, layer in layers.items()]
    coders += embedding_and_head_coders(model, config.ends_bits)
    if not coders:
        return Compressed(model)
    return train_codes(CodedModel(model, coders), config, data, teacher)
