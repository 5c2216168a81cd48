"""The Python API: encode a long text once, ask it many questions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from star_attention.config import MergePath, StarConfig
from star_attention.distributed import Communicator, default_communicator
from star_attention.distributed.base import agree, require_same
from star_attention.engines.loader import (
    EngineOptions,
    LoadFormat,
    division_of,
    load_engine,
    star_ranks,
)
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model
from star_attention.models.config import ModelConfig
from star_attention.models.tokenizer import TextStream, Tokenizer
from star_attention.runtime.runtime import EncodedContext, Runtime
from star_attention.runtime.sampling import SamplingParams


@dataclass
class Answer:
    """The answer to one question.

    Attributes:
        text: what the model wrote, without the end token or stop string (rank 0; empty elsewhere).
        token_ids: its tokens, the same on every rank.
        finish_reason: `stop` (end token or stop string) or `length` (max_tokens).
    """

    question: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"


@dataclass(frozen=True)
class TextPiece:
    """Text that an answer grew by; empty while a character or a stop string is undecided, and on
    ranks other than 0. `answer` is the whole so far."""

    index: int
    text: str
    answer: Answer


class LLM:
    """A model, ready for long contexts; under mpirun every rank makes the same calls.

    Example, alone or as `mpirun -n 4 python example.py`:

        from star_attention import LLM, SamplingParams, StarConfig

        llm = LLM("smollm2", StarConfig(block_size=1024))
        context = llm.encode(open("report.txt").read())
        answer = llm.ask(context, "Who wrote this report?", SamplingParams(max_tokens=32))
        print(answer.text)

    Args:
        model: a Hugging Face folder with safetensors, a GGUF file, a hub name, `smollm2`, or the
            folder of a TensorRT engine, which runs on the GPU in the engine's dtype.
        config: how contexts are divided, unless `encode` is told otherwise; what it leaves open is
            as a TensorRT engine was built for.
        dtype: what to compute in: `float32` (the CPU's default), `bfloat16` (CUDA's) or `float16`.
        device: `cpu` or `cuda` (kernels built, head_dim 64 or 128, pages of 64 or 128); ranks of a
            machine take its GPUs in turn.
        template: `chat`, `none` (base models), or `auto`: `chat` where the model has a template.
        load_format: `dummy`: random weights for the model's config, to try speed and memory.
        kv_cache_gib: memory of the KV cache on a GPU; by default 0.8 of what the weights leave.
        merge: how ranks on GPUs merge attention: over `peer` memory, `nccl`, or `auto`.
        tp: processes that share one model (tensor parallelism); a rank is that many of them.
        strict: refuse text beyond the model's maximum position, instead of a warning.
        comm: connects the ranks; by default mpirun's, or a single process.

    Raises:
        UserError: on every rank, if the model cannot be loaded on any.
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
        strict: bool = False,
        comm: Communicator | None = None,
    ) -> None:
        self.comm = comm or default_communicator()
        self._strict = strict
        options = EngineOptions(device, dtype, load_format, kv_cache_gib, merge, tp)
        path = self._on_rank_0(lambda: find_model(str(model), load_format != "dummy"))
        self.config = agree(self.comm, lambda: division_of(path, config or StarConfig(), options))
        require_same(
            self.comm,
            version=version("star-attention-trt"),
            model=str(model),
            template=template,
            **asdict(options),
            **asdict(self.config),
        )
        ranks = star_ranks(self.comm, tp)
        engine, self._tokenizer = agree(
            self.comm,
            lambda: (
                load_engine(path, ranks, self.config.tokens_per_block, options),
                Tokenizer(path, template) if ranks.rank == 0 else None,
            ),
        )
        eos = self._on_rank_0(lambda: self._tokenizer.eos_token_ids)
        self._eos = {*engine.config.eos_token_ids, *eos}
        self.runtime = Runtime(engine, ranks)

    @property
    def model_config(self) -> ModelConfig:
        return self.runtime.engine.config

    def encode(
        self,
        text: str,
        config: StarConfig | None = None,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> EncodedContext:
        """Phase 1: caches the KV of a text, which can then be asked many times.

        Args:
            text: the context; rank 0's is used.
            config: replaces the division given to `LLM` for this text, its page size excepted.
            on_progress: called with the share of this rank's work that is done.

        Raises:
            UserError: the text is empty, or a size is not right for it.
        """
        config = config or self.config
        config = replace(config, tokens_per_block=self.config.tokens_per_block)
        require_same(self.comm, **asdict(config))

        def tokens() -> np.ndarray:
            if not text.strip():
                raise UserError("the context is empty: give it some text")
            return np.array(self._tokenizer.context_tokens(text), np.int32)

        token_ids = self._on_rank_0(tokens)
        self._check_engine(len(token_ids), self.runtime.engine.max_input_len, "--max_input_len")
        self._check_length(len(token_ids), "context")
        return self.runtime.encode(token_ids, config, on_progress)

    @overload
    def ask(
        self, context: EncodedContext, questions: str, params: SamplingParams | None = None
    ) -> Answer: ...

    @overload
    def ask(
        self,
        context: EncodedContext | Sequence[EncodedContext],
        questions: Sequence[str],
        params: SamplingParams | None = None,
    ) -> list[Answer]: ...

    def ask(self, context, questions, params=None):
        """Phase 2: answers one question, or several together that do not see one another, over one
        context or each over its own.

        Raises:
            UserError: a question is empty, or longer than the model allows.
        """
        answers = {}
        for piece in self.stream(context, questions, params):
            answers[piece.index] = piece.answer
        if isinstance(questions, str):
            return answers[0]
        return [answers[index] for index in range(len(questions))]

    def stream(
        self,
        context: EncodedContext | Sequence[EncodedContext],
        questions: str | Sequence[str],
        params: SamplingParams | None = None,
    ) -> Iterator[TextPiece]:
        """`ask`, a token at a time. Under mpirun every rank iterates to the end."""
        params = params or SamplingParams()
        require_same(self.comm, **asdict(params))
        questions = [questions] if isinstance(questions, str) else list(questions)
        is_one = isinstance(context, EncodedContext)
        contexts = [context] * len(questions) if is_one else list(context)
        if len(contexts) != len(questions):
            problem = f"{len(questions)} questions over {len(contexts)} contexts"
            raise UserError(f"{problem}: use one context, or one for each")
        token_ids = self._on_rank_0(lambda: [self._question_tokens(text) for text in questions])
        pairs = zip(contexts, token_ids, strict=True)
        asked = max((text.plan.context_len + len(tokens) for text, tokens in pairs), default=0)
        self._check_engine(asked, self.runtime.engine.max_input_len, "--max_input_len")
        whole = asked + params.max_tokens
        self._check_engine(whole, self.runtime.engine.max_seq_len, "--max_seq_len")
        self._check_length(whole, "context, question and answer")
        answers = [Answer(question) for question in questions]
        streams = [TextStream(self._tokenizer, params.stop) for _ in questions]
        pieces: dict[int, str] = {}

        def ends(index: int, token: int) -> bool:
            if token in self._eos and not params.ignore_eos:
                return True
            pieces[index] = streams[index].add(token)
            return streams[index].stopped

        for new in self.runtime.generate(contexts, token_ids, params, ends):
            for index, token in new.tokens.items():
                answer, text = answers[index], pieces.pop(index, "")
                if token not in self._eos or params.ignore_eos:
                    answer.token_ids.append(token)
                if index in new.finished:
                    answer.finish_reason = new.finished[index]
                    text += streams[index].finish()
                answer.text += text
                yield TextPiece(index, text, answer)

    def _question_tokens(self, text: str) -> np.ndarray:
        if not text.strip():
            raise UserError("a question is empty: ask something")
        tokens = np.array(self._tokenizer.question_tokens(text), np.int32)
        if len(tokens) > self.model_config.max_position:
            raise UserError(
                f"a question has {len(tokens)} tokens, the model allows "
                f"{self.model_config.max_position}: put long text into the context"
            )
        return tokens

    def _check_engine(self, tokens: int, most: int | None, flag: str) -> None:
        if most is not None and tokens > most:
            raise UserError(
                f"this takes {tokens} tokens, the engine was built for {flag} {most}: "
                "use a shorter text, or build it for more"
            )

    def _check_length(self, tokens: int, what: str) -> None:
        limit = self.model_config.max_position
        if tokens <= limit:
            return
        message = f"{what} have {tokens} tokens, the model was made for {limit}"
        if self._strict:
            raise UserError(f"{message}: use a shorter text, or leave --strict away")
        if self.comm.rank == 0:
            warnings.warn(f"{message}: answers may get worse", stacklevel=3)

    def _on_rank_0(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on rank 0, on every rank; its UserError on every rank."""
        value = agree(self.comm, action if self.comm.rank == 0 else lambda: None)
        return self.comm.broadcast_object(value)
