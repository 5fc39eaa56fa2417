"""Layer-wise error compensation: each layer is fitted to the inputs that the compressed layers before it really produce.

Let x be what arrives at a layer in the compressed model and t what the layer should answer: what it answers in the
given model and, where its output is added to the residual stream, also what the stream has lost by now. With
e = t - (W x + b) and covariances over the tokens of the calibration images, the correction with the least squared error
E||e - D (x - mean x)||^2 and a ridge is

    D = Cov(e, x) (Cov(x) + rho tr Cov(x) / n I)^-1,    W' = W + D,    b' = b + mean(e) - D mean(x).

A layer without a bias has nothing to take a mean: there the moments are about 0, E[e x^T] and E[x x^T].
Where nothing before the layer was compressed, e = 0 and so D = 0: without propagated inputs there is nothing to gain
beyond the best form of its rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitbench.calibration.moments import BATCH, watching
from vitbench.data.batches import eval_batches
from vitbench.data.splits import Split
from vitbench.model import blocks, vit
from vitbench.model.layers import SplitLinear


@dataclass(frozen=True)
class Mismatch:
    """Second moments of a layer's present inputs x and of its error e, about the means where it has a bias; float64.

    Attributes:
        tokens: how many were seen.
        covariance: Cov(x), or E[x x^T] where there is no bias, (in, in).
        mean: of x, (in,).
        cross: Cov(e, x), or E[e x^T], (out, in).
        error: mean of e, (out,).
        power: E||e||^2 before anything is done about it; of all parts together for a part of a split layer.
    """

    tokens: int
    covariance: Tensor
    mean: Tensor
    cross: Tensor
    error: Tensor
    power: float

    def correction(self, ridge: float) -> Tensor:
        """D (out, in)."""
        size = len(self.covariance)
        loaded = self.covariance + ridge * self.covariance.trace() / size * torch.eye(size, dtype=self.covariance.dtype)
        return torch.linalg.solve(loaded, self.cross.T).T

    def bias(self, change: Tensor) -> Tensor:
        """What to add to the bias (out,) of a layer that has one, where the weight is changed by `change` (out, in)."""
        return self.error - change @ self.mean


@torch.no_grad()
def mismatches(
    model: nn.Module, given: nn.Module, names: Sequence[str], split: Split
) -> Iterator[tuple[str, Mismatch]]:
    """The mismatch at each of the layers `names`, in the order of the forward pass.

    `model` and `given` are the same at first. Whoever takes a mismatch may replace that layer in `model` before asking
    for the next; what comes later sees it.
    """
    wanted = [vit.embed_patches(given, x) for x, _ in eval_batches(split, given.recipe.preprocess, BATCH)]
    present = wanted
    for index, (block, original) in enumerate(zip(model.blocks, given.blocks, strict=True)):
        prefix = f"blocks.{index}."
        own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        whole = {name.partition(".parts.")[0]: None for name in own}  # the parts of a split layer share their inputs
        layers = {name: original.get_submodule(name) for name in whole}
        answers: dict[str, list[Tensor]] = {name: [] for name in layers}
        wanted = [_answers(original, layers, tokens, answers) for tokens in wanted]
        for name, layer in layers.items():
            found, start = _mismatch(block, name, present, answers.pop(name), layer), 0
            for part, size in _parts(name, layer):
                rows = slice(start, start := start + size)
                if part in own:
                    yield prefix + part, replace(found, cross=found.cross[rows], error=found.error[rows])
        present = [block(tokens) for tokens in present]


def _parts(name: str, layer: nn.Module) -> list[tuple[str, int]]:
    """The layer, or the parts of a split one, by name with how many outputs each has."""
    if isinstance(layer, SplitLinear):
        return [(f"{name}.parts.{i}", size) for i, size in enumerate(layer.sizes)]
    return [(name, layer.out_features)]


def _answers(
    block: nn.Module, layers: dict[str, nn.Module], tokens: Tensor, answers: dict[str, list[Tensor]]
) -> Tensor:
    """What the block makes of `tokens`; adds to `answers` what the layers answer, with the stream that it is added to."""
    streams = {name: blocks.residual_source(block, name) for name in layers}
    norms = {name: block.get_submodule(name) for name in set(streams.values()) if name}
    stream: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if name in norms:
            stream[name] = x
        else:
            answers[name].append(y + stream[streams[name]] if streams[name] else y)

    with watching({**norms, **layers}, see):
        return block(tokens)


def _mismatch(block: nn.Module, name: str, present: list[Tensor], answers: list[Tensor], layer: nn.Module) -> Mismatch:
    inputs, outputs = layer.in_features, layer.out_features
    second = torch.zeros(inputs, inputs, dtype=torch.float64)
    cross = torch.zeros(outputs, inputs, dtype=torch.float64)
    mean, error = second.new_zeros(inputs), second.new_zeros(outputs)
    count, power, shift = 0, 0.0, None
    for tokens in present:
        x, stream = _arriving(block, name, tokens)
        wanted = answers.pop(0)
        e = (wanted if stream is None else wanted - stream) - layer(x)
        x, e = x.flatten(0, -2), e.flatten(0, -2)
        shift = x.mean(0) if shift is None else shift  # or a large mean would eat the covariance's digits
        x = x - shift
        count, power = count + len(x), power + float(e.double().square().sum())
        second += (x.T @ x).double()
        cross += (e.T @ x).double()
        mean += x.sum(0).double()
        error += e.sum(0).double()
    mean, error = mean / count, error / count
    covariance, cross = second / count - torch.outer(mean, mean), cross / count - torch.outer(error, mean)
    mean = mean + shift.double()
    if not _has_bias(layer):
        covariance, cross = covariance + torch.outer(mean, mean), cross + torch.outer(error, mean)
    return Mismatch(count, covariance, mean, cross, error, power / count)


def _has_bias(layer: nn.Module) -> bool:
    return layer.bias if isinstance(layer, SplitLinear) else layer.bias is not None


class _Enough(Exception):
    """Stops a forward pass once it has shown what it was run for."""


def _arriving(block: nn.Module, name: str, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The input of the layer `name` in `block`, and the stream that its output is added to, if it is."""
    norm, found = blocks.residual_source(block, name), {}

    def see(seen: str, x: Tensor, y: Tensor) -> None:
        found[seen] = x

    def stop(module: nn.Module, x: tuple) -> None:
        found[name] = x[0]
        raise _Enough

    handle = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        with watching({norm: block.get_submodule(norm)} if norm else {}, see):
            block(tokens)
    except _Enough:
        return found[name], found.get(norm)
    finally:
        handle.remove()
    raise RuntimeError(f"{name} is not called in its block")


