"""How a generated sample gets exactly the length that is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable

from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.sample import Sample, UnavailableError

# A generated sample is shorter than asked by at most this share of the length.
_SLACK = 0.008

# Writes sample `index` around a haystack of `size` units (characters, or what the task counts in).
Draft = Callable[[random.Random, int, int], Sample]


class SampleMaker:
    """Makes samples of a length: `maker(index)`.

    A sample's prompt and `max_tokens` together have at most `length` tokens of the model's
    tokenizer, and less by 0.8 per cent, or by what one unit of the haystack has. Which bytes it
    has depends on the key, the length and the index, not on what was made before.

    Args:
        name: the task, for messages.
        draft: writes a sample; a larger size gives more tokens.
        prompts: counts tokens.
        length, max_tokens: tokens of prompt and answer, and of the answer, at most.
        smallest: the least size that the draft can write.
        key: seeds all samples.

    Raises:
        UnavailableError: the length is below what the task needs.
    """

    def __init__(
        self,
        name: str,
        draft: Draft,
        prompts: PromptTokenizer,
        length: int,
        max_tokens: int,
        smallest: int,
        key: str,
    ) -> None:
        self._name, self._length, self._max_tokens = name, length, max_tokens
        self._draft, self._prompts, self._key = draft, prompts, f"{key}/{name}/{length}"
        self._budget, self._slack = length - max_tokens, int(_SLACK * length)
        self._smallest = smallest
        needed = self._tokens(self._write(0, smallest))
        self._check(needed)
        # Where the search for a sample's size begins: on the line through the tokens of no haystack
        # and sample 0's, in the middle of what is accepted.
        twice = self._tokens(self._write(0, 2 * smallest))
        self._empty = min(2 * needed - twice, needed - 1)
        self._start = smallest + (self._budget - needed) * smallest // (needed - self._empty)
        sample, size = self._search(0)
        self._start = max(self._next(size, self._tokens(sample)), smallest)

    def __call__(self, index: int) -> Sample:
        return self._search(index)[0]

    def _write(self, index: int, size: int) -> Sample:
        return self._draft(random.Random(f"{self._key}/{index}"), index, size)

    def _tokens(self, sample: Sample) -> int:
        return self._prompts.count(sample)

    def _search(self, index: int) -> tuple[Sample, int]:
        """The sample and its size, by steps along the line through `_empty` and the last try,
        between the largest size that is known to fit and the smallest that is known not to."""
        size, fits, too_large = self._start, self._smallest, None
        best = None
        for step in range(64):
            sample = self._write(index, size)
            tokens = self._tokens(sample)
            missing = self._budget - tokens
            if missing >= 0:
                best, fits = sample, size
                if missing <= self._slack:
                    break
            else:
                too_large = size
            if too_large is not None and too_large - fits <= 1:
                break
            target = self._next(size, tokens)
            if too_large is None:
                size = max(target, size + 1)
            else:
                inside = min(max(target, fits + 1), too_large - 1)
                size = inside if step < 8 else (fits + too_large) // 2
        if best is None:
            best = self._write(index, self._smallest)
            self._check(self._tokens(best))
        return best, fits

    def _next(self, size: int, tokens: int) -> int:
        """The size that should give the tokens wanted, when `size` gives `tokens`."""
        per_unit = max(tokens - self._empty, 1) / size
        return size + round((self._budget - self._slack / 2 - tokens) / per_unit)

    def _check(self, smallest_tokens: int) -> None:
        if smallest_tokens > self._budget:
            raise UnavailableError(
                f"--lengths {self._length} is too short for {self._name}: use "
                f"{smallest_tokens + self._max_tokens} tokens or more"
            )
