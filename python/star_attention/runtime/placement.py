"""Which rank keeps the KV of what is asked and answered.

Source: Star Attention, arXiv 2411.17116, section 2.2 (`tail`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from star_attention.config import KvPlacement


def keeper(placement: KvPlacement, index: int, num_ranks: int, tokens_per_block: int) -> int:
    """The rank that keeps the KV of the answer's token of this index: the query rank, which is the
    last, or, with `round_robin`, all in turn, page by page, from the one behind it on."""
    query_rank = num_ranks - 1
    if placement == "tail":
        return query_rank
    return (query_rank + 1 + index // tokens_per_block) % num_ranks


def kept_tokens(
    question: int, answer: int, placement: KvPlacement, num_ranks: int, tokens_per_block: int
) -> np.ndarray:
    """Tokens of a question and its answer that each rank keeps, int64 [ranks]."""
    kept = np.zeros(num_ranks, np.int64)
    kept[-1] = question
    if placement == "tail":
        kept[-1] += answer
        return kept
    pages, rest = divmod(answer, tokens_per_block)
    kept += pages // num_ranks * tokens_per_block
    kept[: pages % num_ranks] += tokens_per_block
    kept[pages % num_ranks] += rest
    return kept


def runs_of(
    count: int, placement: KvPlacement, num_ranks: int, tokens_per_block: int
) -> Iterator[tuple[int, int, int]]:
    """(rank, begin, end) of the runs of an answer's first `count` tokens that one rank keeps."""
    step = count if placement == "tail" else tokens_per_block
    for begin in range(0, count, max(step, 1)):
        rank = keeper(placement, begin, num_ranks, tokens_per_block)
        yield rank, begin, min(begin + step, count)
