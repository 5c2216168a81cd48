"""The torch engine step by step, without the runtime: several ranks are threads."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine_steps import NONE, ints, slots_of, step_of
from helpers import run_job
from star_attention.distributed import SingleProcess
from star_attention.engines.base import Limits, RingHop, RingStep, is_decode_step, padded_count
from star_attention.engines.torch import attention as torch_attention
from star_attention.engines.torch import graphs
from star_attention.engines.torch.attention import PagedAttention
from star_attention.engines.torch.engine import TorchEngine
from star_attention.engines.torch.graphs import DecodeGraphs
from star_attention.engines.torch.kv_pool import KvPool
from star_attention.engines.torch.memory import pass_limits
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B, ModelConfig, RopeConfig
from star_attention.models.loading import random_weights
from thread_ranks import ThreadRanks

PAGE = 8
CPU = torch.device("cpu")
CONFIG = ModelConfig(3, 32, 48, 4, 2, 8, 64, 256, 1e-5, RopeConfig())
TOKENS = np.random.default_rng(0).integers(0, 64, 200).astype(np.int32)


def make_engine(comm=None, pages=None):
    weights = random_weights(CONFIG, torch.float32, CPU)
    engine = TorchEngine(CONFIG, weights, comm or SingleProcess(), PAGE, pages)
    engine.reserve_pages(pages or 20)
    engine.reserve_positions(CONFIG.max_position)
    return engine


def run(engine, spans, step, rows=NONE):
    """A step over spans of the text."""
    places = np.concatenate([NONE, *(np.arange(*span) for span in spans)]).astype(np.int32)
    return engine.step(TOKENS[places], places, step, np.asarray(rows, np.int32)).clone()


def one_rank(block, blocks, anchor, question):
    """Logits of a question behind blocks that see the anchor, in one engine."""
    engine, pages = make_engine(), block // PAGE
    own = [list(range(pages * index, pages * (index + 1))) for index in range(blocks)]
    sequences = [(own[0], 0, block)]
    sequences += [(own[0][: anchor // PAGE] + each, anchor, block) for each in own[1:]]
    run(engine, [(block * i, block * (i + 1)) for i in range(blocks)], step_of(*sequences))
    end = blocks * block
    step = step_of((list(range(blocks * pages + 1)), end, question))
    return run(engine, [(end, end + question)], step, range(question))


@pytest.mark.parametrize("cuts", [[5, 21], [3, 11, 16], [9], []], ids=str)
def test_an_anchor_that_is_shared_piece_by_piece(cuts):
    """Rank 0's block is cut anywhere, also inside a page, and its pages are scattered; the others
    receive the anchor with each cut and compute their blocks with the last."""
    block, anchor, question, size = 24, 16, 5, 3
    own, scratch = [6, 2, 4], [9, 5]

    def work(comm):
        engine = make_engine(comm)
        for begin, end in zip([0, *cuts], [*cuts, block], strict=True):
            rows = min(end, anchor) - begin  # of the anchor
            touched = range(begin // PAGE, -(-min(end, anchor) // PAGE))
            options = {}
            if rows > 0:
                pages = own if comm.rank == 0 else scratch
                options["shared_pages"] = ints(*(pages[page] for page in touched))
                options["shared_rows"] = rows
            if comm.rank == 0:
                run(engine, [(begin, end)], step_of((own, begin, end - begin), **options))
            elif end < anchor:
                run(engine, [], step_of(**options))
            elif begin < anchor:
                first = comm.rank * block
                step = step_of(([*scratch, *own], anchor, block), **options)
                run(engine, [(first, first + block)], step)
        start = size * block
        here = comm.rank == size - 1
        step = step_of(([*own, 7], block, question), stored=here, merge=True)
        return run(engine, [(start, start + question)], step, range(question))

    expected = one_rank(block, size, anchor, question)
    for logits in ThreadRanks(size).run(work):
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_rank_0_shares_what_it_has_not_computed():
    def work(comm):
        step = step_of(([0], 0, 4), shared_pages=ints(0), shared_rows=5)
        if comm.rank:
            step = step_of(shared_pages=ints(0), shared_rows=5)
        run(make_engine(comm), [] if comm.rank else [(0, 4)], step)

    with pytest.raises(ValueError, match="rank 0 shares 5 rows of 4"):
        ThreadRanks(2, timeout=5).run(work)


def test_rank_0_is_at_most_two_layers_ahead():
    """On a GPU it waits for no transfer before that; each may hold a copy of the anchor."""
    under_way, most = [], 0

    class Request:
        def __init__(self, buffer):
            under_way.append(self)
            self.buffer = buffer

        def wait(self, stream):
            assert under_way.pop(0) is self

    comm = SimpleNamespace(
        rank=0, size=2, start_broadcast=lambda buffer, root, stream: Request(buffer)
    )
    tables = SimpleNamespace(kv_lens=torch.zeros(1), attend=lambda *_: (None, None))
    attention = PagedAttention(tables, comm, 1.0, shared_pages=ints(3, 1), shared_rows=5)
    for layer in range(6):
        pool = torch.full((4, 2, 1, PAGE, 8), float(layer))
        attention.begin(pool)
        attention.stored(pool, 4)
        before = len(under_way)
        attention.stored(pool, 8)
        most = max(most, before, len(under_way))
        assert under_way[-1].buffer.eq(layer).all()
        attention(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), pool)
    assert most == 2
    attention.end()
    assert not under_way


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ring_keeps_two_partials(monkeypatch, size):
    """Every rank's pages reach every rank; partial results are merged hop by hop."""
    part, kept = 16, []
    merge = torch_attention.ops.merge_lse

    def counted(o, lse, **options):
        kept.append(len(o))
        return merge(o, lse, **options)

    monkeypatch.setattr(torch_attention.ops, "merge_lse", counted)

    def work(comm):
        engine, own = make_engine(comm), [3, 1]
        hops = []
        for hop in range(size):
            source = (comm.rank - hop) % size
            sees = part if source <= comm.rank else 0
            hops.append(RingHop(2, ints([0, 1]), ints(sees), causal=not hop))
        step = RingStep(slots_of(own, 0, part), ints(0, part), ints(*own), tuple(hops))
        first = comm.rank * part
        return run(engine, [(first, first + part)], step, range(part))

    engine, total = make_engine(), size * part
    expected = run(engine, [(0, total)], step_of((list(range(2 * size)), 0, total)), range(total))
    logits = np.concatenate(ThreadRanks(size).run(work))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert set(kept) == ({2} if size > 1 else set())


