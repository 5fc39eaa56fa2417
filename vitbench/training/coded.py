"""Training through codes: a ViT some of whose weights are decoded from coders at each step, and what it becomes.

Everything else of the ViT (norms, biases, embeddings) is tuned beside the coders (`vitbench.calibration.coders`) with a
learning rate and a weight decay of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.calibration.coders import Coder
from vitbench.calibration.quantizers import LearnedRange
from vitbench.data.splits import ImageData
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, fine_tune

MIN_FLOAT16 = 2.0**-24  # float16's least number above 0, a subnormal one


class CodedTrainingConfig(FineTuneConfig):
    """What methods that train codes have in common.

    Attributes:
        ends_bits: bits of the patch embedding and the head, one step for each output; None leaves them as they are.
        rest: how all that has no codes is stored.
        rest_lr: learning rate of the rest, as a multiple of `train.lr`.
    """

    ends_bits: int | None = Field(default=8, ge=2, le=8)
    rest: Literal["float16", "float32"] = "float16"
    rest_lr: float = Field(default=0.1, ge=0)


class CodedModel(nn.Module):
    """A ViT whose coded weights are decoded at each forward pass; while evaluating, once."""

    def __init__(self, model: nn.Module, coders: Sequence[Coder]):
        super().__init__()
        self.vit, self.coders, self.recipe = model, nn.ModuleList(coders), model.recipe
        self.embed_dim = model.embed_dim
        self.regularizer: Tensor | float = 0.0  # of the last forward pass in training
        self._decoded: dict[str, Tensor] | None = None
        model.requires_grad_(True)
        for coder in coders:
            for name in coder.names:
                model.get_submodule(name).weight.requires_grad_(False)

    def decode(self) -> dict[str, Tensor]:
        """The coded weights by parameter name. Fills `regularizer`."""
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
        """For the optimiser: coders and learned ranges without weight decay; the rest with it, except vectors."""
        codes = [p for p in self.coders.parameters() if p.requires_grad]
        codes += [p for module in self.vit.modules() if isinstance(module, LearnedRange) for p in module.parameters()]
        inside = {id(p) for p in codes}
        rest = [p for p in self.vit.parameters() if p.requires_grad and id(p) not in inside] if rest_lr else []
        return [
            {"params": codes, "weight_decay": 0.0, "lr_scale": 1.0},
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay, "lr_scale": rest_lr},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": rest_lr},
        ]

    def to_packed_model(self, rest: str) -> nn.Module:
        """The compressed model: runtime layers for what was coded, `rest` for the other tensors."""
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


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round all floating-point tensors to float16, subnormal numbers included, in place; they stay float32.

    A step that a layer divides by (`divisors`) becomes the least number of float16 where it would become 0.

    Raises:
        InputError: a value above float16's largest.
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
    settle: Callable[[], None] | None = None,
) -> nn.Module:
    """Train a coded model jointly, and finish it. Returns the compressed model, with the training's `history`.

    Args:
        penalty: turns the coders' regularizer into a term of the loss.
        settle: called after the training, before the weights are packed.
    """
    fine_tune(
        coded,
        config,
        data,
        teacher,
        groups=coded.param_groups(config.train, config.rest_lr),
        penalty=(lambda: penalty(coded.regularizer)) if penalty else None,
        title="training the codes",
    )
    if settle:
        settle()
    small = coded.cpu().to_packed_model(config.rest)
    small.history = coded.history
    return small
