"""Phase 1 in passes of any size, with another context's and answers in between: the logits of later
questions are those of an uncut run."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import forced_logits
from star_attention.config import StarConfig
from star_attention.engines.torch.engine import TorchEngine
from star_attention.models.config import ModelConfig
from star_attention.models.loading import random_weights
from star_attention.models.rope import RopeConfig
from star_attention.runtime.leader import lead_together
from star_attention.runtime.sampling import SamplingParams
from thread_ranks import ThreadRanks

TINY = ModelConfig(2, 32, 48, 4, 2, 8, 61, 1024, 1e-5, RopeConfig())
WEIGHTS = random_weights(TINY, torch.float32, torch.device("cpu"))
PAGE = 4
TOKENS = np.random.default_rng(0).integers(0, 61, 200).astype(np.int32)

configs = st.builds(
    lambda block, anchor, mode, method: StarConfig(
        block * PAGE if method == "star" else None,
        min(anchor, block) * PAGE if method == "star" else None,
        mode,
        "round_robin",
        PAGE,
        method,
    ),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from(["recompute", "local", "broadcast"]),
    st.sampled_from(["star", "star", "ring"]),
)


def logits_of(size, contexts, budget):
    """Of a question and an answer over each context (tokens, division), all read together, the
    first of them being asked twice meanwhile; with a `budget` as one group."""

    def work(comm):
        leader, _ = lead_together(TorchEngine(TINY, WEIGHTS, comm, PAGE), comm)
        scheduler = leader.scheduler
        scheduler.chunk_tokens = budget
        scheduler.least_shared = 0 if budget else 1 << 60
        opened = [scheduler.add_context(tokens, config) for tokens, config in contexts]
        params = SamplingParams(max_tokens=12)
        asked = [scheduler.add_question(opened[0], TOKENS[i : i + 3], params) for i in (0, 7)]
        while leader.step() is not None:
            pass
        logits = [forced_logits(leader, each, TOKENS[:5], TOKENS[5:11]) for each in opened]
        return [each.answer for each in asked], np.concatenate(logits)

    answers, logits = zip(*ThreadRanks(size).run(work), strict=True)
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])
    return answers[0], logits[0]


@settings(max_examples=25)
@given(
    size=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    divisions=st.lists(configs, min_size=3, max_size=3),
    budget=st.integers(1, 40),
)
def test_any_cut_and_interleaving(size, lengths, divisions, budget):
    contexts = [
        (TOKENS[20 * i : 20 * i + length], config)
        for i, (length, config) in enumerate(zip(lengths, divisions, strict=False))
    ]
    answer, logits = logits_of(size, contexts, budget)
    expected_answer, expected = logits_of(size, contexts, None)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert answer == expected_answer
