"""Fewer tokens: after the attention of some blocks only some tokens are passed to the MLP and to later blocks.

- `cls_attention` keeps the tokens that the class token attends to most (mean over heads) and adds one token, the mean of
  the removed ones (EViT, Liang et al. 2022).
- `hsic` keeps tokens by a fixed score of each position (`vitbench.removal.dependence.positions`), `hsic_cls` by the product of
  both.
- `merge` averages the most similar pairs instead of removing tokens (token merging, Bolya et al. 2023). Attention counts
  each token by its size, the number of tokens merged into it, and so does a head that pools the tokens.
- `ward` merges in the same way, and takes the pairs whose mean loses least of the tokens themselves (`ward_matching`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitbench.model.layers.attention import softmax_attention

MERGING = ("merge", "ward")  # the reductions that average pairs of tokens
ATTENTION_POWER = 0.5  # of the class token's attention in Ward's error; chosen on calibration images


def max_merged(tokens: int, prefix: int) -> int:
    """The most tokens that merging in pairs can remove in one block: half of those that are not in the prefix."""
    return max(0, (tokens - prefix) // 2)


def reachable_counts(requested: Sequence[int | None], tokens: int, prefix: int) -> list[int | None]:
    """The `counts` of `TokenBlocks` that merging in pairs can reach: each `requested` count or the least that is possible."""
    reachable = []
    for count in requested:
        min_tokens = tokens - max_merged(tokens, prefix)
        reachable.append(None if count is None else max(count, min(min_tokens, tokens)))
        tokens = min(tokens, reachable[-1] or tokens)
    return reachable


@dataclass
class TokenState:
    """The tokens between two blocks.

    Attributes:
        x: the tokens, (B, N, d).
        sizes: how many input tokens each token stands for, (B, N); None until some are merged.
        scores: of the positions, (B, N); None if the reduction does not use them.
        source: the index of the token that now holds each of the N_0 input tokens, (B, N_0); None if it is not tracked.
    """

    x: Tensor
    sizes: Tensor | None = None
    scores: Tensor | None = None
    source: Tensor | None = None


class TokenBlocks(nn.Sequential):
    """A ViT's blocks that reduce the tokens; it replaces the plain sequence of blocks.

    Args:
        blocks: timm's blocks.
        reduction: "cls_attention", "hsic", "hsic_cls", "merge" or "ward".
        counts: tokens left after the attention of each block, with class and fused token; None keeps all.
        prefix: how many class and register tokens come first; they are always kept.
        tokens: how many tokens enter the first block.
        restores: whether the output has as many tokens as the input: each input token becomes the token that it was merged
            into. A mean over them weights a merged token by its size, and attention over them is the proportional
            attention of Bolya et al. (2023, eq. 1), since a key that stands s times adds log(s) to its logit.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        reduction: str,
        counts: Sequence[int | None],
        prefix: int,
        tokens: int,
        restores: bool = False,
    ):
        super().__init__(*blocks)
        self.reduction, self.counts, self.prefix, self.restores = reduction, tuple(counts), prefix, restores
        if reduction.startswith("hsic"):
            self.register_buffer("scores", torch.zeros(tokens))

    def extra_repr(self) -> str:
        """The settings that decide the output beside the blocks."""
        settings = f"reduction={self.reduction!r}, counts={self.counts}, prefix={self.prefix}"
        return f"{settings}, restores=True" if self.restores else settings

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N', d), or (B, N, d) if the tokens are restored."""
        return self.resume(x)

    def resume(self, x: Tensor, first: int = 0, counts: Sequence[int | None] | None = None) -> Tensor:
        """As `forward`, from the input of block `first` on, where no tokens are merged yet; with other `counts` if given."""
        if not self.restores:
            return self.states(TokenState(x), first, counts)[-1].x
        source = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        last = self.states(TokenState(x, source=source), first, counts)[-1]
        assert last.source is not None, "it is tracked from the first state on"
        return last.x.gather(1, last.source[..., None].expand(-1, -1, x.shape[2]))

    def states(self, start: TokenState, first: int = 0, counts: Sequence[int | None] | None = None) -> list[TokenState]:
        """The state before block `first` and after it and every later block. If `start.source` is set, it is tracked."""
        scores = self.scores.expand(len(start.x), -1) if self.reduction.startswith("hsic") else None
        states = [TokenState(start.x, start.sizes, scores, start.source)]
        counts = self.counts if counts is None else counts
        for block, count in list(zip(self, counts, strict=True))[first:]:
            states.append(self._run_block(block, count, states[-1]))
        return states

    def _run_block(self, block: nn.Module, count: int | None, state: TokenState) -> TokenState:
        tokens = state.x.shape[1]
        count = tokens if count is None else count
        reduces_tokens = count < tokens
        if not reduces_tokens and state.sizes is None:
            return TokenState(block(state.x), state.sizes, state.scores, state.source)
        attention_output, q, k = attention_with_qk(block.attn, block.norm1(state.x), state.sizes)
        state = TokenState(
            state.x + block.drop_path1(block.ls1(attention_output)), state.sizes, state.scores, state.source
        )
        if reduces_tokens and self.reduction == "merge":
            state = bipartite_soft_matching(state, k, tokens - count, self.prefix)
        elif reduces_tokens and self.reduction == "ward":
            # a head that pools the tokens does not read the class token, whose attention then says nothing about them
            attention = None if self.restores else cls_attention(q, k, block.attn.scale)
            state = ward_matching(state, attention, tokens - count, self.prefix)
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
    """A timm attention layer's output for x (B, N, d), with its queries and keys (B, heads, N, head_dim).

    With `sizes` (B, N) the logits of a key get log(size) added, so that a merged token counts as all that it stands for
    (proportional attention, Bolya et al. 2023, eq. 1).
    """
    shape = *x.shape[:2], 3, attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if sizes is None else sizes.log()[:, None, None, :].to(q.dtype)
    output = softmax_attention(q, k, v, attn.scale, attn.fused_attn, bias)
    output = attn.norm(output.transpose(1, 2).flatten(2))
    return attn.proj_drop(attn.proj(output)), q, k


