"""/openapi.json: what the routes take and give, made from the models that check the bodies."""

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jaxpaged.server.exchange import to_json
from jaxpaged.server.protocol import NO_EFFECT, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, WireBody

ERRORS = {
    "400": "What was asked for cannot be had; the message says why, and `param` by which name.",
    "401": "The API key is missing or wrong.",
    "403": "The Host header names no host of this server.",
    "404": "There is no such model or route.",
    "405": "The route takes another method.",
    "408": "The body did not come in time.",
    "409": "The request_id is in use.",
    "413": "The body is too large.",
    "415": "The body is no plain JSON.",
    "429": "The server is full; Retry-After says when to try again.",
    "431": "The headers are too large or too many.",
    "500": "The request failed within the engine.",
    "503": "The model is not ready, or the server shuts down.",
    "504": "The request took too long.",
}
POST_ERRORS = tuple(ERRORS)
GET_ERRORS = ("401", "403", "405", "431", "503")
BODIES: Mapping[str, tuple[type[WireBody], str]] = {
    "/v1/completions": (CompletionBody, "Completion"),
    "/v1/chat/completions": (ChatBody, "ChatCompletion"),
    "/tokenize": (TokenizeBody, "Tokens"),
    "/detokenize": (DetokenizeBody, "Text"),
}


def _object(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_REASON = {"enum": ["stop", "length", "tool_calls"]}
_USAGE = _object(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT))
_CALL = _object({
    "id": _TEXT, "type": {"const": "function"}, "function": _object({"name": _TEXT, "arguments": _TEXT}),
})  # fmt: skip
_MESSAGE = _object({"role": {"const": "assistant"}, "content": _TEXT_OR_NULL}, tool_calls=_list(_CALL))
_STATE = _object({"state": _TEXT})


def _answer(kind: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    head = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT}
    choices = _list(_object({"index": _COUNT, "finish_reason": _REASON, **choice}))
    return _object({**head, "choices": choices, "usage": _USAGE})


ANSWERS: Mapping[str, Any] = {
    "Error": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL})}
    ),
    "Completion": _answer("text_completion", {"text": _TEXT}),
    "ChatCompletion": _answer("chat.completion", {"message": _MESSAGE}),
    "Tokens": _object({"count": _COUNT, "max_model_len": _COUNT, "tokens": _list(_COUNT)}, token_strs=_list(_TEXT)),
    "Text": _object({"prompt": _TEXT}),
    "Model": _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT}),
    "Models": _object({"object": {"const": "list"}, "data": _list({"$ref": "#/components/schemas/Model"})}),
    "State": _STATE,
    "Version": _object({"version": _TEXT}),
}


def make_document() -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    bodies: list[type[BaseModel]] = [body for body, _ in BODIES.values()]
    _, made = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    schemas = made["$defs"]
    for body in (CompletionBody, ChatBody):
        # what OpenAI keeps for its own use may come, too
        schemas[body.__name__]["properties"] |= {name: {} for name in NO_EFFECT}
    paths: dict[str, Any] = {path: {"post": _post(body, answer)} for path, (body, answer) in BODIES.items()}
    paths |= {
        "/v1/models": {"get": _get("The served model, in a list of one.", "Models")},
        "/v1/models/{model}": {
            "get": _get("The served model.", "Model", errors=(*GET_ERRORS, "404"))
            | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": _TEXT}]}
        },
        "/version": {"get": _get("The version of jaxpaged.", "Version")},
        "/health": {"get": _health("Whether requests are taken.")},
        "/health/ready": {"get": _health("The same.")},
        "/health/live": {"get": _health("Whether the engine lives.")},
        "/metrics": {"get": _other("Counters for Prometheus.", "text/plain")},
        "/openapi.json": {"get": _other("This document.", "application/json")},
        "/": {"get": _other("A page to chat and watch the engine.", "text/html")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxpaged", "version": importlib.metadata.version("jaxpaged")},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # a server without a key takes any
        "security": [{"key": []}, {}],
    }


@functools.cache
def document_bytes() -> bytes:
    """The same as JSON, made once: it takes milliseconds, in which no other request is served."""
    return to_json(make_document())


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    return {status: {"description": ERRORS[status], "content": _content("Error")} for status in statuses}


def _post(body: type[WireBody], answer: str) -> dict[str, Any]:
    content = _content(answer)
    description = "The answer."
    if "stream" in body.model_fields:
        content["text/event-stream"] = {}
        description = "The answer; with stream=true in events, of which the last is [DONE]."
    return {
        "summary": (body.__doc__ or "").partition(": ")[2] or description,
        "requestBody": {"required": True, "content": _content(body.__name__)},
        "responses": {"200": {"description": description, "content": content}, **_errors(POST_ERRORS)},
    }


def _get(summary: str, answer: str, errors: tuple[str, ...] = GET_ERRORS) -> dict[str, Any]:
    ok = {"description": summary, "content": _content(answer)}
    return {"summary": summary, "responses": {"200": ok, **_errors(errors)}}


def _health(summary: str) -> dict[str, Any]:
    states = {
        status: {"description": description, "content": _content("State")}
        for status, description in (("200", "Yes."), ("503", "No."))
    }
    return {"summary": summary, "security": [{}], "responses": {**states, **_errors(("405", "431"))}}


def _other(summary: str, kind: str) -> dict[str, Any]:
    ok = {"description": summary, "content": {kind: {"schema": {}}}}
    return {"summary": summary, "responses": {"200": ok, **_errors(GET_ERRORS)}}
