import errno
import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention.cli import terminal
from star_attention.cli.plot import plot_plan
from star_attention.config import StarConfig
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.plan import MAX_BLOCKS, MAX_RANKS, make_plan
from star_attention.predict import Rates, predict
from star_attention.runtime.phase1 import ContextPart, scratch_pages
from star_attention.spans import Cost, Range, causal_pairs, evenly, most_tokens

MODES = st.sampled_from(["recompute", "local", "broadcast"])


PAGES = st.sampled_from([1, 16, 64])


def check_partition(plan):
    """Blocks, parts and spans each cover the context once; what a span sees is the anchor, and its
    block up to itself, all of it computed before or with it."""
    edges = [0, *(block.end for block in plan.blocks)]
    assert [block.start for block in plan.blocks] == edges[:-1]
    assert edges[-1] == plan.context_len
    edges = [0, *(part.end for part in plan.parts)]
    assert [part.start for part in plan.parts] == edges[:-1]
    assert edges[-1] == plan.context_len
    for part in plan.parts:
        block = plan.blocks[part.block]
        assert block.start <= part.start < part.end <= block.end
        assert part.start % plan.tokens_per_block == 0
        assert 0 <= part.rank < plan.num_ranks


def check_passes(plan, most=None):
    """All passes of at most so many tokens a rank; the spans."""
    passes, computed, every = plan.passes(), np.zeros(plan.context_len, bool), []
    again = [np.zeros(plan.anchor_size, bool) for _ in range(plan.num_ranks)]
    for part in plan.parts:
        if part.start in plan.cached:
            computed[part.start : part.end] = True
    while not passes.finished:
        spans = passes.next(most)
        every += spans
        assert spans
        for span in spans:
            block = plan.blocks[span.block]
            if span.start < block.start or block.rank not in (None, span.rank):
                again[span.rank][span.start : span.end] = True
                continue
            assert not computed[span.start : span.end].any()
            computed[span.start : span.end] = True
        for span in spans:
            block = plan.blocks[span.block]
            own = Range(block.start, span.end)
            if span.start < block.start:
                own = Range(0, span.end)
            front = (Range(0, block.prefix),) if block.prefix and own.start else ()
            assert span.sees == (*front, own)
            for seen in span.sees:
                there = computed[seen.start : seen.end]
                in_anchor = seen.end <= plan.anchor_size
                assert there.all() or (in_anchor and again[span.rank][: seen.end].all())
        if most is not None:
            assert most_tokens(spans) <= most + plan.tokens_per_block
    assert computed.all()
    return every


