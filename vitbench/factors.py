"""Factors with one side shared over depth: W_l^T ~ Z_l D for all blocks l, in closed form and as trainable codes."""

import torch
from torch import Tensor, nn

from vitbench import vit
from vitbench.batches import eval_batches
from vitbench.coded import Coder
from vitbench.data import Split
from vitbench.layers import FactoredLinear, SharedFactor
from vitbench.moments import watching
from vitbench.quantizers import LearnedStep


def stacked(layers: dict[str, nn.Linear]) -> Tensor:
    """M: the transposed weights (in, out) of one type, one below the other: (blocks in, out)."""
    return torch.cat([layer.weight.detach().T for layer in layers.values()])


@torch.inference_mode()
def output_grams(
    model: nn.Module, layers: dict[str, nn.Linear], split: Split, batch_size: int = 32
) -> dict[str, Tensor]:
    """For each layer, the sum over the tokens of `split` of y y^T with y = W x, without the bias: (out, out), float64."""
    grams = {
        name: torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64) for name, layer in layers.items()
    }

    def add(name: str, _: Tensor, y: Tensor) -> None:
        bias = layers[name].bias
        y = (y if bias is None else y - bias).flatten(0, -2)
        grams[name] += (y.T @ y).double()

    with watching(layers, add):
        for x, _ in eval_batches(split, model.recipe.preprocess, batch_size):
            model(x)
    return grams


def closed_form(target: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Z (rows, rank) and D (rank, out) with the least error of M ~ Z D, D with orthonormal rows.

    Without a gram the error is ||M - Z D||, and D is the `rank` first right singular vectors of M. With the gram of
    the layers' outputs, G = sum_l M_l^T C_l M_l where C_l holds the inputs' second moments, it is that of the outputs,
    sum_l ||X_l (M_l - Z_l D)||: D is then the first eigenvectors of G. In both, Z = M D^T.
    """
    gram = target.double().T @ target.double() if gram is None else gram
    _, vectors = torch.linalg.eigh(gram)
    right = vectors[:, -rank:].flip(1).T.contiguous().float()
    return target @ right.T, right


class Free(nn.Module):
    """The left factor itself as the parameter, in units of each column's root mean square."""

    def __init__(self, start: Tensor):
        super().__init__()
        scale = start.square().mean(dim=0, keepdim=True).sqrt().clamp(min=1e-8)
        self.value = nn.Parameter(start / scale)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        return self.value


class Encoder(nn.Module):
    """The paper's encoder, ((M A1 + B1) G1^T G2^T) A2 + B2: affine by element, two linear maps, affine by element.

    It is linear in the constant M and is thrown away after the training. Hidden widths are the official code's: 2 d
    for qkv and fc1, d for proj and fc2.
    """

    def __init__(self, target: Tensor, hidden: int, rank: int):
        super().__init__()
        rows, out = target.shape
        self.register_buffer("target", target)
        self.register_buffer("scale", torch.ones(1, rank))
        self.scale_in, self.shift_in = nn.Parameter(torch.ones(rows, out)), nn.Parameter(torch.zeros(rows, out))
        self.first, self.second = nn.Linear(out, hidden, bias=False), nn.Linear(hidden, rank, bias=False)
        self.scale_out, self.shift_out = nn.Parameter(torch.ones(rows, rank)), nn.Parameter(torch.zeros(rows, rank))

    def forward(self) -> Tensor:
        return self.second(self.first(self.target * self.scale_in + self.shift_in)) * self.scale_out + self.shift_out


class FactorCoder(Coder):
    """All layers of one type as codes of Z (a step and a zero point for each rank column) times codes of D (a step for
    each output).

    Args:
        kind: the layer type, which names the shared factor in the model.
        layers: the dense layers by name, all of one shape.
        left: `Free` or `Encoder`; makes Z (blocks in, rank) in units of its `scale`.
        right: D (rank, out) to start from.
    """

    def __init__(self, kind: str, layers: dict[str, nn.Linear], left: nn.Module, right: Tensor, bits: int):
        super().__init__()
        self.kind, self.names, self.bits, self.left = kind, list(layers), bits, left
        self.quantized = True
        self.register_buffer("target", stacked(layers))
        self.register_buffer(
            "right_scale", right.square().mean().sqrt().clamp(min=1e-8) if isinstance(left, Free) else torch.ones(())
        )
        self.right = nn.Parameter(right / self.right_scale)
        self.left_steps = LearnedStep(right.shape[0], bits, dim=0, zero_point=True)
        self.right_steps = LearnedStep(right.shape[1], bits, dim=0)

    @property
    def rank(self) -> int:
        """Columns of Z."""
        return len(self.right)

    @torch.no_grad()
    def start_steps(self, rule: str) -> None:
        """Set the quantizers' steps from the present factors."""
        self.left_steps.start(self.left(), rule)
        self.right_steps.start(self.right, rule)

    def product(self) -> Tensor:
        """Z D (blocks in, out)."""
        left, right = self.left(), self.right
        if self.quantized:
            left, right = self.left_steps(left), self.right_steps(right)
        return (left * self.left.scale) @ (right * self.right_scale)

    def decode(self) -> dict[str, Tensor]:
        chunks = self.product().chunk(len(self.names))
        return {name: chunk.T for name, chunk in zip(self.names, chunks, strict=True)}

    def mismatch(self, weights: dict[str, Tensor]) -> Tensor:
        decoded = torch.cat([weights[name].T for name in self.names])
        return (decoded - self.target).square().mean()

    def install(self, model: nn.Module) -> None:
        codes, step, _ = self.right_steps.export(self.right)
        latent, latent_step, zero = self.left_steps.export(self.left())
        offset = 2 ** (self.bits - 1)
        factor = SharedFactor(self.rank, self.right.shape[1], self.bits)
        factor.fill(codes, step * self.right_scale, latent_step * self.left.scale.flatten(), zero + offset)
        if not hasattr(model, "shared"):
            model.shared = nn.ModuleDict()
        model.shared[self.kind] = factor
        for name, chunk in zip(self.names, latent.chunk(len(self.names)), strict=True):
            old = model.get_submodule(name)
            new = FactoredLinear(
                old.in_features, old.out_features, self.rank, self.bits, self.kind, old.bias is not None
            )
            vit.replace_module(model, name, new.fill(chunk + offset, old.bias))
