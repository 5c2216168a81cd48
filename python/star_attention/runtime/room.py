"""What fits into the ranks' KV caches, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from star_attention.config import StarConfig
from star_attention.engines.base import Limits
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.plan import Plan, make_plan
from star_attention.runtime.blocks import Block
from star_attention.runtime.pages import frame_count, question_pages
from star_attention.runtime.phase1 import scratch_pages
from star_attention.runtime.placement import kept_tokens
from star_attention.runtime.requests import Division
from star_attention.runtime.store import Stored

# Numbers of ranks that are tried for what would fit.
_RANKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_MOST_POSITIONS = 2**31 - 1


class Room:
    """Pages of all ranks are counted together, int64 [ranks].

    Args:
        model: weighs work, so that plans are the workers'.
        limits: what every rank's engine allows.
        has_exchanges, has_hops, has_selection, kv_packing: as in `ModelEngine`.
    """

    def __init__(
        self,
        model: ModelConfig,
        limits: Limits,
        num_ranks: int,
        tokens_per_block: int,
        has_exchanges: bool,
        has_hops: bool,
        has_selection: bool,
        kv_packing: int = 1,
    ) -> None:
        self.limits = limits
        self._packing = kv_packing
        self._model = model
        self._num_ranks, self._page = num_ranks, tokens_per_block
        self._has_exchanges, self._has_hops = has_exchanges, has_hops
        self._has_selection = has_selection

    def plan(self, tokens: int, config: StarConfig) -> Plan:
        """The plan of a context. Raises UserError if the engines cannot run it."""
        if config.attention == "ring" and not self._has_hops:
            raise UserError(
                "TensorRT engines have no ring attention: use --attention star or dense"
            )
        if config.attention == "ring" and self.limits.ring_tokens == 0:
            raise UserError(
                "ring attention's transfers do not fit beside the KV cache: use a smaller "
                "--kv-cache-gib, or --attention star"
            )
        if config.selected_pages and not self._has_selection:
            raise UserError(
                "--selected-pages needs pages of 128 tokens on GPUs, and no TensorRT engine: use 0"
            )
        if config.selected_pages and self.limits.selected_tokens == 0:
            raise UserError(
                "--selected-pages does not fit beside the KV cache: use 0, or a smaller "
                "--kv-cache-gib"
            )
        self._model.check_length(tokens)
        self._check_length(tokens, self.limits.input_len, "--max_input_len")
        plan = make_plan(tokens, config, self._num_ranks, self._model)
        if plan.exchanges and not self._has_exchanges:
            raise UserError(
                "--anchor-mode broadcast needs a GPU for each rank in TensorRT engines: use local"
            )
        return plan

    def divide(self, plan: Plan, known: Sequence[Block | Stored | None]) -> Division:
        """How ranks hold a context around the blocks that are `known` of its parts."""
        return divide(plan, known, self._packing)

    def pass_tokens(self, plan: Plan) -> int | None:
        """Tokens of a rank in a pass of a context, at most."""
        if plan.attention == "ring":
            return self.limits.ring_tokens
        return self.limits.selected_tokens if plan.selected_pages else self.limits.pass_tokens

    def fits(self, pages: np.ndarray) -> bool:
        return self.limits.pages is None or bool((pages <= self.limits.pages).all())

    def check_context(self, division: Division, config: StarConfig, kept: np.ndarray) -> None:
        """Raises UserError, with what would fit, if a context does not beside the pages `kept` of
        others."""
        limit, held = self.limits.pages, division.new + division.scratch
        if self.fits(kept + held):
            return
        needed = int(held.max()) * self._page
        if self.fits(held):
            free = int((limit - kept).min()) * self._page
            raise UserError(
                f"the context needs {needed} tokens of KV cache on a rank, of {limit * self._page} "
                f"other contexts leave {free}: release them, or use a larger --kv-cache-gib"
            )
        plan = division.plan
        advice = "use a smaller block size"
        if config.attention == "dense":
            exact = "ring or " if self._has_hops else ""
            advice = f"use {exact}star over several ranks"
        elif ranks := self._ranks_that_fit(plan, config):
            advice = f"use {ranks} ranks"
        raise UserError(
            f"the context needs {needed} tokens of KV cache on a rank, there is room for "
            f"{limit * self._page}: {advice}, or a larger --kv-cache-gib"
        )

    def _ranks_that_fit(self, plan: Plan, config: StarConfig) -> int | None:
        """The first number of ranks of a few beyond the plan's. Where the default block falls below
        the anchor there are too many."""
        for ranks in _RANKS:
            if ranks > plan.num_ranks:
                try:
                    larger = make_plan(plan.context_len, config, ranks, self._model)
                except UserError:
                    return None
                division = self.divide(larger, [None] * len(larger.parts))
                if self.fits(division.new + division.scratch):
                    return ranks
        return None

    def check_question(
        self,
        division: Division,
        config: StarConfig,
        question: int,
        answer: int,
        contexts: np.ndarray,
    ) -> np.ndarray:
        """Pages that a question takes on each rank at most; raises UserError if that does not fit
        beside `contexts`."""
        asked = division.plan.context_len + question
        self._model.check_length(asked + answer)
        self._check_length(asked, self.limits.input_len, "--max_input_len")
        self._check_length(asked + answer, self.limits.seq_len, "--max_seq_len")
        if asked + answer > _MOST_POSITIONS:
            raise UserError(
                f"max_tokens is {answer}: context, question and answer have at most "
                f"{_MOST_POSITIONS} tokens: use {_MOST_POSITIONS - asked} or less"
            )
        pages = self.pages_of(division, config, question, answer)
        if not self.fits(contexts + pages):
            rank = int(np.argmax(contexts + pages))
            room = max(0, int(self.limits.pages - contexts[rank])) * self._page
            raise UserError(
                f"question and answer need {int(pages[rank]) * self._page} tokens of KV cache on a "
                f"rank, the contexts leave room for {room}: use a smaller --max-tokens, more "
                "ranks, or a larger --kv-cache-gib"
            )
        return pages

    def pages_of(
        self, division: Division, config: StarConfig, question: int, answer: int
    ) -> np.ndarray:
        """Pages, int64 [ranks], of a question and an answer of so many tokens."""
        placement = config.kv_placement
        kept = kept_tokens(question, answer, placement, self._num_ranks, self._page)
        return pages_of_question(division.tokens, kept.tolist(), self._page)

    def _check_length(self, tokens: int, most: int | None, flag: str) -> None:
        if most is not None and tokens > most:
            raise UserError(
                f"this takes {tokens} tokens, the engine was built for {flag} {most}: "
                "use a shorter text, or build it for more"
            )


def divide(plan: Plan, known: Sequence[Block | Stored | None], packing: int) -> Division:
    """Holds a context around the blocks that are `known` of its parts, wherever these are."""
    plan = plan.beside([block.rank if block else None for block in known])
    pages, new, scratch = (np.zeros(plan.num_ranks, np.int64) for _ in range(3))
    tokens = [0] * plan.num_ranks
    for each, block in zip(plan.parts, known, strict=True):
        count = frame_count(each.tokens, plan.tokens_per_block, packing)
        pages[each.rank] += count
        new[each.rank] += 0 if isinstance(block, Block) else count
        tokens[each.rank] += each.tokens if packing == 1 else 0
    for rank in range(plan.num_ranks):
        scratch[rank] = scratch_pages(plan, rank, packing)
    return Division(plan, tuple(known), pages, new, scratch, tokens)


def pages_of_question(
    cached: Sequence[int], kept: Sequence[int], tokens_per_block: int
) -> np.ndarray:
    """`question_pages` of each rank, int64 [ranks]."""
    pairs = zip(cached, kept, strict=True)
    return np.array([question_pages(c, k, tokens_per_block) for c, k in pairs], np.int64)