@given(
    context_len=st.integers(0, 5000),
    pages=st.integers(1, 20),
    anchor_pages=st.integers(0, 20),
    page=PAGES,
    num_ranks=st.integers(1, 9),
    mode=MODES,
    most=st.one_of(st.none(), st.integers(1, 700)),
)
def test_spans_compute_the_context(context_len, pages, anchor_pages, page, num_ranks, mode, most):
    anchor = min(anchor_pages, pages) * page
    config = StarConfig(pages * page, anchor, mode, tokens_per_block=page)
    plan = make_plan(context_len, config, num_ranks)
    check_partition(plan)
    assert all(block.tokens == plan.block_size for block in plan.blocks[:-1])
    assert [block.prefix for block in plan.blocks] == [0, *[anchor] * 10**4][: len(plan.blocks)]
    if most is not None:
        most = max(most, context_len // 50)
    spans = check_passes(plan, most)
    if most is None:
        assert tuple(spans) == plan.spans
        for rank, cost in enumerate(plan.rank_costs):
            own = [span.cost for span in spans if span.rank == rank]
            assert cost == Cost(sum(c.tokens for c in own), sum(c.pairs for c in own))


@given(context_len=st.integers(0, 10**7), num_ranks=st.integers(1, 64))
def test_default_sizes(context_len, num_ranks):
    plan = make_plan(context_len, None, num_ranks)
    check_partition(plan)
    assert plan.block_size % plan.tokens_per_block == 0
    assert plan.anchor_size == plan.block_size
    assert len(plan.blocks) <= max(4, num_ranks)


def flops_of(plan):
    return [cost.flops(plan.model) for cost in plan.rank_costs]


@settings(max_examples=200)
@given(
    context_pages=st.integers(1, 600),
    rest=st.integers(0, 63),
    pages=st.integers(1, 200),
    anchor_pages=st.integers(0, 200),
    num_ranks=st.integers(2, 8),
)
def test_ranks_are_equally_busy(context_pages, rest, pages, anchor_pages, num_ranks):
    """The busiest has 3 % more than the mean, or, in short contexts, a page; blocks of 16 pages a
    rank."""
    pages = max(pages, 16 * num_ranks)
    config = StarConfig(64 * pages, 64 * min(anchor_pages, pages), tokens_per_block=64)
    plan = make_plan(64 * context_pages + rest, config, num_ranks)
    last = Range(max(0, plan.context_len - 64), plan.context_len)
    page = max(plan.spans, key=lambda span: span.end)._replace(start=last.start).cost
    flops = flops_of(plan)
    mean = sum(flops) / num_ranks
    assert max(flops) <= max(1.03 * mean, mean + page.flops(plan.model))
    kept = [sum(part.tokens for part in plan.parts_of(rank)) for rank in range(num_ranks)]
    assert max(kept) - min(kept) <= max(part.tokens for part in plan.parts)


@settings(max_examples=60)
@given(
    costs=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    loads=st.lists(st.integers(0, 40), min_size=2, max_size=3),
)
def test_work_is_shared_evenly(costs, loads):
    """Against every way to give ascending pieces to ranks."""
    costs, loads = np.sort(np.array(costs, float)), np.array(loads, float)

    def busiest(ranks):
        total = loads.copy()
        np.add.at(total, np.array(ranks), costs)
        return total.max()

    best = min(map(busiest, itertools.product(range(len(loads)), repeat=len(costs))))
    assert busiest(evenly(costs, loads)) <= best + costs.max()


@given(
    context_len=st.integers(1, 900),
    anchor_pages=st.integers(0, 3),
    num_ranks=st.integers(1, 4),
    mode=st.sampled_from(["recompute", "local"]),
)
def test_busiest_rank_does_least(context_len, anchor_pages, num_ranks, mode):
    """Without exchanges: against every contiguous division of the blocks that leaves no rank idle
    needlessly."""
    config = StarConfig(96, anchor_pages * 32, mode, tokens_per_block=32)
    plan = make_plan(context_len, config, num_ranks)
    anchor = Cost(plan.anchor_size, causal_pairs(plan.anchor_size))
    costs = costs_of_blocks(plan)
    joining = anchor.flops(LLAMA_3_1_8B) if mode == "local" else 0

    def busiest(cuts):
        edges = [0, *cuts, len(costs)]
        return max(
            sum(costs[a:b]) + (joining if a else 0) for a, b in itertools.pairwise(edges) if a < b
        )

    parts = min(num_ranks, len(costs))
    best = min(map(busiest, itertools.combinations(range(1, len(costs)), parts - 1)))
    assert max(flops_of(plan)) == best


def costs_of_blocks(plan):
    """FLOPs of each block, with the anchor where it is computed again for it."""
    anchor = Cost(plan.anchor_size, causal_pairs(plan.anchor_size))
    again = anchor if plan.anchor_mode == "recompute" else Cost()
    costs = [Cost(b.tokens, causal_pairs(b.tokens, b.prefix)) for b in plan.blocks]
    return [
        (cost + again if block.prefix else cost).flops(LLAMA_3_1_8B)
        for cost, block in zip(costs, plan.blocks, strict=True)
    ]


@given(
    context_pages=st.integers(1, 200),
    pages=st.integers(1, 40),
    more=st.integers(0, 200),
    num_ranks=st.integers(1, 5),
    mode=MODES,
    random=st.randoms(use_true_random=False),
)
def test_a_plan_around_what_is_cached(context_pages, pages, more, num_ranks, mode, random):
    """A text that grew has the same parts; those that are there stay where they are."""
    config = StarConfig(16 * pages, 16 * min(pages, 3), mode, tokens_per_block=16)
    before = make_plan(16 * context_pages, config, num_ranks)
    plan = make_plan(16 * (context_pages + more), config, num_ranks)
    starts = {part.start: part.rank for part in before.parts}
    where = [starts.get(part.start) if random.random() < 0.7 else None for part in plan.parts]
    if mode != "broadcast" and where:  # rank 0 has the first one
        where[0] = where[0] and 0
    whole = {(p.start, p.end) for p in before.parts[:-1]}
    assert whole <= {(p.start, p.end) for p in plan.parts}
    around = plan.beside(where)
    assert around.cached == {
        p.start for p, rank in zip(plan.parts, where, strict=True) if rank is not None
    }
    for part, rank in zip(around.parts, where, strict=True):
        assert rank is None or part.rank == rank
    check_partition(around)
    check_passes(around)
    assert around.beside([None] * len(where)) == plan


def assigned_one_by_one(costs, num_ranks, joining):
    """The rank of each block, as the planner once found it: by walking over all blocks."""

    def fill(limit):
        ranks = []
        rank, load = 0, 0
        for index, cost in enumerate(costs):
            blocks_left, ranks_left = len(costs) - index, num_ranks - rank - 1
            has_block = bool(ranks) and ranks[-1] == rank
            if has_block and ranks_left and (load + cost > limit or blocks_left <= ranks_left):
                rank, load = rank + 1, joining
            if load + cost > limit:
                return None
            load += cost
            ranks.append(rank)
        return ranks

    low, high = 0, sum(costs) + joining
    while low < high:
        middle = (low + high) // 2
        if fill(middle) is None:
            low = middle + 1
        else:
            high = middle
    return fill(high)


@given(
    context_len=st.integers(0, 4000),
    pages=st.integers(1, 6),
    anchor_pages=st.integers(0, 6),
    page=st.sampled_from([1, 16, 64]),
    num_ranks=st.integers(1, 40),
    mode=st.sampled_from(["recompute", "local"]),
)
def test_division_is_that_of_walking_over_all_blocks(
    context_len, pages, anchor_pages, page, num_ranks, mode
):
    config = StarConfig(pages * page, min(anchor_pages, pages) * page, mode, tokens_per_block=page)
    plan = make_plan(context_len, config, num_ranks)
    anchor = Cost(plan.anchor_size, causal_pairs(plan.anchor_size))
    joining = anchor if mode == "local" else Cost()
    ranks = assigned_one_by_one(costs_of_blocks(plan), num_ranks, joining.flops(LLAMA_3_1_8B))
    assert [block.rank for block in plan.blocks] == ranks
    assert [part.rank for part in plan.parts] == ranks


@pytest.mark.parametrize("attention", ["star", "ring"])
def test_parts_of_a_rank(attention):
    plan = make_plan(5000, StarConfig(attention=attention, tokens_per_block=16), 7)
    for rank in range(8):
        assert plan.parts_of(rank) == tuple(p for p in plan.parts if p.rank == rank)


def seconds(action):
    begin = time.process_time()
    action()
    return time.process_time() - begin


def test_large_plans_are_quick(tmp_path, capsys):
    """Generous limits: what grows with blocks times ranks takes minutes to hours here."""
    config = StarConfig(128, 128, "local")
    assert seconds(lambda: make_plan(1 << 20, config, 64)) < 0.5
    plan = make_plan(1 << 20, config, 4096)
    assert seconds(lambda: [plan.parts_of(rank) for rank in range(4096)]) < 0.5
    assert seconds(lambda: plot_plan(plan, tmp_path / "plan.png")) < 8
    assert seconds(lambda: make_plan(1 << 27, None, MAX_RANKS)) < 10
    plan = make_plan(128 * MAX_BLOCKS, config, 64)
    assert len(plan.blocks) == MAX_BLOCKS
    assert seconds(lambda: terminal.print_plan(plan, "a model", Rates())) < 15
    first = [block.rank for block in plan.blocks].index(1)
    assert f"1     {first} to " in capsys.readouterr().out
    plan = make_plan(1 << 27, StarConfig(attention="dense"), MAX_RANKS)
    assert seconds(lambda: terminal.print_plan(plan, "a model", Rates())) < 10
    assert "too large to say what arrives" in capsys.readouterr().out


def test_cost_of_anchor_modes():
    def tokens(mode):
        config = StarConfig(1024, 512, mode)
        return [cost.tokens for cost in make_plan(8192, config, 2).rank_costs]

    assert sum(tokens("broadcast")) == 8192
    assert sum(tokens("local")) == 8192 + 512
    assert sum(tokens("recompute")) == 8192 + 7 * 512
    one_block = make_plan(1000, StarConfig(attention="dense"))
    assert one_block.rank_costs == (one_block.dense_cost,)


@given(context_len=st.integers(0, 3000), num_ranks=st.integers(1, 5))
def test_ring_is_exact_and_balanced(context_len, num_ranks):
    plan = make_plan(context_len, StarConfig(attention="ring", tokens_per_block=16), num_ranks)
    assert sum(cost.pairs for cost in plan.rank_costs) == causal_pairs(context_len)
    assert sum(cost.tokens for cost in plan.rank_costs) == context_len
    if context_len == 32 * num_ranks * 8:
        assert len({cost.pairs for cost in plan.rank_costs}) == 1


@pytest.mark.parametrize(
    ("context_len", "num_ranks", "options", "message"),
    [
        (-1, 1, {}, "context length is -1"),
        (10, 0, {}, "number of ranks is 0"),
        (10, 10**6, {}, "number of ranks is 1000000: use 65536 or less"),
        (10, 10**6, {"attention": "ring"}, "number of ranks is 1000000: use 65536 or less"),
        (1 << 30, 1, {"block_size": 128}, "8388608 blocks of 1073741824 tokens.*use 1024 or more"),
        (10, 1, {"block_size": 100}, "block size 100 is not a multiple.*use 128"),
        (10, 1, {"block_size": 0}, "block size is 0: use 128"),
        (10, 1, {"block_size": 128, "anchor_size": 256}, "anchor size is 256: use 0 to 128"),
        (10, 1, {"anchor_size": 256}, "anchor size is 256: use 0 to 128"),
        (10, 1, {"anchor_size": -128}, "anchor size is -128: use 0"),
        (10, 1, {"anchor_size": 100}, "anchor size 100 is not a multiple.*use 128"),
        (10, 1, {"tokens_per_block": 0}, "tokens_per_block is 0"),
        (10, 1, {"anchor_mode": "none"}, "anchor_mode is 'none': use one of recompute"),
        (10, 1, {"preset": "fast"}, "preset is 'fast': use one of None, paper"),
        (10, 1, {"preset": "paper", "block_size": 128}, "the block size 128 is not the preset pa"),
        (10, 1, {"preset": "paper", "anchor_size": 0}, "the anchor size 0 is not the preset pape"),
        (10, 1, {"preset": "paper", "selected_pages": 1}, "the number of selected pages 1 is not"),
        (10, 1, {"preset": "paper", "attention": "ring"}, "the attention ring is not the preset"),
    ],
)
def test_refusals(context_len, num_ranks, options, message):
    with pytest.raises(UserError, match=message):
        make_plan(context_len, StarConfig(**options), num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 4, 7])
