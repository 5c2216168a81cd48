"""Context -> blocks -> ranks: who encodes what in phase 1, and what it costs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise

from star_attention.config import AnchorMode, StarConfig
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B, ModelConfig

MAX_BLOCKS = 1 << 20
MAX_RANKS = 1 << 16


@dataclass(frozen=True)
class Cost:
    """Work of phase 1: tokens through the projections and (query, key) pairs of attention."""

    tokens: int = 0
    pairs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.pairs + other.pairs)

    def flops(self, model: ModelConfig) -> int:
        """FLOPs of this work in `model` (a multiplication and an addition are two)."""
        return (
            self.tokens * model.gemm_flops_per_token + self.pairs * model.attention_flops_per_pair
        )


@dataclass(frozen=True)
class Block:
    """Context tokens [start, end), the rank that encodes and keeps them, and its work for them.

    Besides their own block its tokens see the first `prefix` tokens of the context: the anchor
    (none for the first block, which contains it), or all that is before it in an exact method.
    """

    start: int
    end: int
    prefix: int
    rank: int
    cost: Cost

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """The division of one context.

    Attributes:
        blocks: in context order; ranks own contiguous runs of them.
        rank_costs: phase 1 work of each rank, the anchor's included where it pays for it.
        notes: what was rounded or left unused, one line each.
    """

    context_len: int
    block_size: int
    anchor_size: int
    tokens_per_block: int
    num_ranks: int
    anchor_mode: AnchorMode
    blocks: tuple[Block, ...]
    rank_costs: tuple[Cost, ...]
    notes: tuple[str, ...]

    def blocks_of(self, rank: int) -> tuple[Block, ...]:
        """A rank's blocks in context order."""
        return self._blocks_by_rank.get(rank, ())

    @cached_property
    def _blocks_by_rank(self) -> dict[int, tuple[Block, ...]]:
        found: dict[int, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.rank, []).append(block)
        return {rank: tuple(blocks) for rank, blocks in found.items()}

    def on_ranks(self, ranks: Sequence[int]) -> Plan:
        """The same blocks, each on the rank given for it. Their costs are not summed up anew."""
        pairs = zip(self.blocks, ranks, strict=True)
        return replace(self, blocks=tuple(replace(block, rank=rank) for block, rank in pairs))

    @property
    def dense_cost(self) -> Cost:
        """Work of phase 1 of dense attention, for comparison with the rank costs."""
        return Cost(self.context_len, causal_pairs(self.context_len))


def causal_pairs(tokens: int, before: int = 0) -> int:
    """Pairs of `tokens` causal queries that also see `before` earlier tokens."""
    return tokens * before + tokens * (tokens + 1) // 2


def make_plan(
    context_len: int,
    config: StarConfig | None = None,
    num_ranks: int = 1,
    model: ModelConfig = LLAMA_3_1_8B,
) -> Plan:
    """Cuts a context into blocks and gives them to ranks so that the busiest rank does least.

    `dense` is one block; `ring` is two blocks a rank, one from each end of the context, which see
    all that is before them.

    Args:
        context_len: tokens of the context, 0 or more.
        config: the method, block, anchor and page sizes in tokens, and the anchor mode.
        num_ranks: ranks to spread over, at most 65,536; more ranks than blocks leave the last ones
            without any.
        model: its shape weighs projections against attention.

    Raises:
        UserError: a number is out of range, the anchor does not fit into the default block, or
            there would be more than 1,048,576 blocks.

    Source: Star Attention, arXiv 2411.17116, section 2.1 (phase 1).
    """
    config = config or StarConfig()
    if context_len < 0:
        raise UserError(f"the context length is {context_len}: use 0 or more tokens")
    if num_ranks < 1:
        raise UserError(f"the number of ranks is {num_ranks}: use 1 or more")
    if num_ranks > MAX_RANKS:
        raise UserError(f"the number of ranks is {num_ranks}: use {MAX_RANKS} or less")
    page = config.tokens_per_block
    if config.attention == "dense":
        if num_ranks > 1:
            raise UserError(f"dense attention runs on one rank, not {num_ranks}: use --ranks 1")
        config = replace(config, block_size=None, anchor_size=0)
    if config.attention == "ring":
        return _ring_plan(context_len, config, num_ranks)
    notes: list[str] = []
    block_size, anchor_size = _sizes(context_len, config, num_ranks, notes)

    mode = config.anchor_mode
    anchor_cost = Cost(anchor_size, causal_pairs(anchor_size))

    @cache
    def cost_of(tokens: int, prefix: int) -> tuple[Cost, int]:
        cost = Cost(tokens, causal_pairs(tokens, prefix))
        if prefix and mode == "recompute":
            cost += anchor_cost
        return cost, cost.flops(model)

    spans, flops = [], []
    for start in range(0, context_len, block_size):
        end, prefix = min(start + block_size, context_len), anchor_size if start else 0
        cost, work = cost_of(end - start, prefix)
        spans.append((start, end, prefix, cost))
        flops.append(work)

    joining = anchor_cost if mode == "local" else Cost()
    edges = _assign(flops, num_ranks, joining.flops(model))
    blocks = tuple(
        Block(start, end, prefix, rank, cost)
        for rank, (first, last) in enumerate(pairwise(edges))
        for start, end, prefix, cost in spans[first:last]
    )
    if blocks and len(blocks) < num_ranks:
        notes.append(f"{num_ranks - len(blocks)} of {num_ranks} ranks have no block")
    return Plan(
        context_len,
        block_size,
        anchor_size,
        page,
        num_ranks,
        mode,
        blocks,
        _rank_costs(blocks, num_ranks, joining),
        tuple(notes),
    )


