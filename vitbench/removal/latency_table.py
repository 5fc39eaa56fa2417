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
    """Seconds of attention by heads, their width and tokens, and of the MLP by neurons and tokens; linear in between.

    As a cost it adds up the blocks; what is outside of them (embedding, norms, head) is timed once as `rest`. It is eager
    mode with torch's present thread count, and assumes that parts take as long together as alone.
    """

    tokens: np.ndarray
    heads: np.ndarray
    head_dims: np.ndarray
    neurons: np.ndarray
    attention: np.ndarray
    mlp: np.ndarray
    rest: float

    def __call__(self, counts: Counts) -> np.ndarray:
        """Seconds for each of P policies: (P,)."""
        from scipy.interpolate import RegularGridInterpolator

        attention = RegularGridInterpolator((self.heads, self.head_dims, self.tokens), self.attention)
        mlp = RegularGridInterpolator((self.neurons, self.tokens), self.mlp)
        seconds = attention(np.stack([counts.heads, counts.head_dims, counts.before], -1))
        return self.rest + (seconds + mlp(np.stack([counts.neurons, counts.after], -1))).sum(-1)

    @classmethod
    @torch.inference_mode()
    def measured(cls, model: nn.Module, space: Space, batch: int) -> "LatencyTable":
        """Time parts of the model's first block at sizes that cover the space, for `batch` images."""
        block, whole = model.blocks[0], np.zeros(space.size)
        least = space.counts(whole + space.most)
        tokens = np.unique(np.linspace(least.after.min(), space.tokens, GRID).astype(int))
        heads = np.arange(1, space.heads.max() + 1)
        head_dims = np.unique([least.head_dims.min(), space.head_dims.max()])
        neurons = np.unique(np.linspace(least.neurons.min(), space.neurons.max(), GRID).astype(int))
        inputs = [torch.randn(batch, int(n), model.embed_dim) for n in tokens]
        attention = [_attention(block, int(h), int(width)) for h in heads for width in head_dims]
        parts = attention + [_mlp(block, int(n)) for n in neurons]
        times = np.array(
            [[_seconds(part, x) for x in inputs] for part in progress.bar(parts, "latency table", unit="part")]
        )
        by_part = times[: len(attention)].reshape(len(heads), len(head_dims), len(tokens)), times[len(attention) :]
        table = cls(tokens, heads, head_dims, neurons, *by_part, rest=0.0)
        size = model.recipe.preprocess.size
        rest = _seconds(model, torch.randn(batch, 3, size, size)) - float(table(space.counts(whole))[0])
        return dataclasses.replace(table, rest=max(0.0, rest))


def _attention(block: nn.Module, heads: int, head_dim: int) -> nn.Module:
    """Attention like this block's, with its norm, of another size and with random weights."""
    made, d = copy.deepcopy(block), block.attn.qkv.in_features
    blocks.size_attention(made.attn, heads, head_dim)
    made.attn.qkv = nn.Linear(d, 3 * made.attn.attn_dim, bias=made.attn.qkv.bias is not None)
    made.attn.proj = nn.Linear(made.attn.attn_dim, d)
    return nn.Sequential(made.norm1, made.attn).eval()


def _mlp(block: nn.Module, neurons: int) -> nn.Module:
    """An MLP like this block's, with its norm, of another size and with random weights."""
    made, d = copy.deepcopy(block), block.attn.qkv.in_features
    made.mlp.fc1, made.mlp.fc2 = nn.Linear(d, neurons), nn.Linear(neurons, d)
    return nn.Sequential(made.norm2, made.mlp).eval()


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    times = []
    for _ in range(CALLS + 5):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:]))
