"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from star_attention.serve.api import DetokenizeRequest, TokenizeRequest
from star_attention.serve.body import read_model
from star_attention.serve.documents import request_schema
from star_attention.serve.errors import ApiError
from star_attention.serve.exchange import Answered
from star_attention.serve.front import Front
from star_attention.serve.prompts import chat_messages

_PART = 1 << 16


def token_routes(front: Front) -> APIRouter:
    router = APIRouter()
    tokenizer = front.tokenizer

    def tokens_of(asked: TokenizeRequest) -> bytes:
        if asked.messages is not None:
            tokens = tokenizer.chat(chat_messages(asked.messages)).token_ids
        else:
            tokens = tokenizer.text_tokens(asked.prompt)
            if asked.add_special_tokens is False:
                tokens = tokens[len(tokenizer.text_tokens("")) :]
        model = front.engine.model
        wants_texts = asked.return_token_strs
        ids = _json_list(part.tolist() for part in _parts(tokens))
        texts = b"null"
        if wants_texts:
            parts = _parts(tokens)
            texts = _json_list([tokenizer.token_text(each) for each in part] for part in parts)
        said = {"count": len(tokens), "max_model_len": model.max_tokens if model else None}
        return b'%s, "tokens": %s, "token_strs": %s}' % (json.dumps(said).encode()[:-1], ids, texts)

    def text_of(asked: DetokenizeRequest) -> dict[str, Any]:
        for token in asked.tokens:
            if token >= tokenizer.vocab_size:
                raise ApiError(
                    400,
                    f"token {token} is not one of the model's: use 0 to {tokenizer.vocab_size - 1}",
                    "tokens",
                    "invalid_value",
                )
        return {"prompt": tokenizer.decode(asked.tokens)}

    @router.post("/tokenize", openapi_extra=request_schema(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text or a conversation."""
        asked = await read_model(request, front, TokenizeRequest)
        front.check_model(asked.model)
        texts = [part.text for message in asked.messages or () for part in message.content]
        texts.append(asked.prompt or "")
        return Answered(front, lambda: front.tokenise(texts, tokens_of, asked))

    @router.post("/detokenize", openapi_extra=request_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of tokens, without control tokens."""
        asked = await read_model(request, front, DetokenizeRequest)
        front.check_model(asked.model)
        return Answered(front, lambda: front.in_thread(text_of, asked))

    return router


def _parts(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Of millions of tokens, so that no step holds the event loop up."""
    return (tokens[start : start + _PART] for start in range(0, len(tokens), _PART))


def _json_list(parts: Iterable[Sequence[Any]]) -> bytes:
    return b"[" + b", ".join(json.dumps(part).encode()[1:-1] for part in parts) + b"]"
