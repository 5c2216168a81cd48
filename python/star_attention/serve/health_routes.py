"""/health, /version and /metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from star_attention.serve.errors import RETRY_ENGINE
from star_attention.serve.front import Front


def health_routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """200: requests are answered; 503: why not."""
        status = "draining" if front.draining else front.engine.state
        body = {"status": status, "reason": front.engine.reason if status != "ready" else ""}
        if status == "ready":
            return JSONResponse(body)
        return JSONResponse(body, 503, {"Retry-After": str(RETRY_ENGINE)})

    @router.get("/version")
    async def get_version() -> Response:
        """Of the package."""
        return JSONResponse({"version": package_version()})

    @router.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(
            generate_latest(front.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    return router


def package_version() -> str:
    try:
        return version("star-attention-trt")
    except PackageNotFoundError:  # run from its sources
        return "unknown"
