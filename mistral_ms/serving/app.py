"""The paths of the server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from mistral_ms.serving.errors import ApiError
from mistral_ms.serving.schema import ChatRequest, CompletionRequest
from mistral_ms.serving.service import Service, refusal

PAGE = Path(__file__).with_name("page.html")


def make_app(service: Service) -> FastAPI:
    """The application of a service, for any ASGI server.

    Args:
        service: answers what is asked.
    """
    # no pages of FastAPI: they load scripts from other sites
    app = FastAPI(title="mistral_ms", openapi_url=None, docs_url=None, redoc_url=None)
    page = PAGE.read_text(encoding="utf-8")
    for name, value in (("model", service.settings.model), ("no-chat", service.no_chat)):
        page = page.replace(f"{{{{{name}}}}}", _escaped(value))
    policy = _policy(page)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    @app.get("/v1/models", response_model=None)
    async def models(request: Request) -> Response:
        service.admit(request)
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(request: Request, name: str) -> Response:
        service.admit(request)
        if name != service.settings.model:
            raise ApiError(404, f"no model {name[:200]!r}", "model_not_found", "model")
        return JSONResponse(service.model_card())

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if service.healthy:
            return JSONResponse({"status": "ok"})
        status = "failed" if service.runner.failed else "shutting down"
        return JSONResponse({"status": status}, 503)

    @app.get("/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        service.check_host(request)
        kind = service.metrics.content_type
        return Response(service.metrics.text(), headers={"Content-Type": kind})

    @app.get("/", response_model=None)
    async def chat_page(request: Request) -> Response:
        service.check_host(request)
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return refusal(ApiError(error.status_code, str(error.detail), "unknown_url", None, headers))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return refusal(ApiError(500, "an error of the server: see its log", "internal_error"))

    return app


def _escaped(text: str) -> str:
    """Text as the content of an HTML element or attribute."""
    for character, name in (("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot")):
        text = text.replace(character, f"&{name};")
    return text


def _policy(page: str) -> str:
    """What the page may do: run its own script, use its own style, ask this server."""
    allowed = {}
    for element in ("script", "style"):
        (inner,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        allowed[element] = f"{element}-src 'sha256-{digest}'"
    own = "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {allowed['script']}; {allowed['style']}; {own}"
