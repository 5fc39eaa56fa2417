"""Fewer tokens: after the attention of some blocks only a part of them goes on to the MLP and to later blocks.

- `cls_attention` keeps the tokens that the class token attends to most (mean over heads), as EViT does (Liang et al.
  2022), and adds one token, the plain mean of those that go.
- `hsic` does so by a score of each position that was found beforehand (`vitbench.removal.criteria.positions`), `hsic_cls` by the
  product of both.
- `merge` loses none: the most similar pairs are averaged (token merging, Bolya et al. 2023), and attention counts a
  token as often as it has tokens in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.model.layers.attention import softmax_attention


def most_merged(tokens: int, prefix: int) -> int:
    """How many of `tokens` may go where they are merged in pairs: half of those that are not in the prefix."""
    return max(0, (tokens - prefix) // 2)


def merged_counts(wanted: Sequence[int | None], tokens: int, prefix: int) -> list[int | None]:
    """The `counts` of `TokenBlocks` as merging in pairs reaches them, where fewer are wanted than that."""
    reached = []
    for count in wanted:
        least = tokens - most_merged(tokens, prefix)
        reached.append(None if count is None else max(count, min(least, tokens)))
        tokens = min(tokens, reached[-1] or tokens)
    return reached


@dataclass
class State:
    """The tokens on their way: `x` (B, N, d), and what is known of each.

    Attributes:
        sizes: how many tokens are in each, (B, N); None until some are merged.
        scores: of the positions, (B, N); None where they do not count.
        source: which token each of the first N_0 tokens is in now, (B, N_0).
    """

    x: Tensor
    sizes: Tensor | None = None
    scores: Tensor | None = None
    source: Tensor | None = None


class TokenBlocks(nn.Sequential):
    """A ViT's blocks with fewer tokens on the way; it stands in the place of the plain sequence.

    Args:
        blocks: timm's blocks.
        reduction: "cls_attention", "hsic", "hsic_cls" or "merge".
        counts: tokens left after the attention of each block, class and fused token included; None: all.
        prefix: how many class and register tokens come first; they always stay.
        tokens: how many tokens come in.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], reduction: str, counts: Sequence[int | None], prefix: int, tokens: int
    ):
        super().__init__(*blocks)
        self.reduction, self.counts, self.prefix = reduction, tuple(counts), prefix
        if reduction.startswith("hsic"):
            self.register_buffer("scores", torch.zeros(tokens))

    def extra_repr(self) -> str:
        """What decides the answer beside the blocks."""
        return f"reduction={self.reduction!r}, counts={self.counts}, prefix={self.prefix}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N', d)."""
        return self.states(State(x))[-1].x

    def states(self, start: State) -> list[State]:
        """The state before the first and after every block; with `source` set it is followed, for pictures."""
        scores = self.scores.expand(len(start.x), -1) if self.reduction.startswith("hsic") else None
        found = [State(start.x, start.sizes, scores, start.source)]
        for block, count in zip(self, self.counts, strict=True):
            found.append(self._through(block, count, found[-1]))
        return found

    def _through(self, block: nn.Module, count: int | None, state: State) -> State:
        reduces = count is not None and count < state.x.shape[1]
        if not reduces and state.sizes is None:
            return State(block(state.x), state.sizes, state.scores, state.source)
        answer, q, k = attend(block.attn, block.norm1(state.x), state.sizes)
        state = State(state.x + block.drop_path1(block.ls1(answer)), state.sizes, state.scores, state.source)
        if reduces and self.reduction == "merge":
            state = merge(state, k, state.x.shape[1] - count, self.prefix)
        elif reduces:
            state = keep_and_fuse(state, self._scores(state, q, k, block.attn.scale), count, self.prefix)
        x = state.x + block.drop_path2(block.ls2(block.mlp(block.norm2(state.x))))
        return State(x, state.sizes, state.scores, state.source)

    def _scores(self, state: State, q: Tensor, k: Tensor, scale: float) -> Tensor:
        if self.reduction == "hsic":
            return state.scores
        seen = class_attention(q, k, scale)
        return seen if state.scores is None else seen * state.scores