def _ring_plan(context_len: int, config: StarConfig, num_ranks: int) -> Plan:
    """Zig-zag: chunk r and chunk 2R - 1 - r to rank r of R, so that causal work is equal.

    Source: zig-zag ring attention, as in ring-flash-attention; Ring Attention, arXiv 2310.01889.
    """
    page = config.tokens_per_block
    chunk = max(1, -(-context_len // (2 * num_ranks * page))) * page
    blocks = []
    for index in range(2 * num_ranks):
        start, end = (min(edge * chunk, context_len) for edge in (index, index + 1))
        cost = Cost(end - start, causal_pairs(end - start, start))
        blocks.append(Block(start, end, start, min(index, 2 * num_ranks - 1 - index), cost))
    return Plan(
        context_len,
        chunk,
        0,
        page,
        num_ranks,
        config.anchor_mode,
        tuple(blocks),
        _rank_costs(blocks, num_ranks, Cost()),
        (),
    )


def _rank_costs(blocks: Sequence[Block], num_ranks: int, joining: Cost) -> tuple[Cost, ...]:
    tokens, pairs = [0] * num_ranks, [0] * num_ranks
    for block in blocks:
        rank = block.rank
        if block.prefix and not tokens[rank]:  # its first block, which needs the anchor
            tokens[rank], pairs[rank] = joining.tokens, joining.pairs
        tokens[rank] += block.cost.tokens
        pairs[rank] += block.cost.pairs
    return tuple(map(Cost, tokens, pairs))


def _sizes(
    context_len: int, config: StarConfig, num_ranks: int, notes: list[str]
) -> tuple[int, int]:
    """Block and anchor size: the user's, or the defaults, rounded up to whole pages."""
    page = config.tokens_per_block
    block_size = config.block_size
    if block_size is None:
        parts = 1 if config.attention == "dense" else max(4, num_ranks)
        exact = max(1, -(-context_len // parts))
        block_size = -(-exact // page) * page
        if block_size != exact and context_len:
            notes.append(
                f"block size {exact} (context / {parts}) rounded up to {block_size}, "
                f"a multiple of the page of {page} tokens"
            )
    config.check_anchor(block_size)
    if (blocks := -(-context_len // block_size)) > MAX_BLOCKS:
        least = -(-context_len // (MAX_BLOCKS * page)) * page
        raise UserError(
            f"the block size {block_size} makes {blocks} blocks of {context_len} tokens, more than "
            f"{MAX_BLOCKS}: use {least} or more"
        )
    return block_size, block_size if config.anchor_size is None else config.anchor_size


def _assign(costs: Sequence[int], num_ranks: int, joining: int) -> list[int]:
    """Edges of the ranks' runs of blocks: rank r has blocks edges[r] to edges[r + 1].

    The largest rank's sum is least, and no rank is without a block while there are enough.
    `joining` is what every rank but the first pays once.
    """
    count = len(costs)
    if count <= num_ranks:
        return list(range(count + 1))
    until = [0, *accumulate(costs)]

    def fill(limit: int) -> list[int] | None:
        """Each rank takes what it can, but leaves every later one a block."""
        edges = [0]
        for rank in range(num_ranks):
            begin, room = edges[-1], limit - (joining if rank else 0)
            end = bisect_right(until, until[begin] + room, begin) - 1
            if end <= begin:
                return None
            edges.append(min(end, count - (num_ranks - rank - 1)))
        return edges if edges[-1] == count else None

    low = max(max(costs), -(-until[-1] // num_ranks))
    high = low + max(costs) + joining
    while low < high:
        middle = (low + high) // 2
        if fill(middle) is None:
            low = middle + 1
        else:
            high = middle
    edges = fill(high)
    assert edges is not None
    return edges
