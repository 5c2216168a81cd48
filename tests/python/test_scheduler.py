"""What ranks see when the scheduler is free to cut, interleave and put back as it likes.

Several workers run in this process over engines that compute nothing but note, for every slot of
the KV cache, which token it holds. After every order the rows of all ranks are checked: together
they see exactly the tokens that the definition of Star Attention gives them.
"""

import itertools
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention.config import StarConfig
from star_attention.distributed import Traffic
from star_attention.engines.base import Limits
from star_attention.errors import UserError
from star_attention.models.config import LLAMA_3_1_8B
from star_attention.runtime.blocks import BlockTable
from star_attention.runtime.copies import Copies
from star_attention.runtime.leader import Leader
from star_attention.runtime.orders import (
    Ask,
    Chunk,
    Decode,
    Forget,
    Load,
    Release,
    Report,
    Save,
    Saved,
    Wait,
)
from star_attention.runtime.sampling import SamplingParams
from star_attention.runtime.scheduler import Scheduler
from star_attention.runtime.store import Store
from star_attention.runtime.tiers import SaveEnd
from star_attention.runtime.worker import Worker
from star_attention.serve.warm_up import warm_up
from star_attention.spans import most_tokens

PAGE = 4
LAYERS = 2


class NotingEngine:
    """Keeps the last step; `slots[page, offset]` is the key of the token that is cached there."""

    tokens_per_block = PAGE
    has_exchanges = has_hops = has_prefix = has_selection = True
    kv_dtype, kv_packing = "auto", 1
    wait_seconds = graph_steps = peak_memory_bytes = 0

    def __init__(self, limits, window=None):
        self.limits = limits
        self.config = replace(LLAMA_3_1_8B, window=window)
        self.slots = np.zeros((0, PAGE), object)
        self.last = None
        self.positions = 0
        self.is_reading = False

    def reserve_pages(self, count):
        more = np.full((count - len(self.slots), PAGE), None)
        self.slots = np.concatenate([self.slots, more])

    def reserve_positions(self, positions):
        self.positions = max(self.positions, positions)

    def copy_page(self, source, target):
        self.slots[target] = self.slots[source]

    def step(self, token_ids, positions, attention, logit_rows, on_layer=None):
        assert len(token_ids) == len(positions) == len(attention.slot_mapping)
        assert positions.max(initial=-1) < self.positions
        self.last = positions, attention
        self.is_reading |= not len(logit_rows)
        return np.zeros((len(logit_rows), 3), np.float32)

    def finish_steps(self):
        self.is_reading = False


