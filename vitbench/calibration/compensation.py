"""Layer-wise error compensation: each layer is fitted to the inputs that the compressed layers before it produce.

Let x be a layer's input in the compressed model, and t its target: its output in the original model and, if that is added
to the residual stream, also the error that the stream has by then. With e = t - (W x + b) and covariances over the tokens
of the calibration images, the correction with the least squared error E||e - D (x - mean x)||^2 and a ridge is

    D = Cov(e, x) (Cov(x) + rho tr Cov(x) / n I)^-1,    W' = W + D,    b' = b + mean(e) - D mean(x).

A layer without a bias cannot correct a mean, so its moments are about 0: E[e x^T] and E[x x^T].
If nothing before the layer was compressed, e = 0 and D = 0: without propagated inputs the correction gains nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitbench.calibration.moments import CALIBRATION_BATCH, forward_hooks
from vitbench.data.batches import eval_batches
from vitbench.data.splits import Split
from vitbench.model import blocks, vit
from vitbench.model.layers import SplitLinear


@dataclass(frozen=True)
class ErrorMoments:
    """Second moments of a layer's present inputs x and its output error e, float64; about the means if it has a bias.

    Attributes:
        tokens: the number of tokens.
        covariance: Cov(x), or E[x x^T] without a bias, (in, in).
        mean: E[x], (in,).
        cross: Cov(e, x), or E[e x^T] without a bias, (out, in).
        mean_error: E[e], (out,).
        error_energy: E||e||^2 before the correction; for a part of a split layer that of all parts together.
    """

    tokens: int
    covariance: Tensor
    mean: Tensor
    cross: Tensor
    mean_error: Tensor
    error_energy: float

    def correction(self, ridge: float) -> Tensor:
        """The correction D of the weight, (out, in)."""
        size = len(self.covariance)
        regularised = self.covariance + ridge * self.covariance.trace() / size * torch.eye(
            size, dtype=self.covariance.dtype
        )
        return torch.linalg.solve(regularised, self.cross.T).T

    def bias_change(self, change: Tensor) -> Tensor:
        """The correction of a bias, (out,), if the weight is changed by `change` (out, in)."""
        return self.mean_error - change @ self.mean


@torch.no_grad()
def layer_error_moments(
    model: nn.Module, original: nn.Module, names: Sequence[str], split: Split
) -> Iterator[tuple[str, ErrorMoments]]:
    """Yield (name, error moments) of each layer in `names`, in the order of the forward pass.

    `model` starts as a copy of `original`. The caller may replace a layer in `model` before the next item: later layers then
    get the inputs that the replaced layer produces.
    """
    original_tokens = [
        vit.embed_patches(original, x) for x, _ in eval_batches(split, original.recipe.preprocess, CALIBRATION_BATCH)
    ]
    compressed_tokens = original_tokens
    for index, (block, original_block) in enumerate(zip(model.blocks, original.blocks, strict=True)):
        prefix = f"blocks.{index}."
        layer_names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        split_layers = {
            name.partition(".parts.")[0]: None for name in layer_names
        }  # the parts of a split layer share their inputs
        layers = {name: original_block.get_submodule(name) for name in split_layers}
        target_outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        original_tokens = [
            _run_original_block(original_block, layers, tokens, target_outputs) for tokens in original_tokens
        ]
        for name, layer in layers.items():
            error_moments, first_row = (
                _layer_error_moments(block, name, compressed_tokens, target_outputs.pop(name), layer),
                0,
            )
            for part, size in _parts(name, layer):
                rows = slice(first_row, first_row := first_row + size)
                if part in layer_names:
                    yield (
                        prefix + part,
                        replace(
                            error_moments, cross=error_moments.cross[rows], mean_error=error_moments.mean_error[rows]
                        ),
                    )
        compressed_tokens = [block(tokens) for tokens in compressed_tokens]


def _parts(name: str, layer: nn.Module) -> list[tuple[str, int]]:
    """(name, outputs) of the layer, or of each part of a split layer."""
    if isinstance(layer, SplitLinear):
        return [(f"{name}.parts.{i}", size) for i, size in enumerate(layer.sizes)]
    return [(name, layer.out_features)]


def _run_original_block(
    block: nn.Module, layers: dict[str, nn.Module], tokens: Tensor, target_outputs: dict[str, list[Tensor]]
) -> Tensor:
    """The block's output for `tokens`. Appends to `target_outputs` each layer's output, plus the stream it is added to."""
    streams = {name: blocks.residual_source(block, name) for name in layers}
    norms = {name: block.get_submodule(name) for name in set(streams.values()) if name}
    stream: dict[str, Tensor] = {}

    def on_call(name: str, x: Tensor, y: Tensor) -> None:
        if name in norms:
            stream[name] = x
        else:
            target_outputs[name].append(y + stream[streams[name]] if streams[name] else y)

    with forward_hooks({**norms, **layers}, on_call):
        return block(tokens)


def _layer_error_moments(
    block: nn.Module, name: str, compressed_tokens: list[Tensor], target_outputs: list[Tensor], layer: nn.Module
) -> ErrorMoments:
    inputs, outputs = layer.in_features, layer.out_features
    second = torch.zeros(inputs, inputs, dtype=torch.float64)
    cross = torch.zeros(outputs, inputs, dtype=torch.float64)
    mean, error = second.new_zeros(inputs), second.new_zeros(outputs)
    count, energy = 0, 0.0
    shift: Tensor | None = None
    for tokens in compressed_tokens:
        x, stream = _layer_input(block, name, tokens)
        target = target_outputs.pop(0)
        e = (target if stream is None else target - stream) - layer(x)
        x, e = x.flatten(0, -2), e.flatten(0, -2)
        shift = x.mean(0) if shift is None else shift  # a large mean would cancel the covariance's digits
        x = x - shift
        count, energy = count + len(x), energy + float(e.double().square().sum())
        second += (x.T @ x).double()
        cross += (e.T @ x).double()
        mean += x.sum(0).double()
        error += e.sum(0).double()
    mean, error = mean / count, error / count
    covariance, cross = second / count - torch.outer(mean, mean), cross / count - torch.outer(error, mean)
    assert shift is not None  # a split has at least one batch
    mean = mean + shift.double()
    if not _has_bias(layer):
        covariance, cross = covariance + torch.outer(mean, mean), cross + torch.outer(error, mean)
    return ErrorMoments(count, covariance, mean, cross, error, energy / count)


def _has_bias(layer: nn.Module) -> bool:
    return layer.bias if isinstance(layer, SplitLinear) else layer.bias is not None


class _StopForward(Exception):
    """Stops a forward pass once the layer's input is captured."""


