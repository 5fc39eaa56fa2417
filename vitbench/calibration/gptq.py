"""Codes that keep a linear layer's outputs instead of its weights: second-order rounding (GPTQ, Frantar et al. 2022).

With H the covariance of the layer's inputs, or their second moments about 0 where it has no bias to take the mean error, the
mean squared error of its outputs is

    E = tr((W - Q) H (W - Q)^T),    Q_ij = s_ig q_ij

with a step s for each group g of a row's weights. Columns are rounded one after the other, and what is lost in one is made
up for by those that are not rounded yet; then steps and codes are improved in turn, each by its exact minimum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.calibration import compensation
from vitbench.calibration.quantizers import best_step, code_range, to_codes
from vitbench.data.splits import Split

BLOCK = 64  # columns whose corrections reach the later ones at once
ROWS = 32  # whose steps are solved for at once


@torch.no_grad()
def second_order(
    weight: Tensor, covariance: Tensor, bits: int, group: int, damping: float = 0.01, sweeps: int = 3
) -> tuple[Tensor, Tensor]:
    """Round a weight so that its outputs change least.

    Args:
        weight: (out, in).
        covariance: of the inputs (about 0 where the layer has no bias), (in, in).
        group: inputs that share a step; divides `in`.
        damping: added to the covariance's diagonal, in units of its mean.
        sweeps: how often steps and codes are improved afterwards.

    Returns:
        codes (out, in), whole numbers, and steps (out, in / group), both float32. A step may be negative.
    """
    w, size = weight.double(), len(covariance)
    h = covariance.double()
    h = h + damping * h.diagonal().mean() * torch.eye(size, dtype=h.dtype)
    codes, steps = _columns(w, h, bits, group)
    for _ in range(sweeps):
        steps = _better_steps(w, h, codes, steps, group)
        codes = _better_codes(w, h, codes, steps.repeat_interleave(group, 1), bits)
    return codes.float(), steps.float()


def round_in_turn(
    model: nn.Module,
    given: nn.Module,
    layers: Mapping[str, nn.Linear],
    bits: Mapping[str, int],
    split: Split,
    *,
    group: int | None = None,
    damping: float = 0.01,
    ridge: float = 1.0,
) -> dict[str, Tensor]:
    """Round `model`'s layers in place, first to last, each to what the rounded ones before it give it (`compensation`).

    Args:
        given: what the layers should answer like.
        bits: of each layer's codes.
        group: inputs that share a step; None: all of a row.
        ridge: of the compensation.

    Returns:
        Layer name -> its steps, as `second_order` has them.
    """
    steps = {}
    found = compensation.mismatches(model, given, list(layers), split)
    for name, mismatch in progress.progress_bar(found, "rounding", total=len(layers), unit="layer"):
        layer, size = layers[name], group or layers[name].in_features
        weight = layer.weight.detach().double()
        wanted = weight + mismatch.correction(ridge)
        codes, step = second_order(wanted, mismatch.covariance, bits[name], size, damping)
        rounded = codes * step.repeat_interleave(size, 1)
        if layer.bias is not None:
            layer.bias.data += mismatch.bias(rounded - weight).float()
        layer.weight.data, steps[name] = rounded, step
    return steps


def _columns(w: Tensor, h: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Column by column: with H^-1 = U^T U, the error e of column j moves the later ones by -e U_jk / U_jj."""
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, codes, steps = w.clone(), torch.empty_like(w), []
    for first in range(0, w.shape[1], group):
        span = slice(first, first + group)
        step = best_step(w[:, span], bits, 1, u.diagonal()[span] ** -2, signs=(1, -1))
        steps.append(step)
        for start in range(first, first + group, BLOCK):
            end = min(start + BLOCK, first + group)
            lost = torch.empty(len(w), end - start, dtype=w.dtype)
            for j in range(start, end):
                codes[:, j] = to_codes(w[:, j], step[:, 0], bits)
                lost[:, j - start] = (w[:, j] - codes[:, j] * step[:, 0]) / u[j, j]
                w[:, j:end] -= torch.outer(lost[:, j - start], u[j, j:end])
            w[:, end:] -= lost @ u[start:end, end:]
    return codes, torch.cat(steps, 1)


def _better_steps(w: Tensor, h: Tensor, codes: Tensor, steps: Tensor, group: int) -> Tensor:
    """The steps of least error for these codes: for each row the solution of A s = c over its groups.

    A_gk = q_g H_gk q_k and c_g = q_g (w H)_g. A group without codes keeps its step.
    """
    better = []
    for rows in torch.arange(len(w)).split(ROWS):
        q = codes[rows].unflatten(1, (-1, group))
        spread = torch.diag_embed(q.mT).permute(0, 2, 3, 1).flatten(2)  # (rows, groups, in): each group in its place
        a, c = spread @ h @ spread.mT, (spread @ (w[rows] @ h)[:, :, None])[..., 0]
        used = q.any(dim=2)
        a = a + torch.diag_embed((~used).to(a.dtype))
        better.append(torch.where(used, torch.linalg.solve(a, c), steps[rows]))
    return torch.cat(better)


def _better_codes(w: Tensor, h: Tensor, codes: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Each column's best codes while the others stay, one column after the other."""
    codes, (low, high) = codes.clone(), code_range(bits)
    residual = (w - codes * steps) @ h  # of all columns; kept up to date
    for j in range(w.shape[1]):
        wanted = codes[:, j] + residual[:, j] / (steps[:, j] * h[j, j])
        new = wanted.round().clamp(low, high)
        change = (new - codes[:, j]) * steps[:, j]
        codes[:, j] = new
        residual -= torch.outer(change, h[j])
    return codes