def learned(
    weight: Tensor, left: Tensor, right: Tensor, mismatch: Mismatch, rank: int, steps: int, ridge: float
) -> tuple[Tensor, Tensor]:
    """A layer's factors after a compact residual of them has been learned by the gradient of the layer's output loss.

    Of W_r = A B the last `rank` components become the residual P Q, which so starts from the best of its rank; Adam then
    minimises E||t - (A' B' + P Q) x - b'||^2 plus the ridge on what it moves, from the second moments, which hold all of
    it. Returns [A' P] and [B'; Q].
    """
    rank = min(rank, left.shape[1])
    start, weight = left @ right, weight.detach().double()
    fixed = left[:, :-rank] @ right[:-rank]
    p, q = left[:, -rank:], right[-rank:]
    ratio = (q.norm(dim=1).clamp(min=1e-12) / p.norm(dim=0).clamp(min=1e-12)).sqrt()  # one step size suits both sides
    pair = [nn.Parameter(p * ratio), nn.Parameter(q / ratio[:, None])]
    covariance, load = mismatch.covariance, ridge * mismatch.covariance.trace() / len(mismatch.covariance)
    lost = (((start - weight) @ covariance) * (start - weight)).sum().clamp(min=1e-12)
    optimizer = torch.optim.Adam(pair, lr=0.01 * float(torch.cat([p.detach().flatten() for p in pair]).std()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            made = fixed + pair[0] @ pair[1]
            change = made - weight
            loss = ((change @ covariance - 2 * mismatch.cross) * change).sum() + load * (made - start).square().sum()
            optimizer.zero_grad()
            (loss / lost).backward()
            optimizer.step()
            schedule.step()
    left, right = left.clone(), right.clone()
    left[:, -rank:], right[-rank:] = pair[0].detach(), pair[1].detach()
    return left, right
