"""What a body asks of the engine: sampling or a beam search, and the form of the output."""

from typing import Any

from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.server.errors import ApiError, invalid, refusal
from jaxpaged.server.protocol import ResponseFormat, Sampling
from jaxpaged.structured_outputs import StructuredOutputsParams

SAMPLING_NAMES = tuple(name for name in Sampling.model_fields if name in SamplingParams.__dataclass_fields__)
BEAM_NAMES = tuple(name for name in Sampling.model_fields if name in BeamSearchParams.__dataclass_fields__)
"""Names of a body that are fields of the engine's parameters; `further` may replace their values."""
SPACE = " ?"
"""White space in JSON that the server gives its form: a small model, left free, writes lines and lines of it."""
BEAMS_ALONE = {"beam_width": None, "length_penalty": 1.0, "early_stopping": False}
"""What only a beam search has, and the values that ask for nothing."""


def form_of(body: Sampling) -> StructuredOutputsParams | None:
    """The form that the output must have, or None. ApiError 400 naming what is wrong with it."""
    asked = {name: value for name, value in (body.structured_outputs or {}).items() if value is not None}
    if body.response_format is None or body.response_format.type == "text":
        return _form("structured_outputs", asked) if body.structured_outputs is not None else None
    if body.structured_outputs is not None:
        raise invalid(
            "response_format", "response_format and structured_outputs both give the form of the output: give one"
        )
    return _form("response_format", _fields_of(body.response_format) | {"whitespace_pattern": SPACE})


def form_param(body: Sampling) -> str:
    """The body's name for what gives the output its form."""
    return "structured_outputs" if body.response_format is None else "response_format"


def _fields_of(asked: ResponseFormat) -> dict[str, Any]:
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise invalid(
            "response_format",
            "response_format of type 'json_schema' needs {'json_schema': {'name': ..., 'schema': {...}}}",
        )
    return {"json": asked.json_schema.schema_}


def _form(param: str, fields: dict[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**fields)
    except ValueError as error:
        message = str(error)
        raise refusal(ValueError(message if message.startswith(param) else f"{param}: {message}"), param) from error


def params_of(
    body: Sampling, defaults: SamplingParams, max_model_len: int, form: StructuredOutputsParams | None, **further: Any
) -> SamplingParams | BeamSearchParams:
    """The engine's parameters. Raises ApiError 400 naming what is wrong.

    Args:
        defaults: The checkpoint's, for what the body leaves open; a beam search takes `max_tokens` of them only.
        further: Fields under other names in this kind of body.
    """
    given = {name: getattr(body, name) for name in SAMPLING_NAMES if getattr(body, name) is not None}
    given |= further | {"structured_outputs": form}
    try:
        if body.use_beam_search:
            return _beam_params(body, defaults, max_model_len, given)
        for name, neutral in BEAMS_ALONE.items():
            if getattr(body, name) not in (None, neutral):
                raise ApiError(
                    400, f"{name} has no effect without use_beam_search=true: set it, or leave {name} out", param=name,
                    code="unsupported_parameter",
                )
        names = SamplingParams.__dataclass_fields__
        return SamplingParams(**({name: getattr(defaults, name) for name in names} | given))
    except ValueError as error:
        raise refusal(error) from error


def _beam_params(
    body: Sampling, defaults: SamplingParams, max_model_len: int, given: dict[str, Any]
) -> BeamSearchParams:
    if body.stream:
        raise ApiError(
            400, "stream: a beam search has no text before its end: leave stream or use_beam_search out",
            param="stream", code="unsupported_parameter",
        )
    plain = SamplingParams.__dataclass_fields__
    for name, value in given.items():
        if name not in BEAM_NAMES and name not in ("n", "logprobs") and value not in (None, plain[name].default):
            raise ApiError(
                400, f"{name} has no effect on a beam search: leave it out", param=name, code="unsupported_parameter"
            )
    width = body.beam_width if body.beam_width is not None else body.n
    if width is None:
        raise invalid("beam_width", "a beam search needs its width: give beam_width, or n")
    if body.n is not None and not 1 <= body.n <= width:
        raise invalid("n", f"n={body.n} of beam_width={width} hypotheses: it must be from 1 to beam_width")
    fields = {name: value for name, value in given.items() if name in BeamSearchParams.__dataclass_fields__}
    fields |= {name: getattr(body, name) for name in BEAMS_ALONE if getattr(body, name) is not None}
    max_tokens = given.get("max_tokens", defaults.max_tokens)
    return BeamSearchParams(
        **(fields | {"beam_width": width, "max_tokens": max_model_len if max_tokens is None else max_tokens})
    )
