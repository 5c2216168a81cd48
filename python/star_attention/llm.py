"""The Python API: encode a long text once, ask it many questions."""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from star_attention.config import MergePath, StarConfig
from star_attention.engines.base import ModelEngine
from star_attention.engines.loader import division_of
from star_attention.engines.options import EngineOptions, LoadFormat
from star_attention.errors import UserError, counted
from star_attention.models.checkpoint import find_model
from star_attention.models.config import ModelConfig
from star_attention.models.fingerprint import fingerprint
from star_attention.models.quantization import Quantization
from star_attention.models.tokenizer import TextStream, Tokenizer, without_mark
from star_attention.plan import Plan
from star_attention.runtime import interrupts
from star_attention.runtime.job import current_job
from star_attention.runtime.leader import Leader, OnChunk
from star_attention.runtime.orders import Chunk, OpenStore, Order, Report, Wait
from star_attention.runtime.requests import Context, FinishReason, NewToken, Question
from star_attention.runtime.sampling import SamplingParams, TokenLogprobs
from star_attention.runtime.saved_contexts import SavedContexts
from star_attention.runtime.store import Store, open_store

_LOOK_SECONDS = 0.01  # between looks at what is being saved
_UNBOUNDED = 1 << 62  # bytes


@dataclass
class Answer:
    """The answer to one question.

    Attributes:
        text: what the model wrote, without the end token or stop string.
        token_ids: its tokens.
        finish_reason: `stop` (end token or stop string) or `length` (max_tokens).
        logprobs: of each token, if `SamplingParams.logprobs` wants them.
    """

    question: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class TextPiece:
    """Text that an answer grew by; empty while a character or a stop string is undecided. `answer`
    is the whole so far."""

    index: int
    text: str
    answer: Answer


