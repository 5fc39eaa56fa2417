"""Low-rank forms of one weight matrix, W (out x in) ~ A B, nested: the first r columns and rows are the form of rank r.

`activation` is the closed form of the best one for the layer's outputs (lesson 03). With C the covariance of the inputs,
G = W C W^T = U diag(s^2) U^T and W_r = U_r U_r^T W: its squared error of the outputs, the mean over tokens of
||(W - W_r) x||^2, is the sum of the discarded s_i^2. The others are published rivals.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitbench.errors import InputError
from vitbench.moments import Moments, shrunk


@dataclass(frozen=True)
class Factors:
    """A (out, k) and B (k, in), most important component first, float64."""

    left: Tensor
    right: Tensor

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """A_r (out, rank) and B_r (rank, in)."""
        return self.left[:, :rank], self.right[:rank]

    def lost(self, covariance: Tensor) -> Tensor:
        """The mean squared error of the outputs, E||(W - A_r B_r) x||^2, for each rank r from 0 to k: (k + 1,).

        The components from r on leave out the sum over i, j >= r of (a_i . a_j) (b_i C b_j^T).
        """
        shares = (self.left.T @ self.left) * (self.right @ covariance @ self.right.T)
        tails = shares.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp(min=0)
        return torch.cat([tails, tails.new_zeros(1)])


def svd(weight: Tensor, moments: Moments, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The plain singular value decomposition: the least error of the weights, whatever passes through them."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u * s, v


def asvd(weight: Tensor, moments: Moments, covariance: Tensor, power: float = 0.5) -> tuple[Tensor, Tensor]:
    """ASVD (Yuan et al. 2023, arXiv 2312.05821): the SVD of W S, S = diag(E|x_j|^power), times S^-1."""
    scale = moments.magnitude.pow(power).clamp(min=1e-6 * float(moments.magnitude.max()) ** power)
    u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
    return u * s, v / scale


def svd_llm(weight: Tensor, moments: Moments, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """SVD-LLM (Wang et al. 2024, arXiv 2403.07378): the SVD of W L, L L^T = E[x x^T] (Cholesky), times L^-1.

    Moments that are singular, as those of a ViT's normalised tokens nearly are, get the least load on the diagonal that
    makes L exist.

    Raises:
        InputError: no load up to a millionth of the mean variance does.
    """
    for load in (0.0, 1e-12, 1e-9, 1e-6):
        lower, failed = torch.linalg.cholesky_ex(shrunk(moments.second, load))
        if not failed:
            break
    else:
        raise InputError(
            f"the inputs' second moments are singular (Cholesky fails at feature {int(failed)}) and svd_llm needs their "
            "inverse; take decomposition=activation, which needs none, or more calibration images"
        )
    u, s, v = torch.linalg.svd(weight @ lower, full_matrices=False)
    return u * s, torch.linalg.solve_triangular(lower, v, upper=False, left=False)


def activation(weight: Tensor, moments: Moments, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors of W C W^T, without an inverse and without a matrix larger than the smaller side of W."""
    outer, inner = torch.linalg.qr(weight) if weight.shape[0] > weight.shape[1] else (None, weight)
    _, vectors = torch.linalg.eigh(inner @ covariance @ inner.T)
    u = vectors.flip(1) if outer is None else outer @ vectors.flip(1)
    return u, u.T @ weight


DECOMPOSITIONS = {"svd": svd, "asvd": asvd, "svd_llm": svd_llm, "activation": activation}


def factorise(
    weight: Tensor, moments: Moments, covariance: Tensor, how: str = "activation", gradient_weight: float = 0.0
) -> Factors:
    """Factors of `weight` in the manner `how`.

    Args:
        weight: (out, in).
        moments: of the layer; `covariance` (in, in) is what errors of the outputs are measured with.
        gradient_weight: with g > 0 the errors of outputs count by Omega = I + g Gamma / mean(diag Gamma), Gamma the
            second moments of the loss's gradient there: the decomposition is that of Omega^(1/2) W. A change of
            outputs that the loss feels then costs more than one that it does not.
    """
    weight = weight.detach().double()
    if gradient_weight:
        gamma = moments.gradient.double() / max(moments.sensitivity, 1e-300)  # a layer may have no gradient at all
        lower = torch.linalg.cholesky(torch.eye(len(gamma), dtype=gamma.dtype) + gradient_weight * gamma)
        left, right = DECOMPOSITIONS[how](lower.T @ weight, moments, covariance)
        left = torch.linalg.solve_triangular(lower.T, left, upper=True)
    else:
        left, right = DECOMPOSITIONS[how](weight, moments, covariance)
    return Factors(left, right)
