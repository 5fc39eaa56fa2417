"""Coders: the trainable form of some weights, which they decode for a forward pass and at the end pack into runtime layers."""

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
        """Module name -> weight as it is after coding."""

    @abstractmethod
    def install(self, model: nn.Module) -> None:
        """Put runtime layers with the present codes into `model`."""

    def mismatch(self, weights: dict[str, Tensor]) -> Tensor | float:
        """The loss on the decoded weights themselves."""
        return 0.0


class RowCoder(Coder):
    """Codes of one weight, a learned step for each output row or each `group` of a row's weights (LSQ).

    The weight is trained in units of the root mean square of what shares a step, so that one learning rate suits all.
    It starts from the given steps, or from those that round best.
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
            self.steps.start(self.value.detach())
        else:
            self.steps.step.data = step.reshape(-1, 1) / self.scale

    def decode(self) -> dict[str, Tensor]:
        return {self.names[0]: (self.steps(self.value) * self.scale).view(self.shape)}

    def install(self, model: nn.Module) -> None:
        codes, step, _ = self.steps.export(self.value)
        old = model.get_submodule(self.names[0])
        new = _packed_like(old, self.bits, self.group).set_codes(codes, step * self.scale.flatten(), old.bias)
        vit.replace_module(model, self.names[0], new)


def _packed_like(module: nn.Module, bits: int, group: int | None) -> PackedLinear | PackedConv2d:
    """An empty packed layer of a dense one's shape; it rounds its inputs if the given one does."""
    bias = module.bias is not None
    if not isinstance(module, nn.Linear):
        return PackedConv2d(module.in_channels, module.out_channels, module.kernel_size[0], bits, bias)
    packed = PackedLinear(module.in_features, module.out_features, bits, bias, group)
    if isinstance(module, RoundingLinear):
        packed.input = Rounded(module.input.bits).set_range(*module.input.ends())
    return packed


class RoundingLinear(nn.Linear):
    """A linear layer, made of a given one, that rounds its inputs over a range which is learned."""

    def __init__(self, given: nn.Linear, bits: int, low: float, high: float):
        super().__init__(given.in_features, given.out_features, given.bias is not None, device="meta")
        self.weight, self.bias = given.weight, given.bias
        self.input = LearnedRange(bits, low, high)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.input(x))


def ends(model: nn.Module, bits: int | None, names: Sequence[str] = vit.EMBEDDING_AND_HEADS) -> list[Coder]:
    """Coders of the patch embedding and the head (or the ones in `names`), or none."""
    found = {} if bits is None else vit.embedding_and_heads(model)
    return [RowCoder(name, module, bits) for name, module in found.items() if name in names]