class EncodedContext:
    """A context whose KV is cached on the ranks. Ask it as often as you like.

    Its memory is given back by `release`, at the end of a `with` block, or when nobody refers to it
    any more; what is being answered is answered to its end.

    Attributes:
        plan: how it is divided.
    """

    def __init__(self, leader: Leader, context: Context, release: Callable[[], None]) -> None:
        self._leader = leader
        self._context = context
        self._release = weakref.finalize(self, release)
        self._release.atexit = False

    @property
    def plan(self) -> Plan:
        return self._context.plan

    @property
    def config(self) -> StarConfig:
        return self._context.config

    @property
    def released(self) -> bool:
        return not self._release.alive

    def release(self) -> None:
        """Frees its pages; it cannot be asked any more."""
        self._release()

    def __enter__(self) -> EncodedContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class LLM:
    """A model, ready for long contexts.

    Example, alone or as `mpirun -n 4 python example.py` (with `--oversubscribe` if there are fewer
    cores than ranks):

        from star_attention import LLM, SamplingParams, StarConfig

        llm = LLM("smollm2", StarConfig(block_size=1024))
        context = llm.encode(open("report.txt").read())
        answer = llm.ask(context, "Who wrote this report?", SamplingParams(max_tokens=32))
        print(answer.text)

    Under mpirun the script goes on on rank 0 only; the other ranks work for it inside the first
    `LLM(...)` until it ends, and exit.

    Args:
        model: a Hugging Face folder with safetensors, a GGUF file, `org/name` of the local Hugging
            Face cache, `smollm2`, or the folder of a TensorRT engine, which runs on the GPU in the
            engine's dtype.
        config: how contexts are divided and kept, unless `encode` is told otherwise; what it leaves
            open is as a TensorRT engine was built for.
        dtype: what to compute in: `float32` (the CPU's default), `bfloat16` (CUDA's) or `float16`.
        device: `cpu` or `cuda` (kernels built, head_dim 64 or 128, pages of 64 or 128); ranks of a
            machine take its GPUs in turn.
        template: `chat`, `none` (base models), or `auto`: `chat` where the model has a template.
        load_format: `dummy`: random weights for the model's config, to try speed and memory.
        kv_cache_gib: memory of the KV cache; by default 0.8 of what the weights leave of a GPU, and
            on the CPU as much as is needed.
        merge: how ranks on GPUs merge attention: over `peer` memory, `nccl`, or `auto`.
        tp: processes that share one model (tensor parallelism); a rank is that many of them.
        quantization: `fp8`: projections in FP8; `int8`: in INT8, on a CPU; `none`: in `dtype`;
            `auto`: in FP8 if the checkpoint's are and the GPU can.
        strict: refuse text beyond the model's maximum position, instead of a warning.
        system: what the chat template's system message says.
        allow_special: texts may spell control tokens; otherwise they are text like any other.
        context_dir: a folder where every rank keeps the KV of the blocks that are read, and finds
            them again, also in another process with the same model, dtype, page size and ranks;
            `save` and `load` keep whole contexts there. Blocks of contexts that are released stay
            in memory too, until their room is needed.

    Raises:
        UserError: the model cannot be loaded, on any rank, or `context_dir` is another model's, in
            use, or cannot be written to.
    """

    def __init__(
        self,
        model: str | Path,
        config: StarConfig | None = None,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        template: str = "auto",
        load_format: LoadFormat = "auto",
        kv_cache_gib: float | None = None,
        merge: MergePath = "auto",
        tp: int = 1,
        quantization: Quantization = "auto",
        strict: bool = False,
        system: str | None = None,
        allow_special: bool = False,
        context_dir: str | Path | None = None,
    ) -> None:
        self._job = current_job()
        self._strict = strict
        kv_dtype = config.kv_dtype if config else "auto"
        options = EngineOptions(
            device, dtype, load_format, kv_cache_gib, merge, tp, quantization, kv_dtype
        )
        path = find_model(str(model), load_format != "dummy")
        self.config = division_of(path, config or StarConfig(), options)
        self._tokenizer = Tokenizer(path, template, system=system, allow_special=allow_special)
        self._number, worker, limits = self._job.load(path, self.config.tokens_per_block, options)
        self.model_config: ModelConfig = worker.engine.config
        self._end_tokens = frozenset(
            {*self.model_config.eos_token_ids, *self._tokenizer.eos_token_ids}
        )
        weakref.finalize(self, self._job.dropped.append, self._number).atexit = False
        execute = functools.partial(self._job.execute, self._number)
        self._saved = self._store = None
        if context_dir is not None:
            self._saved = SavedContexts(
                Path(context_dir) / "contexts", self._tokenizer, "the context folder"
            )
            self._store = _open_blocks(execute, path, Path(context_dir), worker.engine, tp)
        self._leader = Leader(
            execute,
            worker.engine,
            worker.comm.size,
            limits,
            shares_blocks=self._store is not None,
            store=self._store,
        )
        self._streams: dict[Question, _Stream] = {}
        # What is over, to be seen to between orders: it may end at any moment, also by collection.
        self._dropped: deque[Context] = deque()
        self._ended: deque[Question] = deque()

    def encode(
        self,
        text: str,
        config: StarConfig | None = None,
        on_progress: Callable[[float], None] = lambda done: None,
        *,
        questions: Sequence[str] = (),
        params: SamplingParams | None = None,
    ) -> EncodedContext:
        """Phase 1: caches the KV of a text, which can then be asked many times.

        Args:
            text: the context.
            config: replaces the division given to `LLM` for this text, page size and `kv_dtype`
                excepted.
            on_progress: called with the share of rank 0's work that is done.
            questions: that will be asked with `params`: whatever would be refused then is refused
                before the text is read.

        Raises:
            UserError: the text is empty, a size is not right for it, or it does not fit.
        """
        if not isinstance(text, str) or not without_mark(text).strip():
            raise UserError("the context is empty: give it some text")
        token_ids = np.array(self._tokenizer.context_tokens(text), np.int32)
        if not len(token_ids):
            raise UserError("the context has no tokens for this model's tokenizer: use other text")
        return self._encode(token_ids, config or self.config, on_progress, questions, params)

    def save(self, context: EncodedContext, name: str = "context") -> None:
        """Keeps a context in `context_dir`, for `load`; one of this name is replaced. Waits until
        its KV is on the disk.

        Raises:
            UserError: there is no `context_dir`, it cannot be written to, or the context is a
                ring's, whose KV is kept nowhere.
        """
        saved, tokens = self._contexts_folder(), context._context.token_ids
        if context.config.attention == "ring":
            raise UserError("a context of attention ring cannot be saved: use star or dense")
        copies = self._leader.scheduler.copies
        while copies.is_saving:
            if not self._step():
                time.sleep(_LOOK_SECONDS)
        if not all(self._store.has(key, ("disk",)) for key in context._context.keys):
            raise UserError("the context cannot be saved: the context folder does not take its KV")
        said = {
            "name": name,
            "created": time.time(),
            "bytes": sum(len(self._tokenizer.token_bytes(token)) for token in tokens.tolist()),
            "division": asdict(context.config),
        }
        try:
            saved.write(said, tokens)
        except OSError as error:
            raise UserError(f"the context cannot be saved: {error.strerror}") from None

    def load(
        self,
        name: str = "context",
        on_progress: Callable[[float], None] = lambda done: None,
        *,
        questions: Sequence[str] = (),
        params: SamplingParams | None = None,
    ) -> EncodedContext:
        """A context of `context_dir`, divided as it was saved. What of its KV is there, and whole,
        is not computed again.

        Args:
            on_progress, questions, params: as in `encode`.

        Raises:
            UserError: there is no such context, it was made with another tokenizer, or as `encode`.
        """
        said, token_ids = self._contexts_folder().read(name)
        try:
            config = StarConfig(**(said.division or {}))
        except (TypeError, UserError):
            raise UserError(f"the saved context {name!r} is damaged: save it again") from None
        config = replace(config, kv_placement=self.config.kv_placement)
        return self._encode(token_ids, config, on_progress, questions, params)

    def _contexts_folder(self) -> SavedContexts:
        if self._saved is None:
            raise UserError("contexts are saved in context_dir: give it to LLM(...)")
        return self._saved

    def _encode(
        self,
        token_ids: np.ndarray,
        config: StarConfig,
        on_progress: Callable[[float], None],
        questions: Sequence[str],
        params: SamplingParams | None,
    ) -> EncodedContext:
        kept = {name: getattr(self.config, name) for name in ("tokens_per_block", "kv_dtype")}
        config = replace(config, **kept)
        self._check_length(len(token_ids), "context")
        answer = (params or SamplingParams()).max_tokens
        asked = [(len(self._question_tokens(question)), answer) for question in questions]
        longest = max((sum(each) for each in asked), default=0)
        self._check_length(len(token_ids) + longest, "context, question and answer")
        self._tidy()
        context = self._leader.scheduler.add_context(token_ids, config, asked)
        failures: list[BaseException] = []  # of on_progress: raised when no order is under way

        def on_chunk(chunk: Chunk, share: float) -> None:
            if chunk.context == context.number and not failures:
                passed = sum(span.tokens for span in chunk.spans)
                done = context.phase1.done - (1 - share) * passed
                try:
                    on_progress(done / context.phase1.total)
                except BaseException as failure:
                    failures.append(failure)

        try:
            while not context.is_ready:
                self._advance(on_chunk)
                if failures:
                    raise failures[0]
            self._leader.execute(Wait())
            release = functools.partial(self._dropped.append, context)
            return EncodedContext(self._leader, context, release)
        except BaseException:
            self._dropped.append(context)
            raise

    @overload
    def ask(
        self,
        context: EncodedContext,
        questions: str,
        params: SamplingParams | None = None,
        answer_prefix: str = "",
    ) -> Answer: ...

    @overload
    def ask(
        self,
        context: EncodedContext | Sequence[EncodedContext],
        questions: Sequence[str],
        params: SamplingParams | None = None,
        answer_prefix: str | Sequence[str] = "",
    ) -> list[Answer]: ...

    def ask(self, context, questions, params=None, answer_prefix=""):
        """Phase 2: answers one question, or several together that do not see one another, over one
        context or each over its own.

        Args:
            answer_prefix: how the answers begin, or each of them: the model goes on from there, and
                its text does not repeat it.

        Raises:
            UserError: a question is empty, or longer than the model or the KV cache allows.
        """
        answers = {}
        for piece in self.stream(context, questions, params, answer_prefix):
            answers[piece.index] = piece.answer
        if isinstance(questions, str):
            return answers[0]
        return [answers[index] for index in range(len(questions))]

    def stream(
        self,
        context: EncodedContext | Sequence[EncodedContext],
        questions: str | Sequence[str],
        params: SamplingParams | None = None,
        answer_prefix: str | Sequence[str] = "",
    ) -> Iterator[TextPiece]:
        """`ask`, a token at a time. Questions are over when the iterator is exhausted or closed."""
        params = params or SamplingParams()
        questions = [questions] if isinstance(questions, str) else list(questions)
        is_one = isinstance(context, EncodedContext)
        contexts = [context] * len(questions) if is_one else list(context)
        is_one = isinstance(answer_prefix, str)
        prefixes = [answer_prefix] * len(questions) if is_one else list(answer_prefix)
        for given, *what in (
            (contexts, "context"),
            (prefixes, "answer prefix", "answer prefixes"),
        ):
            if len(given) != len(questions):
                problem = f"{counted(len(questions), 'question')} with {counted(len(given), *what)}"
                raise UserError(f"{problem}: use one, or one for each")
        token_ids = [self._question_tokens(*each) for each in zip(questions, prefixes, strict=True)]
        for each, tokens in zip(contexts, token_ids, strict=True):
            if each._leader is not self._leader:
                raise UserError("the context was encoded by another LLM: ask that one")
            whole = each.plan.context_len + len(tokens) + params.max_tokens
            self._check_length(whole, "context, question and answer")
        return self._pieces(contexts, questions, token_ids, params)

    def token_text(self, token: int) -> str:
        """One token's text; a control token's spelling. What is no whole character is replaced."""
        return self._tokenizer.token_text(token)

    @property
    def free_tokens(self) -> int | None:
        """What the KV cache has room for on the fullest rank; None: it takes what it needs."""
        self._tidy()
        return self._leader.scheduler.free_tokens

    def report(self, *, reset: bool = False) -> list[dict[str, Any]]:
        """Of every process: seconds that loading the model took, peak memory in bytes, pages in
        use, and what the phases `context`, `question` and `decode` took since the last `reset`."""
        self._tidy()
        return self._leader.execute(Report(reset))

    def close(self) -> None:
        """Gives the model's memory back, on all ranks. Nothing can be asked any more."""
        self._job.unload(self._number)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pieces(
        self,
        contexts: Sequence[EncodedContext],
        questions: Sequence[str],
        token_ids: Sequence[np.ndarray],
        params: SamplingParams,
    ) -> Iterator[TextPiece]:
        scheduler, streams = self._leader.scheduler, []
        pieces: deque[TextPiece] = deque()
        self._tidy()
        try:
            for index, (context, text, tokens) in enumerate(
                zip(contexts, questions, token_ids, strict=True)
            ):
                decoder = TextStream(self._tokenizer, params.stop)
                with interrupts.held():
                    question = scheduler.add_question(
                        context._context, tokens, params, self._end_tokens
                    )
                    answer = Answer(text, logprobs=None if params.logprobs is None else [])
                    streams.append(_Stream(question, index, answer, decoder, pieces))
                    self._streams[question] = streams[-1]
            while pieces or any(not stream.question.is_over for stream in streams):
                while not pieces:
                    self._advance()
                yield pieces.popleft()
        finally:
            self._ended.extend(stream.question for stream in streams)
        self._tidy()

    def _advance(self, on_chunk: OnChunk = lambda chunk, share: None) -> None:
        """One order of what is waited for."""
        was_order = self._step(on_chunk)
        assert was_order, "something is waited for, but nothing is left to do"

    def _step(self, on_chunk: OnChunk = lambda chunk, share: None) -> bool:
        """One order; whether there was one."""
        self._tidy()
        with interrupts.held():
            new = self._leader.step(on_chunk)
            for token in new or ():
                if self._streams[token.question].take(token, self._end_tokens):
                    self._leader.scheduler.finish(token.question)
        return new is not None

    def _tidy(self) -> None:
        """Gives back what nobody needs any more."""
        scheduler = self._leader.scheduler
        with interrupts.held():
            while self._ended:
                question = self._ended.popleft()
                scheduler.finish(question)
                del self._streams[question]
            while self._dropped:
                scheduler.release_context(self._dropped.popleft())
            self._leader.flush()

    def _question_tokens(self, text: str, answer_prefix: str = "") -> np.ndarray:
        if not isinstance(text, str) or not without_mark(text).strip():
            raise UserError("a question is empty: ask something")
        tokens = np.array(self._tokenizer.question_tokens(text, answer_prefix), np.int32)
        self.model_config.check_tokens(tokens)
        if not len(tokens):
            raise UserError("a question has no tokens for this model's tokenizer: ask otherwise")
        if len(tokens) > self.model_config.max_position:
            raise UserError(
                f"a question has {len(tokens)} tokens, the model allows "
                f"{self.model_config.max_position}: put long text into the context"
            )
        return tokens

    def _check_length(self, tokens: int, what: str) -> None:
        limit = self.model_config.max_position
        if tokens <= limit:
            return
        message = f"{what} have {tokens} tokens, the model was made for {limit}"
        if self._strict:
            raise UserError(f"{message}: use a shorter text, or leave --strict away")
        warnings.warn(f"{message}: answers may get worse", stacklevel=3)


