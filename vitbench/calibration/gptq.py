"""Codes that keep a linear layer's outputs instead of its weights: second-order rounding (GPTQ, Frantar et al. 2022).

Let H be the covariance of the layer's inputs, or their second moments about 0 if it has no bias that takes the mean error.
The mean squared error of its outputs is

    E = tr((W - Q) H (W - Q)^T),    Q_ij = s_ig q_ij

with a step s for each group g of a row's weights. Columns are rounded one by one, and later columns compensate the error of
each. Then steps and codes are refined alternately, each to its exact minimum.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.calibration import compensation
from vitbench.calibration.quantizers import code_range, min_error_step, quantize
from vitbench.data.splits import Split

BLOCK = 64  # columns whose corrections are applied to the later ones in one product
ROWS = 32  # rows whose steps are solved for in one call


@torch.no_grad()
def gptq_codes(
    weight: Tensor, covariance: Tensor, bits: float, group: int, damping: float = 0.01, refinements: int = 3
) -> tuple[Tensor, Tensor]:
    """Round a weight with the least change of its outputs.

    Args:
        weight: (out, in).
        covariance: of the inputs (about 0 if the layer has no bias), (in, in).
        group: inputs that share a step; divides `in`.
        damping: added to the covariance's diagonal, in units of its mean.
        refinements: how often steps and codes are refined afterwards.

    Returns:
        Codes (out, in), integers, and steps (out, in / group), both in float32. A step may be negative.
    """
    w, size = weight.double(), len(covariance)
    h = covariance.double()
    h = h + damping * h.diagonal().mean() * torch.eye(size, dtype=h.dtype)
    codes, steps = _round_columns(w, h, bits, group)
    for _ in range(refinements):
        steps = _refine_steps(w, h, codes, steps, group)
        codes = _refine_codes(w, h, codes, steps.repeat_interleave(group, 1), bits)
    return codes.float(), steps.float()


def gptq_weight(
    weight: Tensor, covariance: Tensor, bits: float, group: int | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The weight (out, in) that `gptq_codes` stand for, and their steps; without a group each row has a step."""
    size = group or weight.shape[1]
    codes, steps = gptq_codes(weight, covariance, bits, size, **options)
    return codes * steps.repeat_interleave(size, 1), steps


def gptq_layers(
    model: nn.Module,
    original: nn.Module,
    layers: Mapping[str, nn.Linear],
    bits: Mapping[str, float],
    split: Split,
    *,
    group: int | None = None,
    damping: float = 0.01,
    ridge: float = 1.0,
) -> dict[str, Tensor]:
    """Round `model`'s layers in place, first to last, each for the inputs that the rounded layers produce (`compensation`).

    Args:
        original: the model whose outputs the layers should keep.
        bits: layer name -> bits of its codes.
        group: inputs that share a step; None: all inputs of a row.
        ridge: of the compensation.

    Returns:
        Layer name -> its steps, as from `gptq_codes`.
    """
    steps = {}

    def round_weight(name: str, target_weight: Tensor, covariance: Tensor) -> Tensor:
        rounded, steps[name] = gptq_weight(target_weight, covariance, bits[name], group, damping=damping)
        return rounded

    replace_weights(model, original, layers, split, round_weight, ridge)
    return steps


def replace_weights(
    model: nn.Module,
    original: nn.Module,
    layers: Mapping[str, nn.Linear],
    split: Split,
    approximate: Callable[[str, Tensor, Tensor], Tensor],
    ridge: float = 1.0,
    title: str = "rounding",
) -> None:
    """Replace `model`'s weights in place, first layer to last, each for the inputs that the replaced layers produce.

    Args:
        original: the model whose outputs the layers should keep.
        approximate: maps a layer's name, the weight that corrects the error of earlier layers (out, in) and the inputs'
            covariance (in, in) to the weight to store (out, in).
        ridge: of the correction (`compensation`).
    """
    all_error_moments = compensation.layer_error_moments(model, original, list(layers), split)
    for name, error_moments in progress.progress_bar(all_error_moments, title, total=len(layers), unit="layer"):
        layer = layers[name]
        weight = layer.weight.detach().double()
        new_weight = approximate(name, weight + error_moments.correction(ridge), error_moments.covariance)
        if layer.bias is not None:
            layer.bias.data += error_moments.bias_change(new_weight - weight).float()
        layer.weight.data = new_weight.float()


def _round_columns(w: Tensor, h: Tensor, bits: float, group: int) -> tuple[Tensor, Tensor]:
    """Round column by column: with H^-1 = U^T U, the error e of column j changes each later column k by -e U_jk / U_jj."""
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, codes, steps = w.clone(), torch.empty_like(w), []
    for first in range(0, w.shape[1], group):
        span = slice(first, first + group)
        step = min_error_step(w[:, span], bits, 1, u.diagonal()[span] ** -2, signs=(1, -1))
        steps.append(step)
        for start in range(first, first + group, BLOCK):
            end = min(start + BLOCK, first + group)
            column_errors = torch.empty(len(w), end - start, dtype=w.dtype)
            for j in range(start, end):
                codes[:, j] = quantize(w[:, j], step[:, 0], bits)
                column_errors[:, j - start] = (w[:, j] - codes[:, j] * step[:, 0]) / u[j, j]
                w[:, j:end] -= torch.outer(column_errors[:, j - start], u[j, j:end])
            w[:, end:] -= column_errors @ u[start:end, end:]
    return codes, torch.cat(steps, 1)


def _refine_steps(w: Tensor, h: Tensor, codes: Tensor, steps: Tensor, group: int) -> Tensor:
    """The steps with the least error for these codes: for each row the solution of A s = c over its groups.

    A_gk = q_g H_gk q_k and c_g = q_g (w H)_g. A group without codes keeps its step.
    """
    refined = []
    for rows in torch.arange(len(w)).split(ROWS):
        q = codes[rows].unflatten(1, (-1, group))
        group_codes = torch.diag_embed(q.mT).permute(0, 2, 3, 1).flatten(2)  # (rows, groups, in), 0 outside the group
        a, c = group_codes @ h @ group_codes.mT, (group_codes @ (w[rows] @ h)[:, :, None])[..., 0]
        has_codes = q.any(dim=2)
        a = a + torch.diag_embed((~has_codes).to(a.dtype))
        refined.append(torch.where(has_codes, torch.linalg.solve(a, c), steps[rows]))
    return torch.cat(refined)


def _refine_codes(w: Tensor, h: Tensor, codes: Tensor, steps: Tensor, bits: float) -> Tensor:
    """Set each column, one after the other, to its best codes while the others are fixed."""
    codes, (low, high) = codes.clone(), code_range(bits)
    residual = (w - codes * steps) @ h  # of all columns; updated with each column
    for j in range(w.shape[1]):
        optimum = codes[:, j] + residual[:, j] / (steps[:, j] * h[j, j])
        new = optimum.round().clamp(low, high)
        change = (new - codes[:, j]) * steps[:, j]
        codes[:, j] = new
        residual -= torch.outer(change, h[j])
    return codes