def test_the_papers_setting(num_ranks):
    """A quarter of the context, whatever the number of ranks; by default it is as many blocks."""
    plan, default = (
        make_plan(1 << 16, StarConfig(preset=preset), num_ranks) for preset in ("paper", None)
    )
    assert (plan.block_size, plan.anchor_size, plan.selected_pages) == (16384, 16384, 0)
    assert len(plan.blocks) == 4
    assert len(default.blocks) == max(4, num_ranks)


def test_notes(capsys):
    def printed(*plan):
        terminal.print_plan(make_plan(*plan), "a model", Rates())
        return capsys.readouterr().out

    assert "rounded up to 256" in make_plan(1000).notes[0]
    assert "3 of 5 ranks have nothing to compute" in printed(256, StarConfig(128), 5)
    shared = printed(8192, StarConfig(4096), 5)
    assert "all ranks compute blocks 0 to 1 in slices" in shared
    assert "nothing" not in shared


def test_predictions_are_what_was_measured():
    """docs/results.md, two H200s."""
    for seconds, config, num_ranks in (
        (6.09, StarConfig(32768, anchor_mode="recompute"), 2),
        (4.96, StarConfig(32768, anchor_mode="local"), 2),
        (4.79, StarConfig(attention="ring"), 2),
        (9.33, StarConfig(attention="dense"), 1),
    ):
        predicted = predict(make_plan(1 << 17, config, num_ranks))
        assert predicted.seconds == pytest.approx(seconds, rel=0.02)


