"""The functions of a conversation: what the template is told, what form a forced call has, who reads the calls."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxpaged.server.errors import invalid
from jaxpaged.server.params import SPACE, form_of, form_param
from jaxpaged.server.protocol import ChatBody, Tool
from jaxpaged.server.tool_parser import DIALECTS, FORCED, ToolParser
from jaxpaged.structured_outputs import StructuredOutputsParams

MAX_TOOLS = 128


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """What the tools of one conversation mean for its prompt, its output's form, and the reading of its output."""

    template_tools: tuple[dict[str, Any], ...] | None = None
    form: StructuredOutputsParams | None = None
    make_parser: Callable[[], ToolParser] | None = None
    """For one choice; None where the output is text."""
    form_param: str = "structured_outputs"
    """What in the body gave that form."""
    has_special_marker: bool = False
    """Whether calls begin with a special token, which must be in the text then."""


def plan_tools(body: ChatBody, dialect_name: str | None, special_tokens: Sequence[str]) -> ToolPlan:
    """The plan for a body. ApiError 400 for what cannot be had.

    Args:
        dialect_name: How this model writes calls, where that is known.
        special_tokens: What is left out of the output's text unless that is asked for.
    """
    form = form_of(body)
    tools = body.tools or []
    _check(tools)
    names = [tool.function.name for tool in tools]
    choice = _choice(body, names)
    if choice == "none":
        return ToolPlan(form=form, form_param=form_param(body))
    told = template_tools(tools)
    if choice == "auto":
        if body.response_format is not None and form is not None:
            raise invalid(
                "response_format", "response_format leaves no room for calls: use tool_choice='none' or 'required', or "
                "leave one of them out",
            )
        return _auto_plan(body, told, names, form, dialect_name, special_tokens)
    if form is not None:
        raise invalid("tool_choice", f"tool_choice gives the output its form: leave {form_param(body)} out")
    dialect = replace(FORCED, id_length=DIALECTS[dialect_name].id_length if dialect_name else None)
    known_name = None if choice == "required" else choice[1]
    if known_name is None:
        schema = calls_schema(tools, max_calls=None if body.parallel_tool_calls else 1)
    else:
        schema = _parameters(next(tool for tool in tools if tool.function.name == known_name))
    return ToolPlan(
        template_tools=told,
        form=_form(schema),
        form_param="tools",
        make_parser=lambda: ToolParser(dialect, frozenset(names), known_name=known_name),
    )


def template_tools(tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """Tools as chat templates take them."""
    return tuple(tool.model_dump(exclude_none=True) for tool in tools)


def _auto_plan(
    body: ChatBody, told: tuple[dict[str, Any], ...], names: list[str], form: StructuredOutputsParams | None,
    dialect_name: str | None, special_tokens: Sequence[str],
) -> ToolPlan:
    if dialect_name is None:
        raise invalid(
            "tools", "tools: it is not known how this model writes calls: the operator names it with "
            "--tool-call-parser; tool_choice='required' works without",
        )
    dialect = DIALECTS[dialect_name]
    max_calls = None if body.parallel_tool_calls else 1
    return ToolPlan(
        template_tools=told,
        form=form,
        make_parser=lambda: ToolParser(dialect, frozenset(names), max_calls=max_calls),
        has_special_marker=dialect.marker in special_tokens,
    )


def _check(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"tools has {len(tools)} entries; at most {MAX_TOOLS} are allowed")
    seen = set()
    for tool in tools:
        if tool.function.name in seen:
            raise invalid("tools", f"tools names the function {tool.function.name!r} twice: give it once")
        seen.add(tool.function.name)


def _choice(body: ChatBody, names: Sequence[str]) -> Any:
    """"none", "auto", "required", or ("function", name)."""
    choice = body.tool_choice
    if choice is None:
        return "auto" if names else "none"
    if choice in ("none", "auto") and not names:
        return "none"
    if not names:
        raise invalid("tool_choice", "tool_choice asks for a call, and there are no tools: give tools")
    if isinstance(choice, str):
        return choice
    if choice.function.name not in names:
        raise invalid("tool_choice", f"tool_choice names {choice.function.name!r}, which is not among the tools")
    return "function", choice.function.name


def _parameters(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments; without one it takes none."""
    parameters = tool.function.parameters
    return parameters if parameters else {"type": "object", "properties": {}, "additionalProperties": False}


def calls_schema(tools: Sequence[Tool], *, max_calls: int | None = None) -> dict[str, Any]:
    """The JSON schema of a list of calls: `[{"name": ..., "arguments": ...}, ...]`, the name first."""
    definitions, calls = {}, []
    for index, tool in enumerate(tools):
        definitions[f"arguments_{index}"] = _moved(_parameters(tool), f"#/$defs/arguments_{index}")
        calls.append({
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/arguments_{index}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return schema if max_calls is None else schema | {"maxItems": max_calls}


def _moved(value: Any, place: str) -> Any:
    """A schema that stands at `place` of another one: its references to itself lead there."""
    if isinstance(value, list):
        return [_moved(item, place) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _moved(item, place) for key, item in value.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def _form(schema: dict[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(json=schema, whitespace_pattern=SPACE)
    except ValueError as error:
        raise invalid("tools", f"tools: the parameters make no schema: {error}") from error


def with_read_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of earlier calls as objects, which is how chat templates take them.

    OpenAI's clients send them as text. ApiError 400 for calls that are none.
    """
    read = []
    for index, message in enumerate(messages):
        calls = message.get("tool_calls")
        if calls is None:
            read.append({key: value for key, value in message.items() if key != "tool_calls"})
            continue
        if not isinstance(calls, list):
            raise invalid("messages", f"messages[{index}].tool_calls must be a list of calls")
        read.append({**message, "tool_calls": [_read_call(call, index) for call in calls]})
    return read


def _read_call(call: Any, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid("messages", f"messages[{index}].tool_calls: a call is {{'id', 'type', 'function': {{'name'}}}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise invalid(
                "messages", f"messages[{index}].tool_calls: the arguments of {function['name'][:80]!r} are no JSON: "
                f"{error}",
            ) from error
    if arguments is not None and not isinstance(arguments, dict):
        raise invalid(
            "messages", f"messages[{index}].tool_calls: the arguments of {function['name'][:80]!r} are no object"
        )
    return {**call, "function": {**function, "arguments": arguments or {}}}
