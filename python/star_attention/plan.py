"""Context -> blocks -> ranks: who computes what in phase 1, who keeps it, and what it costs."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import accumulate, cycle, pairwise

from star_attention.config import AnchorMode, AttentionMethod, KvDtype, StarConfig
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B, ModelConfig
from star_attention.spans import Cost, Passes, Range, Reading, Span, causal_pairs

MAX_BLOCKS = 1 << 20
MAX_RANKS = 1 << 16
# Pages of a part at least.
_PART_PAGES = 4


@dataclass(frozen=True)
class Block:
    """Context tokens [start, end) that see one another, besides the first `prefix` tokens of the
    context: the anchor (none for the first block, which contains it).

    Attributes:
        rank: computes its tokens; None: all ranks do, together.
    """

    start: int
    end: int
    prefix: int
    rank: int | None

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Part:
    """Tokens [start, end) of a block, by its index, whose KV a rank keeps."""

    start: int
    end: int
    block: int
    rank: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """The division of one context.

    Attributes:
        blocks, parts: in context order. Where parts start depends on the block size and the number
            of ranks alone.
        selected_pages: of earlier blocks, that a page of rows sees besides.
        kv_dtype: what its KV is kept in once no row is to see it any more.
        cached: where parts start that are there already, and are not computed.
        notes: what was rounded or left unused, one line each.
    """

    context_len: int
    block_size: int
    anchor_size: int
    tokens_per_block: int
    num_ranks: int
    attention: AttentionMethod
    anchor_mode: AnchorMode
    model: ModelConfig
    blocks: tuple[Block, ...]
    parts: tuple[Part, ...]
    cached: frozenset[int]
    notes: tuple[str, ...]
    selected_pages: int = 0
    kv_dtype: KvDtype = "auto"

    def parts_of(self, rank: int) -> tuple[Part, ...]:
        """What a rank keeps, in context order."""
        return self._parts_by_rank.get(rank, ())

    @cached_property
    def _parts_by_rank(self) -> dict[int, tuple[Part, ...]]:
        found: dict[int, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.rank, []).append(part)
        return {rank: tuple(parts) for rank, parts in found.items()}

    def candidates(self, block: Block) -> int:
        """Pages that a block's rows choose from: those between the anchor and the block."""
        if not self.selected_pages:
            return 0
        return max(block.start - self.anchor_size, 0) // self.tokens_per_block

    def selected_tokens(self, block: Block) -> int:
        """Tokens that each row of a block sees of earlier blocks, besides the anchor."""
        return min(self.candidates(block), self.selected_pages) * self.tokens_per_block

    def cost(self, span: Span) -> Cost:
        """Work of a span of this plan, with what its rows see of earlier blocks."""
        tokens, pairs = span.cost
        chosen = self.selected_tokens(self.blocks[span.block])
        return Cost(tokens, pairs + tokens * chosen)

    @property
    def is_quantized(self) -> bool:
        """Whether its KV ends up in 8 bits."""
        return self.kv_dtype != "auto"

    @property
    def ends_by_block(self) -> bool:
        """Whether only its own rows see a block, the anchor excepted: not if later ones choose from
        it, nor if there is one block."""
        return self.attention == "star" and not self.selected_pages

    @property
    def seen_parts(self) -> tuple[Part, ...]:
        """Parts that are there already and that what is computed sees."""
        read = {part.block for part in self.parts if part.start not in self.cached}
        in_front = self.anchor_size if read else 0
        if self.selected_pages and read:  # what is chosen from
            in_front = self.blocks[max(read)].start
        seen: list[Part] = []
        reach, window = (self.model.window or 1) - 1, self.context_len
        for part in reversed(self.parts):
            if part.block in read:
                window = self.blocks[part.block].start - reach
            sees = part.start < in_front or part.block in read or part.end > window
            if part.start in self.cached and sees:
                seen.append(part)
        return tuple(seen[::-1])

    @property
    def is_chained(self) -> bool:
        """Whether blocks are computed one after the other, as their rows see earlier ones: those
        that they choose pages from, or that a window reaches into."""
        return self.selected_pages > 0 or self.model.window is not None

    @property
    def exchanges(self) -> bool:
        """Whether ranks send one another pages that stay, other than those that pass by."""
        return self.num_ranks > 1 and self.anchor_mode == "broadcast" and self.attention != "ring"

    def passes(self) -> Passes:
        """Phase 1, from the beginning."""
        return self._passes(self._alone)

    def _passes(self, alone: Sequence[Sequence[Reading]]) -> Passes:
        loads = [cost.flops(self.model) for cost in self._costs_alone]
        sizes = self.anchor_size, self.tokens_per_block
        return Passes(
            self._together,
            alone,
            loads,
            *sizes,
            self.model,
            whole_pages=self.selected_pages > 0,
            few_blocks=self.is_quantized and self.ends_by_block,
        )

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Phase 1 in as few passes as there are."""
        return self.passes().all()

    @cached_property
    def slices(self) -> tuple[Span, ...]:
        """Those of `spans` that ranks compute together."""
        return self._passes([()] * self.num_ranks).all()

    @cached_property
    def rank_costs(self) -> tuple[Cost, ...]:
        """Phase 1 work of each rank."""
        tokens, pairs = map(list, zip(*self._costs_alone, strict=True))
        for span in self.slices:
            cost = self.cost(span)
            tokens[span.rank] += cost.tokens
            pairs[span.rank] += cost.pairs
        return tuple(map(Cost, tokens, pairs))

    @property
    def dense_cost(self) -> Cost:
        """Work of phase 1 of dense attention, for comparison with the rank costs."""
        return Cost(self.context_len, causal_pairs(self.context_len))

    def beside(self, where: Sequence[int | None]) -> Plan:
        """The same blocks around parts that are there already.

        Args:
            where: of each part the rank that has it; None: it is to be computed.
        """
        cached = frozenset(
            part.start for part, rank in zip(self.parts, where, strict=True) if rank is not None
        )
        fresh = replace(self, cached=cached)
        if self.attention == "ring":
            return fresh
        return _assigned(fresh, where) if self.num_ranks > 1 else fresh

    @cached_property
    def _rows(self) -> list[tuple[Range, ...]]:
        """Of each block, what is to be computed."""
        if not self.cached:
            return [(Range(block.start, block.end),) for block in self.blocks]
        rows: list[list[Range]] = [[] for _ in self.blocks]
        for part in self.parts:
            if part.start in self.cached:
                continue
            own = rows[part.block]
            if own and own[-1].end == part.start:
                own[-1] = Range(own[-1].start, part.end)
            else:
                own.append(Range(part.start, part.end))
        return [tuple(each) for each in rows]

    @cached_property
    def _together(self) -> list[Reading]:
        """What ranks compute together."""
        if self.attention == "ring":
            # Every rank's rows see all before them, which passes by.
            rows = [(part.rank, Range(part.start, part.end)) for part in self.parts]
            return [Reading(0, rank, 0, (each,)) for rank, each in rows]
        return [
            self._reading(index)
            for index, block in enumerate(self.blocks)
            if block.rank is None and self._rows[index]
        ]

    @cached_property
    def _alone(self) -> list[list[Reading]]:
        """What each rank computes on its own."""
        alone: list[list[Reading]] = [[] for _ in range(self.num_ranks)]
        anchor = (Range(0, self.anchor_size),)
        for index, again in self._blocks_alone():
            rank = self.blocks[index].rank
            if again:
                block = index if self.anchor_mode == "recompute" else 0
                alone[rank].append(Reading(block, rank, 0, anchor))
            alone[rank].append(self._reading(index))
        return alone

    @cached_property
    def _costs_alone(self) -> tuple[Cost, ...]:
        """Of what each rank computes on its own: by shapes, of which many blocks have few."""
        shapes: Counter[tuple[int, int, int]] = Counter()  # rank, tokens, what all of them see
        for index, again in self._blocks_alone():
            block = self.blocks[index]
            if again:
                shapes[block.rank, self.anchor_size, 0] += 1
            before = block.prefix + self.selected_tokens(block)
            for rows in self._rows[index]:
                shapes[block.rank, rows.tokens, before + rows.start - block.start] += 1
        tokens, pairs = [0] * self.num_ranks, [0] * self.num_ranks
        for (rank, size, before), count in shapes.items():
            tokens[rank] += count * size
            pairs[rank] += count * causal_pairs(size, before)
        return tuple(map(Cost, tokens, pairs))

    def _blocks_alone(self) -> Iterator[tuple[int, bool]]:
        """Blocks that one rank computes, by their index, and whether it computes the anchor again
        before it."""
        if self.attention == "ring":
            return
        has_anchor = {self.parts[0].rank} if self.parts else set()
        for index, block in enumerate(self.blocks):
            if block.rank is None or not self._rows[index]:
                continue
            again = bool(block.prefix) and (
                self.anchor_mode == "recompute"
                or (self.anchor_mode == "local" and block.rank not in has_anchor)
            )
            if again:
                has_anchor.add(block.rank)
            yield index, again

    def _reading(self, index: int) -> Reading:
        block = self.blocks[index]
        sees = (Range(0, block.prefix),) if block.prefix else ()
        alone = self.anchor_mode == "recompute"
        return Reading(index, block.rank, block.start, self._rows[index], sees, alone=alone)


def make_plan(
    context_len: int,
    config: StarConfig | None = None,
    num_ranks: int = 1,
    model: ModelConfig = LLAMA_3_1_8B,
) -> Plan:
    """Cuts a context into blocks and gives them to ranks so that all are equally busy.

    With anchor mode `broadcast` each rank computes the same number of whole blocks; the first one
    and those that are left all ranks compute together. Otherwise ranks compute contiguous runs of
    blocks, so that the busiest does least. `dense` is one block; so is `ring`, of which a rank has
    two chunks, one from each end. Models with windows have `broadcast`, and all ranks compute every
    block together.

    Args:
        context_len: tokens of the context, 0 or more.
        config: the method, block, anchor and page sizes in tokens, and the anchor mode.
        num_ranks: ranks to spread over, at most 65,536; some may be left without any.
        model: its shape weighs projections against attention.

    Raises:
        UserError: a number is out of range, the anchor does not fit into the default block, there
            would be more than 1,048,576 blocks, or the model has a window, which the method does
            not go with.

    Source: Star Attention, arXiv 2411.17116, section 2.1 (phase 1); zig-zag ring attention, as in
    ring-flash-attention; Ring Attention, arXiv 2310.01889.
    """
    config = config or StarConfig()
    if context_len < 0:
        raise UserError(f"the context length is {context_len}: use 0 or more tokens")
    if num_ranks < 1:
        raise UserError(f"the number of ranks is {num_ranks}: use 1 or more")
    if num_ranks > MAX_RANKS:
        raise UserError(f"the number of ranks is {num_ranks}: use {MAX_RANKS} or less")
    page = config.tokens_per_block
    notes: list[str] = []
    _check_model(config, model)
    if model.window is not None:
        if config.anchor_mode != "broadcast":
            notes.append("anchor mode broadcast: the model's windows reach across blocks")
        config = replace(config, anchor_mode="broadcast")
    if config.attention != "star":
        config = replace(config, block_size=None, anchor_size=0, selected_pages=0)
        if num_ranks > 1:  # only with exchanges can ranks share their one block
            config = replace(config, anchor_mode="broadcast")
    block_size, anchor_size = _sizes(context_len, config, num_ranks, notes)
    blocks = tuple(
        Block(start, min(start + block_size, context_len), anchor_size if start else 0, 0)
        for start in range(0, context_len, block_size)
    )
    if config.attention == "ring":
        part_size = max(1, -(-context_len // (2 * num_ranks * page))) * page
    else:
        part_size = _part_size(block_size, page, num_ranks, config.anchor_mode)
    parts = tuple(
        Part(start, min(start + part_size, block.end), index, 0)
        for index, block in enumerate(blocks)
        for start in range(block.start, block.end, part_size)
    )
    plan = Plan(
        context_len,
        block_size,
        anchor_size,
        page,
        num_ranks,
        config.attention,
        config.anchor_mode,
        model,
        blocks,
        parts,
        frozenset(),
        tuple(notes),
        config.selected_pages,
        config.kv_dtype,
    )
    if num_ranks == 1:
        return plan
    if config.attention == "ring":
        ranks = [min(index, 2 * num_ranks - 1 - index) for index in range(len(parts))]
        shared = tuple(replace(block, rank=None) for block in blocks)
        return replace(plan, blocks=shared, parts=_on_ranks(parts, ranks))
    return _assigned(plan, [None] * len(parts))


def _check_model(config: StarConfig, model: ModelConfig) -> None:
    if config.selected_pages:
        model.check_no_gemma("with selected pages: use --selected-pages 0")
    if model.window is not None:
        _check_window(config, model)


def _check_window(config: StarConfig, model: ModelConfig) -> None:
    if config.attention == "ring":
        model.check_no_window("by ring attention: use --attention star or dense")
    if config.selected_pages:
        model.check_no_window("with selected pages: use --selected-pages 0")
    if config.kv_dtype != "auto":
        model.check_no_window(f"with --kv-dtype {config.kv_dtype}: use auto")


def _part_size(block_size: int, page: int, num_ranks: int, mode: AnchorMode) -> int:
    """Tokens of a part: as many parts as ranks, unless these would be small."""
    if mode != "broadcast":  # who computes a block keeps it
        return block_size
    pages = -(-block_size // page)
    return -(-pages // max(1, min(num_ranks, pages // _PART_PAGES))) * page


def _on_ranks(parts: Sequence[Part], ranks: Sequence[int]) -> tuple[Part, ...]:
    return tuple(Part(p.start, p.end, p.block, rank) for p, rank in zip(parts, ranks, strict=True))


def _assigned(plan: Plan, where: Sequence[int | None]) -> Plan:
    """Ranks for blocks and parts, around parts that are on a rank already."""
    if plan.anchor_mode == "broadcast":
        owners = _owners(plan)
    else:
        owners = _runs(plan) if not plan.cached else _owners_beside(plan, where)
    blocks = tuple(
        Block(b.start, b.end, b.prefix, owner) for b, owner in zip(plan.blocks, owners, strict=True)
    )
    kept = [0] * plan.num_ranks
    ranks = list(where)
    for index, part in enumerate(plan.parts):
        if ranks[index] is None:
            ranks[index] = owners[part.block]
        if ranks[index] is not None:
            kept[ranks[index]] += part.tokens
    least = [(tokens, rank) for rank, tokens in enumerate(kept)]
    heapify(least)
    for index, part in enumerate(plan.parts):
        if ranks[index] is None:
            tokens, rank = least[0]
            ranks[index] = rank
            heapreplace(least, (tokens + part.tokens, rank))
    return replace(plan, blocks=blocks, parts=_on_ranks(plan.parts, ranks))


def _owners(plan: Plan) -> list[int | None]:
    """The rank that computes each block; None: all do. As many whole blocks for each rank as
    possible; the first block, which the others need, and what is left is for all, unless blocks
    have less than a page for each. Where they are chained all are for all, one after the other."""
    num_ranks = plan.num_ranks
    owners: list[int | None] = [None] * len(plan.blocks)
    if plan.is_chained:
        return owners
    rows = plan._rows
    whole = [
        index
        for index, block in enumerate(plan.blocks)
        if (block.start or not plan.anchor_size)
        and block.tokens == plan.block_size
        and rows[index] == (Range(block.start, block.end),)
    ]
    each = len(whole) // num_ranks
    for place, index in enumerate(whole[: each * num_ranks]):
        owners[index] = place // each
    if plan.block_size < num_ranks * plan.tokens_per_block:
        small = cycle(range(num_ranks))
        for index in range(1 if plan.anchor_size else 0, len(owners)):
            if owners[index] is None:
                owners[index] = next(small)
    return owners


def _runs(plan: Plan) -> list[int]:
    """Contiguous runs of blocks, so that the busiest rank does least."""
    anchor = Cost(plan.anchor_size, causal_pairs(plan.anchor_size))
    again = anchor if plan.anchor_mode == "recompute" else Cost()
    joining = anchor if plan.anchor_mode == "local" else Cost()
    flops: dict[tuple[int, int], int] = {}
    costs = []
    for block in plan.blocks:
        shape = block.tokens, block.prefix
        if shape not in flops:
            cost = Cost(block.tokens, causal_pairs(*shape))
            flops[shape] = (cost + again if block.prefix else cost).flops(plan.model)
        costs.append(flops[shape])
    edges = _assign(costs, plan.num_ranks, joining.flops(plan.model))
    return [rank for rank, (first, last) in enumerate(pairwise(edges)) for _ in range(first, last)]


def _owners_beside(plan: Plan, where: Sequence[int | None]) -> list[int]:
    """A rank for each block, some of which ranks have already: each of the others goes to the rank
    that has least to compute by then, and, of these, keeps least; the first one to rank 0."""
    work, tokens = [0] * plan.num_ranks, [0] * plan.num_ranks
    for block, rank in zip(plan.blocks, where, strict=True):
        if rank is not None:
            tokens[rank] += block.tokens
    owners = []
    for block, rank in zip(plan.blocks, where, strict=True):
        if rank is None:
            rank = 0
            if block.start:
                rank = min(range(plan.num_ranks), key=lambda r: (work[r], tokens[r]))
            cost = Cost(block.tokens, causal_pairs(block.tokens, block.prefix))
            work[rank] += cost.flops(plan.model)
            tokens[rank] += block.tokens
        owners.append(rank)
    return owners


def _sizes(
    context_len: int, config: StarConfig, num_ranks: int, notes: list[str]
) -> tuple[int, int]:
    """Block and anchor size: the user's, or the defaults, rounded up to whole pages."""
    page = config.tokens_per_block
    block_size = config.block_size
    if block_size is None:
        parts = config.default_blocks(num_ranks)
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
