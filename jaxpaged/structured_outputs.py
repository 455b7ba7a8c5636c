"""What a request may ask of its output's form, checked once at the door (names follow vLLM's Python API)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged.refusals import naming_unknown_fields, refuse

MAX_GRAMMAR_BYTES = 64 * 1024
"""Most bytes of a schema, a regular expression, a grammar, or all choices together."""
MAX_CHOICES = 1024
"""Most entries of `choice`."""
MAX_SCHEMA_DEPTH = 64
"""Most levels of objects and lists in a schema."""
FORMS = ("json", "regex", "choice", "grammar", "json_object")
REMEDIES: Mapping[str, str] = {
    "structural_tag": "not supported; write the whole output as a grammar",
    "disable_fallback": "there is one grammar backend and no fallback: leave it out",
    "disable_additional_properties": 'write "additionalProperties": false into the schema',
    "json_schema": "use json",
    "schema": "use json",
    "ebnf": "use grammar, in Lark's syntax",
    "lark": "use grammar",
}


@naming_unknown_fields(REMEDIES)
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an output: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`.

    Raises ValueError with the name, the value and what is allowed. Whether the grammar itself is sound is seen when the
    request meets the engine, before it is admitted.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as a mapping or as its text; kept as text."""
    regex: str | None = None
    """A regular expression (Rust's syntax, without look-around) that the whole output matches."""
    choice: Sequence[str] | None = None
    """The texts that may be the output."""
    grammar: str | None = None
    """A grammar in Lark's syntax; its rule `start` is the output."""
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without white space between its tokens."""
    whitespace_pattern: str | None = None
    """A regular expression for the white space between the tokens of JSON."""

    def __post_init__(self) -> None:
        freeze = object.__setattr__
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs has {', '.join(given) or 'nothing'}: give exactly one of {', '.join(FORMS)}"
            )
        if self.json is not None:
            freeze(self, "json", _check_schema(self.json))
        for name in ("regex", "grammar", "whitespace_pattern"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if self.choice is not None:
            freeze(self, "choice", _check_choices(self.choice))
        if self.json_object is not None and self.json_object is not True:
            raise refuse("json_object", self.json_object, "True, or left out")
        if not isinstance(self.disable_any_whitespace, bool):
            raise refuse("disable_any_whitespace", self.disable_any_whitespace, "True or False")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("whitespace_pattern contradicts disable_any_whitespace=True: give one")
        is_json = self.json is not None or self.json_object is not None
        for name, is_given in (
            ("disable_any_whitespace", self.disable_any_whitespace),
            ("whitespace_pattern", self.whitespace_pattern is not None),
        ):
            if is_given and not is_json:
                raise ValueError(f"{name} has no effect on {given[0]}: leave it out")


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise refuse(name, value, "a non-empty string")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise refuse(name, ascii(value), "valid Unicode text (it has a lone surrogate)") from error
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise ValueError(f"{name} has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are allowed")
    if "\0" in value:
        raise refuse(name, value, "text without NUL characters")
    return value


def _check_schema(value: object) -> str:
    allowed = "a JSON schema: a mapping, or the text of a JSON object"
    if isinstance(value, str):
        _check_text("json", value)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json is not valid JSON: {error}. Give a JSON schema as a mapping or as text") from error
    if hasattr(value, "model_json_schema"):
        raise refuse("json", value, f"{allowed}; of a pydantic model, give its model_json_schema()")
    if not isinstance(value, Mapping):
        raise refuse("json", value, allowed)
    _check_size(value)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json cannot be written as JSON: {error}. Give {allowed}") from error
    return _check_text("json", text)


def _check_size(schema: object) -> None:
    """Levels and entries, before anything walks the schema that has neither bound."""
    level, num_entries = [schema], 0
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        inner: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                inner.extend(value.values())
            elif isinstance(value, (list, tuple)):
                inner.extend(value)
        if not inner:
            return
        num_entries += len(inner)
        if num_entries > MAX_GRAMMAR_BYTES:
            raise ValueError(f"json has more than {MAX_GRAMMAR_BYTES} entries: make the schema smaller")
        level = inner
    raise ValueError(f"json is nested more than {MAX_SCHEMA_DEPTH} levels deep: use $defs and $ref")


def _check_choices(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise refuse("choice", value, "a non-empty list of strings")
    if len(value) > MAX_CHOICES:
        raise ValueError(f"choice has {len(value)} entries; at most {MAX_CHOICES} are allowed")
    for entry in value:
        _check_text("choice entry", entry)
    num_bytes = sum(len(entry.encode()) for entry in value)
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise ValueError(f"choice has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are allowed")
    return tuple(value)
