"""The torch engine step by step, without the runtime: several ranks are threads."""

import functools
import itertools
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine_steps import NONE, ints, step_of
from helpers import run_job
from star_attention.distributed import SingleProcess, Traffic
from star_attention.engines.base import (
    Exchange,
    Hop,
    Limits,
    Pages,
    Prefix,
    is_decode_step,
    padded_count,
)
from star_attention.engines.torch import attention as torch_attention
from star_attention.engines.torch import graphs, operators
from star_attention.engines.torch.engine import TorchEngine
from star_attention.engines.torch.graphs import DecodeGraphs
from star_attention.engines.torch.kv_pool import KvPool
from star_attention.engines.torch.memory import pass_limits
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B, ExpertsConfig, ModelConfig
from star_attention.models.loading import random_weights
from star_attention.models.rope import RopeConfig
from star_attention.runtime.pages import Rows, window_of
from thread_ranks import ThreadRanks

PAGE = 8
CPU = torch.device("cpu")
CONFIG = ModelConfig(3, 32, 48, 4, 2, 8, 64, 256, 1e-5, RopeConfig())
TOKENS = np.random.default_rng(0).integers(0, 64, 200).astype(np.int32)


def make_engine(comm=None, pages=None, config=CONFIG):
    weights = random_weights(config, torch.float32, CPU)
    engine = TorchEngine(config, weights, comm or SingleProcess(), PAGE, pages)
    engine.reserve_pages(pages or 20)
    engine.reserve_positions(config.max_position)
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


def pages_of(rank, *pages):
    return Pages(rank, ints(*pages))


@pytest.mark.parametrize("cuts", [[5, 21], [3, 11, 16], [9], []], ids=str)
def test_an_anchor_that_arrives_piece_by_piece(cuts):
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
            if rows > 0 and comm.rank == 0:
                sent = [own[page] for page in touched]
                sends = tuple(pages_of(rank, *sent) for rank in range(1, size))
                options["exchanges"] = (Exchange(rows, sends, ()),)
            elif rows > 0:
                arrives = pages_of(0, *(scratch[page] for page in touched))
                options["exchanges"] = (Exchange(0, (), (arrives,)),)
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


