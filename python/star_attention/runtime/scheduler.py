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
from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from star_attention.config import StarConfig
from star_attention.engines.base import Limits
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.plan import Plan
from star_attention.runtime.orders import Ask, Chunk, Decode, Open, Order, QuestionPart, Release
from star_attention.runtime.pages import question_pages
from star_attention.runtime.phase1 import Phase1
from star_attention.runtime.placement import keeper, runs_of
from star_attention.runtime.requests import Context, FinishReason, NewToken, Question
from star_attention.runtime.room import Room, pages_of_context, pages_of_question
from star_attention.runtime.sampling import SamplingParams


class Scheduler:
    """See the module.

    Args:
        model, limits, has_ring, shares_pages: as in `Room`.
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
        self._room = Room(model, limits, num_ranks, tokens_per_block, has_ring, shares_pages)
        self._num_ranks, self._page = num_ranks, tokens_per_block
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
        plan = self._room.plan(len(token_ids), config)
        context = self._new_context(token_ids, config, plan)
        kept = self._kept_contexts()
        self._room.check_context(context, kept)
        for question, answer in questions:
            self._room.check_question(context, question, answer, kept + context.pages)
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
        kept = self._kept_contexts()
        most = self._room.check_question(context, len(token_ids), params.max_tokens, kept)
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
            *pages_of_context(plan, config),
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
            self._room.fits(self._used + context.held)
            and self._room.fits(held + self._room_for_questions(opened))
            and self._room.fits(pages + self._room_for_questions([*opened, context]))
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
        tokens = context.phase1.next(self._room.limits, self._chunk_tokens)
        if context.phase1.finished:
            self._used -= context.scratch
        else:
            self._reading.append(context)
        return Chunk(context.number, tokens)

    # Questions

    def _ask(self) -> Ask | None:
        """Parts of waiting questions, as many as a pass takes; all are kept by the same rank."""
        limits, parts, rows = self._room.limits, [], []
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
            if not self._room.fits(self._used + next_tokens):
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
        while not self._room.fits(self._used + (more := self._growth_of(self._running))):
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
        placement = question.context.config.kv_placement
        for rank, begin, end in runs_of(len(answer), placement, self._num_ranks, self._page):
            question.pending.append((rank, answer[begin:end]))

    def _give_pages_back(self, question: Question) -> None:
        if any(question.kept):
            pages = pages_of_question(question.context.cached, question.kept, self._page)
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


_number = attrgetter("number")