def test_predictions_of_transfers():
    config = StarConfig(32768)
    plan = make_plan(1 << 17, config, 4)
    fast, slow = predict(plan), predict(plan, Rates(link_gbs=10))
    assert fast.received_bytes == slow.received_bytes
    assert fast.exposed_seconds < 0.02 * fast.seconds
    seconds = max(slow.received_bytes) / 10e9
    assert slow.exposed_seconds == pytest.approx(seconds, rel=0.2)
    assert slow.seconds - fast.seconds == pytest.approx(slow.exposed_seconds, rel=0.1)
    # All that others compute of the first block, and of the others what is before late slices.
    block = plan.model.kv_bytes(32768, 2)
    assert all(block / 2 < each / 4 < block for each in fast.received_bytes)
    ring = predict(make_plan(1 << 17, StarConfig(attention="ring"), 4), Rates(link_gbs=10))
    assert max(ring.received_bytes) == 3 * block
    assert ring.exposed_seconds < slow.exposed_seconds
    for mode in ("local", "recompute"):
        alone = predict(make_plan(1 << 17, StarConfig(32768, anchor_mode=mode), 4))
        assert alone.received_bytes == (0, 0, 0, 0)


@pytest.mark.parametrize("config", [StarConfig(256, 128), StarConfig(attention="ring")])
def test_plot_shows_every_rank(tmp_path, config):
    from matplotlib import pyplot as plt

    path = tmp_path / "plan.png"
    plot_plan(make_plan(1500, config, 3), path)
    pixels = plt.imread(path)[..., :3].reshape(-1, 3)
    for color in plt.get_cmap("tab10").colors[:3]:
        assert (abs(pixels - color) < 0.01).all(axis=1).sum() > 500