def _layer_input(block: nn.Module, name: str, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The input of the layer `name` in `block`, and the residual stream that its output is added to, or None."""
    norm, captured = blocks.residual_source(block, name), {}

    def on_call(called: str, x: Tensor, y: Tensor) -> None:
        captured[called] = x

    def stop(module: nn.Module, x: tuple) -> None:
        captured[name] = x[0]
        raise _StopForward

    handle = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        with forward_hooks({norm: block.get_submodule(norm)} if norm else {}, on_call):
            block(tokens)
    except _StopForward:
        return captured[name], captured.get(norm)
    finally:
        handle.remove()
    raise RuntimeError(f"{name} is not called in its block")


def fit_compact_residual(
    weight: Tensor, left: Tensor, right: Tensor, error_moments: ErrorMoments, rank: int, steps: int, ridge: float
) -> tuple[Tensor, Tensor]:
    """Fit the last `rank` components of a layer's factors to the layer's target by gradient descent.

    W_r = A B is split into A' B' and a compact residual P Q, the last `rank` components. Adam minimises
    E||t - (A' B' + P Q) x - b'||^2 plus a ridge on the change of P Q, computed from the second moments alone.

    Args:
        weight: the layer's present weight, (out, in).
        left, right: A (out, k) and B (k, in), most important component first.

    Returns:
        [A' P] and [B'; Q].
    """
    rank = min(rank, left.shape[1])
    initial_product, weight = left @ right, weight.detach().double()
    fixed = left[:, :-rank] @ right[:-rank]
    p, q = left[:, -rank:], right[-rank:]
    ratio = (q.norm(dim=1).clamp(min=1e-12) / p.norm(dim=0).clamp(min=1e-12)).sqrt()  # one step size suits both sides
    pair = [nn.Parameter(p * ratio), nn.Parameter(q / ratio[:, None])]
    covariance, ridge_load = (
        error_moments.covariance,
        ridge * error_moments.covariance.trace() / len(error_moments.covariance),
    )
    initial_error = (((initial_product - weight) @ covariance) * (initial_product - weight)).sum().clamp(min=1e-12)
    optimizer = torch.optim.Adam(pair, lr=0.01 * float(torch.cat([p.detach().flatten() for p in pair]).std()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            product = fixed + pair[0] @ pair[1]
            change = product - weight
            loss = ((change @ covariance - 2 * error_moments.cross) * change).sum() + ridge_load * (
                product - initial_product
            ).square().sum()
            optimizer.zero_grad()
            (loss / initial_error).backward()
            optimizer.step()
            schedule.step()
    left, right = left.clone(), right.clone()
    left[:, -rank:], right[-rank:] = pair[0].detach(), pair[1].detach()
    return left, right
