"""Text to tokens and back, with the chat template divided between context and question."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from star_attention.cache import cache_folder
from star_attention.errors import UserError, refusing
from star_attention.models.checkpoint import is_engine_folder
from star_attention.models.kept_tokens import KeptTokens, Tokenized
from star_attention.models.plain_text import PlainText

Template = Literal["auto", "chat", "none"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
ROLES = ("system", "user", "assistant")

# What stands between context and question in the user's turn. Tokenizers that split before they
# merge never join a single line break with what follows it, nor read it differently at the end of
# a text: the tokens of both parts are those of the whole.
_BETWEEN = "\n"
_KEPT_FORMAT = 3  # of tokenizers out of GGUF files; the number grows when one is made otherwise
_LONG = 4096  # characters of a text whose tokens are kept


@dataclass(frozen=True)
class Message:
    """A turn of a conversation, its text in parts."""

    role: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """The tokens of a conversation, up to where the answer begins.

    Attributes:
        token_ids: int32 [n].
        starts: for each part of each message, the index of its first token; for an empty part, of
            the token that follows.
    """

    token_ids: np.ndarray
    starts: tuple[tuple[int, ...], ...]


class Tokenizer:
    """The tokenizer of a Hugging Face folder, a GGUF file, or a TensorRT engine's folder.

    With a chat template, context tokens + question tokens are the tokens of the template applied
    to one user turn, the context, a line break and the question, with the generation prompt behind
    it. White space around context and question is dropped. Without a template (base models), both
    are tokenised as they are, the context with the model's opening token in front.

    A byte order mark at the beginning of a text or part is not part of it.

    Only the template gives control tokens: a text that spells one has the tokens of its characters,
    unless `allow_special` says otherwise.

    Args:
        path: the folder or file.
        template: `chat`, `none`, or `auto`: `chat` where the model has a chat template.
        system: what the template's system message says, in front of the context.
        allow_special: texts may spell control tokens.

    Raises:
        UserError: there is no tokenizer, no chat template where one is asked for, or it does not
            allow a user's message, or one behind the system message.
    """

    def __init__(
        self,
        path: Path,
        template: Template = "auto",
        *,
        system: str | None = None,
        allow_special: bool = False,
    ) -> None:
        if template not in TEMPLATES:
            raise UserError(f"--template is {template!r}: use one of {', '.join(TEMPLATES)}")
        if system is not None and not system.strip():
            raise UserError("--system is empty: give it some text, or leave it away")
        self._path, self._system, self._allow_special = path, system, allow_special
        self._tokenizer = _load(path)
        has_template = bool(self._tokenizer.chat_template)
        if template == "chat" and not has_template:
            raise UserError(f"{path} has no chat template: use --template none")
        self._kept = KeptTokens()
        self.uses_chat = has_template and template in ("auto", "chat")
        if self.uses_chat:
            self._front, self._closing = self._around_user()
        elif system is not None:
            raise UserError("--system needs a chat template, which is not used here")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @functools.cached_property
    def vocab_size(self) -> int:
        """The tokenizer's tokens are below it."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def context_tokens(self, text: str) -> list[int]:
        """The tokens in front of the question."""
        text = without_mark(text)
        if self.uses_chat:
            return self._encode(self._opening + text.strip() + _BETWEEN)
        return self._opening_token + self._encode(text)

    def question_tokens(self, text: str, answer_prefix: str = "") -> list[int]:
        """The tokens behind the context, up to where the answer goes on behind its prefix."""
        text = without_mark(text)
        if not self.uses_chat:
            return self._encode(text + answer_prefix)
        # Behind a line break, so that a tokenizer that marks a text's beginning does not see one.
        text = _BETWEEN + text.strip() + self._plain.control(self._closing) + answer_prefix
        return self._encode(text)[self._between_size :]

    def text_tokens(self, text: str) -> np.ndarray:
        """The model's opening token and a text, without a template: int32 [n]."""
        opening = np.array(self._opening_token, np.int32)
        return np.concatenate([opening, self._tokenized(without_mark(text), ())[0]])

    def least_tokens(self, text: str) -> int:
        """A text has no fewer tokens, as is known without tokenising it."""
        return self._plain.least_tokens(without_mark(text))

    def chat(self, messages: Sequence[Message]) -> Chat:
        """The tokens of the chat template applied to a conversation.

        A message's content is its parts, joined by line breaks; white space around parts, and empty
        parts, are dropped. A user's message of two parts has the tokens of context and question.
        The tokens in front of a part do not depend on what follows it.

        Raises:
            UserError: the model has no chat template, or it does not allow these messages.
        """
        if not self.uses_chat:
            raise UserError(
                "the model has no chat template: use /v1/completions, or a model that has one"
            )
        messages = [replace(m, parts=tuple(map(without_mark, m.parts))) for m in messages]
        _check(messages)
        roles = [message.role for message in messages]
        piece, *behind = map(self._plain.control, self._around(roles))
        # Text that is tokenised together, cut behind line breaks, and where parts begin in it.
        pieces: list[tuple[str, list[int]]] = []
        begins: list[int] = []
        for message, closing in zip(messages, behind, strict=True):
            is_empty = True
            for part in map(str.strip, message.parts):
                if part and not is_empty:
                    pieces.append((piece + _BETWEEN, begins))
                    piece, begins = "", []
                begins.append(len(piece))
                piece += part
                is_empty = is_empty and not part
            piece += closing
        token_ids, starts = self._join([*pieces, (piece, begins)])
        rest = iter(starts)
        return Chat(
            token_ids, tuple(tuple(islice(rest, len(message.parts))) for message in messages)
        )

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def decoder(self) -> Callable[[int], str]:
        """Of a text's tokens, one after the other: what each adds to it, nothing while a character
        is incomplete. Together that is what `decode` says of all of them."""
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=True), self._tokenizer.backend_tokenizer
        return lambda token: stream.step(backend, token) or ""

    def token_text(self, token: int) -> str:
        """One token's text; a control token's spelling. What is no whole character is replaced."""
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return self._plain.token_bytes(token)

    def _around_user(self) -> tuple[list[str], str]:
        """What the template writes up to the user's text, cut where the system message stands, and
        what behind it."""
        roles = ["user"] if self._system is None else ["system", "user"]
        try:
            *front, closing = self._around(roles)
            return front, closing
        except UserError as error:
            advice = "use --template none"
            if self._system is not None:
                advice = "leave --system away"
            else:
                with contextlib.suppress(UserError):
                    self._around(["system", "user"])
                    advice = "give it a system message with --system"
            raise UserError(f"{self._path}: {error}: {advice}") from None

    @functools.cached_property
    def _opening(self) -> str:
        """What stands in front of the user's text, as `_encode` wants it."""
        return (self._system or "").strip().join(map(self._plain.control, self._front))

    def _around(self, roles: Sequence[str]) -> list[str]:
        """What the template writes before, between and behind messages of these roles.

        It sees marks in place of their texts.
        """
        marked = [
            {"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)
        ]
        with refusing("the model's chat template does not allow these messages"):  # a program
            text = self._tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=True
            )
        texts = re.split("\ue000([0-9]+)\ue001", text)
        found = [int(index) for index in texts[1::2]]
        if found != list(range(len(roles))):
            wrong = min(
                range(len(roles)), key=lambda n: (found.count(n) == 1, found[n : n + 1] == [n])
            )
            raise UserError(
                "the model's chat template leaves out, repeats or moves the text of message "
                f"{wrong + 1}, of the role {roles[wrong]}"
            )
        return texts[::2]

    def _join(self, pieces: Sequence[tuple[str, list[int]]]) -> tuple[np.ndarray, list[int]]:
        """The tokens of all pieces, int32 [n], and the index of the first token at each of their
        begins."""
        token_ids: list[np.ndarray] = []
        starts: list[int] = []
        count, front, skipped = 0, "", 0
        for piece, begins in pieces:
            begins = [len(front) + begin for begin in begins]
            encoded, firsts = self._tokenized(front + piece, begins)
            starts += [count + first - skipped for first in firsts]
            token_ids.append(encoded[skipped:])
            count += len(token_ids[-1])
            front, skipped = _BETWEEN, self._between_size
        return np.concatenate(token_ids), starts

    def _tokenized(self, text: str, begins: Sequence[int]) -> Tokenized:
        """A text's tokens, and the index of the first at or behind each of these characters."""

        def encode() -> Tokenized:
            return self._plain.tokenized(text, begins)

        return encode() if len(text) < _LONG else self._kept.get(text, begins, encode)

    @functools.cached_property
    def _plain(self) -> PlainText:
        return _load_plain(self._path, self._allow_special)

    @functools.cached_property
    def _opening_token(self) -> list[int]:
        with refusing(f"{self._path}: the tokenizer cannot read"):
            return self._tokenizer.backend_tokenizer.encode("").ids[:1]

    @functools.cached_property
    def _between_size(self) -> int:
        return len(self._encode(_BETWEEN))

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text).ids


