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


def max_merged(tokens: int, prefix: int) -> int:
    """How many of `tokens` may go where they are merged in pairs: half of those that are not in the prefix."""
    return max(0, (tokens - prefix) // 2)


def reachable_counts(requested: Sequence[int | None], tokens: int, prefix: int) -> list[int | None]:
    """The `counts` of `TokenBlocks` as merging in pairs reaches them, where fewer are wanted than that."""
    reachable = []
    for count in requested:
        min_tokens = tokens - max_merged(tokens, prefix)
        reachable.append(None if count is None else max(count, min(min_tokens, tokens)))
        tokens = min(tokens, reachable[-1] or tokens)
    return reachable


@dataclass
class TokenState:
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
        return self.states(TokenState(x))[-1].x

    def states(self, start: TokenState) -> list[TokenState]:
        """The state before the first and after every block; with `source` set it is followed, for pictures."""
        scores = self.scores.expand(len(start.x), -1) if self.reduction.startswith("hsic") else None
        states = [TokenState(start.x, start.sizes, scores, start.source)]
        for block, count in zip(self, self.counts, strict=True):
            states.append(self._through(block, count, states[-1]))
        return states

    def _through(self, block: nn.Module, count: int | None, state: TokenState) -> TokenState:
        reduces_tokens = count is not None and count < state.x.shape[1]
        if not reduces_tokens and state.sizes is None:
            return TokenState(block(state.x), state.sizes, state.scores, state.source)
        attention_output, q, k = attention_with_qk(block.attn, block.norm1(state.x), state.sizes)
        state = TokenState(
            state.x + block.drop_path1(block.ls1(attention_output)), state.sizes, state.scores, state.source
        )
        if reduces_tokens and self.reduction == "merge":
            state = bipartite_soft_matching(state, k, state.x.shape[1] - count, self.prefix)
        elif reduces_tokens:
            state = keep_and_fuse(state, self._scores(state, q, k, block.attn.scale), count, self.prefix)
        x = state.x + block.drop_path2(block.ls2(block.mlp(block.norm2(state.x))))
        return TokenState(x, state.sizes, state.scores, state.source)

    def _scores(self, state: TokenState, q: Tensor, k: Tensor, scale: float) -> Tensor:
        if self.reduction == "hsic":
            return state.scores
        attention = cls_attention(q, k, scale)
        return attention if state.scores is None else attention * state.scores


def attention_with_qk(attn: nn.Module, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A timm attention layer's answer to x (B, N, d), with its queries and keys (B, heads, N, head_dim).

    With `sizes` (B, N) a key counts as often as there are tokens in it: log(size) joins the logits.
    """
    shape = *x.shape[:2], 3, attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if sizes is None else sizes.log()[:, None, None, :].to(q.dtype)
    output = softmax_attention(q, k, v, attn.scale, attn.fused_attn, bias)
    output = attn.norm(output.transpose(1, 2).flatten(2))
    return attn.proj_drop(attn.proj(output)), q, k


def cls_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """How much the class token (the first) attends to each token, mean over heads: (B, N)."""
    return (scale * (q[:, :, :1] @ k.transpose(-2, -1))).softmax(-1).mean(1)[:, 0]


def keep_and_fuse(state: TokenState, scores: Tensor, count: int, prefix: int) -> TokenState:
    """`count` tokens: the prefix, the best of the others by `scores` (B, N) in their order, and the mean of the rest."""
    x, n = state.x, state.x.shape[1]
    top_idx = scores[:, prefix:].topk(count - prefix - 1, dim=1).indices.sort(dim=1).values
    fused_count = n - prefix - top_idx.shape[1]

    def select(values: Tensor) -> Tensor:  # (B, N, ...) -> (B, count, ...)
        head, rest = values[:, :prefix], values[:, prefix:]
        index = top_idx.reshape(*top_idx.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        kept_tokens = rest.gather(1, index)
        fused = (rest.sum(1, keepdim=True) - kept_tokens.sum(1, keepdim=True)) / fused_count
        return torch.cat([head, kept_tokens, fused], dim=1)

    source = state.source
    if source is not None:
        new_index = torch.full((len(x), n), count - 1, device=x.device)
        new_index[:, :prefix] = torch.arange(prefix, device=x.device)
        new_index.scatter_(1, top_idx + prefix, torch.arange(prefix, count - 1, device=x.device).expand_as(top_idx))
        source = new_index.gather(1, source)
    return TokenState(select(x), state.sizes, None if state.scores is None else select(state.scores), source)


def bipartite_soft_matching(state: TokenState, keys: Tensor, r: int, prefix: int) -> TokenState:
    """Average the `pairs` most similar pairs; each is one of the second, fourth, ... token and one of the first, third, ...

    Similarity is the cosine of the mean keys (B, heads, N, head_dim). Prefix tokens stay apart, in front; then come the
    tokens at even places that are left, in order, then those at odd places with what joined them.
    """
    x = state.x
    sizes = torch.ones_like(x[..., 0]) if state.sizes is None else state.sizes
    metric = F.normalize(keys.mean(1)[:, prefix:], dim=-1)
    node_max, node_idx = (metric[:, 1::2] @ metric[:, ::2].transpose(-2, -1)).max(-1)
    edge_idx = node_max.argsort(dim=1, descending=True)
    src_idx, unm_idx = edge_idx[:, :r], edge_idx[:, r:].sort(dim=1).values
    dst_idx = node_idx.gather(1, src_idx)

    def merge_sum(values: Tensor) -> Tensor:  # (B, N, c) -> (B, N - pairs, c), sums
        src, dst, c = values[:, prefix + 1 :: 2], values[:, prefix::2], values.shape[2]
        merged_src = src.gather(1, src_idx[..., None].expand(-1, -1, c))
        unmerged = src.gather(1, unm_idx[..., None].expand(-1, -1, c))
        return torch.cat(
            [values[:, :prefix], unmerged, dst.scatter_add(1, dst_idx[..., None].expand(-1, -1, c), merged_src)], 1
        )

    total = merge_sum(sizes[..., None])
    source = state.source
    if source is not None:
        new_index, dst_start = torch.empty_like(source[:, : x.shape[1]]), prefix + unm_idx.shape[1]
        new_index[:, :prefix] = torch.arange(prefix, device=x.device)
        new_index[:, prefix::2] = dst_start + torch.arange((x.shape[1] - prefix + 1) // 2, device=x.device)
        src_new_index = torch.empty_like(edge_idx)
        src_new_index.scatter_(1, unm_idx, torch.arange(prefix, dst_start, device=x.device).expand_as(unm_idx))
        src_new_index.scatter_(1, src_idx, dst_start + dst_idx)
        new_index[:, prefix + 1 :: 2] = src_new_index
        source = new_index.gather(1, source)
    return TokenState(merge_sum(x * sizes[..., None]) / total, total[..., 0], state.scores, source)