def cls_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of the class token (the first) to each token, mean over heads: (B, N)."""
    return (scale * (q[:, :, :1] @ k.transpose(-2, -1))).softmax(-1).mean(1)[:, 0]


def keep_and_fuse(state: TokenState, scores: Tensor, count: int, prefix: int) -> TokenState:
    """Reduce to `count` tokens: the prefix, the others with the highest `scores` (B, N) in their order, the mean of the rest."""
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
    """Average the `r` most similar pairs of tokens (token merging, Bolya et al. 2023, section 3).

    The similarity of a pair is the cosine of the `keys` (B, heads, N, head_dim), mean over heads; see `merge_pairs`.
    """
    metric = F.normalize(keys.mean(1)[:, prefix:], dim=-1)
    return merge_pairs(state, metric[:, 1::2] @ metric[:, ::2].transpose(-2, -1), r, prefix)


def ward_matching(state: TokenState, attention: Tensor | None, r: int, prefix: int) -> TokenState:
    """Average the `r` pairs of tokens that lose least (see `merge_pairs`).

    A pair x_i, x_j of sizes n_i, n_j that becomes its mean adds n_i n_j / (n_i + n_j) |x_i - x_j|^2 to the squared error of
    the tokens that it stands for (Ward 1963, doi 10.1080/01621459.1963.10500845), so that large tokens are merged late. The
    error is weighted by the root of the pair's mean share of the class token's `attention` (B, N), if it is given: a part
    of the image that the class token looks at is merged late, too.
    """
    src, dst = state.x[:, prefix + 1 :: 2], state.x[:, prefix::2]
    squares = [part.square().sum(-1) for part in (src, dst)]
    errors = _pairwise_sum(*squares) - 2 * src @ dst.transpose(-2, -1)
    if state.sizes is not None:
        errors = errors / _pairwise_sum(1 / state.sizes[:, prefix + 1 :: 2], 1 / state.sizes[:, prefix::2])
    if attention is not None:
        errors = errors * _pairwise_sum(attention[:, prefix + 1 :: 2], attention[:, prefix::2]) ** ATTENTION_POWER
    return merge_pairs(state, -errors, r, prefix)


def _pairwise_sum(src: Tensor, dst: Tensor) -> Tensor:
    """(B, S), (B, D) -> (B, S, D)."""
    return src[:, :, None] + dst[:, None]


def merge_pairs(state: TokenState, similarity: Tensor, r: int, prefix: int) -> TokenState:
    """Average the `r` most similar pairs of tokens (Bolya et al. 2023, section 3).

    Tokens after the prefix alternate between two sets: dst has the first, third, ..., src the second, fourth, ... A pair
    is one src token and its most similar dst token, by `similarity` (B, src, dst). Means are weighted by the tokens' sizes.
    The result has the prefix, the unmerged src tokens in their order, and all dst tokens.
    """
    x = state.x
    sizes = torch.ones_like(x[..., 0]) if state.sizes is None else state.sizes
    node_max, node_idx = similarity.max(-1)
    edge_idx = node_max.argsort(dim=1, descending=True)
    src_idx, unm_idx = edge_idx[:, :r], edge_idx[:, r:].sort(dim=1).values
    dst_idx = node_idx.gather(1, src_idx)

    def merge_sum(values: Tensor) -> Tensor:  # (B, N, c) -> (B, N - r, c), sums
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
