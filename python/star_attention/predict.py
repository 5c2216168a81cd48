"""How long phase 1 of a plan would take, from what GPUs reach in it and how fast pages travel.

A pass takes as long as its busiest rank:

    tokens · F_token / gemm + pairs · F_pair / attention + exposed

with the model's FLOPs a token through the projections and a pair of attention; `exposed` is what is
left of transfers beside these. In each layer an exchange begins when its rows' KV is projected and
the one before is over, and must be over when all rows are projected. A ring's pages pass by beside
attention, all but the last list's. Ranks that exchange nothing do not wait for one another.
Of selected pages the attention to them counts; choosing and sending them are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from star_attention.arrivals import Arrival, Arrivals
from star_attention.plan import Plan
from star_attention.spans import Cost, Span

# Of following which rank has which page, pass by pass: beyond it takes minutes.
_MOST_STEPS = 1 << 30
_ITEMSIZE = 2  # bytes of an element of the KV


@dataclass(frozen=True)
class Rates:
    """What one GPU reaches in phase 1.

    The defaults are an H200's: GEMMs with the norms, RoPE and SiLU between them, and attention, by
    their kernels' times at 128K tokens over two GPUs; NCCL over NVLink (docs/results.md).

    Attributes:
        gemm_tflops, attention_tflops: of bfloat16.
        link_gbs: GB/s that a rank receives, or sends, from or to all others.
    """

    gemm_tflops: float = 710.0
    attention_tflops: float = 650.0
    link_gbs: float = 350.0


@dataclass(frozen=True)
class Prediction:
    """Phase 1 of a plan.

    Attributes:
        seconds: in all.
        exposed_seconds: those of them in which ranks wait for transfers.
        received_bytes: of each rank; None: the plan is too large to follow its pages, and transfers
            are left out.
    """

    seconds: float
    exposed_seconds: float
    received_bytes: tuple[int, ...] | None


def predict(plan: Plan, rates: Rates | None = None) -> Prediction:
    """Phase 1 in as few passes as there are, without launches and without what ranks wait for one
    another because of uneven clocks."""
    rates = rates or Rates()
    work = [_seconds(cost, plan, rates) for cost in plan.rank_costs]
    if plan.attention == "ring":
        return _ring(plan, rates, work)
    if not plan.exchanges:
        return Prediction(max(work), 0.0, (0,) * plan.num_ranks)
    if not _can_follow(plan):
        return Prediction(max(work), 0.0, None)
    arrivals, passes = Arrivals(plan), plan.passes()
    received = np.zeros(plan.num_ranks, np.int64)
    total = exposed = 0.0
    while not passes.finished:
        spans = passes.next()
        costs = [Cost()] * plan.num_ranks
        for span in spans:
            costs[span.rank] += plan.cost(span)
        groups = arrivals.take(spans)
        waits = _exposed(plan, rates, spans, costs, groups)
        received += sum(_bytes(plan, group)[1] for group in groups)
        total += max(_seconds(cost, plan, rates) for cost in costs) + waits
        exposed += waits
    return Prediction(total, exposed, tuple(received.tolist()))


def _seconds(cost: Cost, plan: Plan, rates: Rates) -> float:
    model = plan.model
    gemm = cost.tokens * model.gemm_flops_per_token / rates.gemm_tflops
    return (gemm + cost.attention_flops(model) / rates.attention_tflops) / 1e12


def _can_follow(plan: Plan) -> bool:
    passes = 1 + sum(block.rank is None for block in plan.blocks)
    pages = -(-plan.context_len // plan.tokens_per_block)
    return passes * plan.num_ranks * max(pages, plan.num_ranks << 12) <= _MOST_STEPS


def _bytes(plan: Plan, group: Sequence[Arrival]) -> np.ndarray:
    """int64 [2, ranks]: what each sends and receives, in all layers."""
    page = plan.model.kv_bytes(plan.tokens_per_block, _ITEMSIZE)
    found = np.zeros((2, plan.num_ranks), np.int64)
    for each in group:
        found[0, each.source] += len(each.pages) * page
        found[1, each.dest] += len(each.pages) * page
    return found


def _exposed(
    plan: Plan,
    rates: Rates,
    spans: Sequence[Span],
    costs: Sequence[Cost],
    groups: Sequence[Sequence[Arrival]],
) -> float:
    """Seconds of a pass's exchanges that the projections to Q, K and V do not hide."""
    model = plan.model
    width = (model.num_q_heads + 2 * model.num_kv_heads) * model.head_dim
    token = 2 * model.num_layers * model.hidden_size * width / rates.gemm_tflops / 1e12
    rows = np.zeros(plan.num_ranks)  # that are stored before the exchange
    slices: list[list[int]] = [[] for _ in rows]
    for span in spans:
        if plan.blocks[span.block].rank is None:
            slices[span.rank].append(span.tokens)
    over = 0.0
    for index, group in enumerate(groups):
        if index:
            rows += [each[index - 1] if index <= len(each) else 0 for each in slices]
        if group:
            over = max(over, rows.max() * token) + _bytes(plan, group).max() / rates.link_gbs / 1e9
    return max(0.0, float(over) - max(cost.tokens for cost in costs) * token) if over else 0.0


def _ring(plan: Plan, rates: Rates, work: Sequence[float]) -> Prediction:
    """Each rank's pages go round to all others."""
    received = tuple(
        plan.model.kv_bytes(plan.context_len - sum(part.tokens for part in own), _ITEMSIZE)
        for own in map(plan.parts_of, range(plan.num_ranks))
    )
    attention = max(
        cost.attention_flops(plan.model) / rates.attention_tflops / 1e12 for cost in plan.rank_costs
    )
    hidden = attention * (plan.num_ranks - 1) / plan.num_ranks
    exposed = max(0.0, max(received) / rates.link_gbs / 1e9 - hidden)
    return Prediction(max(work) + exposed, exposed, received)