class Ranks:
    """Workers in a row; `execute` checks what each row of an order sees."""

    def __init__(self, size, limits, window=None):
        self.window = window
        self.engines = [NotingEngine(limits, window) for _ in range(size)]
        self.workers = []
        for rank, engine in enumerate(self.engines):
            comm = SimpleNamespace(rank=rank, size=size, traffic=Traffic())
            comm.world = SimpleNamespace(rank=rank, gather_objects=lambda value: [value])
            self.workers.append(Worker(engine, comm))
        self.contexts = {}
        self.context_of = {}
        self.orders = []

    def execute(self, order, on_layer=None):
        self.orders.append(order)
        for engine in self.engines:
            engine.last = None
        results = [worker.execute(order, on_layer) for worker in self.workers]
        for worker, engine in zip(self.workers, self.engines, strict=True):
            assert worker._reading or not engine.is_reading
        if isinstance(order, Chunk):
            self.check_chunk(self.contexts[order.context])
        elif isinstance(order, Load | Saved):
            return [each for result in results for each in result]
        elif isinstance(order, Ask):
            self.check_questions([(part.question, part.context) for part in order.parts])
        elif isinstance(order, Decode):
            self.check_questions([(n, self.context_of[n]) for n in order.questions])
        return results[0]

    def check_chunk(self, context):
        plan, names = context.plan, self.names(context)
        lasts = [engine.last for engine in self.engines]
        for index in range(max(len(last[1].exchanges) for last in lasts if last)):
            for engine in filter(lambda each: each.last, self.engines):
                self.store(engine, names, engine.last[1].exchanges[index].rows)
            self.exchange([last and last[1].exchanges[index] for last in lasts])
        for engine in filter(lambda each: each.last, self.engines):
            self.store(engine, names)
        self.check_selections(plan, names)
        for rank, engine in enumerate(self.engines):
            if engine.last is None:
                continue
            positions, step = engine.last
            for row, (position, seen) in enumerate(
                zip(positions.tolist(), self.seen(rank, step), strict=True)
            ):
                block = max((b for b in plan.blocks if b.start <= position), key=lambda b: b.start)
                begin, prefix = block.start, block.prefix
                if position < prefix:  # the anchor, computed for a later block
                    begin, prefix = 0, 0
                expected = {names[i] for i in (*range(prefix), *range(begin, position + 1))}
                assert seen == expected, (rank, row, position)
            if self.window is not None:
                seen_by_row = self.seen_in_window(engine, step)
                for position, seen in zip(positions.tolist(), seen_by_row, strict=True):
                    first = max(0, position - self.window + 1)
                    assert seen == names[first : position + 1], (rank, position)

    def check_selections(self, plan, names):
        """Rows choose from all pages between the anchor and their block, and these are stored."""
        selections = [engine.last and engine.last[1].selection for engine in self.engines]
        if not any(selections):
            for positions, _ in (engine.last for engine in self.engines if engine.last):
                last = max(positions.tolist(), default=0) // plan.block_size * plan.block_size
                assert not plan.selected_pages or last <= plan.anchor_size
            return
        first, found = plan.anchor_size // PAGE, {}
        for rank, (engine, selection) in enumerate(zip(self.engines, selections, strict=True)):
            positions, step = engine.last
            assert np.array_equal(selection.owners, selections[0].owners)
            for index in np.flatnonzero(selection.owners == rank).tolist():
                found[first + index] = engine.slots[selection.pages[index]].tolist()
            for row, count in zip(step.cu_seqlens_q, selection.counts, strict=False):
                assert positions[row] % PAGE == 0
                block = positions[row] // plan.block_size * plan.block_size
                assert count == max(block // PAGE - first, 0)
        assert found == {page: names[page * PAGE : (page + 1) * PAGE] for page in sorted(found)}
        assert sorted(found) == list(range(first, first + len(selections[0].owners)))

    def check_questions(self, pairs):
        for engine in self.engines:
            positions, step = engine.last
            counts = np.diff(step.cu_seqlens_q)
            keys = np.repeat([question for question, _ in pairs], counts)
            for slot, *key in zip(
                step.slot_mapping.tolist(), keys.tolist(), positions.tolist(), strict=True
            ):
                if slot >= 0:
                    engine.slots[slot // PAGE, slot % PAGE] = tuple(key)
        seen = [self.seen(rank, engine.last[1]) for rank, engine in enumerate(self.engines)]
        positions, step = self.engines[0].last
        row = 0
        for (question, context), count in zip(pairs, np.diff(step.cu_seqlens_q), strict=True):
            self.context_of[question] = context
            length = self.contexts[context].plan.context_len
            for _ in range(count):
                position = int(positions[row])
                shards = [rank[row] for rank in seen]
                assert sum(map(len, shards)) == position + 1  # nothing twice
                expected = set(self.names(self.contexts[context]))
                expected |= {(question, i) for i in range(length, position + 1)}
                assert set().union(*shards) == expected
                row += 1
        if self.window is not None:
            self.check_windows(pairs)

    def check_windows(self, pairs):
        positions, step = self.engines[0].last
        shards = [self.seen_in_window(engine, engine.last[1]) for engine in self.engines]
        numbers = np.repeat(np.arange(len(pairs)), np.diff(step.cu_seqlens_q)).tolist()
        rows = zip(numbers, positions.tolist(), *shards, strict=True)
        for number, position, *seen in rows:
            question, context = pairs[number]
            names = self.names(self.contexts[context])
            names += [(question, i) for i in range(len(names), position + 1)]
            assert sorted(map(str, itertools.chain(*seen))) == sorted(
                map(str, names[max(0, position - self.window + 1) :])
            )

    def names(self, context):
        """Of the context's tokens: contexts may share those of blocks of the same contents."""
        number, plan = context.number, context.plan
        pairs = zip(plan.parts, context.keys, strict=True)
        return [(key or number, i) for part, key in pairs for i in range(part.start, part.end)]

    def store(self, engine, names, rows=None):
        """The first rows of an engine's last step."""
        positions, step = engine.last
        for slot, position in zip(step.slot_mapping[:rows].tolist(), positions[:rows], strict=True):
            engine.slots[slot // PAGE, slot % PAGE] = names[position]

    def exchange(self, exchanges):
        """One of each rank's, or None: what is sent is received."""
        sent = {
            (rank, to.rank): to.pages
            for rank, each in enumerate(exchanges)
            if each
            for to in each.sends
        }
        for rank, each in enumerate(exchanges):
            for source in each.receives if each else ():
                pages = sent.pop((source.rank, rank))
                self.engines[rank].slots[source.pages] = self.engines[source.rank].slots[pages]
        assert not sent

    def seen_in_window(self, engine, step):
        """The keys that each row of an engine's step sees in layers with a window."""
        rows, window = [], step.window
        starts = [window.starts[a:b] for a, b in itertools.pairwise(step.cu_seqlens_q)]
        for table, kv_len, firsts in zip(window.page_table, window.kv_lens, starts, strict=True):
            cached = engine.slots[table].reshape(-1)
            for i, first in enumerate(firsts.tolist()):
                end = kv_len - (len(firsts) - 1 - i) * step.causal
                rows.append(cached[first:end].tolist())
        return rows

    def seen(self, rank, step):
        """The keys that each row of a rank's step sees."""
        counts = np.diff(step.cu_seqlens_q)
        sources = [(self.engines[rank], step, None)]
        for index, hop in enumerate(step.hops):
            source = self.engines[hop.source]
            sends = source.last[1].hops[index].sends
            assert (sends.rank, len(sends.pages)) == (rank, hop.num_pages)
            sources.append((source, hop, sends.pages))
        rows = [set() for _ in range(counts.sum())]
        for engine, tables, pages in sources:
            row = 0
            for index, count in enumerate(counts.tolist()):
                table = tables.page_table[index]
                cached = engine.slots[table if pages is None else pages[table]].reshape(-1)
                for i in range(count):
                    length = int(tables.kv_lens[index]) - (count - 1 - i) * (
                        pages is None and tables.causal
                    )
                    rows[row] |= set(cached[:length])
                    row += 1
        if getattr(step, "prefix", None):
            starts = step.prefix.cu_seqlens_q
            for index, length in enumerate(step.prefix.kv_lens.tolist()):
                cached = self.engines[rank].slots[step.prefix.page_table[index]].reshape(-1)
                for row in rows[starts[index] : starts[index + 1]]:
                    assert row.isdisjoint(cached[:length])
                    row |= set(cached[:length])
        return rows


class NotingTiers:
    """Keeps what the slots of a block note; loads wait and fail at random."""

    def __init__(self, engine, random):
        self.engine, self.random = engine, random
        self.blocks, self.ends = {}, []

    def save(self, key, pages, layers, tiers):
        if layers.stop == LAYERS:
            stored = self.random.random() < 0.8
            if stored:
                self.blocks[key] = self.engine.slots[pages].copy()
            self.ends.append(SaveEnd(key, "host", stored))

    def load(self, key, pages, layers):
        state = self.random.choice(["done", "done", "waiting", "failed"])
        if key not in self.blocks or state == "failed":
            self.blocks.pop(key, None)
            return "failed"
        if state == "done" and layers.stop == LAYERS:
            self.engine.slots[pages] = self.blocks[key]
        return state

    def forget(self, key, tier):
        del self.blocks[key]

    def cancel(self, key):
        pass

    def ended(self):
        ends, self.ends = self.ends, []
        return ends


def make(
    size, limits=None, chunk_tokens=None, shares_blocks=False, store=None, random=None, window=None
):
    limits = limits or Limits()
    ranks = Ranks(size, limits, window)
    for worker in ranks.workers:
        worker._tiers = store and NotingTiers(worker.engine, random)
    leader = Leader(ranks.execute, ranks.engines[0], size, limits, shares_blocks, store)
    leader.scheduler.chunk_tokens = chunk_tokens
    return ranks, leader


def add_context(ranks, leader, length, config, edited=(), keep=True):
    tokens = np.zeros(length, np.int32)
    tokens[[i for i in edited if i < length]] = 1
    context = leader.scheduler.add_context(tokens, config, keep=keep)
    ranks.contexts[context.number] = context
    return context


def check_pages(ranks, leader):
    leader.flush()
    in_use = [worker.pool.pages_in_use for worker in ranks.workers]
    counted = leader.scheduler.pages_in_use.tolist()
    assert all(a <= b for a, b in zip(in_use, counted, strict=True)), (in_use, counted)
    return in_use, counted


configs = st.builds(
    lambda block, anchor, mode, placement, method, chosen: StarConfig(
        block * PAGE if method == "star" else None,
        min(anchor, block) * PAGE if method == "star" else None,
        mode,
        placement,
        PAGE,
        method,
        chosen if method == "star" and mode == "broadcast" else 0,
    ),
    st.sampled_from([1, 2, 3, 4, 9]),
    st.integers(0, 9),
    st.sampled_from(["recompute", "local", "broadcast"]),
    st.sampled_from(["tail", "round_robin"]),
    st.sampled_from(["star", "star", "star", "ring"]),
    st.integers(0, 2),
)


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_chosen_from_is_loaded_first(count):
    """A text that was appended to: its beginning comes out of host memory."""
    store = Store({"host": 100}, 1, LAYERS, page_bytes=1)
    ranks, leader = make(1, Limits(pages=24), None, True, store, Random(0))
    config = StarConfig(2 * PAGE, PAGE, tokens_per_block=PAGE, selected_pages=count)

    def read(length, *edited):
        context = add_context(ranks, leader, length, config, edited, keep=False)
        leader.scheduler.add_question(context, np.zeros(1, np.int32), SamplingParams(max_tokens=1))
        leader.scheduler.release_context(context)
        return context

    for length, *edited in ((8 * PAGE,), (22 * PAGE, *range(0, 22 * PAGE, PAGE))):
        read(length, *edited)
        while leader.step() is not None or leader.scheduler.copies.awaits_saves:
            leader._asked_for_saves = 0.0
    context = read(10 * PAGE)
    while not context.is_open:
        leader.step()
    loaded = [block for block in context.blocks if block.source == "host"]
    assert len(loaded) == 3
    assert context.blocks[-1] in context.reads
    assert context.awaits == (loaded if count else [])


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_server_warms_up(monkeypatch, has_prefix):
    """Any engine: steps of 1 to 64 questions, and none without."""
    monkeypatch.setattr(NotingEngine, "has_prefix", has_prefix)
    ranks, leader = make(2)
    steps = []

    def execute(order, on_layer=None):
        steps.extend([order] if isinstance(order, Decode) else [])
        results = [worker.execute(order) for worker in ranks.workers]
        return results[0]

    leader.execute = execute
    warm_up(leader, StarConfig(4 * PAGE, tokens_per_block=PAGE))
    assert {len(step.questions) for step in steps} == {1 << power for power in range(7)}
    assert any(step.groups for step in steps) == has_prefix
    assert check_pages(ranks, leader)[0] == [0, 0]


@settings(max_examples=300)
@given(data=st.data(), size=st.integers(1, 4), chunk=st.one_of(st.none(), st.integers(1, 40)))
def test_every_row_sees_what_it_should(data, size, chunk):
    """Contexts, questions and releases in any order, few pages, passes of any size; texts that have
    blocks in common, which contexts share, or do not."""
    draw = data.draw
    limits = Limits(
        pages=draw(st.one_of(st.none(), st.integers(12, 40))),
        pass_tokens=draw(st.one_of(st.none(), st.integers(1, 50))),
        ring_tokens=draw(st.one_of(st.none(), st.integers(1, 50))),
        pass_sequences=draw(st.one_of(st.none(), st.integers(1, 5))),
        question_tokens=draw(st.one_of(st.none(), st.integers(1, 9))),
        questions=draw(st.one_of(st.none(), st.integers(1, 4))),
    )
    shares = draw(st.booleans())
    store = None
    if shares and draw(st.booleans()):
        store = Store({"host": draw(st.integers(10, 60))}, 1, LAYERS, page_bytes=1)
    random = draw(st.randoms(use_true_random=False))
    window = draw(st.one_of(st.none(), st.integers(1, 70)))
    ranks, leader = make(size, limits, chunk, shares, store, random, window)
    leader.scheduler.question_tokens = draw(st.one_of(st.none(), st.integers(1, 9)))
    leader.scheduler.least_shared = draw(st.integers(0, 60))
    leader.scheduler._has_prefix = draw(st.booleans())
    divisions = st.sampled_from(draw(st.lists(configs, min_size=1, max_size=3)))
    edits = st.lists(st.integers(0, 60), max_size=2)
    contexts, questions = [], []
    actions = st.sampled_from(["context", "question", "question", "question", "release", "step"])
    for action in ["context", *draw(st.lists(actions, min_size=4, max_size=25))]:
        try:
            if action == "context":
                length = draw(st.integers(1, 60))
                keep = not shares or draw(st.booleans())
                new = add_context(ranks, leader, length, draw(divisions), draw(edits), keep)
                contexts.append(new)
            elif action == "question" and contexts:
                context = draw(st.sampled_from(contexts))
                tokens = np.zeros(draw(st.integers(1, 12)), np.int32)
                params = SamplingParams(max_tokens=draw(st.integers(1, 12)))
                questions.append(leader.scheduler.add_question(context, tokens, params))
            elif action == "release" and contexts:
                context = contexts.pop(draw(st.integers(0, len(contexts) - 1)))
                leader.scheduler.release_context(context)
        except UserError:
            pass  # it does not fit
        if action == "step":
            for _ in range(draw(st.integers(1, 10))):
                leader._asked_for_saves = 0.0
                leader.step()
                check_pages(ranks, leader)
    steps, left = 0, contexts
    while True:
        while leader.step() is not None:
            leader._asked_for_saves = 0.0
            check_pages(ranks, leader)
            steps += 1
            assert steps < 5000, "it does not end"
        passing = [each for each in left if each.is_ready and not each.is_kept]
        if not passing:
            break
        left = [each for each in left if each not in passing]
        for context in passing:
            leader.scheduler.release_context(context)
    for question in questions:
        assert len(question.answer) == question.params.max_tokens
    for context in left:
        assert context.is_ready or (context.is_kept and not context.is_open)
        leader.release(context)
    leader.step()
    idle = leader.scheduler._blocks.idle.tolist()
    assert check_pages(ranks, leader) == (idle, idle)
    assert shares or not any(idle)


@settings(max_examples=150)
@given(
    data=st.data(),
    size=st.integers(1, 3),
    config=configs,
    window=st.one_of(st.none(), st.integers(1, 40)),
)
def test_blocks_come_back_from_lower_tiers(data, size, config, window):
    """A few texts, asked again and again, over pages for one or two of them."""
    draw = data.draw
    store = Store({"host": draw(st.integers(10, 60))}, 1, LAYERS, page_bytes=1)
    limits = Limits(pages=draw(st.integers(13, 16)))
    random = draw(st.randoms(use_true_random=False))
    if config.attention == "ring" or config.selected_pages:
        window = None
    ranks, leader = make(size, limits, 8, True, store, random, window)
    questions, scheduler = [], leader.scheduler
    lengths = draw(st.lists(st.integers(20, 30), min_size=2, max_size=3))
    for _ in range(draw(st.integers(4, 12))):
        index = draw(st.integers(0, len(lengths) - 1))
        edited = draw(st.lists(st.just(lengths[index] - 1), max_size=1))
        context = add_context(ranks, leader, lengths[index], config, edited, keep=False)
        params = SamplingParams(max_tokens=draw(st.integers(1, 5)))
        questions.append(scheduler.add_question(context, np.zeros(2, np.int32), params))
        scheduler.release_context(context)
        for _ in range(draw(st.sampled_from([0, 10, 60, 60, 60]))):
            leader._asked_for_saves = 0.0
            leader.step()
            check_pages(ranks, leader)
    steps = 0
    while leader.step() is not None:
        steps += 1
        assert steps < 5000, "it does not end"
    for question in questions:
        assert len(question.answer) == question.params.max_tokens
    idle = scheduler._blocks.idle.tolist()
    assert check_pages(ranks, leader) == (idle, idle)


def test_passes_of_contexts_and_decode_steps_alternate():
    ranks, leader = make(2, chunk_tokens=8)
    config = StarConfig(32, 8, tokens_per_block=PAGE)
    first = add_context(ranks, leader, 64, config)
    while not first.is_ready:
        leader.step()
    tokens = np.zeros(3, np.int32)
    leader.scheduler.add_question(first, tokens, SamplingParams(max_tokens=50))
    leader.step()
    second, third = (add_context(ranks, leader, 96, config) for _ in range(2))
    ranks.orders.clear()
    while not (second.is_ready and third.is_ready):
        leader.step()
    kinds = [type(order) for order in ranks.orders if isinstance(order, Chunk | Decode)]
    assert all(a != b for a, b in itertools.pairwise(kinds))
    chunks = [order for order in ranks.orders if isinstance(order, Chunk)]
    assert max(most_tokens(chunk.spans) for chunk in chunks) <= 8 + PAGE
    assert {chunk.context for chunk in chunks[:2]} == {second.number, third.number}


@pytest.mark.parametrize("is_released", [True, False])
def test_nothing_is_read_any_more_when_pages_are_given_away(is_released):
    ranks, leader = make(2, chunk_tokens=2 * PAGE)
    context = add_context(ranks, leader, 20 * PAGE, StarConfig(8 * PAGE, tokens_per_block=PAGE))
    while not any(engine.is_reading for engine in ranks.engines):
        leader.step()
    for worker in ranks.workers:
        worker.execute(Release(contexts=(context.number,)) if is_released else Wait())
        assert not worker.engine.is_reading


def test_saves_come_after_what_somebody_waits_for():
    store = Store({"host": 100}, 1, LAYERS, page_bytes=1)
    ranks, leader = make(2, None, 8, shares_blocks=True, store=store, random=Random(0))
    config = StarConfig(32, 8, tokens_per_block=PAGE)
    first = add_context(ranks, leader, 64, config, range(64))
    while not first.is_ready:
        leader.step()
    second = add_context(ranks, leader, 640, config, range(640))
    ranks.orders.clear()
    while not second.is_ready:
        leader.step()
    kinds = [type(order) for order in ranks.orders if isinstance(order, Chunk | Save)]
    runs = [len(list(run)) for kind, run in itertools.groupby(kinds) if kind is Chunk]
    assert len(runs) > 3
    assert len(runs) > 3
    assert runs[1:-1] == [8] * len(runs[1:-1])
    while leader.step() is not None:
        pass
    assert Save in map(type, ranks.orders)


def test_the_newest_question_is_put_back_when_the_pool_is_full():
    ranks, leader = make(1, Limits(pages=10))
    context = add_context(ranks, leader, 24, StarConfig(24, tokens_per_block=PAGE))
    params, tokens = SamplingParams(max_tokens=12), np.zeros(2, np.int32)
    asked = [leader.scheduler.add_question(context, tokens, params) for _ in range(2)]
    while leader.step() is not None:
        pass
    assert [len(each.answer) for each in asked] == [12, 12]
    parts = [part for order in ranks.orders if isinstance(order, Ask) for part in order.parts]
    assert [part.question for part in parts].count(asked[0].number) == 1
    assert [part.question for part in parts].count(asked[1].number) > 1


@pytest.mark.parametrize("placement", ["tail", "round_robin"])
def test_what_can_never_fit_is_refused_at_once(placement):
    ranks, leader = make(2, Limits(pages=8))
    config = StarConfig(16, 4, "local", placement, PAGE)
    with pytest.raises(UserError, match=r"needs 36 tokens of KV cache on a rank, .* room for 32"):
        add_context(ranks, leader, 64, config)
    context = add_context(ranks, leader, 48, config)
    with pytest.raises(UserError, match="other contexts leave"):
        add_context(ranks, leader, 48, config)
    with pytest.raises(UserError, match="question and answer need"):
        leader.scheduler.add_question(
            context, np.zeros(5, np.int32), SamplingParams(max_tokens=10**6)
        )
    with pytest.raises(UserError, match="question and answer need"):
        make(2, Limits(pages=8))[1].scheduler.add_context(
            np.zeros(16, np.int32), config, [(5, 10**6)]
        )
    assert ranks.orders == []


def test_answers_may_be_longer_than_any_list():
    scheduler = Scheduler(LLAMA_3_1_8B, Limits(), 3, PAGE)
    config = StarConfig(16, kv_placement="round_robin", tokens_per_block=PAGE)
    context = scheduler.add_context(np.zeros(40, np.int32), config)
    question = np.zeros(3, np.int32)
    scheduler.add_question(context, question, SamplingParams(max_tokens=10**9))
    with pytest.raises(UserError, match="max_tokens is 3000000000"):
        scheduler.add_question(context, question, SamplingParams(max_tokens=3 * 10**9))


def test_a_rank_that_cannot_hold_what_was_ordered_says_so():
    ranks, _ = make(1, Limits(pages=2))
    with pytest.raises(MemoryError, match="3 pages of KV cache are wanted, 2 "):
        ranks.workers[0].pool.allocate(3)


def test_report_counts_every_phase():
    ranks, leader = make(1)
    context = add_context(ranks, leader, 30, StarConfig(8, tokens_per_block=PAGE))
    params = SamplingParams(max_tokens=5)
    leader.scheduler.add_question(context, np.zeros(4, np.int32), params)
    while leader.step() is not None:
        pass
    phases = leader.execute(Report(reset=True))[0]["phases"]
    assert [phases[name]["tokens"] for name in ("context", "question", "decode")] == [30, 4, 4]
    assert leader.execute(Report())[0]["phases"]["context"]["tokens"] == 0


def test_what_an_engine_cannot_do_is_refused():
    scheduler = Scheduler(LLAMA_3_1_8B, Limits(), 2, PAGE, has_exchanges=False, has_hops=False)
    tokens = np.zeros(40, np.int32)
    with pytest.raises(UserError, match=r"broadcast needs a GPU for each rank .*: use local"):
        scheduler.add_context(tokens, StarConfig(16, tokens_per_block=PAGE))
    with pytest.raises(UserError, match="no ring attention: use --attention star or dense"):
        scheduler.add_context(tokens, StarConfig(attention="ring", tokens_per_block=PAGE))
    scheduler.add_context(tokens, StarConfig(16, 16, "local", tokens_per_block=PAGE))
    tight = Scheduler(LLAMA_3_1_8B, Limits(ring_tokens=0), 2, PAGE)
    with pytest.raises(UserError, match="do not fit beside the KV cache"):
        tight.add_context(tokens, StarConfig(attention="ring", tokens_per_block=PAGE))
    tight = Scheduler(LLAMA_3_1_8B, Limits(selected_tokens=0), 2, PAGE, has_selection=True)
    with pytest.raises(UserError, match="--selected-pages does not fit beside the KV cache"):
        tight.add_context(tokens, StarConfig(8, 8, tokens_per_block=PAGE, selected_pages=1))


def test_a_kept_context_takes_no_room_that_others_were_promised():
    """Both of its blocks are on one rank already, where another context then would never fit."""
    ranks, leader = make(2, Limits(pages=4), shares_blocks=True)
    config = StarConfig(PAGE, 0, tokens_per_block=PAGE)
    before = add_context(ranks, leader, 4 * PAGE, config, keep=False)
    while leader.step() is not None:
        pass
    leader.release(before)
    kept = add_context(ranks, leader, 2 * PAGE, config)
    other = add_context(ranks, leader, 6 * PAGE, config, range(6 * PAGE), keep=False)
    while leader.step() is not None:
        pass
    assert kept.is_ready
    assert other.is_ready


def copies_of(budgets, num_ranks, keys):
    """Copies of blocks of two pages on rank 0 that were read, and the store."""
    store, table = Store(budgets, 1, 1, page_bytes=1), BlockTable(num_ranks)
    copies = Copies(store, table, num_ranks)
    for key in keys:
        block = table.new(key, 0, 2 * PAGE, 2)
        block.is_ready = True
        copies.add_save(block)
    return copies, store


def test_saves_under_way_count_in_a_tiers_size():
    copies, _ = copies_of({"host": 5}, 4, [b"a", b"b", b"c", b"d"])
    there, ends = [], []
    while True:
        order = copies.save()
        if isinstance(order, Forget):
            there = [key for key in there if key not in order.keys]
        elif isinstance(order, Save):
            there.append(order.key)
            ends.append(SaveEnd(order.key, "host", True))
        elif ends:
            assert copies.saved([ends]) == []
            ends = []
        else:
            break
        assert 2 * len(there) <= 5
    assert there == [b"c", b"d"]


def test_a_block_larger_than_a_tier_goes_to_the_other():
    copies, store = copies_of({"host": 1, "disk": 4}, 1, [b"a", b"b"])
    for key in (b"a", b"b"):
        assert copies.save().tiers == ("disk",)
        assert copies.saved([[SaveEnd(key, "disk", True)]]) == []
    assert copies.save() is None
    assert not copies.awaits_saves
    assert store.counts() == {"host": (0, 0), "disk": (2, 4)}
    copies, _ = copies_of({"host": 1, "disk": 1}, 1, [b"a"])
    assert copies.save() is None


def test_what_is_being_saved_is_not_forgotten():
    """It was in one of the tiers before, and was least recently used there."""
    copies, store = copies_of({"host": 4, "disk": 8}, 1, [b"a", b"b"])
    store.add("host", b"a", 0, 2)
    orders = []
    while order := copies.save():
        orders.append(order)
    assert [type(order) for order in orders] == [Save, Save]
    copies.saved([[SaveEnd(key, tier, True) for key in (b"a", b"b") for tier in ("host", "disk")]])
    assert not copies.awaits_saves
