"""Text to tokens where only the chat template spells control tokens, whatever the text says."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from star_attention.errors import UserError, refusing
from star_attention.models.apart import encode_apart, first_tokens
from star_attention.models.kept_tokens import Tokenized

_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = (byte for byte in range(0x100) if byte not in _VISIBLE)
# Byte-level BPE writes each byte as one visible character.
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + index): byte for index, byte in enumerate(_HIDDEN)
}
_INNER = range(0x80, 0xC0)  # bytes of a character in UTF-8 behind its first
_VALID = {*range(0xC0), *range(0xC2, 0xF5)}  # bytes of UTF-8
# Unicode decomposes no character into more: NFC makes no fewer of four.
_COMPOSED = 4
_SPLITS = ("ByteLevel", "Split", "Digits", "Punctuation")  # that keep what they split
_HUGE = 1 << 20  # characters of a text that is tokenised in a process of its own


class PlainText:
    """A copy of a tokenizer that knows its control tokens only by secret spellings.

    Control tokens are the special ones, and added ones that the chat template writes. The copy
    differs in nothing else, so text has the tokens that it always had, unless it spells a control
    token: then it has those of its characters.

    Args:
        allow_special: texts may spell control tokens; nothing is hidden then.
    """

    def __init__(self, tokenizer: Any, allow_special: bool = False) -> None:
        from tokenizers import Tokenizer as Backend

        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("there is no tokenizer.json, nor one that can be made a fast one")
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        model = state["model"]
        self._is_byte_level = '"ByteLevel"' in json.dumps(state["decoder"])
        self._bytes = {}
        if model.get("byte_fallback"):
            self._bytes = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(0x100)}
        # Some trainers list the bytes of a byte fallback as special tokens.
        added = [token for token in state["added_tokens"] if token["content"] not in self._bytes]
        self._added = {token["id"]: token["content"] for token in added}
        written = "" if allow_special else _written(tokenizer)
        controls = {
            token["content"]: token["id"]
            for token in added
            if not allow_special
            and (
                token["special"]
                or token["content"] in tokenizer.all_special_tokens
                or (token["content"].strip() and token["content"] in written)
            )
        }
        secret = secrets.token_hex(16)
        self._secrets = {name: f"{secret}{index:06}" for index, name in enumerate(controls)}
        longest_first = sorted(map(re.escape, controls), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")

        for token in added:
            token["content"] = self._secret(token["content"])
        self._hide(model)
        state |= {"added_tokens": added, "post_processor": None, "truncation": None}
        state["padding"] = None
        self._state = json.dumps(state)
        self._backend = Backend.from_str(self._state)
        # A byte-level tokenizer drops bytes that it has no token for.
        self._lost = set()
        if self._is_byte_level:
            self._lost = {byte for each, byte in _BYTE_OF.items() if each not in model["vocab"]}
        self._longest = self._longest_token(state)
        self._composes = any(
            step["type"] == "NFC" for step in _steps(state["normalizer"], "normalizers")
        )
        for name, token_id in controls.items():
            assert self._backend.token_to_id(self._secret(name)) == token_id, name

    def control(self, text: str) -> str:
        """The chat template's text as `encode` wants it: its control tokens spelled secretly."""
        return self._control.sub(lambda match: self._secrets[match[0]], text)

    def encode(self, text: str) -> Any:
        """The `tokenizers.Encoding` of a text, without opening or closing tokens."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _not_unicode() from None
        with refusing("the tokenizer cannot read the text"):
            # As a batch: other threads run meanwhile.
            return self._backend.encode_batch([text], add_special_tokens=False)[0]

    def tokenized(self, text: str, begins: Sequence[int]) -> Tokenized:
        """A text's tokens, and the index of the first at or behind each of these characters."""
        if len(text) >= _HUGE:
            try:
                return encode_apart(self._state, text, begins)
            except UnicodeEncodeError:
                raise _not_unicode() from None
        encoded = self.encode(text)
        return np.array(encoded.ids, np.int32), first_tokens(encoded, begins, len(text))

    def least_tokens(self, text: str) -> int:
        """A text has no fewer tokens; 0 where that is not known. Takes a hundredth of the time that
        tokenising does."""
        if self._longest is None:
            return 0
        characters = len(text)
        if self._is_byte_level:
            begins = text.encode(errors="ignore").translate(None, bytes({*_INNER, *self._lost}))
            characters = len(begins)
        composed = _COMPOSED if self._composes and not text.isascii() else 1
        return -(-characters // (self._longest * composed))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for one that the tokenizer does not know."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token) or ""
        if piece in self._bytes:
            return self._bytes[piece]
        if not self._is_byte_level:
            return piece.replace("\u2581", " ").encode()
        if all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        return piece.encode()

    def _longest_token(self, state: Mapping[str, Any]) -> int | None:
        """Characters that begin in a token at most; None: the tokenizer may drop some."""
        model, hidden = state["model"], set(self._secrets.values())
        normalizers = _steps(state["normalizer"], "normalizers")
        splits = _steps(state["pre_tokenizer"], "pretokenizers")
        added = [token for token in state["added_tokens"] if token["content"] not in hidden]
        keep_all = _SPLITS if self._is_byte_level else (*_SPLITS, "Metaspace")
        if self._is_byte_level:
            has_bytes = any(step["type"] == "ByteLevel" for step in splits)
            if normalizers:  # what becomes of a character may be lost
                has_bytes &= not self._lost & _VALID
        else:
            has_bytes = bool(self._bytes) and self._bytes.keys() <= model["vocab"].keys()
        if not (
            model["type"] == "BPE"
            and has_bytes
            and all(map(_keeps_characters, normalizers))
            and all(step["type"] in keep_all for step in splits)
            and all(step.get("behavior") != "Removed" for step in splits)
            and not any(token["lstrip"] or token["rstrip"] for token in added)
        ):
            return None
        longest = max(map(self._characters, model["vocab"].keys() - hidden))
        return max(longest, *(len(token["content"]) for token in added), 1)

    def _characters(self, piece: str) -> int:
        """Characters that begin in a piece of the vocabulary."""
        if piece in self._bytes:
            return 1
        if self._is_byte_level and all(character in _BYTE_OF for character in piece):
            return sum(_BYTE_OF[character] not in _INNER for character in piece)
        return len(piece)

    def _secret(self, name: str) -> str:
        return self._secrets.get(name, name)

    def _hide(self, model: dict[str, Any]) -> None:
        """Renames control tokens in the model's vocabulary, so that no merge leads to them."""
        vocab = model["vocab"]
        if isinstance(vocab, list):
            model["vocab"] = [[self._secret(piece), score] for piece, score in vocab]
        elif not self._secrets.keys().isdisjoint(vocab):
            model["vocab"] = {self._secret(piece): token for piece, token in vocab.items()}
            if "merges" in model:
                model["merges"] = [
                    (left, right)
                    for left, right in model["merges"]
                    if self._secrets.keys().isdisjoint((left, right, left + right))
                ]
        if model.get("unk_token"):
            model["unk_token"] = self._secret(model["unk_token"])


def _written(tokenizer: Any) -> str:
    """The chat template's source, and what it writes around messages."""
    template = tokenizer.chat_template or ""
    source = template if isinstance(template, str) else "".join(template.values())
    for roles in (("system", "user", "assistant"), ("user", "assistant"), ("user",)):
        with contextlib.suppress(Exception):  # of any kind: it is a program
            messages = [{"role": role, "content": "."} for role in roles]
            source += tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
    return source


def _steps(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, which may be a sequence of some."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for each in step[name] for inner in _steps(each, name)]


def _keeps_characters(normalizer: Mapping[str, Any]) -> bool:
    """Whether it makes no fewer characters of a text, but for NFC."""
    if normalizer["type"] == "Replace":
        replaced = normalizer["pattern"].get("String")
        return replaced is not None and len(replaced) <= len(normalizer["content"])
    return normalizer["type"] in ("NFC", "Prepend")


def _not_unicode() -> UserError:
    return UserError("the text is not Unicode: it has half of a surrogate pair")
