"""What the server divides, remembers and paces, without a server."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from star_attention.config import StarConfig
from star_attention.runtime.orders import Ask, Chunk, Decode, Load, QuestionPart
from star_attention.runtime.pace import Pace
from star_attention.serve.division import DENSE_TOKENS, division_for
from star_attention.serve.known import KnownContexts
from star_attention.serve.loop import ServerLoop
from star_attention.serve.messages import Stop
from star_attention.spans import Range, Span

STEP = 0.010
DECODE = Decode((1,), (2,), (0,))


def ask(tokens):
    return Ask((QuestionPart(1, 1, np.zeros(tokens, np.int32), 0),))


def chunk(*tokens):
    """Of each rank."""
    return Chunk(1, tuple(Span(0, n, 0, r, (Range(0, n),)) for r, n in enumerate(tokens)))


class Machine:
    """Passes take `fixed` and `each` seconds for every token, give or take a tenth."""

    def __init__(self, pace, fixed, each):
        self.pace, self.fixed, self.each = pace, fixed, each
        self.chance = random.Random(0)

    def round(self, questions=False):
        """A pass and a step; seconds between the steps and tokens of the pass."""
        cuts = self.pace.cuts(answers=True)
        tokens = cuts.question_tokens if questions else cuts.chunk_tokens
        order = ask(tokens) if questions else chunk(tokens, tokens)
        seconds = self._run(order, tokens)
        self.pace.took(DECODE, STEP)
        return seconds + STEP, tokens

    def _run(self, order, tokens):
        seconds = (self.fixed + self.each * tokens) * self.chance.uniform(0.9, 1.1)
        self.pace.took(order, seconds)
        return seconds


def test_copies_that_take_no_time_do_not_grow_for_ever():
    pace = Pace()
    for _ in range(5000):
        pace.cuts(answers=False)
        pace.took(Load(1, b"", 0, 0, 1), 1e-6)
    assert 0 < pace.cuts(answers=False).copy_pages < 1 << 30


def test_copies_while_nothing_is_answered_do_not_hold_up_who_comes_then():
    pace = Pace()
    pace.took(DECODE, STEP)
    for _ in range(30):
        pages = pace.cuts(answers=False).copy_pages
        pace.took(Load(1, b"", 0, 0, 1), 1e-4 * pages)
    assert 0.2 < 1e-4 * pages < 0.3
    assert 1e-4 * pace.cuts(answers=True).copy_pages < 2 * STEP


@pytest.mark.parametrize("questions", [False, True])
@pytest.mark.parametrize("fixed", [0.0, 0.005, STEP])
@pytest.mark.parametrize("each", [1e-6, 1e-5, 1e-4])
def test_the_gap_converges_to_its_bound(fixed, each, questions):
    pace = Pace()
    for _ in range(8):
        pace.took(DECODE, STEP)
    machine = Machine(pace, fixed, each)
    for _ in range(30):
        machine.round(questions)
    rounds = [machine.round(questions) for _ in range(100)]
    assert max(gap for gap, _ in rounds) <= 3 * STEP
    assert np.mean([gap for gap, _ in rounds]) >= 2 * STEP  # the time that there is gets used


def test_passes_that_take_hardly_more_than_a_step_are_not_cut():
    """Reading the weights takes most of their time: cutting them would make everyone wait."""
    pace = Pace()
    for _ in range(8):
        pace.took(DECODE, STEP)
    machine = Machine(pace, 1.2 * STEP, 1e-6)
    rounds = [machine.round(questions=True) for _ in range(50)]
    assert rounds[-1][1] > 1000
    assert max(gap for gap, _ in rounds[20:]) <= 3 * STEP


def test_the_gap_stays_bounded_when_attention_grows():
    pace = Pace(max_gap=0.05)
    pace.took(DECODE, STEP)
    machine = Machine(pace, 0.001, 1e-5)
    gaps = []
    for _ in range(300):
        gaps.append(machine.round()[0])
        machine.each *= 1.015
    assert max(gaps[20:]) <= 0.05
    assert machine.each > 8e-4


def test_what_takes_too_long_does_little_more_than_any_pass():
    """The bound cannot be held, but the context goes on."""
    pace = Pace(max_gap=0.001)
    pace.took(DECODE, STEP)
    machine = Machine(pace, 0.01, 1e-4)
    tokens = [machine.round()[1] for _ in range(100)]
    assert 16 <= np.median(tokens[50:]) < 50


def test_passes_are_not_cut_below_what_takes_as_long():
    """Half a thousand tokens take as long as one: with fewer, a context would never be read."""
    pace = Pace()
    for _ in range(8):
        pace.took(DECODE, STEP)
    machine = Machine(pace, 2 * STEP, 1e-6)
    rounds = [machine.round() for _ in range(200)]
    assert np.mean([tokens for _, tokens in rounds[100:]]) > 500
    assert max(gap for gap, _ in rounds[100:]) <= 4 * STEP


def test_short_passes_do_not_shrink_long_ones():
    pace = Pace()
    pace.took(DECODE, STEP)
    machine = Machine(pace, 0.0, 1e-6)
    for _ in range(30):
        machine.round()
    before = machine.round()[1]
    pace.took(chunk(10, 0), 1e-5)  # the end of a context
    assert max(machine.round()[1] for _ in range(2)) >= before


def test_while_nothing_is_answered_passes_take_what_newcomers_may_wait():
    pace = Pace()
    for _ in range(30):
        tokens = pace.cuts(answers=False).chunk_tokens
        pace.took(chunk(tokens), 0.01 + 1e-5 * tokens)
    assert 0.2 < 0.01 + 1e-5 * tokens < 0.3


def test_block_sizes_that_are_not_given():
    """A quarter above their share at most, of whole pages, and the same while a text grows."""
    config = StarConfig()
    page = config.tokens_per_block
    for ranks in (1, 2, 8):
        parts, before, changes = max(4, ranks), 0, []
        for tokens in range(1000, 1_000_000, 997):
            size = division_for(tokens, config, ranks).block_size
            share = -(-tokens // (parts * page)) * page
            assert size % page == 0
            assert size >= DENSE_TOKENS
            assert share <= max(size, DENSE_TOKENS)
            assert size <= max(1.25 * share, DENSE_TOKENS)
            assert size >= before
            if size != before:
                changes.append(tokens)
            before = size
        # Three significant bits: four sizes while a text grows twofold.
        assert len(changes) <= 4 * np.log2(1_000_000 / (parts * DENSE_TOKENS)) + 3


def test_the_papers_setting_is_a_quarter_on_any_number_of_ranks():
    config = StarConfig(preset="paper")
    for tokens in (1000, 100_000):
        assert division_for(tokens, config, 16) == division_for(tokens, StarConfig(), 4)
    size = division_for(100_000, config, 16).block_size
    assert size != division_for(100_000, StarConfig(), 16).block_size


def test_block_sizes_that_are_given_stay():
    for config in (StarConfig(block_size=512), StarConfig(attention="ring")):
        assert division_for(100_000, config, 2) is config
    config = division_for(9000, StarConfig(anchor_size=4096), 1)
    assert config.anchor_size <= config.block_size


class Cache:
    def __init__(self):
        self.gone = set()
        self.known = KnownContexts(lambda keys: not self.gone.intersection(keys))

    def add(self, token_ids, size):
        keys = [bytes(token_ids[i : i + size]) for i in range(0, len(token_ids), size)]
        self.known.add(token_ids, size, keys)
        return keys


def test_the_longest_known_context_is_found():
    cache, text = Cache(), np.arange(1000, dtype=np.int32)
    for length in (100, 300, 350):
        cache.add(text[:length], 128)
    assert cache.known.longest(text, 400) == 350
    assert cache.known.longest(text, 349) == 300
    assert cache.known.longest(text, 300) == 300
    assert cache.known.longest(text, 299) == 299  # 100 leaves more than a block
    assert cache.known.longest(text, 227) == 100
    assert cache.known.longest(text, 228) == 228
    assert cache.known.longest(text, 50) == 50
    assert cache.known.longest(text[::-1], 400) == 400
    other = text.copy()
    other[320] += 1
    assert cache.known.longest(other, 400) == 300
    assert cache.known.longest(text.astype(np.int64)[::1], 400) == 350


def test_contexts_whose_blocks_are_gone_are_not_found():
    cache, text = Cache(), np.arange(1000, dtype=np.int32)
    cache.add(text[:300], 128)
    keys = cache.add(text[:350], 128)
    cache.gone = {keys[-1]}
    assert cache.known.longest(text, 400) == 300
    cache.gone.update(keys)
    assert cache.known.longest(text, 400) == 400


def test_old_contexts_are_forgotten(monkeypatch):
    monkeypatch.setattr("star_attention.serve.known._MOST", 3)
    cache, texts = Cache(), [np.full(100, i, np.int32) for i in range(5)]
    for text in texts:
        cache.add(text[:90], 128)
        cache.add(texts[0][:90], 128)  # used again and again
    found = [cache.known.longest(text, 100) == 90 for text in texts]
    assert found == [True, False, False, True, True]


@pytest.mark.parametrize("is_saving", [False, True])
def test_an_idle_loop_looks_after_saves(is_saving):
    """Some blocks are saved at a time: the next ones wait until the loop asks for their end."""
    waited = []

    class Connection:
        def poll(self, seconds):
            waited.append(seconds)
            return len(waited) == 2

        def recv(self):
            return Stop()

        def send(self, event):
            pass

    scheduler = SimpleNamespace(
        is_cached=None,
        num_running=0,
        copies=SimpleNamespace(awaits_saves=is_saving, is_saving=False),
        cached=lambda: {"gpu": (0, 0)},
        pages_held=np.zeros(1),
    )
    leader = SimpleNamespace(scheduler=scheduler, step=lambda on_chunk: None)
    ServerLoop(leader, Connection(), None, frozenset(), 1, 1).run()
    assert waited[0] == 0
    assert (waited[1] <= 0.1) == is_saving


def test_a_loop_that_is_stopped_saves_what_was_read():
    requests, left, steps = [Stop()], [True, True, False], []
    connection = SimpleNamespace(
        poll=lambda seconds: bool(requests), recv=requests.pop, send=lambda event: None
    )

    class Copies:
        awaits_saves = True

        @property
        def is_saving(self):
            return left.pop(0)

    scheduler = SimpleNamespace(
        is_cached=None,
        num_running=0,
        copies=Copies(),
        cached=lambda: {"gpu": (0, 0)},
        pages_held=np.zeros(1),
    )
    leader = SimpleNamespace(scheduler=scheduler, step=steps.append)
    ServerLoop(leader, connection, None, frozenset(), 1, 1).run()
    assert left == []
    assert len(steps) == 3
