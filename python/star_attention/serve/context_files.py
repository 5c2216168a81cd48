"""The text of a named context, from what a client sent: JSON or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from star_attention.serve.api import ChatMessage, ContextRequest, Part
from star_attention.serve.body import read_form
from star_attention.serve.errors import ApiError, validation_error
from star_attention.serve.front import Front
from star_attention.serve.prompts import chat_context

MAX_FILES = 1000
_MAX_FIELDS = 16
_LONGEST_NAME = 255


@dataclass(frozen=True)
class ContextText:
    """int32 [n] tokens, bytes of text, and the files it is from."""

    token_ids: np.ndarray
    bytes: int
    files: list[dict[str, Any]]


async def read_context_form(
    request: Request, front: Front
) -> tuple[ContextRequest, list[dict[str, Any]]]:
    """Files and fields of a multipart body; the files' texts become the request's text.

    Raises:
        ApiError
    """
    async with read_form(request, front, MAX_FILES, _MAX_FIELDS) as form:
        names, contents = [], []
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                if key not in ("files", "file"):
                    raise ApiError(400, f"a file is called {key[:40]!r}: use files", "files")
                names.append(_file_name(value.filename))
                contents.append(await value.read())
        return await front.in_thread(_form_request, form, names, contents)


def _form_request(
    form: FormData, names: Sequence[str], contents: Sequence[bytes]
) -> tuple[ContextRequest, list[dict[str, Any]]]:
    fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
    if "messages" in fields:
        raise ApiError(400, "messages is for JSON bodies: use text or files", "messages")
    if contents and "text" in fields:
        raise ApiError(400, "give text or files, one of them", "text")
    files = [
        {"name": name, "bytes": len(content)} for name, content in zip(names, contents, strict=True)
    ]
    if contents:
        texts = map(_file_text, names, contents)
        fields["text"] = "\n".join(texts)
    try:
        return ContextRequest.model_validate_strings(fields), files
    except ValidationError as error:
        raise validation_error(error) from None


def _file_name(name: str | None) -> str:
    """Its last part, for display only."""
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, last))[:_LONGEST_NAME] or "file"


def _file_text(name: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ApiError(
            400, f"the file {name} is not UTF-8 text: use a text file", "files"
        ) from None
    if "\0" in text:
        raise ApiError(400, f"the file {name} is binary: use a text file", "files")
    if not text.strip():
        raise ApiError(400, f"the file {name} is empty: give it some text", "files")
    return text


def context_text(front: Front, asked: ContextRequest, files: list[dict[str, Any]]) -> ContextText:
    """Tokenises, in a thread.

    Raises:
        ApiError: 400.
        UserError: the chat template refuses the messages.
    """
    if (asked.text is None) == (asked.messages is None):
        raise ApiError(400, "give text, messages or files, one of them", "text", "invalid_value")
    messages = asked.messages or [
        ChatMessage.model_construct(role="user", content=[Part(asked.text)])
    ]
    if messages[-1].role != "user":
        raise ApiError(400, "the last message is not a user's", "messages", "invalid_value")
    texts = [part.text for message in messages for part in message.content]
    if not any(text.strip() for text in texts):
        raise ApiError(400, "the context is empty: give it some text", "text", "invalid_value")
    size = sum(len(text.encode()) for text in texts)
    is_stripped = front.tokenizer.uses_chat
    front.check_text(*(map(str.strip, texts) if is_stripped else texts), is_context=True)
    if front.tokenizer.uses_chat:
        token_ids = chat_context(front.tokenizer, asked.system, messages)
    elif asked.messages is not None or asked.system:
        raise ApiError(400, "the model has no chat template: use text", "text", "invalid_value")
    else:
        token_ids = front.tokenizer.text_tokens(asked.text)
    front.check_context_length(len(token_ids))
    front.answer_tokens(len(token_ids) + 1, None)
    return ContextText(token_ids, size, files)
