"""Where the context of a prompt ends and its question begins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from star_attention.models.tokenizer import Message, Tokenizer
from star_attention.serve.api import ChatMessage, Part
from star_attention.serve.errors import ApiError

# Of a long question without a line break, so many tokens are asked.
_TAIL_TOKENS = 256
# Characters; a text has no fewer tokens than its length over this.
_LONGEST_TOKEN = 32


@dataclass(frozen=True)
class Prompt:
    """int32 [n]; the question begins at `border`, 1 <= border < n."""

    token_ids: np.ndarray
    border: int


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[ChatMessage], block_tokens: int) -> Prompt:
    """The question is the last part of the last user message, or what stands behind the last mark.
    One longer than a block is divided at a line break.

    Raises:
        UserError: the chat template refuses the conversation.
        ApiError: 400.
    """
    parts = [[part.text for part in message.content] or [""] for message in messages]
    roles = [_role(message) for message in messages]

    def tokens_of() -> tuple[np.ndarray, Sequence[Sequence[int]]]:
        chat = tokenizer.chat(
            [Message(role, tuple(p)) for role, p in zip(roles, parts, strict=True)]
        )
        return chat.token_ids, chat.starts

    marked = _behind_mark(messages)
    if marked is not None:
        tokens, starts = tokens_of()
        return _prompt(tokens, starts[marked[0]][marked[1]])
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=len(roles) - 1)
    *before, question = parts[asked]
    cuts = _cuts(question)
    # Tokenising as a whole what cannot but be too long would be for nothing.
    if not cuts or len(question) <= _LONGEST_TOKEN * block_tokens:
        cuts = [0, *cuts]
    for cut in cuts:
        parts[asked] = [*before, question[:cut], question[cut:]] if cut else [*before, question]
        tokens, starts = tokens_of()
        end = starts[asked + 1][0] if asked + 1 < len(starts) else len(tokens)
        if end - starts[asked][-1] <= block_tokens:
            return _prompt(tokens, starts[asked][-1])
    return _prompt(tokens, end - _TAIL_TOKENS)


def chat_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """As the tokenizer takes them."""
    return [
        Message(_role(message), tuple(part.text for part in message.content))
        for message in messages
    ]


def _role(message: ChatMessage) -> str:
    return "system" if message.role == "developer" else message.role


def _behind_mark(messages: Sequence[ChatMessage]) -> tuple[int, int] | None:
    """Message and part behind the last mark that has something behind it."""
    places = [(i, j) for i, m in enumerate(messages) for j in range(max(1, len(m.content)))]
    behind = None
    for (i, j), following in itertools.pairwise(places):
        if messages[i].content and messages[i].content[j].marked:
            behind = following
    return behind


def _cuts(text: str) -> list[int]:
    """Where a long question may be divided: behind its last blank line, and behind its last line
    break, such that neither part is blank."""
    text = text.rstrip()
    first = len(text) - len(text.lstrip())
    newline = text.rfind("\n", first)
    if newline < 0:
        return []
    blank, end = None, newline
    while blank is None:
        start = text.rfind("\n", first, end)
        if start < 0:
            break
        if not text[start:end].strip():
            blank = end + 1
        end = start
    return [newline + 1] if blank in (None, newline + 1) else [blank, newline + 1]


def text_prompt(tokenizer: Tokenizer, text: str, block_tokens: int) -> Prompt:
    """Of a plain text: one as long as a block at most is a question, a longer one is divided like a
    long question."""
    tokens = tokenizer.text_tokens(text)
    if len(tokens) <= block_tokens:
        return _prompt(tokens, 1)
    for cut in _cuts(text):
        length = _tokens_of_end(tokenizer, tokens, text[cut:])
        if length <= block_tokens:
            return _prompt(tokens, len(tokens) - length)
    return _prompt(tokens, len(tokens) - _TAIL_TOKENS)


def _tokens_of_end(tokenizer: Tokenizer, tokens: np.ndarray, end: str) -> int:
    """How many tokens at the end spell no more than `end`, at least one."""
    left, length = len(end.encode()), 0
    while length < len(tokens):
        left -= len(tokenizer.token_bytes(int(tokens[-1 - length])))
        if left < 0:
            break
        length += 1
    return max(1, length)


def token_prompt(tokenizer: Tokenizer, tokens: Sequence[int], block_tokens: int) -> Prompt:
    """Of tokens, where nobody knows lines."""
    size = tokenizer.vocab_size
    for token in tokens:
        if not 0 <= token < size:
            raise ApiError(
                400,
                f"token {str(token)[:20]} is not one of the model's: use 0 to {size - 1}",
                "prompt",
                "invalid_value",
            )
    return _prompt(tokens, 1 if len(tokens) <= block_tokens else len(tokens) - _TAIL_TOKENS)


def _prompt(tokens: Sequence[int] | np.ndarray, border: int) -> Prompt:
    if len(tokens) < 2:
        raise ApiError(
            400, f"the prompt has {len(tokens)} tokens: use at least 2", code="invalid_value"
        )
    return Prompt(np.asarray(tokens, np.int32), min(max(1, border), len(tokens) - 1))


def chat_context(
    tokenizer: Tokenizer, system: str | None, messages: Sequence[ChatMessage]
) -> np.ndarray:
    """The tokens of a named context, int32 [n]: everything in front of a question that is one more
    part of the last message, which is a user's.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    turns = [Message("system", (system,))] if system else []
    turns += chat_messages(messages)
    turns[-1] = Message("user", (*turns[-1].parts, "?"))
    chat = tokenizer.chat(turns)
    return chat.token_ids[: chat.starts[-1][-1]]


def chat_behind_context(
    tokenizer: Tokenizer, context: np.ndarray, messages: Sequence[ChatMessage], block_tokens: int
) -> Prompt:
    """A conversation whose first message, a user's, has a named context in front.

    Raises:
        UserError: the chat template refuses the conversation.
        ApiError: 400.
    """
    if messages[0].role != "user":
        raise ApiError(
            400,
            f"the first message is of the role {messages[0].role}: behind a context it is a user's",
            "messages",
            "invalid_value",
        )
    # What stands behind a part does not depend on it: a stand-in is tokenised in its place.
    first = messages[0].model_copy(update={"content": [Part("."), *messages[0].content]})
    rest = chat_prompt(tokenizer, [first, *messages[1:]], block_tokens)
    stand_in = tokenizer.chat([Message("user", (".", "?"))])
    start = stand_in.starts[0][1]
    if not np.array_equal(rest.token_ids[:start], stand_in.token_ids[:start]):
        raise ApiError(
            400,
            "behind a context, the first message is empty, or the model's chat template writes "
            "something else in front of it",
            "messages",
            "invalid_value",
        )
    return _behind(context, rest, start)


def text_behind_context(
    tokenizer: Tokenizer, context: np.ndarray, text: str, block_tokens: int
) -> Prompt:
    """A plain text behind a named context, of a model without chat template."""
    opening = tokenizer.text_tokens("")
    rest = text_prompt(tokenizer, text, block_tokens)
    return _behind(context, rest, len(opening))


def _behind(context: np.ndarray, rest: Prompt, start: int) -> Prompt:
    """`rest`, with `context` in place of the tokens before `start`."""
    token_ids = np.concatenate([context, rest.token_ids[start:]])
    return Prompt(token_ids, max(rest.border, start) - start + len(context))
