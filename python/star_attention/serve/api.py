"""What clients may send, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from star_attention.runtime.sampling import SamplingParams
from star_attention.runtime.saved_contexts import CONTEXT_NAME
from star_attention.serve.errors import ApiError

MAX_MESSAGES = 2048
MAX_PARTS = 2048
MAX_ANSWERS = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_LOGPROBS = 20
# Below this temperature the likeliest token is taken: dividing by less overflows.
_GREEDY_BELOW = 1e-3

# Parameters that would change the answer and are not supported, and the values that do nothing.
_COMMON_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "logit_bias": (None, {}),
    "logits_processors": (None, []),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "echo": (None, False),
}
CHAT_UNSUPPORTED = {
    **_COMMON_UNSUPPORTED,
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}
COMPLETION_UNSUPPORTED = {
    **_COMMON_UNSUPPORTED,
    "suffix": (None, ""),
    "prompt_embeds": (None,),
}


def refuse_unsupported(body: object, unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ApiError 400."""
    if not isinstance(body, dict):
        return
    for name, neutral in unsupported.items():
        if name in body and body[name] not in neutral:
            raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")


class Strict(BaseModel):
    """Takes no text for a number; ignores what it does not know."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True)
class Part:
    """A text of a message; `marked` (cache_control): everything up to here is context."""

    text: str
    marked: bool = False


def _parts(content: object) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Part(content)]
    if not isinstance(content, list):
        raise ValueError("use a text or a list of parts")
    if len(content) > MAX_PARTS:
        raise ValueError(f"{len(content)} parts: use {MAX_PARTS} at most")
    return [_part(part) for part in content]


def _part(part: object) -> Part:
    if not isinstance(part, dict):
        raise ValueError('a part is not an object such as {"type": "text", "text": "..."}')
    kind, text, mark = part.get("type"), part.get("text"), part.get("cache_control")
    if kind != "text":
        named = repr(kind[:40]) if isinstance(kind, str) else "without a type"
        raise ValueError(f"a part is {named}: this model reads text only")
    if not isinstance(text, str):
        raise ValueError("a text part has no text")
    if mark is not None and not isinstance(mark, dict):
        raise ValueError('cache_control is not an object such as {"type": "ephemeral"}')
    return Part(text, mark is not None)


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Any],
        BeforeValidator(_parts, json_schema_input_type=str | list[dict[str, Any]] | None),
    ] = Field(default=None, validate_default=True)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class StreamOptions(Strict):
    """`include_progress` is ours: chunks that tell how far the context is read."""

    include_usage: bool | None = None
    include_progress: bool | None = None


_Penalty = Annotated[float, Field(ge=-2, le=2)]


class _AnswerRequest(Strict):
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]],
        BeforeValidator(
            lambda stop: [] if stop is None else [stop] if isinstance(stop, str) else stop,
            json_schema_input_type=str | list[str] | None,
        ),
        Field(max_length=MAX_STOPS),
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    context: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> _AnswerRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true only")
        return self

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def include_progress(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_progress)

    def sampling(self, max_tokens: int, seed: int, logprobs: int | None) -> SamplingParams:
        """`seed`: unless the request has its own."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=(seed if self.seed is None else self.seed) % 2**63,
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


class ChatRequest(_AnswerRequest):
    """POST /v1/chat/completions. `context` is ours: the name of a context that is read first."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true only")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _prompts(prompt: object) -> list[str] | list[list[int]]:
    """A text, several, a prompt's tokens, or several prompts' tokens: always several."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(each) is int for each in prompt):
            return [prompt]
        if all(isinstance(each, str) for each in prompt):
            return prompt
        if all(
            isinstance(each, list) and each and all(type(token) is int for token in each)
            for each in prompt
        ):
            return prompt
    raise ValueError("use a text, a list of texts, or token ids")


class CompletionRequest(_AnswerRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        list[Any],
        BeforeValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
        Field(max_length=MAX_PROMPTS),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.answers:
            raise ValueError("best_of other than n is not supported")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


def _context_name(name: str) -> str:
    if not re.fullmatch(CONTEXT_NAME, name):
        raise ValueError(
            "use letters, digits, '.', '_' and '-', 64 at most, of which the first is a letter or "
            "a digit"
        )
    return name


ContextName = Annotated[
    str,
    AfterValidator(_context_name),
    Field(json_schema_extra={"pattern": f"^{CONTEXT_NAME}$"}),
]
_Ttl = Annotated[float, Field(gt=0, le=10 * 365 * 86400)]


class ContextRequest(Strict):
    """POST /v1/contexts."""

    name: ContextName | None = None
    model: str | None = None
    text: str | None = None
    messages: Messages | None = None
    system: str | None = None
    ttl_seconds: _Ttl | None = None
    pinned: bool = False
    stream: bool = False


class ContextPatch(Strict):
    """PATCH /v1/contexts/{name}: what is left out stays."""

    ttl_seconds: _Ttl | None = None
    pinned: bool | None = None
