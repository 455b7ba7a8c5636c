"""Around every route: sane headers, the API key, one error format, a request id, one log line, one count."""

import base64
import binascii
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.server.config import ServerConfig
from jaxpaged.server.errors import ApiError
from jaxpaged.server.exchange import ClientGoneError, JsonResponse
from jaxpaged.server.hosts import AllowedHosts

OPEN_PATHS = frozenset((b"/health", b"/health/live", b"/health/ready"))
"""What needs no key, compared with the path as it came, before anything is decoded or joined."""
PROBED_PATHS = OPEN_PATHS | {b"/metrics"}
"""Asked every few seconds by machines: logged only where the answer is unusual."""
LOG = "jaxpaged.log"
"""Key of the scope under which endpoints leave what the log line should say."""
CLIENT_CLOSED = 499
CLOSING = (400, 408, 413, 415, 431)
"""Errors after which some of the body may still be on its way: the connection is not used again."""
logger = logging.getLogger("jaxpaged.server")


class Gate:
    """ASGI middleware; `count(route, status)` is called for every answer."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, api_key: str | None, count: Callable[[str, int], None]
    ) -> None:
        self._app = app
        self._config = config
        self._key_digest = None if api_key is None else _digest(api_key.encode())
        self._count = count
        self._hosts = AllowedHosts(config.host, config.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        scope[LOG] = fields = {}
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request_id.encode())]
                if status in CLOSING:
                    more.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            try:
                self._check(scope, headers)
                await self._app(scope, receive, send_marked)
            except ApiError as error:
                fields["error"] = error.message
                await _answer(error)(scope, receive, send_marked)
        except ClientGoneError:
            status = CLIENT_CLOSED
        except Exception:
            logger.exception("request failed", extra={"fields": {"request_id": request_id, "path": _shown_path(scope)}})
            fields["error"] = "internal error"
            if status:
                raise  # in the middle of an answer: the connection is cut
            fault = ApiError(500, f"an internal error, logged under request id {request_id}", code="internal_error")
            await _answer(fault)(scope, receive, send_marked)
        finally:
            self._count(scope.get("jaxpaged.route", "other"), status)
            if self._config.log_requests and not (scope["raw_path"] in PROBED_PATHS and status in (200, 503)):
                self._log(scope, request_id, status, time.perf_counter() - started, fields)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if len(scope["headers"]) > self._config.max_headers:
            raise ApiError(
                431, f"{len(scope['headers'])} headers; at most {self._config.max_headers} are allowed (max_headers)",
                code="too_many_headers",
            )
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._config.max_header_bytes:  # the parser counts heads that come in several reads only
            raise ApiError(
                431, f"{size} bytes of headers; at most {self._config.max_header_bytes} are allowed (max_header_bytes)",
                code="headers_too_large",
            )
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise ApiError(400, "content-length and transfer-encoding exclude each other: send one", code="bad_headers")
        if scope["raw_path"] in OPEN_PATHS:
            return
        self._check_key(scope, headers)
        if not self._hosts.allow(value for name, value in scope["headers"] if name == b"host"):
            raise ApiError(
                403, "the Host header names no host of this server: use its address, or let the operator add the name "
                "with --allowed-hosts", code="host_not_allowed",
            )

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._key_digest is None:
            return
        key = _key_of(headers.get(b"authorization", b""))
        if key is None or not hmac.compare_digest(_digest(key), self._key_digest):
            # a browser that opens the page asks for the key as the password
            scheme = "Basic" if scope["raw_path"] == b"/" else "Bearer"
            raise ApiError(
                401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`", code="invalid_api_key",
                headers={"www-authenticate": f'{scheme} realm="jaxpaged"'},
            )

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float, fields: dict[str, Any]) -> None:
        client = scope.get("client")
        known = {
            "request_id": request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": _shown_path(scope),
            "status": status,
            "seconds": round(seconds, 6),
        }
        logger.info("request", extra={"fields": known | fields})


def _answer(error: ApiError) -> JsonResponse:
    return JsonResponse(error.body(), error.status, headers=error.headers)


def _digest(key: bytes) -> bytes:
    # of equal length, so that the comparison does not tell how long the key is
    return hashlib.sha256(key).digest()


def _key_of(authorization: bytes) -> bytes | None:
    """The key in `Bearer KEY`, or the password in `Basic ...`, which is what a browser can send."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None


def _request_id(given: bytes | None) -> str:
    """The client's id where it is one that can stand in a log, or a new one."""
    if given is not None and re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", given):
        return given.decode()
    return uuid.uuid4().hex


def _shown_path(scope: Scope) -> str:
    return scope["raw_path"][:200].decode("ascii", "backslashreplace")
