"""What the first clients would otherwise wait for: kernels are loaded and decode steps captured."""

from __future__ import annotations

import numpy as np

from star_attention.config import StarConfig
from star_attention.runtime.leader import Leader
from star_attention.runtime.sampling import SamplingParams

_MOST_QUESTIONS = 64
_TOKENS = 4  # of an answer: the second step of its kind is captured, the next ones are replays


def warm_up(leader: Leader, config: StarConfig) -> None:
    """Runs a context of a page a rank, and questions over it, 1, 2, 4 and so on at a time, each
    reading it for itself and all together."""
    scheduler, usual = leader.scheduler, leader.scheduler.least_shared
    tokens = np.zeros(leader.num_ranks * config.tokens_per_block, np.int32)
    context = leader.encode(tokens, config)
    params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True)
    most = min(_MOST_QUESTIONS, leader.limits.questions or _MOST_QUESTIONS)
    for least_shared in (1 << 60, 0):
        scheduler.least_shared = least_shared
        for count in (1 << power for power in range(most.bit_length())):
            for _ in range(count):
                scheduler.add_question(context, tokens[:1], params)
            while leader.step() is not None:
                pass
    scheduler.least_shared = usual
    leader.release(context)