def without_mark(text: str) -> str:
    """A text without the byte order mark that it may begin with."""
    return text.removeprefix("\ufeff")


class TextStream:
    """Turns tokens into text as they come, holding back what may still change: a character whose
    bytes are incomplete, or a beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decode = tokenizer.decoder()
        self._stop = stop
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        self._decoded += self._decode(token)
        # Of what was emitted nothing belongs to a stop string.
        ends = [self._decoded.find(stop, self._emitted) for stop in self._stop]
        ends = [end for end in ends if end >= 0]
        if ends:
            self._decoded = self._decoded[: min(ends)]
            self.stopped = True
            return self.finish()
        return self._emit(len(self._decoded) - self._held_back())

    def finish(self) -> str:
        """The rest, once no token follows."""
        return self._emit(len(self._decoded))

    def _held_back(self) -> int:
        pending = self._decoded[self._emitted :]
        lengths = [
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(pending) + 1))
            if pending.endswith(stop[:length])
        ]
        return max(lengths, default=0)

    def _emit(self, end: int) -> str:
        piece = self._decoded[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return piece


def save_tokenizer(path: Path, folder: Path) -> None:
    """Writes the tokenizer of `path` into `folder`. Raises UserError if there is none."""
    _load(path).save_pretrained(folder)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise UserError("the conversation is empty: send at least one message")
    for number, message in enumerate(messages, 1):
        if message.role not in ROLES:
            raise UserError(
                f"the role of message {number} is {message.role!r}: use one of {', '.join(ROLES)}"
            )
    last = next((message for message in reversed(messages) if message.role == "user"), None)
    if last and not (last.parts and last.parts[-1].strip()):
        raise UserError("the last message of the user is empty: ask something")


@functools.cache
def _load_plain(path: Path, allow_special: bool) -> PlainText:
    with refusing(f"{path}: the tokenizer cannot be loaded"):
        return PlainText(_load(path), allow_special)


@functools.cache
def _load(path: Path):
    # Tokenizing forks no process, and transformers' advice is not for the user.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with refusing(f"{path}: the tokenizer cannot be loaded"):
        if is_engine_folder(path):
            path = path / "tokenizer"
        return _load_gguf(path) if path.is_file() else _from_files(path)


def _from_files(folder: Path, **options: Any):
    """Without programs that come with the model, and without the network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True, **options
    )


def _load_gguf(path: Path):
    """Reading one out of a GGUF file takes seconds: it is kept in Hugging Face's format."""
    from transformers import __version__

    from star_attention.models.gguf_tokenizer import read_gguf_tokenizer

    state = path.stat()
    versions = f"transformers {__version__} {_KEPT_FORMAT}"
    source = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {versions}"
    key = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:16]
    # The folder may not be to be had, full, or damaged, or another process was first.
    with contextlib.suppress(Exception):
        kept = cache_folder() / "tokenizers" / f"{path.stem}-{key}"
        if kept.exists():
            return _from_files(kept)
    tokenizer = read_gguf_tokenizer(path, _from_files)
    with contextlib.suppress(Exception):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as unfinished:
            tokenizer.save_pretrained(Path(unfinished) / kept.name)
            os.rename(Path(unfinished) / kept.name, kept)
    return tokenizer
