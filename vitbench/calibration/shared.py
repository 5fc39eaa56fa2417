"""One factor for all blocks, in codes fitted to the layers' outputs: W_l ~ D Z_l, D (out x r) shared, Z_l (r x in).

D spans the directions in which the outputs of all blocks are largest: the first eigenvectors of

    G = sum_l W_l (C_l + f mean(eig C_l) I) W_l^T / tr(...),

with the inputs' second moments C_l; the floor f keeps directions that the calibration images do not show. D is rounded
first. Then, block by block, the weight W'_l that corrects the error of the layers before it (`compensation`) is projected on
the rounded D, P W'_l with P = (D^T D)^-1 D^T, and Z_l are its second-order codes (`gptq`) for the inputs that the
compressed model produces. Layers without a shared factor get second-order codes of their own, within the same pass.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.base.progress import progress_bar
from vitbench.calibration.coders import CodedMatrix, Coder, RowCoder
from vitbench.calibration.gptq import gptq_weight, replace_weights
from vitbench.calibration.moments import Moments
from vitbench.data.splits import Split
from vitbench.model import vit
from vitbench.model.layers import PackedLinear, SharedFactorLinear
from vitbench.model.layers.packed import TERNARY, coded_bytes

RANKS = (0.25, 0.36, 0.5, 0.7)  # tried, in shares of a type's outputs
LATENT_BITS, DENSE_BITS = (TERNARY, 2, 3), (TERNARY, 2, 3)
FLOOR = 0.3  # of the inputs' second moments, in units of their mean eigenvalue


@dataclass(frozen=True)
class FactorShape:
    """The rank of a layer type's factors, and the bits of D and of Z."""

    rank: int
    bits: float
    latent_bits: float


class SharedFactorCoder(Coder):
    """The coder of all layers of one type: a `CodedMatrix` for each Z and one for D.

    Args:
        kind: the layer type, which is also the shared factor's name in the model.
        targets: layer name -> the dense weight that D Z stands for (out, in).
        left: layer name -> Z (rank, in) and its steps.
        right: D (out, rank) and its steps.
        group: inputs of Z, and ranks of D, that share a step; None: a row.
    """

    def __init__(
        self,
        kind: str,
        targets: Mapping[str, Tensor],
        left: Mapping[str, tuple[Tensor, Tensor]],
        right: tuple[Tensor, Tensor],
        shape: FactorShape,
        group: int | None = None,
    ):
        super().__init__()
        self.kind, self.names, self.shape, self.group = kind, list(targets), shape, group
        self.left = nn.ModuleList(
            CodedMatrix(z, shape.latent_bits, group, step) for z, step in (left[name] for name in targets)
        )
        self.right = CodedMatrix(right[0], shape.bits, group, right[1])
        self.register_buffer("target", torch.stack([*targets.values()]))

    def decode(self) -> dict[str, Tensor]:
        right = self.right()
        return {name: right @ left() for name, left in zip(self.names, self.left, strict=True)}

    def regularizer(self, weights: dict[str, Tensor]) -> Tensor:
        return (torch.stack([weights[name] for name in self.names]) - self.target).square().mean()

    def install_packed(self, model: nn.Module) -> None:
        rank, out = self.shape.rank, self.right.shape[0]
        if not hasattr(model, "shared"):
            model.shared = nn.ModuleDict()
        factor = PackedLinear(rank, out, self.shape.bits, bias=False, group=self.group)
        codes, step = self.right.codes_and_steps()
        model.shared[self.kind] = factor.set_codes(codes, step, None)
        for name, left in zip(self.names, self.left, strict=True):
            old = model.get_submodule(name)
            new = SharedFactorLinear(
                old.in_features, out, rank, self.shape.latent_bits, self.kind, old.bias is not None, self.group
            )
            codes, step = left.codes_and_steps()
            new.down.set_codes(codes, step, None)
            if old.bias is not None:
                new.bias = old.bias.detach().float().clone()
            vit.replace_module(model, name, new)


def shared_codes(
    model: nn.Module,
    original: nn.Module,
    forms: Mapping[str, FactorShape | float],
    moments: Mapping[str, Moments],
    split: Split,
    group: int | None = None,
) -> list[Coder]:
    """Factor and round `model`'s layers in place, first to last, and return their coders.

    Args:
        original: a copy of the model, whose outputs the layers should keep.
        forms: layer type -> the shape of its factors, or the bits of its codes without factors.
        moments: of all layers' inputs in `original`.
    """
    by_type = {kind: vit.linear_layers(model, (kind,)) for kind in forms}
    shapes = {kind: form for kind, form in forms.items() if isinstance(form, FactorShape)}
    dense_bits = {kind: form for kind, form in forms.items() if not isinstance(form, FactorShape)}
    kinds = {name: kind for kind, layers in by_type.items() for name in layers}
    targets = {kind: {name: layer.weight.detach().clone() for name, layer in by_type[kind].items()} for kind in shapes}
    right, projections = {}, {}
    for kind, shape in shapes.items():
        directions = output_directions(by_type[kind], moments)
        right[kind], projections[kind] = _rounded_factor(directions, shape, group)
    left: dict[str, tuple[Tensor, Tensor]] = {}

    def approximate(name: str, weight: Tensor, covariance: Tensor) -> Tensor:
        kind = kinds[name]
        if kind in dense_bits:
            left[name] = gptq_weight(weight, covariance, dense_bits[kind], group)
            return left[name][0]
        left[name] = gptq_weight(projections[kind] @ weight, covariance, shapes[kind].latent_bits, group)
        return right[kind][0] @ left[name][0]

    layers = vit.linear_layers(model, tuple(by_type))
    replace_weights(model, original, layers, split, approximate, title="factoring")
    coders: list[Coder] = []
    for kind, shape in shapes.items():
        coders.append(SharedFactorCoder(kind, targets[kind], left, right[kind], shape, group))
    for kind, bits in dense_bits.items():
        coders += [RowCoder(name, layer, bits, group, left[name][1]) for name, layer in by_type[kind].items()]
    return coders


