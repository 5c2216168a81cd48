"""What rank 0 tells every rank to do: small plain data, the same for all.

A rank owns what belongs to a context or a question there; orders name them by numbers that rank 0
gives out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from star_attention.config import StarConfig
from star_attention.runtime.tiers import Tier
from star_attention.spans import Span


@dataclass(frozen=True)
class BlockPart:
    """A part of a context: the rank that holds its KV, as a block of this number, and whether that
    is there already or, `read`, comes with the context's phase 1."""

    number: int
    rank: int
    read: bool


@dataclass(frozen=True)
class Open:
    """A context, int32 [n], is going to be read, as far as its blocks are not there already: each
    rank takes pages for its new ones.

    Attributes:
        is_long: it is rotated as the model rotates long texts; see `RopeConfig.is_long`.
    """

    context: int
    token_ids: np.ndarray
    config: StarConfig
    blocks: tuple[BlockPart, ...]
    is_long: bool


@dataclass(frozen=True)
class Chunk:
    """The next pass of a context's phase 1."""

    context: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class QuestionPart:
    """Tokens, int32 [n], to append to a question, which begins with its first part.

    Attributes:
        rank: keeps their KV; the same for all parts of a pass.
        all_rows: the logits of all tokens are wanted, not only the last one's.
    """

    question: int
    context: int
    token_ids: np.ndarray
    rank: int
    all_rows: bool = False


@dataclass(frozen=True)
class Ask:
    """Encodes parts of questions, in one pass."""

    parts: tuple[QuestionPart, ...]


@dataclass(frozen=True)
class Decode:
    """Appends a generated token to each of these questions, in one pass.

    Attributes:
        ranks: that keep the KV of each token.
        groups: numbers of questions, in their order, over the same blocks, which are read once for
            all of them; empty: each reads its own.
    """

    questions: tuple[int, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Release:
    """Contexts, questions and blocks that are over: pages are free once nobody shares them."""

    contexts: tuple[int, ...] = ()
    questions: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpenStore:
    """Every rank opens its lower tiers, and says what is in them.

    Attributes:
        model: its name, and the fingerprint of its files.
        host_folder, disk_folder: of the tiers; None: there is none.
        disk_option: what the user calls the latter by, for messages.
    """

    model: str
    fingerprint: str
    host_folder: str | None
    disk_folder: str | None
    disk_option: str = "--context-dir"


@dataclass(frozen=True)
class Copy:
    """The rank that has pages for a block copies layers [first, last) of it, to or from its lower
    tiers."""

    block: int
    key: bytes
    rank: int
    first: int
    last: int


@dataclass(frozen=True)
class Save(Copy):
    """Into these tiers."""

    tiers: tuple[Tier, ...]


@dataclass(frozen=True)
class Load(Copy):
    """Out of them."""


@dataclass(frozen=True)
class Forget:
    """A rank's tier has these blocks no longer."""

    tier: Tier
    rank: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Saved:
    """Every rank says which saves have ended."""


@dataclass(frozen=True)
class Wait:
    """Until every rank has done what was ordered so far."""


@dataclass(frozen=True)
class Report:
    """Every rank's statistics; they begin anew with `reset`."""

    reset: bool = False


Order = Open | Chunk | Ask | Decode | Release | OpenStore | Copy | Forget | Saved | Wait | Report
