"""The Hilbert-Schmidt independence criterion: how much one variable depends on another, from samples of both.

Gretton et al. (2005): HSIC = tr(K H L H) / (n - 1)^2 with the kernel matrices K and L of the n samples of each variable
and H = I - 1 1^T / n. It is zero in the limit exactly when the variables are independent, if the kernels are Gaussian.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


def gaussian_mixture(x: Tensor, widths: Sequence[float] = WIDTHS) -> Tensor:
    """The mean over sigma of exp(-||x_i - x_j||^2 / (2 sigma^2)): (..., n, d) -> (..., n, n)."""
    products = x @ x.transpose(-2, -1)
    power = products.diagonal(dim1=-2, dim2=-1)
    apart = (power[..., :, None] + power[..., None, :] - 2 * products).clamp_(min=0)
    mixture = torch.zeros_like(apart)
    for width in widths:
        mixture += torch.exp(apart * (-0.5 / width**2))
    return mixture / len(widths)


def linear(x: Tensor) -> Tensor:
    """x_i . x_j: (..., n, d) -> (..., n, n)."""
    return x @ x.transpose(-2, -1)


def centred(kernel: Tensor) -> Tensor:
    """H K H: (..., n, n) -> (..., n, n)."""
    rows = kernel.mean(-1, keepdim=True)
    return kernel - rows - rows.transpose(-2, -1) + rows.mean(-2, keepdim=True)


def hsic(kernel: Tensor, other: Tensor) -> Tensor:
    """tr(K H L H) / (n - 1)^2 of two kernel matrices (..., n, n), which may be broadcast: (...)."""
    n = kernel.shape[-1]
    return (kernel * centred(other)).sum((-2, -1)) / (n - 1) ** 2


def standardised(x: Tensor, how: str, eps: float = 1e-5) -> Tensor:
    """Samples (..., n, d) feature by feature, over the samples.

    "corrected": (x - mean) / (std + eps). "official": x - mean / (std + eps), as the paper's public code has it without
    the parentheses. "none": as they are.
    """
    if how == "none":
        return x
    mean, spread = x.mean(-2, keepdim=True), x.std(-2, keepdim=True) + eps
    return (x - mean) / spread if how == "corrected" else x - mean / spread
