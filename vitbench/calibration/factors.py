"""Low-rank factors of weight matrices in closed form: of one matrix, or with one factor that all blocks share.

One matrix is W (out x in) ~ A B. The factors are nested: the first r columns and rows are the factors of rank r. "activation"
has the least error of the layer's outputs (lesson 05): with the inputs' covariance C, G = W C W^T = U diag(s^2) U^T and
W_r = U_r U_r^T W, the mean squared error of the outputs, E||(W - W_r) x||^2, is the sum of the discarded s_i^2. The other
decompositions are published ones, for comparison. With a shared factor, W_l^T ~ Z_l D for all blocks l, which also have
trainable codes (`vitbench.methods.uct`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.calibration.coders import Coder
from vitbench.calibration.moments import Moments, forward_hooks, shrink_towards_identity
from vitbench.calibration.quantizers import LearnedStep
from vitbench.data.batches import eval_batches
from vitbench.data.splits import Split
from vitbench.model import vit
from vitbench.model.layers import FactoredLinear, SharedFactor


def stack_weights(layers: dict[str, nn.Linear]) -> Tensor:
    """M, the transposed weights (in, out) of one layer type stacked by rows: (blocks in, out)."""
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

    with forward_hooks(layers, add):
        for x, _ in eval_batches(split, model.recipe.preprocess, batch_size):
            model(x)
    return grams


def closed_form_factors(target: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Z (rows, rank) and D (rank, out) with the least error of M ~ Z D; D has orthonormal rows, and Z = M D^T.

    Without `gram` the error is ||M - Z D||, and D has the first `rank` right singular vectors of M. With the gram of the
    layers' outputs, G = sum_l M_l^T C_l M_l with the inputs' second moments C_l, the error is that of the outputs,
    sum_l ||X_l (M_l - Z_l D)||, and D has the first eigenvectors of G.
    """
    gram = target.double().T @ target.double() if gram is None else gram
    _, vectors = torch.linalg.eigh(gram)
    right = vectors[:, -rank:].flip(1).T.contiguous().float()
    return target @ right.T, right


class DirectFactor(nn.Module):
    """The left factor as a parameter, in units of each column's root mean square."""

    def __init__(self, start: Tensor):
        super().__init__()
        scale = start.square().mean(dim=0, keepdim=True).sqrt().clamp(min=1e-8)
        self.value = nn.Parameter(start / scale)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        return self.value


class Encoder(nn.Module):
    """UCT's encoder, ((M A1 + B1) G1^T G2^T) A2 + B2: elementwise affine, two linear maps, elementwise affine.

    It is linear in the constant M and is not stored after training. The hidden widths are those of the official code: 2 d
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
    """Coder of all layers of one type, as codes of Z times codes of D.

    Z has a step and a zero point for each of its columns, D a step for each output.

    Args:
        kind: the layer type, which is also the shared factor's name in the model.
        layers: the dense layers by name, all of one shape.
        left: a `DirectFactor` or an `Encoder`; it computes Z (blocks in, rank) in units of its `scale`.
        right: the start of D, (rank, out).
    """

    def __init__(self, kind: str, layers: dict[str, nn.Linear], left: nn.Module, right: Tensor, bits: int):
        super().__init__()
        self.kind, self.names, self.bits, self.left = kind, list(layers), bits, left
        self.quantized = True
        self.register_buffer("target", stack_weights(layers))
        self.register_buffer(
            "right_scale",
            right.square().mean().sqrt().clamp(min=1e-8) if isinstance(left, DirectFactor) else torch.ones(()),
        )
        self.right = nn.Parameter(right / self.right_scale)
        self.left_steps = LearnedStep(right.shape[0], bits, dim=0, zero_point=True)
        self.right_steps = LearnedStep(right.shape[1], bits, dim=0)

    @property
    def rank(self) -> int:
        """The number of columns of Z."""
        return len(self.right)

    @torch.no_grad()
    def init_steps(self, rule: str) -> None:
        """Set the quantizers' steps from the present factors."""
        self.left_steps.init_from(self.left(), rule)
        self.right_steps.init_from(self.right, rule)

    def product(self) -> Tensor:
        """Z D (blocks in, out)."""
        z, d = self.left(), self.right
        if self.quantized:
            z, d = self.left_steps(z), self.right_steps(d)
        return (z * self.left.scale) @ (d * self.right_scale)

    def decode(self) -> dict[str, Tensor]:
        chunks = self.product().chunk(len(self.names))
        return {name: chunk.T for name, chunk in zip(self.names, chunks, strict=True)}

    def regularizer(self, weights: dict[str, Tensor]) -> Tensor:
        decoded = torch.cat([weights[name].T for name in self.names])
        return (decoded - self.target).square().mean()

    def install_packed(self, model: nn.Module) -> None:
        codes, step, _ = self.right_steps.codes_and_steps(self.right)
        latent, latent_step, zero = self.left_steps.codes_and_steps(self.left())
        offset = 2 ** (self.bits - 1)
        factor = SharedFactor(self.rank, self.right.shape[1], self.bits)
        factor.set_codes(codes, step * self.right_scale, latent_step * self.left.scale.flatten(), zero + offset)
        if not hasattr(model, "shared"):
            model.shared = nn.ModuleDict()
        model.shared[self.kind] = factor
        for name, chunk in zip(self.names, latent.chunk(len(self.names)), strict=True):
            old = model.get_submodule(name)
            new = FactoredLinear(
                old.in_features, old.out_features, self.rank, self.bits, self.kind, old.bias is not None
            )
            vit.replace_module(model, name, new.set_codes(chunk + offset, old.bias))


