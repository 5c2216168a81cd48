"""What happens next, decided on rank 0: contexts and questions in, orders out.

Holds no tensors and talks to nobody. It knows every context's plan and every rank's pages by
counting: `next` gives an order, which all ranks execute before `next` is called again, and `chosen`
takes the tokens that were sampled from an order's logits.

A context's pages are taken when its phase 1 begins, a question's as it grows. When a rank has none
left for it, the newest question gives its own back and is encoded again later, answer included.
Contexts leave so much room that every question fits if it is alone, so this ends.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

import numpy as np

from star_attention.config import KvPlacement, StarConfig
from star_attention.engines.base import Limits
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.plan import Plan, make_plan
from star_attention.runtime.orders import Ask, Chunk, Decode, Open, Order, QuestionPart, Release
from star_attention.runtime.pages import question_pages
from star_attention.runtime.phase1 import Phase1, own_pages, scratch_pages, shares_anchor
from star_attention.runtime.sampling import SamplingParams

FinishReason = Literal["stop", "length"]
# Up to so many ranks are tried for what would fit.
_MOST_RANKS = 256
_MOST_POSITIONS = 2**31 - 1


@dataclass(eq=False)
class Context:
    """A context as rank 0 knows it.

    Attributes:
        cached: tokens that each rank caches of it in the end.
        pages, scratch: taken on each rank, int64 [ranks]; scratch until phase 1 is over.
        questions: that are being answered over it; with them it stays, also when it is released.
    """

    number: int
    token_ids: np.ndarray
    config: StarConfig
    plan: Plan
    phase1: Phase1
    cached: list[int]
    pages: np.ndarray
    scratch: np.ndarray
    is_open: bool = False
    is_released: bool = False
    questions: int = 0

    @property
    def is_ready(self) -> bool:
        return self.is_open and self.phase1.finished

    @property
    def held(self) -> np.ndarray:
        return self.pages if self.phase1.finished else self.pages + self.scratch


@dataclass(eq=False)
class Question:
    """A question and its answer so far.

    Attributes:
        end_tokens: that end the answer.
        pending: tokens that are still to be encoded, in order, by the rank that keeps them.
        kept: tokens of question and answer that each rank caches.
        most_pages: that it takes on each rank if the answer is longest, int64 [ranks].
    """

    number: int
    context: Context
    token_ids: np.ndarray
    params: SamplingParams
    end_tokens: frozenset[int]
    most_pages: np.ndarray
    rng: np.random.Generator
    kept: list[int]
    pending: deque[tuple[int, np.ndarray]] = field(default_factory=deque)
    answer: list[int] = field(default_factory=list)
    is_over: bool = False


@dataclass(frozen=True)
class NewToken:
    """A token of a question's answer, and why the answer ends with it, if it does."""

    question: Question
    token: int
    finish_reason: FinishReason | None


