"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} and a status."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

_PARAM_NAMES = frozenset(
    field.name for kind in (SamplingParams, BeamSearchParams) for field in dataclasses.fields(kind)
) | {"priority", "cache_salt", "messages", "tools"}
FORM = "structured_outputs"
"""What the engine calls the form of an output."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(param: str, message: str) -> ApiError:
    """400 for a value that the server itself refuses."""
    return ApiError(400, message, param=param, code="invalid_value")


def refusal(error: ValueError, param: str | None = None) -> ApiError:
    """400 for a ValueError of the engine's door, with the parameter its message begins with.

    A request that is longer than the model or the pool gets OpenAI's code for that.
    """
    message = str(error)
    first = re.match(r"\w+", message)
    if param is None and first is not None and first.group() in _PARAM_NAMES:
        param = first.group()
    is_too_long = "max_model_len" in message or "the request can grow to" in message
    return ApiError(400, message, param=param, code="context_length_exceeded" if is_too_long else "invalid_value")


def about_form(error: ApiError, param: str) -> ApiError:
    """What the engine says about the form of an output, under the name that the client gave it by."""
    if error.param != FORM or param == FORM:
        return error
    return ApiError(
        error.status, error.message.replace(FORM, param, 1), code=error.code, param=param, headers=error.headers
    )


def unavailable(message: str, code: str, retry_after_s: int | None = 5) -> ApiError:
    """503; clients and balancers try again, elsewhere or after the time given."""
    headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
    return ApiError(503, message, code=code, headers=headers)
