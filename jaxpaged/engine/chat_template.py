"""A checkpoint's chat template: messages in, text out, in a sandbox, as transformers renders it."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MAX_RENDERED_CHARS = 4 * 2**20
"""Most characters a template may give; the sandbox itself stops code, not size."""
NUM_PLACEHOLDERS = 0xF8FF - 0xE000
"""The private-use characters of Unicode's basic plane: they stand for special tokens that a user typed."""

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """One Jinja template with the special tokens it may name (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    @cached_property
    def _template(self) -> Template:
        # made at first use: a wrong template does not keep a model from completing plain prompts
        try:
            return _make_environment().from_string(self.source)
        except TemplateError as error:
            raise ValueError(f"the model's chat template cannot be read: {error}. Mend chat_template.jinja") from error

    def reads(self, name: str) -> bool:
        """Whether the template mentions a name; what it never mentions has no effect."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(self, messages: Messages, *, add_generation_prompt: bool, **variables: Any) -> str:
        """The conversation as text.

        Args:
            messages: Mappings with "role" and "content" (text, or a list of text parts).
            variables: More names for the template, such as `tools` or `enable_thinking`.

        Raises ValueError for messages that the template refuses, and for output of more than MAX_RENDERED_CHARS.
        """
        names = {**self._special_tokens, "tools": None, "documents": None, **variables}
        template = self._template
        pieces, length = [], 0
        try:
            for piece in template.generate(
                **names, messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt
            ):
                length += len(piece)
                if length > MAX_RENDERED_CHARS:
                    break
                pieces.append(piece)
        except Exception as error:  # a template is a program of its own and may raise anything
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        if length > MAX_RENDERED_CHARS:
            raise ValueError(f"the chat template gives more than {MAX_RENDERED_CHARS} characters: shorten the messages")
        return "".join(pieces)


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """The messages with text parts joined, or ValueError naming the message that is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] must be a mapping with a text 'role', such as 'user'")
        content = message.get("content")
        if content is None and not (message["role"] == "assistant" and message.get("tool_calls")):
            raise ValueError(f"messages[{index}] has no 'content': give text ('' for none)")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "\n".join(_text_of(part, index) for part in content)
        if content is not None and not isinstance(content, str):
            raise ValueError(f"messages[{index}]['content'] must be text or a list of text parts")
        checked.append({**message, "content": content})
    return checked


def _text_of(part: object, index: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"messages[{index}] has a part of type {kind!r}: give {{'type': 'text', 'text': ...}} only")


class Placeholders:
    """Hides strings from a template's reader: each is replaced by one private-use character that `values` lacks.

    Special tokens are found again in the rendered text, so those a user typed must not be there then.
    """

    def __init__(self, hidden: Sequence[str], values: object) -> None:
        typed: list[str] = []
        _collect(values, typed)
        # the longest first, as one special token may begin with another
        found = sorted((h for h in set(hidden) if any(h in text for text in typed)), key=len, reverse=True)
        used = set().union(*map(set, typed)) if found else set()
        free = [chr(code) for code in range(0xE000, 0xE000 + NUM_PLACEHOLDERS) if chr(code) not in used]
        if len(free) < len(found):
            raise ValueError("the messages use too many private-use characters (U+E000 to U+F8FF): remove them")
        self._by_string = dict(zip(found, free, strict=False))

    def __bool__(self) -> bool:
        return bool(self._by_string)

    def hide(self, value: Any) -> Any:
        """`value` with every hidden string in its texts replaced, through lists and mappings."""
        if isinstance(value, str):
            for string, placeholder in self._by_string.items():
                value = value.replace(string, placeholder)
            return value
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        for string, placeholder in self._by_string.items():
            text = text.replace(placeholder, string)
        return text


def _collect(value: object, into: list[str]) -> None:
    if isinstance(value, str):
        into.append(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(key, into)
            _collect(item, into)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, into)


# ---- the environment: what transformers gives a template, and no more


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model is trained on; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(...)` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)` for templates, without underscored names: they lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # so that a field may be called self
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the field {name!r}: take one without an underscore in front")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes HTML characters
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment
