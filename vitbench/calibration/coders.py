"""Coders: trainable forms of weights. They are decoded for a forward pass, and packed into runtime layers at the end."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.calibration.quantizers import LearnedStep, runtime
from vitbench.model import vit
from vitbench.model.layers import PackedConv2d, PackedLinear


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


class CodedMatrix(nn.Module):
    """A tensor as trainable codes with a learned step for each row, or for each `group` of a row (LSQ); it returns the decoded one.

    It is trained in units of the root mean square of the values that share a step, so one learning rate suits all. Steps
    start from `step`, or from the least rounding error.
    """

    def __init__(self, matrix: Tensor, bits: float, group: int | None = None, step: Tensor | None = None):
        super().__init__()
        self.bits, self.group, self.shape = bits, group, matrix.shape
        rows = matrix.detach().flatten(1)
        rows = rows.reshape(-1, group or rows.shape[1])
        self.register_buffer("scale", rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-8))
        self.value = nn.Parameter(rows / self.scale)
        self.steps = LearnedStep(len(rows), bits, dim=1)
        if step is None:
            self.steps.init_from(self.value.detach())
        else:
            self.steps.step.data = step.reshape(-1, 1) / self.scale

    def forward(self) -> Tensor:
        return (self.steps(self.value) * self.scale).view(self.shape)

    def codes_and_steps(self) -> tuple[Tensor, Tensor]:
        """The present codes, integers (rows, group), and the steps, (rows,)."""
        codes, step, _ = self.steps.codes_and_steps(self.value)
        return codes, step * self.scale.flatten()


class RowCoder(CodedMatrix, Coder):
    """The coder of one weight: a `CodedMatrix`."""

    def __init__(self, name: str, module: nn.Module, bits: float, group: int | None = None, step: Tensor | None = None):
        super().__init__(module.weight, bits, group, step)
        self.names = [name]

    def decode(self) -> dict[str, Tensor]:
        return {self.names[0]: self()}

    def install_packed(self, model: nn.Module) -> None:
        old = model.get_submodule(self.names[0])
        codes, step = self.codes_and_steps()
        new = _packed_like(old, self.bits, self.group).set_codes(codes, step, old.bias)
        vit.replace_module(model, self.names[0], new)


def _packed_like(module: nn.Module, bits: float, group: int | None) -> PackedLinear | PackedConv2d:
    """An empty packed layer with the shape of `module`; it quantizes its inputs if `module` does."""
    bias = module.bias is not None
    if not isinstance(module, nn.Linear):
        return PackedConv2d(module.in_channels, module.out_channels, module.kernel_size[0], bits, bias)
    packed = PackedLinear(module.in_features, module.out_features, bits, bias, group)
    if isinstance(module, FakeQuantLinear):
        packed.input = runtime(module.input)
    return packed


class FakeQuantLinear(nn.Linear):
    """A linear layer with the weight and bias of `linear`, shared, whose inputs pass `quantizer` first."""

    def __init__(self, linear: nn.Linear, quantizer: nn.Module):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.input = linear.weight, linear.bias, quantizer

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


def check_group(inputs: Mapping[str, int], group: int | None) -> None:
    """Raise `InputError` if `group` does not divide the inputs of a matrix; `inputs` is matrix name -> inputs."""
    for name, count in inputs.items():
        if group and count % group:
            suitable_sizes = [size for size in (16, 32, 64, 128) if not any(each % size for each in inputs.values())]
            raise InputError(
                f"group = {group} does not divide the {count} inputs of {name}; give one that divides the inputs "
                f"of every layer{f', such as {suitable_sizes}' if suitable_sizes else ''}, or none for a step for each row"
            )