# Pages that each rank computes of a text, from its early and from its late part.
SHARES = {
    "2": ([2, 1], [3, 4]),
    "3": ([1, 2, 1], [3, 1, 2]),
    "3, one without rows": ([2, 0, 3], [1, 0, 2]),
    "3, two without late rows": ([2, 1, 3], [0, 2, 0]),
}
PLACES = {"consecutive": range(10), "scattered": [6, 2, 9, 4, 0, 11, 3, 8, 1, 13]}


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_ranks_compute_a_text_together(monkeypatch, shares, places, chunk):
    """Each an early and a late part; all have all pages then, in all layers, and count what they
    sent. The rows are the text's, whatever was in the pages before."""
    monkeypatch.setitem(operators.CHUNK_ROWS, "cpu", chunk)
    early, late = shares
    size, total = len(early), PAGE * sum(early + late)
    ends = np.cumsum([0, *early, *late]).tolist()
    parts = [range(a, b) for a, b in itertools.pairwise(ends)]  # in pages of the text

    def work(comm, rows):
        engine, rank = make_engine(comm), comm.rank
        engine._pool.data.fill_(torch.nan)
        order = np.roll(places, rank)  # every rank has its own numbers
        mine = [parts[rank], parts[size + rank]]

        def both_ways(phase):
            """As many pages as a rank has; without pages also to those that expect none."""
            others = [other for other in range(size) if other != rank]
            sends = (pages_of(other, *order[list(mine[phase])]) for other in others)
            receives = (
                pages_of(other, *order[list(parts[phase * size + other])]) for other in others
            )
            return tuple(sends), tuple(receives)

        counts = [PAGE * len(part) for part in mine]
        exchanges = (
            Exchange(counts[0], *both_ways(0)),
            Exchange(sum(counts), *both_ways(1)),
        )
        sequences = [
            (list(order[: part.stop]), PAGE * part.start, PAGE * len(part)) for part in mine if part
        ]
        spans = [(PAGE * part.start, PAGE * part.stop) for part in mine if part]
        logits = run(
            engine,
            spans,
            step_of(*sequences, exchanges=exchanges),
            range(sum(counts)) if rows else NONE,
        )
        page_bytes = CONFIG.num_layers * engine.page_bytes
        sent = page_bytes * sum(map(len, mine)) * (size - 1)
        received = page_bytes * (sum(map(len, parts)) - sum(map(len, mine)))
        assert comm.traffic == Traffic(sent, received)
        return logits, spans, engine._pool.data[:, order[: total // PAGE]]

    engine = make_engine()
    step = step_of((list(range(total // PAGE)), 0, total))
    expected = run(engine, [(0, total)], step, range(total))
    for rows in (True, False):
        for logits, spans, kept in ThreadRanks(size).run(lambda comm, rows=rows: work(comm, rows)):
            if rows:
                seen = [expected[slice(*span)] for span in spans]
                np.testing.assert_allclose(logits, np.concatenate([logits[:0], *seen]), atol=1e-5)
            torch.testing.assert_close(
                kept, engine._pool.data[:, : total // PAGE], atol=1e-5, rtol=0
            )


def test_an_exchange_begins_once_its_rows_are_stored(monkeypatch):
    """And those before it have begun, beside the projection of the rows behind."""
    events = []

    class Request:
        def __init__(self, name):
            self.name = name

        def wait(self, stream):
            events.append(f"{self.name} arrived")

    def exchange(sends, receives, stream):
        (name,) = [rank for _, rank in (*sends, *receives)]
        events.append(f"{name} begins")
        return Request(name)

    original = operators.ops.rope_append

    def append(qkv, *arguments):
        events.append(len(qkv))
        original(qkv, *arguments)

    monkeypatch.setattr(operators.ops, "rope_append", append)
    monkeypatch.setitem(operators.CHUNK_ROWS, "cpu", 8)
    comm = SimpleNamespace(rank=0, size=9, exchange=exchange, capturable=False)
    exchanges = (
        Exchange(0, (), (pages_of(1, 5),)),
        Exchange(11, (pages_of(2, 0, 1),), ()),
        Exchange(4, (), (pages_of(3, 9, 7),)),
        Exchange(20, (pages_of(4, 2),), ()),
    )
    run(make_engine(comm), [(0, 20)], step_of(([0, 1, 2], 0, 20), exchanges=exchanges))
    layer = ["1 begins", 4, 7, "2 begins", "3 begins", 8, 1, "4 begins"]
    assert events == CONFIG.num_layers * [*layer, *(f"{name} arrived" for name in (1, 2, 3, 4))]
    with pytest.raises(ValueError, match="an exchange follows 20 rows of 19"):
        run(make_engine(comm), [(0, 19)], step_of(([0, 1, 2], 0, 19), exchanges=exchanges))


def test_scattered_pages_are_packed_once():
    """However many ranks they go to; consecutive ones are sent and received in the pool."""
    sent, received = {}, {}

    def exchange(sends, receives, stream):
        sent.update((rank, buffer.data_ptr()) for buffer, rank in sends)
        received.update((rank, buffer.data_ptr()) for buffer, rank in receives)
        return SimpleNamespace(wait=lambda stream: None)

    comm = SimpleNamespace(rank=0, size=9, exchange=exchange, capturable=False)
    engine = make_engine(comm)
    sends = (pages_of(1, 2, 0), pages_of(2, 3, 4), pages_of(3, 2, 0))
    receives = (pages_of(1, 6, 7), pages_of(2, 9, 8), pages_of(3))
    run(engine, [], step_of(exchanges=(Exchange(0, sends, receives),)))
    last = engine._pool.data[-1]
    assert sent[1] == sent[3] != last[2].data_ptr()
    assert sent[2] == last[3].data_ptr()
    assert received[1] == last[6].data_ptr()
    inside = range(last.data_ptr(), last.data_ptr() + last.nbytes)
    assert received[2] not in inside
    assert set(received) == {1, 2}


@pytest.mark.parametrize("rows_at_a_time", [8, 4096])
@pytest.mark.parametrize("parts", [[16], [16, 16], [16, 8, 32, 24], [24, 0, 8]], ids=str)
def test_hops_keep_two_partials(monkeypatch, parts, rows_at_a_time):
    """Every rank's pages pass by every rank; partial results are merged hop by hop. Some ranks
    have fewer pages, or none."""
    monkeypatch.setattr(torch_attention, "_MERGE_ROWS", rows_at_a_time)
    size, kept = len(parts), []
    starts = np.cumsum([0, *parts]).tolist()
    merge = torch_attention.ops.merge_lse

    def counted(o, lse, **options):
        kept.append(len(o))
        return merge(o, lse, **options)

    monkeypatch.setattr(torch_attention.ops, "merge_lse", counted)

    def work(comm):
        engine, rank = make_engine(comm), comm.rank
        own = [3, 1, 6, 2][: parts[rank] // PAGE]
        hops = []
        for hop in range(1, size):
            source = (rank - hop) % size
            count, sequences = parts[source] // PAGE, 1 if own else 0
            table = np.arange(count, dtype=np.int32)[None].repeat(sequences, axis=0)
            sees = np.full(sequences, parts[source] * (source < rank), np.int32)
            hops.append(Hop(pages_of((rank + hop) % size, *own), source, count, sees, table))
        step = step_of(*([(own, 0, parts[rank])] if own else []), hops=tuple(hops))
        rows = range(parts[rank]) if all(parts) else NONE  # all ranks want some, or none does
        logits = run(engine, [(starts[rank], starts[rank + 1])], step, rows)
        return logits, engine._pool.data[:, own]

    engine, total = make_engine(), sum(parts)
    step = step_of((list(range(total // PAGE)), 0, total))
    expected = run(engine, [(0, total)], step, range(total))
    logits, kept_pages = zip(*ThreadRanks(size).run(work), strict=True)
    if all(parts):
        np.testing.assert_allclose(np.concatenate(logits), expected, atol=1e-5)
    pages = engine._pool.data[:, : total // PAGE]
    torch.testing.assert_close(torch.cat(kept_pages, dim=1), pages, atol=1e-5, rtol=0)
    assert set(kept) == ({2} if size > 1 else set())


def test_two_hops_of_pages_at_a_time():
    """Those attended to and those that arrive."""
    alive, most, size = [], 0, 6

    def exchange(sends, receives, stream):
        nonlocal most
        alive.extend(weakref.ref(buffer) for buffer, _ in receives)
        most = max(most, sum(each() is not None for each in alive))
        return SimpleNamespace(wait=lambda stream: None)

    comm = SimpleNamespace(rank=0, size=size, exchange=exchange, capturable=False)
    hops = tuple(
        Hop(pages_of(hop, 0, 1), size - hop, 2, ints(16), ints(0, 1)[None])
        for hop in range(1, size)
    )
    engine = make_engine(comm)
    run(engine, [(0, 16)], step_of(([0, 1], 0, 16), hops=hops), range(16))
    assert most == 2


def test_prefix_exchange_and_hops():
    """Rows see an anchor that arrives from rank 0 for all of a rank's sequences, pages of their
    own, and those of the ranks before. In the last layer no hop passes if nobody attends."""
    anchor, part, size = 16, 24, 3
    own, front = [3, 1, 6], [9, 4]

    def work(comm, rows=part):
        engine, rank = make_engine(comm), comm.rank
        if rank == 0:
            run(engine, [(0, anchor)], step_of((front, 0, anchor)))
        others = [other for other in range(size) if other != rank]
        exchange = Exchange(0, (), (pages_of(0, *front),))
        if rank == 0:
            exchange = Exchange(0, tuple(pages_of(other, *front) for other in others), ())
        hops = []
        for hop in range(1, size):
            source = (rank - hop) % size
            sees = ints(part * (source < rank))
            sends = pages_of((rank + hop) % size, *own)
            hops.append(Hop(sends, source, 3, sees, ints(0, 1, 2)[None]))
        prefix = Prefix(ints(0, part), ints(anchor), ints(*front)[None])
        step = step_of((own, 0, part), prefix=prefix, exchanges=(exchange,), hops=tuple(hops))
        first = anchor + rank * part
        before = comm.traffic.copy()
        logits = run(engine, [(first, first + part)], step, range(rows))
        assert engine.wait_seconds > 0
        return logits, comm.traffic - before, engine.page_bytes

    engine, total = make_engine(), anchor + size * part
    step = step_of((list(range(total // PAGE)), 0, total))
    expected = run(engine, [(0, total)], step, range(total))[anchor:]
    results = ThreadRanks(size).run(work)
    np.testing.assert_allclose(np.concatenate([each[0] for each in results]), expected, atol=1e-5)
    results += ThreadRanks(size).run(lambda comm: work(comm, rows=0))
    for index, (_, traffic, page) in enumerate(results):
        layers = CONFIG.num_layers - (index >= size)
        passed = 2 * 3 * page * layers
        anchors = 2 * page * CONFIG.num_layers
        ways = (2, 0) if index % size == 0 else (0, 1)
        assert traffic == Traffic(*(passed + way * anchors for way in ways))


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
    with pytest.raises(ValueError, match="row 256 of the rotary table is not there"):
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
    assert not is_decode_step(step_of(), np.arange(0))


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
    forward = functools.partial(engine._forward, is_captured=True)
    pool = engine.limits.pages, PAGE
    windows = {"window": engine.config.window, "windowed": engine.config.windowed_layers}
    engine._graphs = DecodeGraphs(forward, engine._comm, engine._scale, CPU, *pool, **windows)
    return engine


def with_window(engine, step):
    """A step of which all is on one rank."""
    if (size := engine.config.window) is None:
        return step
    counts = np.diff(step.cu_seqlens_q).tolist()
    rows = [
        Rows(*each) for each in zip(step.page_table, step.kv_lens.tolist(), counts, strict=True)
    ]
    firsts = [np.maximum(np.arange(r.kv_len - r.count, r.kv_len) - size + 1, 0) for r in rows]
    return replace(step, window=window_of(rows, firsts, PAGE))


def decode(engine, count, step, length=10):
    """One more token, each step's anew, for questions over pages of their own."""
    places = np.full(count, length, np.int32)
    tokens = (np.arange(count) + 7 * step).astype(np.int32) % 64
    attention = step_of(*(([2 * index, 2 * index + 1], length, 1) for index in range(count)))
    attention = with_window(engine, attention)
    return engine.step(tokens, places, attention, np.arange(count)).clone()


WINDOWS = replace(CONFIG, window=5, windowed_layers=(0, 2))
EXPERTS = replace(CONFIG, experts=ExpertsConfig(6, 2, 24, True), dense_layers=(1,), qk_norm=True)


@pytest.mark.parametrize("config", [CONFIG, EXPERTS, WINDOWS], ids=["dense", "experts", "windows"])
def test_graphs_of_padded_counts(monkeypatch, config):
    """Any number of questions, by graph or not, gets the same logits; rows beyond do no harm."""
    stand_in = StandIn(monkeypatch)
    plain = make_engine(pages=16, config=config)
    graphed = with_graphs(make_engine(pages=16, config=config))
    for engine in (plain, graphed):
        spans = [(0, 10)] * 8
        step = step_of(*(([2 * i, 2 * i + 1], 0, 10) for i in range(8)))
        run(engine, spans, with_window(engine, step))
    counts = [3, 4, 3, 8, 5, 1, 4, 7, 1]
    for step, count in enumerate(counts):
        before = graphed._pool.data.clone()
        logits = decode(graphed, count, step)
        torch.testing.assert_close(logits, decode(plain, count, step), atol=1e-5, rtol=0)
        same = torch.isclose(graphed._pool.data, before, rtol=0, atol=0, equal_nan=True)
        changed = (~same).flatten(2).any(-1).any(0)  # what was never written may be NaN
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
    partial = 4 * 32 * 129
    selected = room // (each + 2 * partial)
    assert alone == Limits(pages, rows, None, rows, selected, rows)
    kv = 2 * 8 * 128 * 2
    layer = pages * 128 * kv
    assert shared.question_tokens == room // (each + partial)
    assert shared.ring_tokens == (room - 3 * layer) // (each + 2 * partial)
    # What is exchanged is all ranks' rows, here, beyond what attention gives, or all of the pool.
    assert limits(2).pass_tokens == rows
    assert shared.pass_tokens == (room - layer) // each > room // (each + 4 * kv - 4096 * 2)
    fewer = limits(4, 4 << 30)
    assert fewer.pass_tokens == (room - (8 << 30) * 9 // 10) // (each + 4 * kv - 4096 * 2)
    assert shared.selected_tokens == (room - layer) // (each + 2 * partial)
    assert limits(2, 1 << 30).ring_tokens == 0
    assert limits(2, 1 << 30).selected_tokens == 0
    # Not a whole chunk fits: its rows are counted.
    few = limits(1, 100 << 20).pass_tokens
    assert few == int(0.9 * (100 << 20)) // (each + 2 * chunk)


@pytest.mark.parametrize(("num_ranks", "free"), [(1, 16 << 20), (2, 16 << 20), (2, 0)])
def test_memory_that_no_pass_fits_into(num_ranks, free):
    with pytest.raises(UserError, match="too little for a pass: use a smaller --kv-cache-gib, or"):
        pass_limits(LLAMA_3_1_8B, 2, num_ranks, 3000, 128, free)