def test_plot_shows_what_pages_are_chosen_from(tmp_path):
    from matplotlib import pyplot as plt

    grey = []
    for count in (0, 2):
        config = StarConfig(256, 128, selected_pages=count)
        plot_plan(make_plan(1500, config, 1), tmp_path / "plan.png")
        pixels = plt.imread(tmp_path / "plan.png")[..., :3].reshape(-1, 3)
        grey.append((abs(pixels - 0.75) < 0.01).all(axis=1).sum())
    assert grey[1] > grey[0] + 500


def test_plot_of_many_blocks(tmp_path):
    """Blocks that are left out leave room for the others: every rank's are as wide as any."""
    from matplotlib import pyplot as plt

    path = tmp_path / "plan.png"
    plot_plan(make_plan(1 << 20, StarConfig(1024), 8), path)
    pixels = plt.imread(path)[..., :3].reshape(-1, 3)
    for color in plt.get_cmap("tab10").colors[:8]:
        assert (abs(pixels - color) < 0.01).all(axis=1).sum() > 300


@pytest.mark.parametrize("old", [None, b"an older picture"])
def test_no_half_pictures(tmp_path, monkeypatch, old):
    path = tmp_path / "plan.png"
    if old:
        path.write_bytes(old)

    def half(self, data):
        write(self, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match=r"plan\.png cannot be written: .*No space left on device"):
        plot_plan(make_plan(10), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([old] if old else [])


def test_pictures_of_pipes_and_links(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "plan.png")
    plot_plan(make_plan(10), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    plot_plan(make_plan(10), "/dev/null")


def test_plot_refusals(tmp_path):
    with pytest.raises(UserError, match="0 tokens"):
        plot_plan(make_plan(0), tmp_path / "plan.png")
    with pytest.raises(UserError, match=r"plan\.xyz cannot be written"):
        plot_plan(make_plan(10), tmp_path / "plan.xyz")


@settings(max_examples=60)
@given(
    context_len=st.integers(1, 120),
    pages=st.integers(1, 9),
    anchor_pages=st.integers(0, 9),
    num_ranks=st.integers(1, 4),
    mode=MODES,
    most=st.one_of(st.none(), st.integers(1, 30)),
    random=st.randoms(use_true_random=False),
)
def test_scratch_pages_suffice(context_len, pages, anchor_pages, num_ranks, mode, most, random):
    """For what a rank sees and does not keep, around whatever is cached."""
    config = StarConfig(4 * pages, 4 * min(pages, anchor_pages), mode, tokens_per_block=4)
    plan = make_plan(context_len, config, num_ranks)
    where = [random.choice([None, random.randrange(num_ranks)]) for _ in plan.parts]
    if mode != "broadcast":  # rank 0 has the first one
        where[0] = where[0] and 0
    plan = plan.beside(where)
    ranks = range(num_ranks)
    kept = [sum(-(-part.tokens // 4) for part in plan.parts_of(rank)) for rank in ranks]
    parts = [
        ContextPart(plan, rank, range(kept[rank]), range(100, 100 + scratch_pages(plan, rank)))
        for rank in ranks
    ]
    passes = plan.passes()
    while not passes.finished:
        spans = passes.next(most)
        steps = [part.take(spans) for part in parts]
        exchanges = {len(step.attention.exchanges) for step in steps if step}
        assert len(exchanges) <= 1
        assert all(steps) or exchanges == {0}
    assert all(part.finished for part in parts)
