"""A table of how long the parts of a block take on this machine, for a search under a budget of latency."""

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
        d, block = model.embed_dim, model.blocks[0]
        most = space.most
        least = space.counts(np.full(2 * space.depth + 1, most))
        tokens = np.unique(np.linspace(least.after.min(), space.tokens, GRID).astype(int))
        heads = np.arange(1, space.heads.max() + 1)
        neurons = np.unique(np.linspace(least.neurons.min(), space.neurons.max(), GRID).astype(int))
        whole = blocks.shapes(model)[0]
        cells = [(h, whole.neurons, n) for h in heads for n in tokens] + [(1, w, n) for w in neurons for n in tokens]
        times = []
        for place, (h, w, n) in enumerate(progress.bar(cells, "latency table", unit="cell")):
            part = _part(block, d, int(h), whole.head_dim, int(w), attention=place < len(heads) * len(tokens))
            times.append(_seconds(part, torch.randn(batch, int(n), d)))
        attention, mlp = np.split(np.array(times), [len(heads) * len(tokens)])
        table = cls(tokens, heads, neurons, attention.reshape(len(heads), -1), mlp.reshape(len(neurons), -1), 0.0)
        size = model.recipe.preprocess.size
        alone = float(table(space.counts(np.zeros(2 * space.depth + 1)))[0])
        rest = max(0.0, _seconds(model, torch.randn(batch, 3, size, size)) - alone)
        return cls(tokens, heads, neurons, table.attention, table.mlp, rest)


def _part(block: nn.Module, d: int, heads: int, head_dim: int, neurons: int, attention: bool) -> nn.Module:
    """Attention or MLP of a block like this one, with its norm, at these sizes and with random weights."""
    kind = type(block)
    bias = block.attn.qkv.bias is not None
    made = kind(d, heads if d % heads == 0 else 1, mlp_ratio=neurons / d, qkv_bias=bias)
    blocks.size_attention(made.attn, heads, head_dim)
    made.attn.qkv = nn.Linear(d, 3 * heads * head_dim, bias=bias)
    made.attn.proj = nn.Linear(heads * head_dim, d)
    return nn.Sequential(made.norm1, made.attn).eval() if attention else nn.Sequential(made.norm2, made.mlp).eval()


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    times = []
    for _ in range(CALLS + 5):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:]))
