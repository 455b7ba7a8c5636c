"""What clients send: OpenAI's names and vLLM's further ones. Every name takes effect or is refused with a reason."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from jaxpaged.server.errors import ApiError, invalid

Body = TypeVar("Body", bound="WireBody")
ROLES = ["system", "user", "assistant", "tool"]
Messages = Annotated[
    list[dict[str, Any]],
    Field(
        json_schema_extra={
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"role": {"enum": ROLES}, "content": {"type": "string"}},
                "required": ["role", "content"],
            },
        }
    ),
]
"""What a message must have is the chat template's to say; the schema is for readers of /openapi.json."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "documents": ([],),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (-1,),
    "spaces_between_special_tokens": (True,),
}
"""Values of unsupported names that ask for nothing; null is one for every name."""
NO_EFFECT = ("user", "safety_identifier", "metadata", "prompt_cache_key")
"""What OpenAI's servers keep for their own bookkeeping; it changes no output there or here."""
REMEDIES: Mapping[str, str] = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use structured_outputs={'json': ...}, or response_format",
    "guided_regex": "use structured_outputs={'regex': ...}",
    "guided_choice": "use structured_outputs={'choice': [...]}",
    "guided_grammar": "use structured_outputs={'grammar': ...}",
    "guided_decoding_backend": "there is one backend for structured_outputs: leave it out",
    "guided_whitespace_pattern": "use structured_outputs={'json': ..., 'whitespace_pattern': ...}",
    "best_of": "use n and logprobs, and keep the best",
    "suffix": "the model cannot fill in the middle: leave it out",
    "chat_template": "templates of clients are not run: the operator puts one into the model's folder",
    "continue_final_message": "not supported: use /v1/completions with the text so far",
    "documents": "not supported: put them into a message",
    "truncate_prompt_tokens": "prompts are not cut in silence: cut it before you send it",
    "prompt_embeds": "prompts are text or token ids",
    "logits_processors": "no code of a client is run: use logit_bias, allowed_token_ids or bad_words",
    "mm_processor_kwargs": "the model takes text only: leave it out",
    "modalities": "the model gives text only: use ['text'], or leave it out",
    "audio": "the model gives text only: leave it out",
    "store": "nothing is kept: use false, or leave it out",
    "service_tier": "there is one tier: use 'auto', or leave it out",
}


class WireBody(BaseModel):
    """A JSON object of known names, with values of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _within(low: float, high: float) -> Any:
    """A number or None, with the range for /openapi.json: a value beyond it is refused by the engine's own words."""
    return Field(None, json_schema_extra={"minimum": low, "maximum": high})


class JsonSchemaFormat(WireBody):
    """A schema under OpenAI's names. The output follows it whatever `strict` says."""

    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(WireBody):
    """The form of an answer under OpenAI's names."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(WireBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False
    """Accepted: OpenAI pads its chunks against listeners who see their sizes; here it adds nothing."""


class Sampling(WireBody):
    """What both kinds of request may ask of the sampler; None means the checkpoint's default, or ours."""

    n: int | None = _within(1, 128)
    temperature: float | None = _within(0, 100)
    top_p: float | None = _within(0.001, 1)
    top_k: int | None = _within(-1, 2**31 - 1)
    min_p: float | None = _within(0, 1)
    presence_penalty: float | None = _within(-2, 2)
    frequency_penalty: float | None = _within(-2, 2)
    repetition_penalty: float | None = _within(1e-4, 1e4)
    seed: int | None = _within(-(2**63), 2**63 - 1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = _within(0, 2**31 - 1)
    min_tokens: int | None = _within(0, 2**31 - 1)
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = _within(0, 20)

    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    """Fields of StructuredOutputsParams."""
    use_beam_search: bool = False
    beam_width: int | None = _within(1, 64)
    """None: as many as `n`."""
    length_penalty: float | None = _within(-100, 100)
    early_stopping: bool | None = None

    model: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Any = Field(
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    )
    echo: bool = False
    logprobs: int | None = _within(0, 20)


class FunctionDefinition(WireBody):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Forced calls follow the schema whatever it says; a call of the model's own accord is given as it is."""


class Tool(WireBody):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(WireBody):
    name: Name


class NamedTool(WireBody):
    """The function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = _within(1, 2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = _within(0, 20)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True


class TokenizeBody(WireBody):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool = False


class DetokenizeBody(WireBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def read_body(kind: type[Body], content: bytes) -> Body:
    """The body of a request. Raises ApiError 400 for what is no JSON, or not this kind of body."""
    try:
        values = from_json(content)  # NaN is found below, with its name
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    return parse_body(kind, values)


def parse_body(kind: type[Body], values: Any) -> Body:
    """The same of a value that was JSON."""
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object, as {\"model\": ...}", code="invalid_json")
    known = kind.model_fields
    asked: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or name in NO_EFFECT:
            continue
        if name not in known:
            if any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL.get(name, ())):
                continue
            remedy = REMEDIES.get(name, f"the parameters are {', '.join(known)}")
            raise ApiError(400, f"{name[:80]} is not accepted: {remedy}", param=name[:80], code="unsupported_parameter")
        if not _is_finite(value):
            raise invalid(name, f"{name} has a number that is NaN or infinite")
        asked[name] = value
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"][:4])
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, f"{place}: {first['msg']}", param=param, code="invalid_type") from error


def _is_finite(value: Any) -> bool:
    """Whether no number within is NaN or infinite; the parser has bounded the depth."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return True