def _open_blocks(
    execute: Callable[[Order], Any], path: Path, folder: Path, engine: ModelEngine, tp: int
) -> Store:
    """The blocks of `context_dir`, on all ranks."""
    blocks = str(folder.resolve() / "blocks")
    order = OpenStore(path.name, fingerprint(path), None, blocks, "the context folder")
    return open_store(execute, order, {"disk": _UNBOUNDED}, engine, tp)


@dataclass(eq=False)
class _Stream:
    """Turns a question's tokens into pieces of text, as they come."""

    question: Question
    index: int
    answer: Answer
    decoder: TextStream
    pieces: deque[TextPiece]

    def take(self, new: NewToken, end_tokens: frozenset[int]) -> bool:
        """Whether the answer ends with this token."""
        text, reason, params = "", new.finish_reason, self.question.params
        if new.token not in end_tokens or params.ignore_eos:
            self.answer.token_ids.append(new.token)
            if self.answer.logprobs is not None:
                self.answer.logprobs.append(new.logprobs)
            text = self.decoder.add(new.token)
            if self.decoder.stopped:
                reason = "stop"
        if reason:
            self.answer.finish_reason = reason
            text += self.decoder.finish()
        self.answer.text += text
        self.pieces.append(TextPiece(self.index, text, self.answer))
        return reason is not None
