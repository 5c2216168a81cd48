"""A sample and a task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from star_attention.errors import UserError


class UnavailableError(UserError):
    """A task cannot be had: its file is not there, or the length has no room for it."""


# The indices of a task that can make any number of samples.
ANY = range(sys.maxsize)


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    Attributes:
        index: its number within its task; with the seed it decides a generated sample's text.
        context: the user's turn up to where phase 1 ends.
        query: the rest of the user's turn.
        outputs: the reference answers.
        answer_prefix: how the model's turn begins; the model goes on from there.
        depths: for each reference answer the share of the context's characters in front of its
            needle, 0 to 1; empty where answers have no needle.
        extra: what the predictions file repeats of it.
    """

    index: int | str
    context: str
    query: str
    outputs: Sequence[str]
    answer_prefix: str = ""
    depths: Sequence[float] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Samples of one kind and length.

    Attributes:
        length: tokens of prompt and answer at most; None: as long as the data is.
        max_tokens: tokens an answer has at most.
        score: (prediction, sample) -> 0 to 1.
        sample: makes the sample of an index.
        indices: of its samples.
        note: what its user should know about its data before a run, if anything.
    """

    name: str
    length: int | None
    max_tokens: int
    score: Callable[[str, Sample], float]
    sample: Callable[[Any], Sample]
    indices: Sequence[int | str] = ANY
    note: str = ""
