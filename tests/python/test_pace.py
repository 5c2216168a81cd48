"""How much is done between two tokens: passes take the time that they are given."""

import pytest

from star_attention.runtime.orders import Chunk, Decode, Load
from star_attention.runtime.pace import Pace
from star_attention.spans import Range, Span

STEP = Decode((1,), (0,), (0,))


def chunk(*tokens):
    return Chunk(1, tuple(Span(0, n, 0, r, (Range(0, n),)) for r, n in enumerate(tokens)))


@pytest.mark.parametrize("per_token", [1e-5, 1e-4, 1e-3])
def test_a_pass_takes_what_the_gap_leaves(per_token):
    """The busiest rank counts; what every pass takes is not cut with it."""
    pace = Pace(gap_factor=3.0)
    for _ in range(40):
        cuts = pace.cuts(answers=True)
        pace.took(STEP, 0.01)
        pace.took(chunk(cuts.chunk_tokens, 1), 0.004 + per_token * cuts.chunk_tokens)
    most = 0.004 + per_token * max(16, pace.cuts(answers=True).chunk_tokens)
    assert most <= 0.020 + 16 * per_token
    assert most >= 0.010


def test_copies_that_take_no_time_do_not_grow_for_ever():
    pace = Pace()
    for _ in range(5000):
        pace.cuts(answers=False)
        pace.took(Load(1, b"", 0, 0, 1), 1e-6)
    assert 0 < pace.cuts(answers=False).copy_pages < 1 << 30