class Scheduler:
    """See the module.

    Args:
        model: weighs work, so that plans are the workers'.
        limits: what every rank's engine allows.
        has_ring, shares_pages: what the engines have, as in `ModelEngine`.
        chunk_tokens: tokens that a rank computes in a pass of phase 1 at most, so that answers go
            on between them; None: as many as `limits` allow.
    """

    def __init__(
        self,
        model: ModelConfig,
        limits: Limits,
        num_ranks: int,
        tokens_per_block: int,
        has_ring: bool = True,
        shares_pages: bool = True,
        chunk_tokens: int | None = None,
    ) -> None:
        self._model, self._limits = model, limits
        self._num_ranks, self._page = num_ranks, tokens_per_block
        self._has_ring, self._shares_pages = has_ring, shares_pages
        self._chunk_tokens = chunk_tokens
        self._numbers = 0
        self._used = np.zeros(num_ranks, np.int64)  # pages of each rank
        self._contexts: list[Context] = []  # all that hold pages or will
        self._reading: deque[Context] = deque()
        self._waiting: list[Question] = []  # oldest first
        self._running: list[Question] = []  # oldest first
        self._over: tuple[list[int], list[int]] = [], []  # contexts, questions
        self._rows: list[Question | None] = []  # whose token each row of the last logits gives
        self._chunk_was_last = False

    def add_context(
        self,
        token_ids: np.ndarray,
        config: StarConfig,
        questions: Sequence[tuple[int, int]] = (),
    ) -> Context:
        """A context to read.

        Args:
            token_ids: int32 [n].
            questions: tokens of questions and of their answers that it must leave room for.

        Raises:
            UserError: the plan is not possible, or does not fit beside the contexts that are kept.
        """
        if config.attention == "ring" and not self._has_ring:
            raise UserError(
                "TensorRT engines have no ring attention: use --attention star or dense"
            )
        if config.attention == "ring" and self._limits.ring_tokens == 0:
            raise UserError(
                "ring attention's transfers do not fit beside the KV cache: use a smaller "
                "--kv-cache-gib, or --attention star"
            )
        self._check_length(len(token_ids), self._limits.input_len, "--max_input_len")
        plan = make_plan(len(token_ids), config, self._num_ranks, self._model)
        if shares_anchor(plan, config) and not self._shares_pages:
            raise UserError(
                "--anchor-mode broadcast needs a GPU for each rank in TensorRT engines: use local"
            )
        context = self._new_context(token_ids, config, plan)
        self._check_room(context)
        for question, answer in questions:
            self._check_question(context, question, answer, self._kept_contexts() + context.pages)
        self._contexts.append(context)
        return context

    def add_question(
        self,
        context: Context,
        token_ids: np.ndarray,
        params: SamplingParams,
        end_tokens: frozenset[int] = frozenset(),
    ) -> Question:
        """A question, int32 [n], to answer.

        Raises:
            UserError: the context was released, or question and answer are too long for the
                engine or the KV cache.
        """
        if context.is_released:
            raise UserError("the context was released: encode the text again")
        most = self._check_question(
            context, len(token_ids), params.max_tokens, self._kept_contexts()
        )
        self._numbers += 1
        question = Question(
            self._numbers,
            context,
            token_ids,
            params,
            end_tokens,
            most,
            np.random.default_rng(params.seed),
            [0] * self._num_ranks,
        )
        self._put_back(question)
        context.questions += 1
        self._waiting.append(question)
        return question

    def release_context(self, context: Context) -> None:
        """It is not asked any more; its pages are free when no question needs them."""
        context.is_released = True
        if context.questions or context not in self._contexts:
            return
        self._contexts.remove(context)
        if context in self._reading:
            self._reading.remove(context)
        if context.is_open:
            self._used -= context.held
            self._over[0].append(context.number)

    def finish(self, question: Question) -> None:
        """The answer is over, or nobody wants it any more."""
        if question.is_over:
            return
        question.is_over = True
        if question in self._waiting:
            self._waiting.remove(question)
        if question in self._running:
            self._running.remove(question)
        self._give_pages_back(question)
        context = question.context
        context.questions -= 1
        if context.is_released:
            self.release_context(context)

    def next(self) -> Order | None:
        """What all ranks do next; None: nothing, until something is added."""
        if order := self.release() or self._open():
            return order
        answers, chunks = (self._ask, self._decode), (self._chunk,)
        for make in (*answers, *chunks) if self._chunk_was_last else (*chunks, *answers):
            if order := make():
                self._chunk_was_last = isinstance(order, Chunk)
                return order
            if any(self._over):  # questions that were put back
                return self.next()
        return None

    def release(self) -> Release | None:
        """What is over and holds pages."""
        if not any(self._over):
            return None
        contexts, questions = self._over
        self._over = [], []
        return Release(tuple(contexts), tuple(questions))

    def wanted(self) -> list[tuple[int, Question]]:
        """Rows of the last order's logits that choose a token, and for which question."""
        return [(row, question) for row, question in enumerate(self._rows) if question]

    def chosen(self, tokens: Sequence[int]) -> list[NewToken]:
        """Takes the tokens of `wanted`."""
        new = []
        for (_, question), token in zip(self.wanted(), tokens, strict=True):
            reason: FinishReason | None = None
            if token in question.end_tokens and not question.params.ignore_eos:
                reason = "stop"
            elif len(question.answer) + 1 == question.params.max_tokens:
                reason = "length"
            question.answer.append(token)
            new.append(NewToken(question, token, reason))
        self._rows = []
        for each in new:
            if each.finish_reason:
                self.finish(each.question)
        return new

    def failed(self, order: Order) -> None:
        """An order was not executed to its end, and the job goes on all the same: what it was about
        begins anew."""
        self._rows = []
        if isinstance(order, Open | Chunk):
            context = next(each for each in self._contexts if each.number == order.context)
            if context in self._reading:
                self._reading.remove(context)
            self._used -= context.held
            self._over[0].append(context.number)
            context.phase1 = Phase1(context.plan, context.config)
            context.is_open = False
        elif isinstance(order, Release):
            self._over[0].extend(order.contexts)
            self._over[1].extend(order.questions)
        elif isinstance(order, Ask | Decode):
            for question in (*self._running, *self._waiting):
                if any(question.kept):
                    self._restart(question)

    @property
    def pages_in_use(self) -> np.ndarray:
        """Of each rank, int64 [ranks]."""
        return self._used.copy()

    # Contexts

    def _new_context(self, token_ids: np.ndarray, config: StarConfig, plan: Plan) -> Context:
        self._numbers += 1
        cached = [0] * plan.num_ranks
        for block in plan.blocks:
            cached[block.rank] += block.tokens
        return Context(
            self._numbers,
            token_ids,
            config,
            plan,
            Phase1(plan, config),
            cached,
            *_pages_of_ranks(plan, config),
        )

    def _kept_contexts(self) -> np.ndarray:
        """Pages, int64 [ranks], of all contexts that nobody released."""
        kept = [context.pages for context in self._contexts if not context.is_released]
        return np.sum(kept, axis=0, dtype=np.int64) if kept else np.zeros_like(self._used)

    def _open(self) -> Open | None:
        """Contexts in their order, each once it fits and leaves every question its room: while it
        is read those over contexts that are open, afterwards its own too."""
        context = next((each for each in self._contexts if not each.is_open), None)
        if context is None:
            return None
        opened = [each for each in self._contexts if each.is_open]
        held = sum((each.held for each in opened), context.held)
        pages = sum((each.pages for each in opened), context.pages)
        if not (
            self._fits(self._used + context.held)
            and self._fits(held + self._room_for_questions(opened))
            and self._fits(pages + self._room_for_questions([*opened, context]))
        ):
            return None
        self._used += context.held
        context.is_open = True
        self._reading.append(context)
        return Open(context.number, context.token_ids, context.config)

    def _room_for_questions(self, contexts: Sequence[Context]) -> np.ndarray:
        """Pages, int64 [ranks], that any one question over these contexts takes at most."""
        most = np.zeros_like(self._used)
        for question in (*self._waiting, *self._running):
            if question.context in contexts:
                most = np.maximum(most, question.most_pages)
        return most

    def _chunk(self) -> Chunk | None:
        if not self._reading:
            return None
        context = self._reading.popleft()
        tokens = context.phase1.next(self._limits, self._chunk_tokens)
        if context.phase1.finished:
            self._used -= context.scratch
        else:
            self._reading.append(context)
        return Chunk(context.number, tokens)

    # Questions

    def _ask(self) -> Ask | None:
        """Parts of waiting questions, as many as a pass takes; all are kept by the same rank."""
        limits, parts, rows = self._limits, [], []
        left = limits.question_tokens
        # Those that run take their next token first: who is put back does not come again before
        # anything has moved.
        next_tokens = self._growth_of(self._running)
        for question in list(self._waiting):
            if not question.context.is_ready:
                continue
            if limits.questions is not None and (
                len(parts) == limits.questions or len(self._running) == limits.questions
            ):
                break
            rank, tokens = question.pending[0]
            if left is not None:
                tokens = tokens[:left]
            same_rank = not parts or parts[0].rank == rank
            if not len(tokens) or not same_rank:
                break
            more = self._growth(question, rank, len(tokens))
            next_tokens[rank] += more
            if not self._fits(self._used + next_tokens):
                if not parts and not self._running:
                    self._put_back_newest(besides=question)
                break
            next_tokens[rank] -= more
            self._used[rank] += more
            question.kept[rank] += len(tokens)
            parts.append(QuestionPart(question.number, question.context.number, tokens, rank))
            left = None if left is None else left - len(tokens)
            rest = question.pending.popleft()[1][len(tokens) :]
            if len(rest):
                question.pending.appendleft((rank, rest))
            rows.append(None if question.pending else question)
            if not question.pending:
                self._waiting.remove(question)
                bisect.insort(self._running, question, key=_number)
        if not parts:
            return None
        self._rows = rows
        return Ask(tuple(parts))

    def _decode(self) -> Decode | None:
        """One token of every running question; the newest make room if need be."""
        if not self._running:
            return None
        while not self._fits(self._used + (more := self._growth_of(self._running))):
            self._put_back_newest()
        if any(self._over):
            return None
        self._used += more
        ranks = [self._next_keeper(question) for question in self._running]
        for question, rank in zip(self._running, ranks, strict=True):
            question.kept[rank] += 1
        self._rows = list(self._running)
        return Decode(
            tuple(question.number for question in self._running),
            tuple(question.answer[-1] for question in self._running),
            tuple(ranks),
        )

    def _put_back_newest(self, besides: Question | None = None) -> None:
        """Of those that hold pages."""
        holding = [each for each in (*self._waiting, *self._running) if any(each.kept)]
        holding = [each for each in holding if each is not besides]
        if holding:
            self._restart(max(holding, key=_number))

    def _restart(self, question: Question) -> None:
        """Gives its pages back and begins anew, answer included."""
        if question in self._running:
            self._running.remove(question)
            bisect.insort(self._waiting, question, key=_number)
        self._give_pages_back(question)
        self._put_back(question)

    def _put_back(self, question: Question) -> None:
        """All that is known of it is to be encoded."""
        answer = np.array(question.answer, np.int32)
        question.pending = deque([(self._num_ranks - 1, question.token_ids)])
        for rank, begin, end in self._runs(question.context.config.kv_placement, len(answer)):
            question.pending.append((rank, answer[begin:end]))

    def _give_pages_back(self, question: Question) -> None:
        if any(question.kept):
            pages = _question_pages(question.context.cached, question.kept, self._page)
            self._used -= pages
            question.kept = [0] * self._num_ranks
            self._over[1].append(question.number)

    def _growth_of(self, running: Sequence[Question]) -> np.ndarray:
        """Pages, int64 [ranks], that running questions' next tokens take."""
        more = np.zeros_like(self._used)
        for question in running:
            rank = self._next_keeper(question)
            more[rank] += self._growth(question, rank, 1)
        return more

    def _growth(self, question: Question, rank: int, tokens: int) -> int:
        """Pages that so many more tokens of a question take on a rank."""
        cached, kept = question.context.cached[rank], question.kept[rank]
        page = self._page
        return question_pages(cached, kept + tokens, page) - question_pages(cached, kept, page)

    def _next_keeper(self, question: Question) -> int:
        """The rank that keeps the last token of a running question's answer."""
        placement, index = question.context.config.kv_placement, len(question.answer) - 1
        return keeper(placement, index, self._num_ranks, self._page)

    def _runs(self, placement: KvPlacement, count: int) -> Iterator[tuple[int, int, int]]:
        """(rank, begin, end) of the runs of an answer's tokens that one rank keeps."""
        step = count if placement == "tail" else self._page
        for begin in range(0, count, max(step, 1)):
            rank = keeper(placement, begin, self._num_ranks, self._page)
            yield rank, begin, min(begin + step, count)

    # What fits

    def _fits(self, pages: np.ndarray) -> bool:
        return self._limits.pages is None or bool((pages <= self._limits.pages).all())

    def _check_room(self, context: Context) -> None:
        """Raises UserError, with what would fit, if a context does not."""
        kept, limit = self._kept_contexts(), self._limits.pages
        if self._fits(kept + context.held):
            return
        needed = int(context.held.max()) * self._page
        if self._fits(context.held):
            free = int((limit - kept).min()) * self._page
            raise UserError(
                f"the context needs {needed} tokens of KV cache on a rank, of {limit * self._page} "
                f"other contexts leave {free}: release them, or use a larger --kv-cache-gib"
            )
        plan, config = context.plan, context.config
        advice = "use a smaller block size"
        if config.attention == "dense":
            exact = "ring or " if self._has_ring else ""
            advice = f"use {exact}star over several ranks"
        elif ranks := self._ranks_that_fit(plan, config):
            advice = f"use {ranks} ranks or more"
        raise UserError(
            f"the context needs {needed} tokens of KV cache on a rank, there is room for "
            f"{limit * self._page}: {advice}, or a larger --kv-cache-gib"
        )

    def _ranks_that_fit(self, plan: Plan, config: StarConfig) -> int | None:
        """The smallest number of ranks beyond the plan's; what the busiest holds never grows with
        their number, and where the default block falls below the anchor there are too many."""

        def fits(ranks: int) -> bool | None:
            try:
                larger = make_plan(plan.context_len, config, ranks, self._model)
            except UserError:
                return None
            return self._fits(sum(_pages_of_ranks(larger, config)))

        numbers = range(plan.num_ranks + 1, _MOST_RANKS + 1)
        at = bisect.bisect_left(numbers, True, key=lambda ranks: fits(ranks) is not False)
        return numbers[at] if at < len(numbers) and fits(numbers[at]) else None

    def _check_question(
        self, context: Context, question: int, answer: int, contexts: np.ndarray
    ) -> np.ndarray:
        """Pages that a question takes on each rank at most; raises UserError if that does not fit
        beside `contexts`."""
        asked = context.plan.context_len + question
        self._check_length(asked, self._limits.input_len, "--max_input_len")
        self._check_length(asked + answer, self._limits.seq_len, "--max_seq_len")
        if asked + answer > _MOST_POSITIONS:
            raise UserError(
                f"max_tokens is {answer}: context, question and answer have at most "
                f"{_MOST_POSITIONS} tokens: use {_MOST_POSITIONS - asked} or less"
            )
        placement = context.config.kv_placement
        kept = kept_tokens(question, answer, placement, self._num_ranks, self._page)
        pages = _question_pages(context.cached, kept.tolist(), self._page)
        if not self._fits(contexts + pages):
            rank = int(np.argmax(contexts + pages))
            room = max(0, int(self._limits.pages - contexts[rank])) * self._page
            raise UserError(
                f"question and answer need {int(pages[rank]) * self._page} tokens of KV cache on a "
                f"rank, the contexts leave room for {room}: use a smaller --max-tokens, more "
                "ranks, or a larger --kv-cache-gib"
            )
        return pages

    def _check_length(self, tokens: int, most: int | None, flag: str) -> None:
        if most is not None and tokens > most:
            raise UserError(
                f"this takes {tokens} tokens, the engine was built for {flag} {most}: "
                "use a shorter text, or build it for more"
            )


_number = attrgetter("number")


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


def _pages_of_ranks(plan: Plan, config: StarConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pages that a context takes on each rank for good, and for phase 1 besides."""
    ranks = range(plan.num_ranks)
    return (
        np.array([own_pages(plan, rank) for rank in ranks], np.int64),
        np.array([scratch_pages(plan, config, rank) for rank in ranks], np.int64),
    )


def _question_pages(
    cached: Sequence[int], kept: Sequence[int], tokens_per_block: int
) -> np.ndarray:
    """`question_pages` of each rank, int64 [ranks]."""
    pairs = zip(cached, kept, strict=True)
    return np.array([question_pages(c, k, tokens_per_block) for c, k in pairs], np.int64)
