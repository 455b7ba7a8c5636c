"""One function call in JSON, read as its characters come: where it ends, and what is known of it before that."""

import enum
import json
import re
from typing import Any

ARGUMENT_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("id", "type")
"""What models write beside a call's name and arguments; it says nothing new."""
MAX_DEPTH = 64
WHITESPACE = " \t\n\r"
_STRING_RUN = re.compile(r'[^"\\]*')
_PLAIN_RUN = re.compile(r"[-+.a-z0-9E]*")
"""Characters of numbers, true, false and null."""


class Outcome(enum.Enum):
    OPEN = "open"
    WHOLE = "whole"
    BROKEN = "broken"


class _Place(enum.Enum):
    """What comes next at the level of the call's own object."""

    BRACE = "{"
    KEY = "key"
    COLON = ":"
    VALUE = "value"
    COMMA = ","


class CallScanner:
    """Reads `{"name": "f", "arguments": {...}}`, or the arguments alone where the name is known; each character once.

    `name` is set as soon as it is read, and `take_arguments` gives the text of the arguments as it comes, once the name
    is known. What is JSON in shape only is found at the end: the outcome is then BROKEN.

    Args:
        names: Of the functions that there are; a call of another is broken.
        known_name: The function whose arguments alone follow.
    """

    def __init__(self, names: frozenset[str], known_name: str | None = None) -> None:
        self._names = names
        self.outcome = Outcome.OPEN
        self.name = known_name
        self._is_alone = known_name is not None
        self._raw: list[str] = []
        self._depth = 1 if self._is_alone else 0
        self._place = _Place.VALUE if self._is_alone else _Place.BRACE
        self._key = ARGUMENT_KEYS[0] if self._is_alone else ""
        self._seen: set[str] = {self._key}
        self._value: list[str] | None = None
        """Pieces of the key or value being read at the call's own level."""
        self._value_kind = ""
        """The first character of the value being read."""
        self._in_string = self._is_escaped = False
        self._arguments: list[str] = []
        """Pieces of the arguments that nobody has taken."""
        self._has_arguments = False

    @property
    def raw(self) -> str:
        """All that was read."""
        return "".join(self._raw)

    @property
    def has_begun(self) -> bool:
        """Whether the function and the beginning of its arguments are known."""
        return self.name is not None and self._has_arguments

    def take_arguments(self) -> str:
        """The text of the arguments that came since the last time."""
        taken = "".join(self._arguments)
        self._arguments.clear()
        return taken

    def read(self, text: str, at: int) -> int:
        """Read from text[at:] until the call ends or breaks; returns where: the breaking character is not read."""
        start = at
        while at < len(text) and self.outcome is Outcome.OPEN:
            at = self._read_string(text, at) if self._in_string else self._read_one(text, at)
        self._raw.append(text[start:at])
        if self.outcome is Outcome.WHOLE:
            self._check()
        return at

    def _add(self, piece: str) -> None:
        if self._value is None:
            return
        self._value.append(piece)
        if self._place is _Place.VALUE and self._key in ARGUMENT_KEYS and self._value_kind == "{":
            self._arguments.append(piece)

    def _read_string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            self._add(text[at])
            return at + 1
        match = _STRING_RUN.match(text, at)
        assert match is not None  # it matches nothing at least
        end = match.end()
        if end > at:
            self._add(text[at:end])
        if end == len(text):
            return end
        self._add(text[end])
        if text[end] == "\\":
            self._is_escaped = True
        else:
            self._in_string = False
            if self._depth == 1:
                self._end_string()
        return end + 1

    def _end_string(self) -> None:
        if self._place is _Place.KEY:
            key = _decoded(self._value)
            self._value = None
            kind = ARGUMENT_KEYS[0] if key in ARGUMENT_KEYS else key
            if key not in ("name", *ARGUMENT_KEYS, *OTHER_KEYS) or kind in self._seen:
                self.outcome = Outcome.BROKEN
                return
            self._seen.add(str(kind))
            self._key, self._place = str(key), _Place.COLON
        else:
            self._end_value()

    def _read_one(self, text: str, at: int) -> int:
        """One character that is in no string."""
        character = text[at]
        if self._value is not None and self._depth == 1 and self._value_kind not in ("{", "[", '"'):
            # within a number or a word, which the next mark ends
            end = _plain_end(text, at)
            if end > at:
                self._add(text[at:end])
                return end
            self._end_value()
            if self.outcome is not Outcome.OPEN:
                return at
        if character in WHITESPACE:
            if self._value is not None:
                self._add(character)
            return at + 1
        if self._depth > 1:
            return self._read_nested(text, at)
        if self._place is _Place.BRACE and character == "{":
            self._depth, self._place = 1, _Place.KEY
        elif self._place is _Place.KEY and character == '"':
            self._in_string, self._value, self._value_kind = True, ['"'], '"'
        elif self._place is _Place.COLON and character == ":":
            self._place = _Place.VALUE
        elif self._place is _Place.VALUE and (character in '"{[' or _plain_end(text, at) > at):
            self._begin_value(character)
        elif self._place is _Place.COMMA and character == ",":
            self._place = _Place.KEY
        elif self._place is _Place.COMMA and character == "}":
            self._depth, self.outcome = 0, Outcome.WHOLE
        else:
            self.outcome = Outcome.BROKEN
            return at
        return at + 1

    def _begin_value(self, character: str) -> None:
        self._value, self._value_kind = [], character
        if self._key in ARGUMENT_KEYS:
            if character not in '"{' or (self._is_alone and character != "{"):
                self.outcome = Outcome.BROKEN  # arguments are an object, or the text of one
            self._has_arguments = character == "{"
        self._add(character)
        self._in_string = character == '"'
        self._depth += character in "{["

    def _read_nested(self, text: str, at: int) -> int:
        end = _plain_end(text, at)
        if end > at:
            self._add(text[at:end])
            return end
        character = text[at]
        if character in "{[":
            self._depth += 1
            if self._depth > MAX_DEPTH:
                self.outcome = Outcome.BROKEN
                return at
        elif character in "}]":
            self._depth -= 1
        elif character == '"':
            self._in_string = True
        elif character not in ",:":
            self.outcome = Outcome.BROKEN
            return at
        self._add(character)
        if self._depth == 1:
            self._end_value()
        return at + 1

    def _end_value(self) -> None:
        assert self._value is not None
        text = self._value
        self._value, self._place = None, _Place.COMMA
        if self._key == "name":
            name = _decoded(text)
            self.name = name if isinstance(name, str) else None
            if self.name not in self._names:
                self.outcome = Outcome.BROKEN
        elif self._key in ARGUMENT_KEYS and self._value_kind == '"':
            inner = _decoded(text)
            if not isinstance(inner, str) or not _is_text(inner) or not isinstance(_decoded([inner]), dict):
                self.outcome = Outcome.BROKEN
                return
            self._arguments.append(inner)
            self._has_arguments = True
        if self._is_alone and self.outcome is Outcome.OPEN:
            self._depth, self.outcome = 0, Outcome.WHOLE

    def _check(self) -> None:
        """At the end: whether what was read is JSON indeed, and says what a call must."""
        value = _decoded(self._raw)
        if not isinstance(value, dict) or self.name is None:
            self.outcome = Outcome.BROKEN
        elif not self._has_arguments:
            self._arguments.append("{}")
            self._has_arguments = True


def _plain_end(text: str, at: int) -> int:
    """Where the run of _PLAIN_RUN at text[at:] ends."""
    match = _PLAIN_RUN.match(text, at)
    assert match is not None  # it matches nothing at least
    return match.end()


def _decoded(pieces: list[str] | None) -> Any:
    """The value of a text in strict JSON; None where it is none."""
    try:
        return json.loads("".join(pieces or ()), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _is_text(value: str) -> bool:
    """Whether it has no lone surrogate, which no answer can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
