"""A table of how long the parts of a block take on this machine, for a search under a budget of latency."""

import copy
import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vitbench import blocks, progress
from vitbench.removal.policy import Counts, Space

CALLS, GRID = 15, 5  # timed calls of each cell; places along neurons and along tokens


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of attention by heads and tokens, and of the MLP by neurons and tokens; what lies between is interpolated.

    As a cost it adds up the blocks; what is outside of them (embedding, norms, head) is timed once as `rest`. It is eager
    mode with torch's present thread count, and assumes that parts take as long together as alone.
    """

    tokens: np.ndarray
    heads: np.ndarray
    neurons: np.ndarray
    attention: np.ndarray
    mlp: np.ndarray
    rest: float

    def __call__(self, counts: Counts) -> np.ndarray:
        """Seconds for each of P policies: (P,)."""
        from scipy.interpolate import RegularGridInterpolator

        parts = (
            (self.attention, self.heads, counts.heads, counts.before),
            (self.mlp, self.neurons, counts.neurons, counts.after),
        )
        total = np.full(len(counts.heads), self.rest)
        for table, axis, units, tokens in parts:
            inside = RegularGridInterpolator((axis, self.tokens), table)
            total = total + inside(np.stack([units, tokens], -1)).sum(-1)
        return total

    @classmethod
    @torch.inference_mode()
    def measured(cls, model: nn.Module, space: Space, batch: int) -> "LatencyTable":
        """Time parts of the model's first block at sizes that cover the space, for `batch` images."""
        block, shape, whole = model.blocks[0], blocks.shapes(model)[0], np.zeros(2 * space.depth + 1)
        least = space.counts(whole + space.most)
        tokens = np.unique(np.linspace(least.after.min(), space.tokens, GRID).astype(int))
        heads = np.arange(1, space.heads.max() + 1)
        neurons = np.unique(np.linspace(least.neurons.min(), space.neurons.max(), GRID).astype(int))
        inputs = [torch.randn(batch, int(n), model.embed_dim) for n in tokens]
        parts = [_part(block, int(h), shape.neurons, attention=True) for h in heads]
        parts += [_part(block, 1, int(n), attention=False) for n in neurons]
        times = np.array(
            [[_seconds(part, x) for x in inputs] for part in progress.bar(parts, "latency table", unit="part")]
        )
        table = cls(tokens, heads, neurons, times[: len(heads)], times[len(heads) :], rest=0.0)
        size = model.recipe.preprocess.size
        rest = _seconds(model, torch.randn(batch, 3, size, size)) - float(table(space.counts(whole))[0])
        return dataclasses.replace(table, rest=max(0.0, rest))


def _part(block: nn.Module, heads: int, neurons: int, attention: bool) -> nn.Module:
    """Attention or MLP of a block like this one, with its norm, at these sizes and with random weights."""
    made = copy.deepcopy(block)
    attn, mlp, d = made.attn, made.mlp, made.attn.qkv.in_features
    blocks.size_attention(attn, heads, attn.head_dim)
    attn.qkv = nn.Linear(d, 3 * attn.attn_dim, bias=attn.qkv.bias is not None)
    attn.proj, mlp.fc1, mlp.fc2 = nn.Linear(attn.attn_dim, d), nn.Linear(d, neurons), nn.Linear(neurons, d)
    return nn.Sequential(made.norm1, attn).eval() if attention else nn.Sequential(made.norm2, mlp).eval()


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    times = []
    for _ in range(CALLS + 5):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:]))
