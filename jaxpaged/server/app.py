"""The routes, as one ASGI application."""

import importlib.metadata
import importlib.resources
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxpaged.server.async_engine import AsyncEngine, EngineState
from jaxpaged.server.chat import ChatJob
from jaxpaged.server.completions import CompletionJob
from jaxpaged.server.config import ServerConfig
from jaxpaged.server.errors import ApiError, invalid
from jaxpaged.server.exchange import EventStream, JsonResponse, read_json_bytes, while_connected
from jaxpaged.server.gate import LOG, Gate
from jaxpaged.server.metrics import Metrics
from jaxpaged.server.openapi import document_bytes
from jaxpaged.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, read_body
from jaxpaged.server.service import Service
from jaxpaged.server.tools import template_tools

Handler = Callable[[Service, Request], Awaitable[Response]]
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""The page may talk with this server, and with nobody else."""


def make_app(engine: AsyncEngine, config: ServerConfig, model_name: str, metrics: Metrics) -> ASGIApp:
    """The application over an engine that was or will be started in the same event loop."""
    metrics.watch(engine)
    return Gate(
        _Routes(Service(engine, config, model_name), metrics), config, config.read_api_key(), metrics.count_answer
    )


class _Routes:
    """Finds the handler by the path as it came."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._created = int(time.time())
        self._routes: Mapping[str, Mapping[str, Handler]] = {
            "/": {"GET": _page},
            "/health": {"GET": _ready},
            "/health/live": {"GET": _live},
            "/health/ready": {"GET": _ready},
            "/version": {"GET": _version},
            "/openapi.json": {"GET": _document},
            "/metrics": {"GET": lambda service, request: _metrics(metrics)},
            "/v1/models": {"GET": self._models},
            "/v1/completions": {"POST": _completions},
            "/v1/chat/completions": {"POST": _chat},
            "/tokenize": {"POST": _tokenize},
            "/detokenize": {"POST": _detokenize},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"].decode("ascii", "replace")
        handlers = self._routes.get(path)
        scope["jaxpaged.route"] = path if handlers is not None else "other"
        if handlers is None and path.startswith("/v1/models/"):
            scope["jaxpaged.route"] = "/v1/models/{model}"
            handlers = {"GET": self._model}
        if handlers is None:
            raise ApiError(404, f"there is no route {path[:200]}", code="not_found")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in handlers:
            allowed = ", ".join(handlers)
            raise ApiError(405, f"{path} takes {allowed}", code="method_not_allowed", headers={"allow": allowed})
        request = Request(scope, receive)
        response = await handlers[method](self._service, request)
        await response(scope, receive, send)

    async def _models(self, service: Service, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._card(service)]})

    async def _model(self, service: Service, request: Request) -> Response:
        service.check_model(request.scope["path"].removeprefix("/v1/models/"))
        return JsonResponse(self._card(service))

    def _card(self, service: Service) -> dict[str, Any]:
        return {
            "id": service.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "jaxpaged",
            "root": service.model_name,
            "parent": None,
            "max_model_len": service.max_model_len,
        }


# ---- generation


async def _completions(service: Service, request: Request) -> Response:
    body = read_body(CompletionBody, await read_json_bytes(request, service.config))
    return await _answer(service, request, CompletionJob.start(service, body), is_streamed=body.stream)


async def _chat(service: Service, request: Request) -> Response:
    body = read_body(ChatBody, await read_json_bytes(request, service.config))
    return await _answer(service, request, ChatJob.start(service, body), is_streamed=body.stream)


async def _answer(service: Service, request: Request, starting: Any, *, is_streamed: bool) -> Response:
    """Start a job; its requests end when the answer has, or when the client leaves."""
    if is_streamed:
        job = await while_connected(request.receive, starting)
        request.scope[LOG]["engine_ids"] = list(job.reply.request_ids[:4])
        return EventStream(job.chunks(), on_end=lambda: service.engine.abort(job.reply))
    return JsonResponse(await while_connected(request.receive, _whole(service, starting, request)))


async def _whole(service: Service, starting: Any, request: Request) -> dict[str, Any]:
    job = await starting
    try:
        answer = await job.whole()
        request.scope[LOG] |= _fields(job, answer)
        return answer
    finally:
        service.engine.abort(job.reply)


def _fields(job: Any, answer: Mapping[str, Any]) -> dict[str, Any]:
    usage = answer["usage"]
    return {
        "engine_ids": list(job.reply.request_ids[:4]),
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "finish_reasons": sorted({choice["finish_reason"] for choice in answer["choices"]}),
    }


# ---- tokens


async def _tokenize(service: Service, request: Request) -> Response:
    body = read_body(TokenizeBody, await read_json_bytes(request, service.config))
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    if body.messages is not None:
        variables = body.chat_template_kwargs or {}
        prompt = await service.chat_prompt(
            body.messages, add_generation_prompt=body.add_generation_prompt, variables=variables,
            tools=template_tools(body.tools or ()) or None,
        )
        ids = prompt.token_ids
    else:
        ids = await service.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": list(ids)}
    if body.return_token_strs:
        answer["token_strs"] = [service.texts[token_id] for token_id in ids]
    return JsonResponse(answer)


async def _detokenize(service: Service, request: Request) -> Response:
    body = read_body(DetokenizeBody, await read_json_bytes(request, service.config))
    service.check_model(body.model)
    vocab_size = service.engine.llm.engine.model_config.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise invalid("tokens", f"tokens: an id is not from 0 to {vocab_size - 1}")
    tokenizer = service.tokenizer
    return JsonResponse({"prompt": await service.in_thread(lambda: tokenizer.decode(body.tokens))})


# ---- about the server


async def _live(service: Service, request: Request) -> Response:
    return _health(service.engine, is_well=service.engine.state is not EngineState.DEAD)


async def _ready(service: Service, request: Request) -> Response:
    return _health(service.engine, is_well=service.engine.state is EngineState.READY)


def _health(engine: AsyncEngine, *, is_well: bool) -> Response:
    if engine.state is not EngineState.DEAD and engine.hang is not None:
        return JsonResponse({"state": "hung", "reason": engine.hang}, 503)
    return JsonResponse({"state": engine.state.value}, 200 if is_well else 503)


async def _version(service: Service, request: Request) -> Response:
    return JsonResponse({"version": importlib.metadata.version("jaxpaged")})


async def _document(service: Service, request: Request) -> Response:
    return Response(document_bytes(), media_type="application/json")


async def _metrics(metrics: Metrics) -> Response:
    text, kind = metrics.render()
    return Response(text, headers={"content-type": kind})


async def _page(service: Service, request: Request) -> Response:
    page = importlib.resources.files("jaxpaged.server").joinpath("page.html").read_bytes()
    headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Response(page, media_type="text/html", headers=headers)