@dataclass(frozen=True)
class Factors:
    """A (out, k) and B (k, in), most important component first, float64."""

    left: Tensor
    right: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """A_r (out, rank) and B_r (rank, in)."""
        return self.left[:, :rank], self.right[:rank]

    def output_error_by_rank(self, covariance: Tensor) -> Tensor:
        """The mean squared error of the outputs, E||(W - A_r B_r) x||^2, for each rank r from 0 to k: (k + 1,).

        It is the sum of (a_i . a_j) (b_i C b_j^T) over the discarded components i, j >= r.
        """
        products = (self.left.T @ self.left) * (self.right @ covariance @ self.right.T)
        tails = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp(min=0)
        return torch.cat([tails, tails.new_zeros(1)])


def svd(weight: Tensor, moments: Moments, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The plain singular value decomposition: the least error of the weights, whatever the inputs are."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u * s, v


def asvd(weight: Tensor, moments: Moments, covariance: Tensor, power: float = 0.5) -> tuple[Tensor, Tensor]:
    """ASVD (Yuan et al. 2023, arXiv 2312.05821): the SVD of W S, S = diag(E|x_j|^power), times S^-1."""
    scale = moments.mean_abs.pow(power).clamp(min=1e-6 * float(moments.mean_abs.max()) ** power)
    u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
    return u * s, v / scale


def svd_llm(weight: Tensor, moments: Moments, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """SVD-LLM (Wang et al. 2024, arXiv 2403.07378): the SVD of W L, L L^T = E[x x^T] (Cholesky), times L^-1.

    The moments of a ViT's normalised tokens are nearly singular, so the smallest damping is added for which L exists.

    Raises:
        InputError: L does not exist with a damping of a millionth of the mean variance.
    """
    for damping in (0.0, 1e-12, 1e-9, 1e-6):
        cholesky, failed_minor = torch.linalg.cholesky_ex(shrink_towards_identity(moments.second_moment, damping))
        if not failed_minor:
            break
    else:
        raise InputError(
            f"the inputs' second moments are singular (Cholesky fails at feature {int(failed_minor)}), and svd_llm needs their "
            "inverse; set decomposition=activation, which needs none, or use more calibration images"
        )
    u, s, v = torch.linalg.svd(weight @ cholesky, full_matrices=False)
    return u * s, torch.linalg.solve_triangular(cholesky, v, upper=False, left=False)


def activation_aware_svd(weight: Tensor, moments: Moments, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Activation-aware SVD: A has the eigenvectors of W C W^T, B = A^T W.

    It needs no inverse, and no matrix larger than the smaller side of W.
    """
    outer, inner = torch.linalg.qr(weight) if weight.shape[0] > weight.shape[1] else (None, weight)
    _, vectors = torch.linalg.eigh(inner @ covariance @ inner.T)
    u = vectors.flip(1) if outer is None else outer @ vectors.flip(1)
    return u, u.T @ weight


DECOMPOSITIONS = {"svd": svd, "asvd": asvd, "svd_llm": svd_llm, "activation": activation_aware_svd}


def factorise(
    weight: Tensor,
    moments: Moments,
    covariance: Tensor,
    decomposition: str = "activation",
    gradient_weight: float = 0.0,
) -> Factors:
    """Factor `weight` by one of `DECOMPOSITIONS`.

    Args:
        weight: (out, in).
        moments: of the layer.
        covariance: of the inputs, with which the error of the outputs is measured, (in, in).
        gradient_weight: g. If it is positive, output errors are weighted by Omega = I + g Gamma / mean(diag Gamma), where
            Gamma is `moments.gradient`: Omega^(1/2) W is decomposed. Output changes that change the loss then cost more.
    """
    weight = weight.detach().double()
    if gradient_weight:
        gamma = moments.gradient.double() / max(moments.sensitivity, 1e-300)  # a layer's gradient may be 0
        lower = torch.linalg.cholesky(torch.eye(len(gamma), dtype=gamma.dtype) + gradient_weight * gamma)
        left, right = DECOMPOSITIONS[decomposition](lower.T @ weight, moments, covariance)
        left = torch.linalg.solve_triangular(lower.T, left, upper=True)
    else:
        left, right = DECOMPOSITIONS[decomposition](weight, moments, covariance)
    return Factors(left, right)
