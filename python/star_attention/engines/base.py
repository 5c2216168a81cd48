"""What a forward pass attends to, and what the runtime asks of an engine.

Everything here is NumPy on the host: an engine brings it to its device in its own way. Page and
slot numbers are those of the engine's KV pool, the same in every layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np

from star_attention.models.config import ModelConfig


@dataclass(frozen=True)
class Prefix:
    """Pages that stand in front of the own ones of several sequences; their rows see them whole.
    An engine with `kv_packing` above 1 has them in 8 bits.

    Attributes:
        cu_seqlens_q: int32 [G + 1], prefix sums of the rows that have each of G lists in front.
        kv_lens: int32 [G], tokens in each list.
        page_table: int32 [G, P], the lists.
    """

    cu_seqlens_q: np.ndarray
    kv_lens: np.ndarray
    page_table: np.ndarray


@dataclass(frozen=True)
class Pages:
    """Pages of this rank, int32 [P], in the order in which they go to another rank, or come from
    it."""

    rank: int
    pages: np.ndarray


@dataclass(frozen=True)
class Exchange:
    """Pages that ranks send one another in each layer, straight into the others' pages.

    All ranks have the same number of exchanges in a step, in the same order; what one sends, the
    other receives, as many pages in the same order.

    Attributes:
        rows: the first rows of this rank's that are to be stored before it takes part.
        sends, receives: at most one for each other rank, in ascending order.
    """

    rows: int
    sends: tuple[Pages, ...]
    receives: tuple[Pages, ...]


@dataclass(frozen=True)
class Hop:
    """Pages of another rank that pass by in each layer, and which of them the rows see, all of
    them whole. They are kept in no page.

    Attributes:
        sends: what another rank sees meanwhile.
        source: the rank whose pages arrive.
        num_pages: of them, which have the numbers from 0 on in `page_table`.
        kv_lens, page_table: as in `PagedStep`.
    """

    sends: Pages
    source: int
    num_pages: int
    kv_lens: np.ndarray
    page_table: np.ndarray


@dataclass
class PageMeans:
    """What an engine keeps of a context's pages from one of its steps to the next, to choose from.

    Attributes:
        count: pages that the context's steps choose from in the end.
        known: how many of the first are in `data` already.
        data: the engine's.
    """

    count: int
    known: int = 0
    data: Any = None


@dataclass(frozen=True)
class Selection:
    """Pages of earlier blocks of which each tile, a page of rows, chooses some that it sees whole.

    Attributes:
        count: that a tile and KV head chooses, at most.
        pages: int32 [C], in the order of the context; -1: on another rank. Those of the context's
            last step come first.
        owners: int32 [C], the ranks that keep them.
        counts: int32 [S], how many of the first a sequence's rows may choose from.
        means: the context's; all its steps have the same.
    """

    count: int
    pages: np.ndarray
    owners: np.ndarray
    counts: np.ndarray
    means: PageMeans


@dataclass(frozen=True)
class Window:
    """What the rows of a step see in layers with a window, instead of all else that the step has
    for them: of the pages' tokens those from a first one on, up to where `causal` ends them.

    Attributes:
        kv_lens, page_table: as in `PagedStep`, of the pages that some row sees.
        starts: int32 [T], the first of its sequence's tokens that each row sees, ascending.
    """

    kv_lens: np.ndarray
    page_table: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class PagedStep:
    """Attention of one forward pass over pages, for S sequences of T tokens in all.

    Attributes:
        slot_mapping: int32 [T], where each token's KV goes: page * tokens_per_block + offset;
            -1: it is not kept here.
        cu_seqlens_q: int32 [S + 1], prefix sums of the tokens per sequence.
        kv_lens: int32 [S], tokens that each sequence has in its pages once this pass's are stored
            and have arrived.
        page_table: int32 [S, P], the pages of each sequence.
        causal: rows are bottom-right aligned with the pages' tokens; otherwise they see them all.
        merge: the ranks hold shards of the same sequences: outputs are merged over all of them.
        prefix: lists of pages before those of `page_table`, each read once for all its sequences.
        exchanges: bring pages of `page_table` from other ranks, in every layer.
        hops: further pages that the rows see, those of one rank after the other's; every rank has
            as many.
        selection: pages that rows choose to see besides, of which all ranks know the same.
            Sequences begin where pages do then.
        window: for models that have layers with one.
    """

    slot_mapping: np.ndarray
    cu_seqlens_q: np.ndarray
    kv_lens: np.ndarray
    page_table: np.ndarray
    causal: bool = True
    merge: bool = False
    prefix: Prefix | None = None
    exchanges: tuple[Exchange, ...] = ()
    hops: tuple[Hop, ...] = ()
    selection: Selection | None = None
    window: Window | None = None


def is_decode_step(attention: PagedStep, logit_rows: np.ndarray) -> bool:
    """One token for each sequence, with the logits of all; a pass without tokens is none."""
    count = len(attention.slot_mapping)
    one_token_each = len(attention.kv_lens) == count > 0
    return one_token_each and np.array_equal(logit_rows, np.arange(count))


def padded_count(sequences: int) -> int:
    """Sequences that a decode graph has which serves so many: a few graphs serve all numbers."""
    return 1 << (sequences - 1).bit_length()


def runs_of(
    pages: Sequence[int] | np.ndarray, every: Sequence[np.ndarray] | None = None
) -> list[tuple[int, int]]:
    """Pages as runs (first page, count) of consecutive ones. With `every` rank's list they are cut
    wherever one of these is not consecutive: all ranks get runs of the same counts."""
    cuts = {0, len(pages)}
    for each in (pages,) if every is None else every:
        cuts.update((np.flatnonzero(np.diff(each) != 1) + 1).tolist())
    return [(int(pages[a]), b - a) for a, b in itertools.pairwise(sorted(cuts))]


# float32 [rows, vocab_size] where the engine computes: a torch, CuPy or NumPy array.
Logits = Any


@dataclass(frozen=True)
class Limits:
    """What an engine can hold and run at a time; None: as much as memory allows.

    Attributes:
        pages: of the KV pool.
        pass_tokens, pass_sequences: of one pass of phase 1.
        ring_tokens: of one pass of ring attention; 0: not even a short one.
        selected_tokens: of one whose rows select pages; 0 likewise.
        question_tokens: of one pass whose attention is merged over ranks.
        questions: that take part in one such pass.
        input_len, seq_len: tokens of context and question, and with the answer.
    """

    pages: int | None = None
    pass_tokens: int | None = None
    pass_sequences: int | None = None
    ring_tokens: int | None = None
    selected_tokens: int | None = None
    question_tokens: int | None = None
    questions: int | None = None
    input_len: int | None = None
    seq_len: int | None = None

    @classmethod
    def common(cls, every: Iterable[Limits]) -> Limits:
        """What all of them allow."""
        values = zip(*(astuple(limits) for limits in every), strict=True)
        return cls(*(min((v for v in each if v is not None), default=None) for each in values))


class ModelEngine(Protocol):
    """A model on one rank, with a KV pool of numbered pages.

    Attributes:
        dtype: `float32`, `float16` or `bfloat16`: of weights, activations and KV.
        quantization: `fp8` or `int8`: of projections, which compute in it instead; or None.
        kv_dtype: `auto`, or what `quantize_pages` makes of KV: `fp8` or `int8`.
        kept_dtype: says what `read_layer` copies, for who keeps it.
        kv_packing: pages in 8 bits that share the memory of one; 1: there are none.
        has_exchanges, has_hops, has_prefix, has_selection: whether a step can have them.
        wait_seconds: how long steps have stood still so far for what other ranks send.
        graph_steps: steps that were replays of a CUDA graph so far.
        peak_memory_bytes: the most memory that was in use so far, on the GPU if there is one.
    """

    config: ModelConfig
    tokens_per_block: int
    dtype: str
    quantization: str | None
    kv_dtype: str
    kept_dtype: str
    kv_packing: int
    limits: Limits
    has_exchanges: bool
    has_hops: bool
    has_prefix: bool
    has_selection: bool
    wait_seconds: float
    graph_steps: int

    @property
    def peak_memory_bytes(self) -> int: ...

    @property
    def page_bytes(self) -> int:
        """Of one page in one layer on this process: K and V of its heads."""

    @property
    def kept_page_bytes(self) -> int:
        """Of one page in one layer on this process once its context is read: in 8 bits with its
        scales, or `page_bytes`. It is what `read_layer` and `write_layer` copy."""

    def quantize_pages(self, pages: np.ndarray, tokens: np.ndarray) -> None:
        """Quantises pages, int32 [N], of which the first tokens, int32 [N], count, where they are,
        in all layers: of every `kv_packing` of them, all are in the memory of the first afterwards,
        in their order. Those of page p are `kv_packing` * p and following."""

    def dequantize_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Writes pages of 8 bits, int32 [N], as pages, int32 [N]."""

    def reserve_pages(self, num_pages: int) -> None:
        """Makes pages below num_pages, at most `limits.pages`, usable; earlier ones stay."""

    def reserve_positions(self, positions: int) -> None:
        """Makes positions below `positions` usable. Every rank gets the same calls at the same
        steps, so that what it invalidates is invalidated on all of them."""

    def copy_page(self, source: int, target: int) -> None:
        """Copies one page's KV in all layers."""

    def read_layer(self, layer: int, pages: Sequence[int], out: np.ndarray) -> None:
        """Copies these pages' KV in a layer, as the steps so far left it, into `out`, uint8
        [len(pages), kept_page_bytes]. On a GPU the copy may be under way when this returns, beside
        the steps that follow; a step that overwrites the pages waits for it."""

    def write_layer(self, layer: int, pages: Sequence[int], data: np.ndarray) -> None:
        """Copies `data`, uint8 [len(pages), kept_page_bytes], into these pages in a layer. On a GPU
        the copy may be under way when this returns; a step that looks at the pages waits for
        it."""

    def finish_copies(self) -> None:
        """Waits for what `read_layer` and `write_layer` began: their host memory is free. Any
        thread may call it."""

    def pin(self, buffer: np.ndarray) -> None:
        """Page-locks host memory, so that copies from and to a GPU are fast and are not waited
        for; without effect where that is not allowed, or there is no GPU. For a thread that
        computes nothing: the CUDA runtime remembers a failure until its next call there."""

    def unpin(self, buffer: np.ndarray) -> None:
        """Undoes `pin`, before the memory is given back and when no copy uses it any more."""

    def finish_steps(self) -> None:
        """All steps are done, and what they read of other ranks is not read any more, here or
        there: before pages are given away that others may read, every rank calls this."""

    def close(self) -> None:
        """Gives memory and connections back, on all ranks. Nothing can be called any more."""

    def step(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        attention: PagedStep,
        logit_rows: np.ndarray,
        on_layer: Callable[[float], None] | None = None,
    ) -> Logits:
        """One forward pass. It is done when this returns, but for the last layers of one without
        logits: `finish_steps` waits for these.

        Every rank of the job takes part, with no tokens if need be, when the step has exchanges,
        hops or a selection, or merges.

        Args:
            token_ids: int32 [T].
            positions: int32 [T], rows of the rotary table: positions of the tokens in the whole
                text, or what `RopeConfig.rows` makes of them.
            attention: what the tokens attend to and where their KV goes.
            logit_rows: int32 [R], the tokens whose logits are wanted. With none, the pass ends
                once the last layer's KV is stored.
            on_layer: called with the share of the layers that is done, by engines that can tell.

        Returns:
            float32 [R, vocab_size], valid until the next step.

        Raises:
            RankError: a rank is lost.
            MemoryError: the pass does not fit into memory.
        """
