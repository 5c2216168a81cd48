"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from star_attention.serve.api import DetokenizeRequest, TokenizeRequest
from star_attention.serve.body import read_model
from star_attention.serve.documents import request_schema
from star_attention.serve.errors import ApiError
from star_attention.serve.exchange import Answered
from star_attention.serve.front import Front
from star_attention.serve.prompts import chat_messages


def token_routes(front: Front) -> APIRouter:
    router = APIRouter()
    tokenizer = front.tokenizer

    def tokens_of(asked: TokenizeRequest) -> dict[str, Any]:
        if asked.messages is not None:
            tokens = list(tokenizer.chat(chat_messages(asked.messages)).token_ids)
        else:
            tokens = list(tokenizer.text_tokens(asked.prompt))
            if asked.add_special_tokens is False:
                tokens = tokens[len(tokenizer.text_tokens("")) :]
        model = front.engine.model
        wants_texts = asked.return_token_strs
        return {
            "count": len(tokens),
            "max_model_len": model.max_tokens if model else None,
            "tokens": tokens,
            "token_strs": [tokenizer.token_text(token) for token in tokens]
            if wants_texts
            else None,
        }

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
        return Answered(front, lambda: front.in_thread(tokens_of, asked))

    @router.post("/detokenize", openapi_extra=request_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of tokens, without control tokens."""
        asked = await read_model(request, front, DetokenizeRequest)
        front.check_model(asked.model)
        return Answered(front, lambda: front.in_thread(text_of, asked))

    return router