def _rounded_factor(
    directions: tuple[Tensor, Tensor], shape: FactorShape, group: int | None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """D in codes with its steps, and P, the projection on it (rank, out)."""
    values, vectors = (each[..., : shape.rank] for each in directions)
    right, step = gptq_weight(vectors, torch.diag(values), shape.bits, group)
    gram = right.double().T @ right.double()
    return (right, step), torch.linalg.solve(gram, right.double().T)


def output_directions(layers: Mapping[str, nn.Linear], moments: Mapping[str, Moments]) -> tuple[Tensor, Tensor]:
    """The eigenvalues of G, (out,), and eigenvectors, (out, out), largest first; float64."""
    gram = torch.zeros(())
    for name, layer in layers.items():
        second, weight = moments[name].second_moment, layer.weight.detach().double()
        floored = second + FLOOR * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
        outputs = weight @ floored @ weight.T
        gram = gram + outputs / outputs.trace()
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=1e-12), vectors.flip(1).contiguous()


def choose_forms(
    layers: Mapping[str, Mapping[str, nn.Linear]],
    moments: Mapping[str, Moments],
    budget: int,
    group: int | None = None,
    rest: str = "float16",
) -> dict[str, FactorShape | float]:
    """For each layer type, factors or codes alone: of all choices within `budget` bytes those with the least error.

    The error of a choice is the second-order term of the loss: the squared error of the layers' outputs for the original
    inputs, times their sensitivity, summed over the blocks. Ranks are `RANKS` of the outputs.

    Args:
        layers: layer type -> its layers by name.
        moments: of all layers, with gradients.

    Raises:
        InputError: no choice is within the budget.
    """
    choices = {kind: _choices(layers[kind], moments, group, rest) for kind in layers}
    sizes, errors = (
        sum(torch.meshgrid(*(torch.tensor([choice[i] for choice in each]) for each in choices.values()), indexing="ij"))
        for i in (0, 1)
    )
    if int(sizes.min()) > budget:
        raise InputError(
            f"target_bytes leaves {budget:,} bytes for the blocks' linear layers, and the smallest form takes {int(sizes.min()):,}; "
            f"give at least {int(sizes.min()) - budget:,} bytes more"
        )
    best = int(errors.masked_fill(sizes > budget, torch.inf).argmin())
    indices = torch.unravel_index(torch.tensor(best), sizes.shape)
    return {kind: choices[kind][int(i)][2] for kind, i in zip(choices, indices, strict=True)}


def _choices(
    layers: Mapping[str, nn.Linear], moments: Mapping[str, Moments], group: int | None, rest: str
) -> list[tuple[int, float, FactorShape | float]]:
    """(bytes, error, form) of each form of one layer type, without those that are larger and worse than another."""
    outputs, inputs = next(iter(layers.values())).weight.shape
    directions = output_directions(layers, moments)
    ranks = sorted({round(share * outputs / (group or 1)) * (group or 1) for share in RANKS} - {0})
    forms: list[FactorShape | float] = [*DENSE_BITS]
    forms += [FactorShape(rank, 4, bits) for rank in ranks for bits in LATENT_BITS]
    choices: list[tuple[int, float, FactorShape | float]] = []
    for form in progress_bar(forms, "forms of one layer type", unit="form"):
        right, projection = torch.eye(outputs), torch.eye(outputs, dtype=torch.float64)
        rows, bits, size, error = outputs, form, 0, 0.0
        if isinstance(form, FactorShape):
            (right, _), projection = _rounded_factor(directions, form, group)
            rows, bits, size = form.rank, form.latent_bits, coded_bytes(outputs, form.rank, form.bits, group, rest)
        size += len(layers) * coded_bytes(rows, inputs, bits, group, rest)
        for name, layer in layers.items():
            weight, covariance = layer.weight.detach().double(), moments[name].output_error_covariance(layer)
            rounded, _ = gptq_weight(projection @ weight, covariance, bits, group, refinements=0)
            change = (right @ rounded).double() - weight
            error += moments[name].sensitivity * float(((change @ covariance) * change).sum())
        choices.append((size, error, form))
    choices.sort(key=lambda choice: choice[:2])
    least = itertools.accumulate((choice[1] for choice in choices), min)
    return [choice for choice, error in zip(choices, least, strict=True) if choice[1] <= error]
