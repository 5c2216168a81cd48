"""Steps of an engine, described by hand."""

import numpy as np

from star_attention.engines.base import PagedStep

NONE = np.empty(0, np.int32)


def ints(*values):
    return np.array(values, np.int32)


def slots_of(pages, begin, end, page=8):
    places = np.arange(begin, end)
    return (np.asarray(pages)[places // page] * page + places % page).astype(np.int32)


def step_of(*sequences, page=8, stored=True, **options):
    """A step of sequences (pages, tokens in them, rows): the rows are stored behind the tokens and
    bottom-right causal, or, if not stored, see all the tokens."""
    slots = [
        slots_of(pages, old, old + rows, page) if stored else np.full(rows, -1, np.int32)
        for pages, old, rows in sequences
    ]
    rows = np.array([rows for _, _, rows in sequences], np.int32)
    table = np.zeros((len(sequences), max((len(p) for p, _, _ in sequences), default=0)), np.int32)
    for row, (pages, _, _) in zip(table, sequences, strict=True):
        row[: len(pages)] = pages
    return PagedStep(
        slot_mapping=np.concatenate([NONE, *slots]),
        cu_seqlens_q=np.concatenate([ints(0), np.cumsum(rows, dtype=np.int32)]),
        kv_lens=ints(*(old for _, old, _ in sequences)) + stored * rows,
        page_table=table,
        causal=stored,
        **options,
    )
