"""What the front and the engine process say to each other: small plain data, numbered requests.

The front asks, the engine's rank 0 answers with events; both are processes of this program on one
machine, and nothing of this comes from outside as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from star_attention.runtime.requests import FinishReason
from star_attention.runtime.sampling import SamplingParams, TokenLogprobs

# Where a block's KV was when a context was opened; `new`: it is read.
Source = Literal["new", "gpu", "host", "disk"]


# From the front


@dataclass(frozen=True)
class Generate:
    """Answer a question over a context, which is read first as far as it is not cached.

    Attributes:
        token_ids: int32 [n], context and question.
        border: tokens in front of the question, at least 1. The context may end earlier, where a
            cached one does; what is between then is part of the question.
        end_tokens: the tokenizer's, that end the answer as the model's own do.
    """

    request: int
    token_ids: np.ndarray
    border: int
    params: SamplingParams
    end_tokens: frozenset[int]


@dataclass(frozen=True)
class Read:
    """Read a context, int32 [n]. With `keep` its KV stays on the GPUs until the request is
    cancelled; otherwise it may be moved or dropped when others need the room."""

    request: int
    token_ids: np.ndarray
    keep: bool = False


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this request any more."""

    request: int


@dataclass(frozen=True)
class Stop:
    """End when nothing is left to do."""


Request = Generate | Read | Cancel | Stop


# From the engine


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Attributes:
        device, dtype: what it computes on and in.
        max_tokens: of context, question and answer together.
        kv_tokens: of context that the ranks' KV caches hold together; None: as memory allows.
        page_bytes: of a page of `tokens_per_block` tokens, on one process.
    """

    device: str
    dtype: str
    num_ranks: int
    max_tokens: int
    kv_tokens: int | None
    tokens_per_block: int
    page_bytes: int


@dataclass(frozen=True)
class BlockPlace:
    """Context tokens [start, end), the rank that keeps their KV, where that was, and how many of
    the first tokens they see besides: the anchor."""

    start: int
    end: int
    rank: int
    source: Source
    anchor: int = 0


@dataclass(frozen=True)
class Opened:
    """A request's context is divided, and its reading begins."""

    request: int
    blocks: tuple[BlockPlace, ...]

    @property
    def context_tokens(self) -> int:
        return self.blocks[-1].end if self.blocks else 0

    @property
    def cached_tokens(self) -> int:
        """That are not read again."""
        return sum(block.end - block.start for block in self.blocks if block.source != "new")


@dataclass(frozen=True)
class Progress:
    """The share, 0 to 1, of each block of `Opened` that is there. The last one has only 1.0."""

    request: int
    done: tuple[float, ...]


@dataclass(frozen=True)
class NewToken:
    """A token of an answer, and why the answer ends with it, if it does."""

    request: int
    token: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Tokens:
    """What one pass gave, of all requests that took part."""

    tokens: tuple[NewToken, ...]


@dataclass(frozen=True)
class ReadDone:
    """A `Read` is over: the whole context is cached."""

    request: int


@dataclass(frozen=True)
class Refused:
    """The request cannot be served, and why."""

    request: int
    reason: str


@dataclass(frozen=True)
class Statistics:
    """About once a second, and when asked for nothing.

    Attributes:
        running, waiting: requests.
        pages_used: that contexts and questions hold, on the rank where they hold most; what is
            cached for later is not among them.
        pages: of a rank.
        cached_blocks: in each tier, `gpu`, `host` and `disk`.
        cached_bytes: of all ranks together.
    """

    running: int
    waiting: int
    pages_used: int
    pages: int
    cached_blocks: dict[str, int]
    cached_bytes: dict[str, int]


Event = Ready | Opened | Progress | Tokens | ReadDone | Refused | Statistics
