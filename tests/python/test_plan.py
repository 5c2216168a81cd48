import errno
import itertools
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_attention.cli import terminal
from star_attention.cli.plot import plot_plan
from star_attention.config import StarConfig
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.plan import MAX_BLOCKS, MAX_RANKS, Cost, causal_pairs, make_plan

MODES = st.sampled_from(["recompute", "local", "broadcast"])


def check_partition(plan):
    """Blocks cover the context once, in order, and ranks own contiguous runs of them."""
    edges = [0, *(block.end for block in plan.blocks)]
    assert [block.start for block in plan.blocks] == edges[:-1]
    assert edges[-1] == plan.context_len
    owners = [block.rank for block in plan.blocks]
    assert owners == sorted(owners)
    assert all(0 <= rank < plan.num_ranks for rank in owners)


@given(
    context_len=st.integers(0, 5000),
    pages=st.integers(1, 8),
    anchor_pages=st.integers(0, 8),
    page=st.sampled_from([1, 16, 64]),
    num_ranks=st.integers(1, 9),
    mode=MODES,
)
def test_blocks_cover_the_context(context_len, pages, anchor_pages, page, num_ranks, mode):
    anchor = min(anchor_pages, pages) * page
    config = StarConfig(pages * page, anchor, mode, tokens_per_block=page)
    plan = make_plan(context_len, config, num_ranks)
    check_partition(plan)
    assert all(block.tokens == plan.block_size for block in plan.blocks[:-1])
    assert all(block.tokens >= 1 for block in plan.blocks)
    assert [block.prefix for block in plan.blocks] == [0, *[anchor] * 10**4][: len(plan.blocks)]
    used = len({block.rank for block in plan.blocks})
    assert used == min(num_ranks, len(plan.blocks))


@given(context_len=st.integers(0, 10**7), num_ranks=st.integers(1, 64))
def test_default_sizes(context_len, num_ranks):
    plan = make_plan(context_len, None, num_ranks)
    check_partition(plan)
    assert plan.block_size % plan.tokens_per_block == 0
    assert plan.anchor_size == plan.block_size
    assert len(plan.blocks) <= max(4, num_ranks)


@given(
    context_len=st.integers(1, 900),
    anchor_pages=st.integers(0, 3),
    num_ranks=st.integers(1, 4),
    mode=MODES,
)
def test_busiest_rank_does_least(context_len, anchor_pages, num_ranks, mode):
    """Against every contiguous division of the blocks that leaves no rank idle needlessly."""
    config = StarConfig(96, anchor_pages * 32, mode, tokens_per_block=32)
    plan = make_plan(context_len, config, num_ranks)
    costs = [block.cost.flops(LLAMA_3_1_8B) for block in plan.blocks]
    anchor = Cost(plan.anchor_size, causal_pairs(plan.anchor_size)).flops(LLAMA_3_1_8B)
    joining = anchor if mode == "local" else 0

    def busiest(cuts):
        edges = [0, *cuts, len(costs)]
        return max(
            sum(costs[a:b]) + (joining if a else 0) for a, b in itertools.pairwise(edges) if a < b
        )

    parts = min(num_ranks, len(costs))
    best = min(map(busiest, itertools.combinations(range(1, len(costs)), parts - 1)))
    assert max(cost.flops(LLAMA_3_1_8B) for cost in plan.rank_costs) == best


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


def costs_one_by_one(plan, joining):
    costs = []
    for rank in range(plan.num_ranks):
        own = [block for block in plan.blocks if block.rank == rank]
        start = joining if own and own[0].prefix else Cost()
        costs.append(sum((block.cost for block in own), start))
    return tuple(costs)


@given(
    context_len=st.integers(0, 4000),
    pages=st.integers(1, 6),
    anchor_pages=st.integers(0, 6),
    page=st.sampled_from([1, 16, 64]),
    num_ranks=st.integers(1, 40),
    mode=MODES,
)
def test_division_is_that_of_walking_over_all_blocks(
    context_len, pages, anchor_pages, page, num_ranks, mode
):
    config = StarConfig(pages * page, min(anchor_pages, pages) * page, mode, tokens_per_block=page)
    plan = make_plan(context_len, config, num_ranks)
    anchor = Cost(plan.anchor_size, causal_pairs(plan.anchor_size))
    joining = anchor if mode == "local" else Cost()
    ranks = assigned_one_by_one(
        [block.cost.flops(LLAMA_3_1_8B) for block in plan.blocks],
        num_ranks,
        joining.flops(LLAMA_3_1_8B),
    )
    assert [block.rank for block in plan.blocks] == ranks
    assert plan.rank_costs == costs_one_by_one(plan, joining)


@pytest.mark.parametrize("attention", ["star", "ring"])
def test_blocks_of_a_rank(attention):
    plan = make_plan(5000, StarConfig(attention=attention, tokens_per_block=16), 7)
    for rank in range(8):
        assert plan.blocks_of(rank) == tuple(b for b in plan.blocks if b.rank == rank)
    assert "_blocks_by_rank" not in asdict(plan)


def seconds(action):
    begin = time.process_time()
    action()
    return time.process_time() - begin


def test_large_plans_are_quick(tmp_path, capsys):
    """Generous limits: what grows with blocks times ranks takes minutes to hours here."""
    config = StarConfig(128, 128, "local")
    assert seconds(lambda: make_plan(1 << 20, config, 64)) < 0.5
    plan = make_plan(1 << 20, config, 4096)
    assert seconds(lambda: [plan.blocks_of(rank) for rank in range(4096)]) < 0.5
    assert seconds(lambda: plot_plan(plan, tmp_path / "plan.png")) < 8
    assert seconds(lambda: make_plan(1 << 27, None, MAX_RANKS)) < 10
    plan = make_plan(128 * MAX_BLOCKS, config, 64)
    assert len(plan.blocks) == MAX_BLOCKS
    assert seconds(lambda: terminal.print_plan(plan, LLAMA_3_1_8B, "a model")) < 5
    first = [block.rank for block in plan.blocks].index(1)
    assert f"│ {first} to " in capsys.readouterr().out


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
        (10, 2, {"attention": "dense"}, "dense attention runs on one rank"),
    ],
)
def test_refusals(context_len, num_ranks, options, message):
    with pytest.raises(UserError, match=message):
        make_plan(context_len, StarConfig(**options), num_ranks)


def test_notes():
    assert "rounded up to 256" in make_plan(1000).notes[0]
    assert make_plan(256, StarConfig(128), 5).notes == ("3 of 5 ranks have no block",)


@pytest.mark.parametrize("config", [StarConfig(256, 128), StarConfig(attention="ring")])
def test_plot_shows_every_rank(tmp_path, config):
    from matplotlib import pyplot as plt

    path = tmp_path / "plan.png"
    plot_plan(make_plan(1500, config, 3), path)
    pixels = plt.imread(path)[..., :3].reshape(-1, 3)
    for color in plt.get_cmap("tab10").colors[:3]:
        assert (abs(pixels - color) < 0.01).all(axis=1).sum() > 500


def test_plot_of_narrow_blocks_shows_them(tmp_path):
    """In their ranks' colours, and labels do not stand on one another."""
    from matplotlib import pyplot as plt

    path = tmp_path / "plan.png"
    plot_plan(make_plan(1 << 20, StarConfig(1024), 8), path)
    pixels = plt.imread(path)[..., :3].reshape(-1, 3)
    for color in plt.get_cmap("tab10").colors[:8]:
        assert (abs(pixels - color) < 0.02).all(axis=1).sum() > 400


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
