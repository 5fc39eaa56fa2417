"""Weight-only quantization: codes of a few bits, one step for each output row, and x in floating point.

    W_ij ~ s_i q_ij,    q_ij in [-2^(b-1), 2^(b-1) - 1]

with the steps that round with the least squared error, or steps learned together with the weights (LSQ, Esser et al.
2020) under cross-entropy and distillation. It is what a factorisation has to beat at the same number of bytes.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from vitbench.coded import CodedModel, Coding, RowCoder, ends, train_codes
from vitbench.data import ImageData
from vitbench.methods import register
from vitbench.training import TrainConfig
from vitbench.tuning import find_teacher
from vitbench.vit import LINEAR_TYPES, dense_layers


class WeightOnly(Coding):
    """Which linear layers of the blocks to code and with how many bits; by default nothing is trained."""

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    bits: int = Field(default=4, ge=2, le=8)
    train: TrainConfig = TrainConfig(epochs=0, lr=2e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


@register(WeightOnly, identity=WeightOnly(layers=(), ends_bits=None, rest="float32"))
def weight_only(model: nn.Module, config: WeightOnly, data: ImageData | None) -> nn.Module:
    """Round the blocks' linear layers to packed codes of a few bits, and train them if asked to."""
    chosen = dense_layers(model, config.layers).values()
    coders = [RowCoder(name, layer, config.bits) for layers in chosen for name, layer in layers.items()]
    coders += ends(model, config.ends_bits)
    if not coders:
        return model
    teacher = find_teacher(model, config, data)
    small, small.history = train_codes(CodedModel(model, coders), config, data, teacher)
    return small
