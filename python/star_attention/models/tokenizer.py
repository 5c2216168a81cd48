"""Text to tokens and back, with the chat template divided between context and question."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from star_attention.cache import cache_folder
from star_attention.errors import UserError
from star_attention.models.checkpoint import is_engine_folder

Template = Literal["auto", "chat", "none"]
TEMPLATES: tuple[Template, ...] = ("auto", "chat", "none")

# What stands between context and question in the user's turn. Tokenizers that split before they
# merge never join a single line break with what follows it, nor read it differently at the end of
# a text: the tokens of both parts are those of the whole.
_BETWEEN = "\n"
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of a Hugging Face folder, a GGUF file, or a TensorRT engine's folder.

    With a chat template, context tokens + question tokens are the tokens of the template applied
    to one user turn, the context, a line break and the question, with the generation prompt behind
    it. White space around context and question is dropped. Without a template (base models), both
    are tokenised as they are, the context with the model's opening token in front.

    Args:
        path: the folder or file.
        template: `chat`, `none`, or `auto`: `chat` where the model has a chat template.

    Raises:
        UserError: there is no tokenizer, or no chat template where one is asked for.
    """

    def __init__(self, path: Path, template: Template = "auto") -> None:
        if template not in TEMPLATES:
            raise UserError(f"--template is {template!r}: use one of {', '.join(TEMPLATES)}")
        self._tokenizer = _load(path)
        has_template = bool(self._tokenizer.chat_template)
        if template == "chat" and not has_template:
            raise UserError(f"{path} has no chat template: use --template none")
        self._opening, self._closing = "", ""
        self.uses_chat = has_template and template != "none"
        if self.uses_chat:
            parts = self.apply_template(_MARK).split(_MARK)
            if len(parts) != 2:
                raise UserError(
                    f"{path}: the chat template writes the user's text {len(parts) - 1} times, "
                    "not once: use --template none"
                )
            self._opening, self._closing = parts

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (eos,)

    def apply_template(self, content: str) -> str:
        """The chat template's text for one user turn, up to where the answer begins."""
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def user_turn(self, context: str, question: str) -> str:
        """The user's turn that context and question tokens spell."""
        return context.strip() + _BETWEEN + question.strip()

    def context_tokens(self, text: str) -> list[int]:
        """The tokens in front of the question."""
        if self.uses_chat:
            return self._encode(self._opening + text.strip() + _BETWEEN)
        return self._tokenizer("").input_ids[:1] + self._encode(text)

    def question_tokens(self, text: str) -> list[int]:
        """The tokens behind the context, up to where the answer begins."""
        if not self.uses_chat:
            return self._encode(text)
        # Behind a line break, so that a tokenizer that marks a text's beginning does not see one.
        encoded = self._tokenizer(
            _BETWEEN + text.strip() + self._closing,
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        return [
            token
            for token, (start, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            if start >= len(_BETWEEN)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


class TextStream:
    """Turns tokens into text as they come, holding back what may still change: a character whose
    bytes are incomplete, or a beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._begin = 0  # tokens from here are decoded again, up to _read they are in _decoded
        self._read = 0
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._begin : self._read])
        after = self._tokenizer.decode(self._tokens[self._begin :])
        if after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        self._decoded += after[len(before) :]
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


@functools.cache
def _load(path: Path):
    # Tokenizing forks no process, and transformers' advice is not for the user.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    try:
        if is_engine_folder(path):
            path = path / "tokenizer"
        return _load_gguf(path) if path.is_file() else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: the tokenizer cannot be loaded: {reason}") from None


def _load_gguf(path: Path):
    """Reading one out of a GGUF file takes seconds: it is kept in Hugging Face's format."""
    from transformers import AutoTokenizer, __version__

    state = path.stat()
    source = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} transformers {__version__}"
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    kept = cache_folder() / "tokenizers" / f"{path.stem}-{key}"
    if kept.exists():
        with contextlib.suppress(OSError, ValueError):  # damaged
            return AutoTokenizer.from_pretrained(kept)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with contextlib.suppress(OSError):  # the folder is not to be had, or another process was first
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as unfinished:
            tokenizer.save_pretrained(Path(unfinished) / kept.name)
            os.rename(Path(unfinished) / kept.name, kept)
    return tokenizer
