"""Training of a ViT with coded weights: coders decode some of its weights at each step, and afterwards they are packed.

The other parameters (norms, biases, embeddings) are trained with the coders (`vitbench.calibration.coders`), at a learning
rate and a weight decay of their own.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.calibration.coders import Coder
from vitbench.calibration.quantizers import LearnedRange
from vitbench.data.splits import ImageData
from vitbench.model import vit
from vitbench.model.layers.packed import coded_bytes
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, fine_tune

MIN_FLOAT16 = 2.0**-24  # the smallest positive float16, a subnormal number


class CodedTrainingConfig(FineTuneConfig):
    """Settings shared by the methods that train coded weights.

    Attributes:
        ends_bits: bits of the patch embedding and the head, with one scale for each output; None does not quantize them.
        rest: storage type of all tensors without codes.
        rest_lr: learning rate of the parameters without codes, as a multiple of `train.lr`.
    """

    ends_bits: int | None = Field(default=8, ge=2, le=8)
    rest: Literal["float16", "float32"] = "float16"
    rest_lr: float = Field(default=0.1, ge=0)


class CodedModel(nn.Module):
    """A ViT that decodes its coded weights at each forward pass in training, and once in evaluation."""

    def __init__(self, model: nn.Module, coders: Sequence[Coder]):
        super().__init__()
        self.vit, self.coders, self.recipe = model, nn.ModuleList(coders), model.recipe
        self.embed_dim = model.embed_dim
        self.regularizer: Tensor | float = 0.0  # the coders' regularizers in the last forward pass, summed
        self._decoded: dict[str, Tensor] | None = None
        model.requires_grad_(True)
        for coder in coders:
            for name in coder.names:
                model.get_submodule(name).weight.requires_grad_(False)

    def decode(self) -> dict[str, Tensor]:
        """Decode the coded weights, by parameter name, and set `regularizer`."""
        weights: dict[str, Tensor] = {}
        self.regularizer = 0.0
        with torch.autocast(next(self.coders.parameters()).device.type, enabled=False):
            for coder in self.coders:
                decoded = coder.decode()
                self.regularizer = self.regularizer + coder.regularizer(decoded)
                weights |= {f"{name}.weight": weight for name, weight in decoded.items()}
        return weights

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            weights = self.decode()
        else:
            self._decoded = weights = self._decoded or self.decode()
        return torch.func.functional_call(self.vit, weights, (x,))

    def train(self, mode: bool = True) -> "CodedModel":
        self._decoded = None
        return super().train(mode)

    def param_groups(self, config: TrainConfig, rest_lr: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser, in three parts.

        Coders and learned ranges have no weight decay. The learning rate of the other parameters is multiplied by `rest_lr`, and
        only matrices among them have weight decay.
        """
        coder_params = [p for p in self.coders.parameters() if p.requires_grad]
        for module in self.vit.modules():
            if isinstance(module, LearnedRange):
                coder_params += module.parameters()
        coder_ids = {id(p) for p in coder_params}
        rest = [p for p in self.vit.parameters() if p.requires_grad and id(p) not in coder_ids] if rest_lr else []
        return [
            {"params": coder_params, "weight_decay": 0.0, "lr_scale": 1.0},
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay, "lr_scale": rest_lr},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": rest_lr},
        ]

    def to_packed_model(self, rest: str) -> nn.Module:
        """The compressed model: runtime layers hold the packed codes, and the other tensors are rounded to type `rest`."""
        model = self.vit
        for coder in self.coders:
            coder.install_packed(model)
        for module in model.modules():
            if hasattr(module, "bind_shared"):
                module.bind_shared(model.shared)
        if rest == "float16":
            round_to_half(model)
        model.recipe = model.recipe.replace(storage=rest)
        return model


def bytes_without(model: nn.Module, config: CodedTrainingConfig, layers: Collection[str]) -> int:
    """The bytes of all tensors but the weights of `layers`, with codes of `config.ends_bits`; no tensor names, no recipe."""
    width, total = getattr(torch, config.rest).itemsize, 0
    ends = {f"{name}.weight" for name in vit.embedding_and_heads(model)} if config.ends_bits else set()
    for key, tensor in model.state_dict().items():
        if key in ends:
            assert config.ends_bits is not None
            total += coded_bytes(len(tensor), tensor[0].numel(), config.ends_bits, None, config.rest)
        elif key.removesuffix(".weight") not in layers:
            total += tensor.numel() * width
    return total


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round all floating-point tensors to float16 values in place, subnormal numbers included; their type stays float32.

    A step that a layer divides by (listed in its `divisors`) becomes the smallest positive float16 where it would round to 0.

    Raises:
        InputError: a value exceeds the float16 range.
    """
    divisors = {id(getattr(layer, name)) for layer in model.modules() for name in getattr(layer, "divisors", ())}
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point():
            continue
        half = tensor.half().float()
        if not torch.isfinite(half).all():
            raise InputError("a value of the model does not fit float16; give rest=float32")
        if id(tensor) in divisors:
            half = torch.where((half == 0) & (tensor != 0), MIN_FLOAT16 * tensor.sign(), half)
        tensor.data.copy_(half)


def train_codes(
    coded: CodedModel,
    config: CodedTrainingConfig,
    data: ImageData | None,
    teacher: nn.Module | None,
    penalty: Callable[[Tensor], Tensor] | None = None,
    before_packing: Callable[[], None] | None = None,
) -> Compressed:
    """Train coders and other parameters together, then pack the weights.

    Args:
        penalty: maps the coders' regularizer to a term of the loss.
        before_packing: called after the training, before the weights are packed.
    """
    history = fine_tune(
        coded,
        config,
        data,
        teacher,
        groups=coded.param_groups(config.train, config.rest_lr),
        penalty=(lambda: penalty(coded.regularizer)) if penalty else None,
        title="training the codes",
    )
    if before_packing:
        before_packing()
    return Compressed(coded.cpu().to_packed_model(config.rest), history)
