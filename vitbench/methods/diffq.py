"""DiffQ: the number of bits of each layer is learned by gradient, together with its weights.

Rounding has no gradient in the number of bits. In training, DiffQ (Défossez et al. 2021, arXiv 2104.09987) replaces rounding
by noise of the same size as the rounding error:

    w + s(b) u / 2,    u uniform in [-1, 1],    s(b) = (max w - min w) / (2^b - 1),

which is smooth in the bits b. The loss gets a penalty on the bytes. Here only bytes above the target are penalised:

    L + pressure max(0, bytes(b) / target - 1).

After training, the bits are rounded to integers that meet the target, and each row gets the step of least squared error.
The paper learns bits for groups of 8 or 16 weights; here each layer has its bits, and each row its step.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.calibration.coders import Coder, RowCoder, embedding_and_head_coders
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import vit
from vitbench.model.vit import LINEAR_TYPES
from vitbench.training.coded import CodedModel, CodedTrainingConfig, train_codes
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher

MIN_BITS, MAX_BITS = 2, 8
BITS_LR_FACTOR = 10.0  # multiplies the logits of the bits, which share the learning rate of the weights


class DiffQ(CodedTrainingConfig):
    """The layers to quantize and their mean number of bits.

    Attributes:
        bits: the target: bits for each weight of these layers, on average; steps and all other tensors are not counted.
        pressure: the weight of the penalty on bytes above the target.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    bits: float = Field(default=4.0, ge=MIN_BITS, le=MAX_BITS)
    pressure: float = Field(default=10.0, gt=0)
    train: TrainConfig = TrainConfig(epochs=5, lr=2e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


@register(DiffQ, identity=DiffQ(layers=(), ends_bits=None, rest="float32"))
def diffq(model: nn.Module, config: DiffQ, data: ImageData | None) -> Compressed:
    """Learn the bits of each layer under noise, then round the weights."""
    vit.dense_layers_by_type(model, config.layers)
    layers, teacher = vit.linear_layers(model, config.layers), find_teacher(model, config, data)
    if layers and not config.train.epochs:
        raise InputError("diffq learns its bits in training; give train.epochs of 1 or more, or use weight_only")
    torch.manual_seed(config.train.seed)
    noisy = {name: NoiseCoder(name, layer, config.bits) for name, layer in layers.items()}
    coders = [*noisy.values(), *embedding_and_head_coders(model, config.ends_bits)]
    if not coders:
        return Compressed(model)
    target = config.bits * sum(coder.value.numel() for coder in noisy.values())

    def pressure(used: Tensor) -> Tensor:
        return config.pressure * (used / target - 1).clamp(min=0)

    coded = CodedModel(model, coders)
    return train_codes(coded, config, data, teacher, pressure, lambda: round_bits_to_target(noisy.values(), target))


class NoiseCoder(Coder):
    """One weight with learned bits, which all its rows share; values are in units of each row's root mean square."""

    def __init__(self, name: str, module: nn.Linear, bits: float):
        super().__init__()
        self.names = [name]
        weight = module.weight.detach()
        self.register_buffer("scale", weight.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-8))
        self.value = nn.Parameter(weight / self.scale)
        bits_fraction = min(max((bits - MIN_BITS) / (MAX_BITS - MIN_BITS), 0.02), 0.98)
        self.initial_logit, self.logit_change = (
            math.log(bits_fraction / (1 - bits_fraction)),
            nn.Parameter(torch.zeros(1)),
        )
        self.final_bits = MIN_BITS  # until `round_bits_to_target` sets it

    @property
    def bits(self) -> Tensor:
        """The current bits, a real number from MIN_BITS to MAX_BITS, (1,)."""
        return MIN_BITS + (MAX_BITS - MIN_BITS) * torch.sigmoid(self.initial_logit + BITS_LR_FACTOR * self.logit_change)

    def decode(self) -> dict[str, Tensor]:
        if not self.training:
            return self._rounded(round(float(self.bits.detach()))).decode()
        low, high = self.value.detach().aminmax(dim=1, keepdim=True)
        step = (high - low) / (2**self.bits - 1)
        noise = torch.rand_like(self.value) - 0.5
        return {self.names[0]: (self.value + step * noise) * self.scale}

    def regularizer(self, weights: dict[str, Tensor]) -> Tensor:
        """The total bits of the weight."""
        return (self.bits * self.value.numel()).sum()

    def install_packed(self, model: nn.Module) -> None:
        self._rounded(self.final_bits).install_packed(model)

    def _rounded(self, bits: int) -> RowCoder:
        layer = nn.Linear(*reversed(self.value.shape), bias=False, device="meta")
        layer.weight = nn.Parameter((self.value * self.scale).detach())
        return RowCoder(self.names[0], layer, bits)


def round_bits_to_target(coders: Iterable[NoiseCoder], target: float) -> None:
    """Set each coder's `final_bits` to an integer, so that all weights together take at most `target` bits.

    The learned bits are rounded first. Then single bits are removed or added where rounding was furthest from the learned value.
    """
    coders = list(coders)
    learned = {coder: float(coder.bits.detach()) for coder in coders}
    for coder in coders:
        coder.final_bits = round(learned[coder])

    def bits_left() -> float:
        return target - sum(coder.final_bits * coder.value.numel() for coder in coders)

    while bits_left() < 0 and (reducible := [coder for coder in coders if coder.final_bits > MIN_BITS]):
        max(reducible, key=lambda coder: coder.final_bits - learned[coder]).final_bits -= 1
    while increasable := [
        coder for coder in coders if coder.final_bits < MAX_BITS and coder.value.numel() <= bits_left()
    ]:
        max(increasable, key=lambda coder: learned[coder] - coder.final_bits).final_bits += 1
