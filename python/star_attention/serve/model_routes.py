"""/v1/models."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from star_attention.serve.front import Front


def model_routes(front: Front) -> APIRouter:
    router = APIRouter(prefix="/v1/models")
    created = int(time.time())

    def as_json(name: str) -> dict[str, Any]:
        model = front.engine.model
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "star-attention",
            "root": front.options.model_names[0],
            "parent": None,
            "max_model_len": model.max_tokens if model else None,
        }

    @router.get("")
    async def list_all() -> Response:
        """The names under which the model is served."""
        data = [as_json(name) for name in front.options.model_names]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/{name:path}")
    async def get(name: str) -> Response:
        """One of them."""
        front.check_model(name)
        return JSONResponse(as_json(name))

    return router
