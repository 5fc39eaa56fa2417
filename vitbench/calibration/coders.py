"""Coders: trainable forms of weights. They are decoded for a forward pass, and packed into runtime layers at the end."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from vitbench.calibration.quantizers import LearnedRange, LearnedStep
from vitbench.model import vit
from vitbench.model.layers import PackedConv2d, PackedLinear, Rounded


class Coder(nn.Module, ABC):
    """The trainable form of the weights of the modules called `names`."""

    names: list[str]

    @abstractmethod
    def decode(self) -> dict[str, Tensor]:
        """Module name -> the weight that the codes stand for."""

    @abstractmethod
    def install_packed(self, model: nn.Module) -> None:
        """Replace the modules in `model` by runtime layers with the present codes, in place."""

    def regularizer(self, weights: dict[str, Tensor]) -> Tensor | float:
        """A loss on the decoded weights, to be added to the training loss; 0 by default."""
        return 0.0


class RowCoder(Coder):
    """Codes of one weight with a learned step for each output row, or for each `group` of a row's weights (LSQ).

    The weight is trained in units of the root mean square of the weights that share a step, so one learning rate suits all.
    Steps start from `step`, or from the least rounding error.
    """

    def __init__(self, name: str, module: nn.Module, bits: int, group: int | None = None, step: Tensor | None = None):
        super().__init__()
        self.names, self.bits, self.group, self.shape = [name], bits, group, module.weight.shape
        weight = module.weight.detach().flatten(1)
        weight = weight.reshape(-1, group or weight.shape[1])
        self.register_buffer("scale", weight.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-8))
        self.value = nn.Parameter(weight / self.scale)
        self.steps = LearnedStep(len(weight), bits, dim=1)
        if step is None:
            self.steps.init_from(self.value.detach())
        else:
            self.steps.step.data = step.reshape(-1, 1) / self.scale

    def decode(self) -> dict[str, Tensor]:
        return {self.names[0]: (self.steps(self.value) * self.scale).view(self.shape)}

    def install_packed(self, model: nn.Module) -> None:
        codes, step, _ = self.steps.codes_and_steps(self.value)
        old = model.get_submodule(self.names[0])
        new = _packed_like(old, self.bits, self.group).set_codes(codes, step * self.scale.flatten(), old.bias)
        vit.replace_module(model, self.names[0], new)


def _packed_like(module: nn.Module, bits: int, group: int | None) -> PackedLinear | PackedConv2d:
    """An empty packed layer with the shape of `module`; it quantizes its inputs if `module` does."""
    bias = module.bias is not None
    if not isinstance(module, nn.Linear):
        return PackedConv2d(module.in_channels, module.out_channels, module.kernel_size[0], bits, bias)
    packed = PackedLinear(module.in_features, module.out_features, bits, bias, group)
    if isinstance(module, FakeQuantLinear):
        packed.input = Rounded(module.input.bits).set_range(*module.input.bounds())
    return packed


class FakeQuantLinear(nn.Linear):
    """A linear layer with the weight and bias of `linear`, shared, that quantizes its inputs over a learned range."""

    def __init__(self, linear: nn.Linear, bits: int, low: float, high: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.input = LearnedRange(bits, low, high)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.input(x))


def embedding_and_head_coders(
    model: nn.Module, bits: int | None, names: Sequence[str] = vit.EMBEDDING_AND_HEADS
) -> list[Coder]:
    """Coders of the patch embedding and the heads, those in `names`; none if `bits` is None."""
    if bits is None:
        return []
    modules = vit.embedding_and_heads(model)
    return [RowCoder(name, module, bits) for name, module in modules.items() if name in names]