def test_a_pool_that_grows_copies_little():
    pool = KvPool(CONFIG, PAGE, torch.float32, CPU, None)
    copies, wanted = 0, []
    for page in range(600):
        before = pool.data
        pool.reserve(page + 1)
        copies += pool.data is not before
        pool.data[:, page] = page
        wanted.append(page)
    assert copies <= 20
    assert pool.data[:, :600, 0, 0, 0, 0].eq(torch.tensor(wanted)).all()
    assert pool.num_pages <= 900
    before = pool.data
    pool.reserve(10)
    assert pool.data is before


def test_a_fixed_pool():
    pool = KvPool(CONFIG, PAGE, torch.float32, CPU, 5)
    before = pool.data
    pool.reserve(5)
    assert pool.data is before
    with pytest.raises(ValueError, match="6 pages are asked for, the KV pool has 5"):
        pool.reserve(6)


def test_positions_are_reserved():
    engine, step = make_engine(), step_of(([0], 0, 1))
    assert len(engine._rotary) == 256  # what the model was made for
    with pytest.raises(ValueError, match="position 256 is not reserved"):
        engine.step(ints(1), ints(256), step, ints(0))
    before = engine.step(ints(1), ints(255), step, ints(0)).clone()
    engine.reserve_positions(257)
    engine.step(ints(1), ints(256), step, ints(0))
    torch.testing.assert_close(engine.step(ints(1), ints(255), step, ints(0)), before)


@pytest.mark.parametrize(
    ("most", "asked", "rows"),
    [
        (1 << 20, 1, 1 << 16),
        (1 << 20, (1 << 20) - 5, 1 << 20),
        (70_000, 66_000, 70_000),
        (1 << 20, (1 << 20) + 1, (1 << 20) + (1 << 16)),  # no doubling
    ],
)
def test_the_rotary_table_grows_by_strides(most, asked, rows):
    config = replace(CONFIG, max_position=most, head_dim=2)
    engine = TorchEngine(config, make_engine()._weights, SingleProcess(), PAGE)
    assert len(engine._rotary) == 0
    engine.reserve_positions(asked)
    assert len(engine._rotary) == rows


def test_what_a_decode_step_is():
    one_each = step_of(([0], 4, 1), ([1], 6, 1))
    assert is_decode_step(one_each, np.arange(2))
    assert not is_decode_step(one_each, np.arange(1))
    assert not is_decode_step(step_of(([0], 3, 2)), np.arange(2))
    # A rank without blocks still takes part in what the others send.
    assert not is_decode_step(step_of(shared_pages=ints(0)), np.arange(0))


def test_padded_counts():
    assert [padded_count(n) for n in (1, 2, 3, 4, 5, 8, 9, 33)] == [1, 2, 4, 4, 8, 8, 16, 64]


def test_a_group_of_one_rank_is_capturable():
    """As with --tp 2 and one star rank: decode runs by graph."""
    code = (
        "from star_attention.distributed import default_communicator\n"
        "world = default_communicator()\n"
        "alone = world.split(world.rank)\n"
        "assert alone.world is world\n"
        "print((alone.size, alone.capturable, world.capturable))\n"
    )
    assert run_job(2, "-c", code).stdout.count("(1, True, False)") == 2


