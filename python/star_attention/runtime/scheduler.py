"""What happens next, decided on rank 0: contexts and questions in, orders out.

Holds no tensors and talks to nobody. It knows every context's plan and every rank's pages by
counting: `next` gives an order, which all ranks execute before `next` is called again, and `chosen`
takes the tokens that were sampled from an order's logits.

A context's pages are taken when its phase 1 begins, a question's as it grows. Blocks that no
context holds any more make room first. When a rank has none left, the newest question gives its own
back and is encoded again later, answer included. Contexts leave so much room that every question
fits if it is alone, so this ends.

Between two tokens of the answers there is at most one pass of something else, each kind in turn:
of phase 1, of questions, or copies of blocks. What is long is cut, and waits for the others in
between. Saves, which nobody waits for, come after the others.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

import numpy as np

from star_attention.config import StarConfig
from star_attention.engines.base import Limits
from star_attention.errors import UserError
from star_attention.models.config import ModelConfig
from star_attention.plan import Plan
from star_attention.runtime.blocks import Block, BlockTable, block_keys
from star_attention.runtime.copies import Copies
from star_attention.runtime.orders import (
    Ask,
    BlockPart,
    Chunk,
    Decode,
    Load,
    Open,
    Order,
    QuestionPart,
    Release,
)
from star_attention.runtime.pages import frame_count, question_pages
from star_attention.runtime.placement import keeper, runs_of
from star_attention.runtime.requests import Context, Division, FinishReason, NewToken, Question
from star_attention.runtime.room import Room, pages_of_question
from star_attention.runtime.sampling import SamplingParams, TokenLogprobs
from star_attention.runtime.store import Store, Stored
from star_attention.runtime.tiers import LoadState

# Tokens of a rank; for fewer, reading them again is as fast as merging what is read apart.
_LEAST_SHARED = 8192
# Passes that somebody waits for come before a save, so many at most.
_MOST_BEFORE_SAVE = 8


class Scheduler:
    """See the module.

    Args:
        model, limits, has_exchanges, has_hops, has_selection, kv_packing: as in `Room`.
        has_prefix: the engines' steps can have one.
        shares_blocks: contexts share blocks of the same contents, and these stay when no context
            holds them, until others need the room.
        store: of the lower tiers, for shared blocks.

    Attributes:
        chunk_tokens, question_tokens: of a pass of phase 1 on a rank, and of one of questions, at
            most; None: as many as `limits` allow.
        copies: of blocks to and from the lower tiers.
        least_shared: tokens that a pass must not read again and again, so that questions over the
            same blocks are grouped.
    """

    def __init__(
        self,
        model: ModelConfig,
        limits: Limits,
        num_ranks: int,
        tokens_per_block: int,
        has_exchanges: bool = True,
        has_hops: bool = True,
        has_prefix: bool = True,
        shares_blocks: bool = False,
        store: Store | None = None,
        has_selection: bool = False,
        kv_packing: int = 1,
    ) -> None:
        self.chunk_tokens: int | None = None
        self.question_tokens: int | None = None
        self.least_shared = _LEAST_SHARED * num_ranks
        self._has_prefix = has_prefix
        self._model = model
        self._room = Room(
            model,
            limits,
            num_ranks,
            tokens_per_block,
            has_exchanges,
            has_hops,
            has_selection,
            kv_packing,
        )
        self._packing = kv_packing
        self._num_ranks, self._page = num_ranks, tokens_per_block
        self._shares_blocks = shares_blocks
        self._numbers = 0
        self._used = np.zeros(num_ranks, np.int64)  # pages of each rank, idle blocks' included
        self._scratch = np.zeros(num_ranks, np.int64)  # of them, for phase 1
        self._blocks = BlockTable(num_ranks)
        self._store = store or Store({}, 1, 1, 0)
        self.copies = Copies(self._store, self._blocks, num_ranks)
        self._contexts: list[Context] = []  # all that hold pages or will
        self._unopened: deque[Context] = deque()
        self._reading: deque[Context] = deque()
        self._waiting: list[Question] = []  # oldest first
        self._running: list[Question] = []  # oldest first
        self._over: tuple[list[int], ...] = [], [], []  # contexts, questions, blocks
        self._rows: list[Question | None] = []  # whose token each row of the last logits gives
        # Who is next comes first; decode steps come in between.
        self._others = deque([self._chunk, self.copies.load, self._ask])
        self._since_save = 0  # passes of others
        self._decode_is_due = False

    def add_context(
        self,
        token_ids: np.ndarray,
        config: StarConfig,
        questions: Sequence[tuple[int, int]] = (),
        keep: bool = True,
    ) -> Context:
        """A context to read.

        Args:
            token_ids: int32 [n].
            questions: tokens of questions and of their answers that it must leave room for. A model
                that rotates long texts otherwise counts these, or some room for them.
            keep: it stays until it is released, so nothing is added that does not fit beside it.
                Others wait for one another.

        Raises:
            UserError: the plan is not possible, does not fit beside the contexts that are kept, or
                the model does not know a token.
        """
        self._model.check_tokens(token_ids)
        plan = self._room.plan(len(token_ids), config)
        rope = self._model.rope
        asked = max(map(sum, questions), default=rope.room)
        is_long = rope.is_long(len(token_ids) + asked)
        keys: list[bytes | None] = [None] * len(plan.parts)
        if self._shares_blocks:
            keys[:] = block_keys(token_ids, plan, is_long)
        self._numbers += 1
        context = Context(
            self._numbers,
            token_ids,
            config,
            keys,
            is_long,
            keep,
            self._even(plan),
            plan.passes(),
        )
        self._check(context, questions)
        self._contexts.append(context)
        try:
            for other in self._unopened if keep else ():
                self._check(other, [_lengths(each) for each in self._waiting_for(other)])
        except UserError:
            self._contexts.remove(context)
            raise UserError(
                "the context does not fit beside what is waiting: do not keep it, or ask later"
            ) from None
        self._unopened.append(context)
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
            UserError: the context was released, question and answer are too long for the engine
                or the KV cache, or the model does not know a token.
        """
        self._model.check_tokens(token_ids)
        if context.is_released:
            raise UserError("the context was released: encode the text again")
        whole = len(context.token_ids) + len(token_ids) + params.max_tokens
        if self._model.rope.is_long(whole) and not context.is_long:
            raise UserError(
                f"context, question and answer have {whole} tokens, but the context was read for "
                f"{self._model.rope.original_max_position}, beyond which the model's rotary "
                "embedding is another: encode it with its questions, or use a smaller max_tokens"
            )
        most = self._check(context, [(len(token_ids), params.max_tokens)])
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
        """It is not asked any more; its pages are free when nobody needs them."""
        context.is_released = True
        if context.questions or context not in self._contexts:
            return
        if context in self._reading and any(block.holders > 1 for block in context.reads):
            return  # others wait for what it reads
        self._contexts.remove(context)
        if context.is_open:
            self._close(context)
        else:
            self._unopened.remove(context)

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
        if order := self.release():
            return order
        save = self.copies.save
        makers = [*self._others, save]
        if self._since_save >= _MOST_BEFORE_SAVE:
            makers.insert(0, makers.pop())
        makers.insert(0 if self._decode_is_due else len(makers), self._decode)
        for make in (self._open, *makers):
            if order := make():
                if make in self._others:
                    self._others.rotate(-1 - self._others.index(make))
                    self._since_save += 1
                elif make == save:
                    self._since_save = 0
                self._decode_is_due = make in self._others or make == save
                return order
            if any(self._over):  # what makes room
                return self.next()
        return None

    def release(self) -> Release | None:
        """What is over and holds pages."""
        if not any(self._over):
            return None
        over = Release(*map(tuple, self._over))
        self._over = [], [], []
        return over

    def wanted(self) -> list[tuple[int, Question]]:
        """Rows of the last order's logits that choose a token, and for which question."""
        return [(row, question) for row, question in enumerate(self._rows) if question]

    def chosen(
        self, tokens: Sequence[int], logprobs: Mapping[int, TokenLogprobs] | None = None
    ) -> list[NewToken]:
        """Takes the tokens of `wanted`, and log-probabilities of some by their index there."""
        new, logprobs = [], logprobs or {}
        for index, ((_, question), token) in enumerate(zip(self.wanted(), tokens, strict=True)):
            reason: FinishReason | None = None
            if token in question.end_tokens and not question.params.ignore_eos:
                reason = "stop"
            elif len(question.answer) + 1 == question.params.max_tokens:
                reason = "length"
            question.answer.append(token)
            new.append(NewToken(question, token, reason, logprobs.get(index)))
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
            failed = next(each for each in self._contexts if each.number == order.context)
            for block in failed.reads:
                block.is_ready = False
            self._reopen([failed])
        elif isinstance(order, Release):
            again = order.contexts, order.questions, order.blocks
            for over, more in zip(self._over, again, strict=True):
                over.extend(more)
        elif isinstance(order, Ask | Decode):
            for question in (*self._running, *self._waiting):
                if any(question.kept):
                    self._restart(question)

    @property
    def pages_in_use(self) -> np.ndarray:
        """Of each rank, int64 [ranks]."""
        return self._used.copy()

    @property
    def pages_held(self) -> np.ndarray:
        """Of those, what no idle block would make room of."""
        return self._used - self._blocks.idle

    @property
    def free_tokens(self) -> int | None:
        """Of KV, on the rank that has the least room; None: there is no limit."""
        limit = self._room.limits.pages
        return None if limit is None else int((limit - self.pages_held).min()) * self._page

    @property
    def num_running(self) -> int:
        """Questions that are being answered."""
        return len(self._running)

    def cached(self) -> dict[str, tuple[int, int]]:
        """Blocks in each tier, and their bytes; of those in pages, pages. All ranks together."""
        pages = int(self._blocks.live.sum() + self._blocks.idle.sum())
        return {"gpu": (self._blocks.count, pages), **self._store.counts()}

    def is_cached(self, keys: Iterable[bytes]) -> bool:
        """Whether a context of these blocks has nothing to read."""
        return all(self._find(key) for key in keys)

    def loaded(self, load: Load, states: Sequence[LoadState]) -> None:
        """Takes what the processes said to a load."""
        if block := self.copies.loaded(load, states):
            self._reopen([each for each in self._contexts if block in each.blocks])

    # Contexts

    def _check(self, context: Context, questions: Sequence[tuple[int, int]]) -> np.ndarray:
        """Raises UserError if a context, with any one of these questions, does not fit beside what
        is kept; the most pages of a question, int64 [ranks]."""
        if context.is_open and not context.is_kept:
            # None of those that are open beside it ends before its own questions do.
            kept = {block for other in self._contexts for block in other.blocks}
            pages = self._scratch + self._pages_of(kept.difference(context.blocks))
            return self._check_division(context, context.division, pages, questions)
        kept = self._kept_blocks(besides=context)
        pages = self._pages_of(kept)
        for other in self._unopened:
            if other.is_kept and other is not context:
                pages += other.division.pages
        if context.is_open:
            return self._check_division(context, context.division, pages, questions)
        around = [block if block in kept else None for block in self._known(context)]
        with contextlib.suppress(UserError):
            return self._check_division(context, context.division, pages, questions)
        division = self._room.divide(context.plan, around)
        return self._check_division(context, division, pages, questions)

    def _check_division(
        self,
        context: Context,
        division: Division,
        kept: np.ndarray,
        questions: Sequence[tuple[int, int]],
    ) -> np.ndarray:
        room, config, most = self._room, context.config, np.zeros_like(self._used)
        if not context.is_open:
            room.check_context(division, config, kept)
        held = kept + (division.pages if context.is_open else division.new)
        for question, answer in questions:
            pages = room.check_question(division, config, question, answer, held)
            most = np.maximum(most, pages)
        return most

    def _kept_blocks(self, besides: Context) -> set[Block]:
        """Of contexts that are kept, without those that `besides` holds itself."""
        kept: set[Block] = set()
        for context in self._contexts:
            if context.is_kept and not context.is_released:
                kept.update(context.blocks)
        return kept.difference(besides.blocks)

    def _pages_of(self, blocks: Iterable[Block]) -> np.ndarray:
        """Pages, int64 [ranks], that blocks take."""
        pages = np.zeros_like(self._used)
        for block in blocks:
            pages[block.rank] += block.pages
        return pages

    def _find(self, key: bytes | None) -> Block | Stored | None:
        if key is None:
            return None
        return self._blocks.find(key) or self._store.find(key)

    def _known(self, context: Context) -> list[Block | Stored | None]:
        return [self._find(key) for key in context.keys]

    def _open(self) -> Open | None:
        """Contexts in their order, each once it fits and leaves every question its room: while it
        is read those over contexts that are open, afterwards its own too."""
        if not self._unopened:
            return None
        context = self._unopened[0]
        config, kept = context.config, self._kept_blocks(besides=context)
        found = tuple(self._known(context))
        around = tuple(block if block in kept else None for block in found)
        # Usually they are the same.
        for known in dict.fromkeys((found, around, (None,) * len(found))):
            division = self._room.divide(context.plan, known)
            if self._fits(context, division) and self._leaves_room(context, division):
                break
        else:
            return None
        for block in found:  # what is read anew replaces it
            if isinstance(block, Block) and not block.holders and block not in division.known:
                self._blocks.forget(block)
                self._drop(block)
        taken = division.new + division.scratch
        if any(self._over):
            return None
        if not self._room.fits(self._used + taken):
            self._evict(taken, besides=division.known)
            return None
        self._unopened.popleft()
        self._hold(context, division)
        parts = (BlockPart(b.number, b.rank, b in context.reads) for b in context.blocks)
        order = Open(context.number, context.token_ids, config, tuple(parts), context.is_long)
        if context.phase1.finished:
            self._end_reading(context)
        else:
            self._reading.append(context)
        return order

    def _fits(self, context: Context, division: Division) -> bool:
        """Whether a context can be opened, if idle blocks make room."""
        resident = {block for block in division.known if isinstance(block, Block)}
        revived = self._pages_of(block for block in resident if not block.holders)
        live, taken = self._blocks.live + division.new + revived, division.new + division.scratch
        opened = [each for each in self._contexts if each.is_open]
        own = [self._question_pages(division, each) for each in self._waiting_for(context)]
        others = self._room_for_questions(opened)
        fits = self._room.fits
        return (
            fits(self._used - self._blocks.idle + revived + taken)
            and fits(live + self._scratch + division.scratch + others)
            and fits(live + np.max([others, *own], axis=0))
        )

    def _leaves_room(self, context: Context, division: Division) -> bool:
        """Whether all that wait, and would fit beside a kept context if it were held evenly, as was
        promised to them, still do if it is held so."""
        if not context.is_kept or context.is_released or not any(division.known):
            return True
        even, kept = context.division, self._kept_blocks(besides=context)
        shared = kept.intersection(each for each in division.known if isinstance(each, Block))
        uneven = replace(division, pages=division.pages - self._pages_of(shared))
        others = [each for each in self._unopened if each is not context]
        return all(
            self._fits_beside(other, context, uneven) or not self._fits_beside(other, context, even)
            for other in others
        )

    def _fits_beside(self, other: Context, context: Context, division: Division) -> bool:
        """Whether `other` would be accepted beside a context that is held so."""
        usual, context.division = context.division, division
        try:
            self._check(other, [_lengths(each) for each in self._waiting_for(other)])
        except UserError:
            return False
        finally:
            context.division = usual
        return True

    def _hold(self, context: Context, division: Division) -> None:
        """Takes pages for what is not there."""
        self._used += division.new + division.scratch
        self._scratch += division.scratch
        plan = division.plan
        for each, known, key in zip(plan.parts, division.known, context.keys, strict=True):
            if isinstance(known, Block):
                self._blocks.hold(known)
                context.blocks.append(known)
                continue
            count = frame_count(each.tokens, self._page, self._packing)
            block = self._blocks.new(key, each.rank, each.tokens, count)
            context.blocks.append(block)
            if known is None:
                context.reads.add(block)
            else:
                block.source = known.tier
                self.copies.add_load(block)
        context.division = division
        context.phase1 = plan.passes()
        parts = list(zip(plan.parts, context.blocks, strict=True))
        seen = {part.start for part in plan.seen_parts}
        context.awaits = [block for each, block in parts if each.start in seen]
        context.is_open = True
        for question in self._waiting_for(context):
            question.most_pages = self._question_pages(division, question)

    def _even(self, plan: Plan) -> Division:
        """How a context is held that is read anew."""
        return self._room.divide(plan, [None] * len(plan.parts))

    def _waiting_for(self, context: Context) -> list[Question]:
        return [each for each in self._waiting if each.context is context]

    def _question_pages(self, division: Division, question: Question) -> np.ndarray:
        """Pages, int64 [ranks], that it takes at most if its context is held so."""
        return self._room.pages_of(division, question.context.config, *_lengths(question))

    def _close(self, context: Context) -> None:
        """Gives its pages back."""
        if context in self._reading:
            self._reading.remove(context)
            self._give_scratch_back(context)
        for block in reversed(context.blocks):
            if self._blocks.give_back(block):
                self._drop(block)
        self._over[0].append(context.number)
        context.blocks, context.reads, context.awaits = [], set(), []
        context.is_open = False

    def _give_scratch_back(self, context: Context) -> None:
        self._used -= context.division.scratch
        self._scratch -= context.division.scratch

    def _reopen(self, contexts: Sequence[Context]) -> None:
        """Contexts, and those that wait for blocks which they read, begin anew."""
        again: list[Context] = []
        while contexts:
            again += contexts
            unread = {block for each in contexts for block in each.reads if not block.is_ready}
            contexts = [
                each
                for each in self._contexts
                if each not in again and not unread.isdisjoint(each.blocks)
            ]
        for context in again:
            self._close(context)
            plan = self._room.plan(len(context.token_ids), context.config)
            context.division = self._even(plan)
            if context.is_released and not context.questions:
                self._contexts.remove(context)
        again = [each for each in again if each in self._contexts]
        self._unopened = deque(sorted([*again, *self._unopened], key=_number))

    def _drop(self, block: Block) -> None:
        self.copies.drop(block)
        self._used[block.rank] -= block.pages
        self._over[2].append(block.number)

    def _evict(self, more: np.ndarray, besides: Collection[Block | None] = ()) -> bool:
        """Gives up idle blocks so that ranks have so many more pages, as far as that helps; whether
        there were any."""
        gone = self._blocks.evict(self._used + more - self._room.limits.pages, besides)
        for block in gone:
            self._drop(block)
        return bool(gone)

    def _room_for_questions(self, contexts: Sequence[Context]) -> np.ndarray:
        """Pages, int64 [ranks], that any one question over these contexts takes at most."""
        among = set(contexts)
        asked = (each for each in (*self._waiting, *self._running) if each.context in among)
        pages = [each.most_pages for each in asked]
        return np.max(pages, axis=0) if pages else np.zeros_like(self._used)

    def _chunk(self) -> Chunk | None:
        """The next pass of the context that has waited longest; one that sees what another context
        reads, or what is loaded, waits for that."""
        limits = self._room.limits
        for _ in range(len(self._reading)):
            context = self._reading.popleft()
            if all(block.is_ready for block in context.awaits):
                bounds = self._room.pass_tokens(context.plan), self.chunk_tokens
                most = min((bound for bound in bounds if bound is not None), default=None)
                spans = context.phase1.next(most, limits.pass_sequences)
                self._reading.append(context)
                if context.phase1.finished:
                    self._end_reading(context)
                return Chunk(context.number, spans)
            self._reading.append(context)
        return None

    def _end_reading(self, context: Context) -> None:
        if context in self._reading:
            self._reading.remove(context)
        self._give_scratch_back(context)
        for block in context.blocks:
            if block in context.reads:
                block.is_ready = True
                self.copies.add_save(block)
        if context.is_released:
            self.release_context(context)

    # Questions

    def _ask(self) -> Ask | None:
        """Parts of waiting questions, as many as a pass takes; all are kept by the same rank."""
        limits, parts, rows = self._room.limits, [], []
        bounds = [b for b in (limits.question_tokens, self.question_tokens) if b is not None]
        left = min(bounds, default=None)
        ready = [question for question in self._waiting if question.context.is_ready]
        if not ready:
            return None
        # Those that run take their next token first: who is put back does not come again before
        # anything has moved.
        next_tokens = self._growth_of(self._running)
        for question in ready:
            if limits.questions is not None and (
                len(parts) == limits.questions or len(self._running) == limits.questions
            ):
                break
            rank, tokens = question.pending[0]
            if left is not None:
                # The oldest leaves half of a pass to others, so that it does not hold them up.
                shares = len(ready) > 1 and not parts
                tokens = tokens[: max(1, left // 2) if shares else left]
            same_rank = not parts or parts[0].rank == rank
            if not len(tokens) or not same_rank:
                break
            more = self._growth(question, rank, len(tokens))
            next_tokens[rank] += more
            if not self._room.fits(self._used + next_tokens):
                if not parts and not self._evict(next_tokens) and not self._running:
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
            if not self._evict(more):
                self._put_back_newest()
        if any(self._over):
            return None
        self._used += more
        running, groups = self._grouped()
        ranks = [self._next_keeper(question) for question in running]
        for question, rank in zip(running, ranks, strict=True):
            question.kept[rank] += 1
        self._rows = list(running)
        return Decode(
            tuple(question.number for question in running),
            tuple(question.answer[-1] for question in running),
            tuple(ranks),
            groups,
        )

    def _grouped(self) -> tuple[list[Question], tuple[int, ...]]:
        """Running questions, those over the same blocks in a row, and how many those are; in their
        order, and none, if that spares little."""
        if not self._has_prefix:
            return self._running, ()
        by_blocks: dict[tuple[Block, ...], list[Question]] = {}
        for question in self._running:
            by_blocks.setdefault(tuple(question.context.blocks), []).append(question)
        groups = list(by_blocks.values())
        spared = sum((len(each) - 1) * each[0].context.plan.context_len for each in groups)
        if spared < self.least_shared:
            return self._running, ()
        return [question for each in groups for question in each], tuple(map(len, groups))

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
            pages = pages_of_question(question.context.division.tokens, question.kept, self._page)
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
        cached, kept = question.context.division.tokens[rank], question.kept[rank]
        page = self._page
        return question_pages(cached, kept + tokens, page) - question_pages(cached, kept, page)

    def _next_keeper(self, question: Question) -> int:
        """The rank that keeps the last token of a running question's answer."""
        placement, index = question.context.config.kv_placement, len(question.answer) - 1
        return keeper(placement, index, self._num_ranks, self._page)


def _lengths(question: Question) -> tuple[int, int]:
    """Tokens of a question, and of its answer at most."""
    return len(question.token_ids), question.params.max_tokens


_number = attrgetter("number")