def attend(attn: nn.Module, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A timm attention layer's answer to x (B, N, d), with its queries and keys (B, heads, N, head_dim).

    With `sizes` (B, N) a key counts as often as there are tokens in it: log(size) joins the logits.
    """
    shape = *x.shape[:2], 3, attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if sizes is None else sizes.log()[:, None, None, :].to(q.dtype)
    answer = softmax_attention(q, k, v, attn.scale, attn.fused_attn, bias)
    answer = attn.norm(answer.transpose(1, 2).flatten(2))
    return attn.proj_drop(attn.proj(answer)), q, k


def class_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """How much the class token (the first) attends to each token, mean over heads: (B, N)."""
    return (scale * (q[:, :, :1] @ k.transpose(-2, -1))).softmax(-1).mean(1)[:, 0]


def keep_and_fuse(state: State, scores: Tensor, count: int, prefix: int) -> State:
    """`count` tokens: the prefix, the best of the others by `scores` (B, N) in their order, and the mean of the rest."""
    x, n = state.x, state.x.shape[1]
    best = scores[:, prefix:].topk(count - prefix - 1, dim=1).indices.sort(dim=1).values
    gone = n - prefix - best.shape[1]

    def chosen(values: Tensor) -> Tensor:  # (B, N, ...) -> (B, count, ...)
        head, rest = values[:, :prefix], values[:, prefix:]
        index = best.reshape(*best.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        kept = rest.gather(1, index)
        fused = (rest.sum(1, keepdim=True) - kept.sum(1, keepdim=True)) / gone
        return torch.cat([head, kept, fused], dim=1)

    source = state.source
    if source is not None:
        places = torch.full((len(x), n), count - 1, device=x.device)
        places[:, :prefix] = torch.arange(prefix, device=x.device)
        places.scatter_(1, best + prefix, torch.arange(prefix, count - 1, device=x.device).expand_as(best))
        source = places.gather(1, source)
    return State(chosen(x), state.sizes, None if state.scores is None else chosen(state.scores), source)


def merge(state: State, keys: Tensor, pairs: int, prefix: int) -> State:
    """Average the `pairs` most similar pairs; each is one of the second, fourth, ... token and one of the first, third, ...

    Similarity is the cosine of the mean keys (B, heads, N, head_dim). Prefix tokens stay apart, in front; then come the
    tokens at even places that are left, in order, then those at odd places with what joined them.
    """
    x = state.x
    sizes = torch.ones_like(x[..., 0]) if state.sizes is None else state.sizes
    metric = F.normalize(keys.mean(1)[:, prefix:], dim=-1)
    best, partner = (metric[:, 1::2] @ metric[:, ::2].transpose(-2, -1)).max(-1)
    order = best.argsort(dim=1, descending=True)
    going, staying = order[:, :pairs], order[:, pairs:].sort(dim=1).values
    into = partner.gather(1, going)

    def joined(values: Tensor) -> Tensor:  # (B, N, c) -> (B, N - pairs, c), sums
        even, odd, c = values[:, prefix + 1 :: 2], values[:, prefix::2], values.shape[2]
        moved = even.gather(1, going[..., None].expand(-1, -1, c))
        left = even.gather(1, staying[..., None].expand(-1, -1, c))
        return torch.cat([values[:, :prefix], left, odd.scatter_add(1, into[..., None].expand(-1, -1, c), moved)], 1)

    total = joined(sizes[..., None])
    source = state.source
    if source is not None:
        places, left = torch.empty_like(source[:, : x.shape[1]]), prefix + staying.shape[1]
        places[:, :prefix] = torch.arange(prefix, device=x.device)
        places[:, prefix::2] = left + torch.arange((x.shape[1] - prefix + 1) // 2, device=x.device)
        even = torch.empty_like(order)
        even.scatter_(1, staying, torch.arange(prefix, left, device=x.device).expand_as(staying))
        even.scatter_(1, going, left + into)
        places[:, prefix + 1 :: 2] = even
        source = places.gather(1, source)
    return State(joined(x * sizes[..., None]) / total, total[..., 0], state.scores, source)