class StandIn:
    """CUDA graphs on the CPU: a replay computes again. `captured`: after how many steps."""

    def __init__(self, monkeypatch):
        self.memories = []
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(graphs, "graph_memory", object)

    def capture(self, run, memory):
        self.memories.append(memory)
        result = run()
        return (lambda: result.copy_(run())), result


def with_graphs(engine):
    engine._graphs = DecodeGraphs(
        engine._forward, engine._comm, engine._scale, CPU, engine.limits.pages, PAGE
    )
    return engine


def decode(engine, count, step, length=10):
    """One more token, each step's anew, for questions over pages of their own."""
    places = np.full(count, length, np.int32)
    tokens = (np.arange(count) + 7 * step).astype(np.int32) % 64
    attention = step_of(*(([2 * index, 2 * index + 1], length, 1) for index in range(count)))
    return engine.step(tokens, places, attention, np.arange(count)).clone()


def test_graphs_of_padded_counts(monkeypatch):
    """Any number of questions, by graph or not, gets the same logits; rows beyond do no harm."""
    stand_in = StandIn(monkeypatch)
    plain, graphed = make_engine(pages=16), with_graphs(make_engine(pages=16))
    for engine in (plain, graphed):
        spans = [(0, 10)] * 8
        run(engine, spans, step_of(*(([2 * i, 2 * i + 1], 0, 10) for i in range(8))))
    counts = [3, 4, 3, 8, 5, 1, 4, 7, 1]
    for step, count in enumerate(counts):
        before = graphed._pool.data.clone()
        logits = decode(graphed, count, step)
        torch.testing.assert_close(logits, decode(plain, count, step), atol=1e-5, rtol=0)
        changed = (graphed._pool.data != before).flatten(2).any(-1).any(0)
        assert changed.nonzero().flatten().tolist() == [2 * i + 1 for i in range(count)]
    # The first step of 4, 8 and 1 ran without one.
    assert graphed.graph_steps == len(counts) - 3
    assert plain.graph_steps == 0
    assert len(stand_in.memories) == 3
    assert len({id(memory) for memory in stand_in.memories}) == 1


def test_graphs_are_invalidated_by_reserved_positions_only(monkeypatch):
    stand_in = StandIn(monkeypatch)
    engine = with_graphs(make_engine(pages=16))
    for _ in range(3):
        decode(engine, 1, 0)
    assert (engine.graph_steps, len(stand_in.memories)) == (2, 1)
    decode(engine, 1, 0, length=15)
    engine.reserve_positions(100)
    decode(engine, 1, 0)
    assert (engine.graph_steps, len(stand_in.memories)) == (4, 1)
    engine.reserve_positions(1000)
    for _ in range(3):
        decode(engine, 1, 0)
    assert (engine.graph_steps, len(stand_in.memories)) == (6, 2)


def test_ranks_capture_at_the_same_step(monkeypatch):
    """Also when their parts of two contexts have different lengths, asked in turn."""
    StandIn(monkeypatch)

    def work(comm):
        engine = with_graphs(make_engine(comm, pages=16))
        steps = []
        lengths = [3, 60] if comm.rank else [100, 7]  # of the two contexts here
        for turn in range(6):
            here = lengths[turn % 2]
            pages = list(range(-(-here // PAGE)))
            step = step_of((pages, here, 1), stored=False, merge=True)
            engine.step(ints(turn), ints([110, 70][turn % 2]), step, ints(0))
            steps.append(engine.graph_steps)
        return steps

    for steps in ThreadRanks(2).run(work):
        assert steps == [0, 1, 2, 3, 4, 5]


def test_tokens_that_fit():
    free, pages = 12 << 30, 3000

    def limits(num_ranks, free=free):
        return pass_limits(LLAMA_3_1_8B, 2, num_ranks, pages, 128, free)

    chunk = 4096 + 3 * 14336
    each = 3 * 4096 * 2 + 32 * 4  # x, q and what attention gives
    room = int(0.9 * free) - 16384 * 2 * chunk
    alone, shared = limits(1), limits(4)
    rows = room // each
    assert alone == Limits(pages, rows, ring_tokens=rows, question_tokens=rows)
    partial = 4 * 32 * 129
    arriving = 2 * pages * 128 * 2 * 8 * 128 * 2
    assert shared.question_tokens == room // (each + partial)
    assert shared.pass_tokens == rows
    assert shared.ring_tokens == (room - arriving) // (each + 2 * partial)
    assert limits(2, 1 << 30).ring_tokens == 0
    # Not a whole chunk fits: its rows are counted.
    few = limits(1, 100 << 20).pass_tokens
    assert few == int(0.9 * (100 << 20)) // (each + 2 * chunk)


@pytest.mark.parametrize(("num_ranks", "free"), [(1, 16 << 20), (2, 16 << 20), (2, 0)])
def test_memory_that_no_pass_fits_into(num_ranks, free):
    with pytest.raises(UserError, match="too little for a pass: use a smaller --kv-cache-gib, or"):
        pass_limits(LLAMA_3_1_8B, 2, num_ranks, 3000, 128, free)
