"""Function calls in what a model writes: three dialects, read in one pass, whole or as the text comes.

Nothing is lost: what looks like a call and is none, or does not end, is given back as content. A stream has told of its
beginning by then, if its function and arguments had begun: `CallBroken` takes that back, and the text follows.
"""

import enum
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxpaged.server.call_scanner import WHITESPACE, CallScanner, Outcome

MAX_HEADER_CHARS = 256
_HEADER_CHARACTER = re.compile(r"[A-Za-z0-9_.\-\[\]\s]")
_HEADER = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*(?:\[CALL_ID\]\s*[A-Za-z0-9_-]{1,64}\s*)?(?:\[ARGS\])?\s*")


class _Mode(enum.Enum):
    CONTENT = "content"
    HEAD = "head"
    """At the text's beginning, where calls may stand without a marker."""
    BEGIN = "begin"
    """Behind a marker."""
    HEADER = "header"
    """In a name that stands in front of arguments."""
    CALL = "call"
    AFTER = "after"
    """Behind a call."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How models write calls.

    `begin` and `after` say which marks, white space aside, lead where: behind the marker, and behind a call.
    """

    marker: str | None = None
    is_at_head: bool = False
    begin: Mapping[str, _Mode] = field(default_factory=dict)
    after: Mapping[str, _Mode] = field(default_factory=dict)
    has_headers: bool = False
    id_length: int | None = None
    """Letters and digits of a call's id, where the chat template wants so many."""


_LIST_AFTER = {",{": _Mode.CALL, "]": _Mode.CONTENT}
DIALECTS: Mapping[str, Dialect] = {
    # <tool_call>{"name": ..., "arguments": ...}</tool_call>
    "hermes": Dialect(marker="<tool_call>", begin={"{": _Mode.CALL}, after={"</tool_call>": _Mode.CONTENT}),
    # {"name": ..., "parameters": ...}; {...}
    "llama3_json": Dialect(
        marker="<|python_tag|>", is_at_head=True, begin={"{": _Mode.CALL}, after={";{": _Mode.CALL}
    ),
    # [TOOL_CALLS] [{"name": ..., "arguments": ...}, ...] and [TOOL_CALLS]name[ARGS]{...}
    "mistral": Dialect(
        marker="[TOOL_CALLS]", begin={"[{": _Mode.CALL, "{": _Mode.CALL}, after=_LIST_AFTER,
        has_headers=True, id_length=9,
    ),
}
FORCED = Dialect(is_at_head=True, begin={"[{": _Mode.CALL}, after=_LIST_AFTER)
"""A list of calls and nothing else, which a grammar sees to."""


def detect_dialect(template: str) -> str | None:
    """Which dialect a model's chat template teaches; None if none that is known here."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        # others write XML within the same marker
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return "llama3_json"
    return None


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallBegun:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    index: int


@dataclass(frozen=True)
class CallBroken:
    """The call is none: its text follows as content."""

    index: int


Event = Content | CallBegun | CallArguments | CallEnded | CallBroken


class ToolParser:
    """Turns the text of one choice, in pieces however cut, into content and calls.

    Args:
        names: Of the functions that may be called.
        known_name: The function whose arguments are the whole text.
        max_calls: What comes behind so many calls is content; None is any number.
    """

    def __init__(
        self, dialect: Dialect, names: frozenset[str], *, known_name: str | None = None, max_calls: int | None = None
    ) -> None:
        self._dialect = dialect
        self._names = names
        self._max_calls = max_calls
        self._events: list[Event] = []
        self._mode = _Mode.HEAD if dialect.is_at_head else _Mode.CONTENT
        self._is_behind_call = False
        self._spaces: list[str] = []
        """White space that is content only if content follows."""
        self._partial = ""
        """What may be the beginning of a marker."""
        self._held: list[str] = []
        """What was read since the marker or the last call: given back if no call follows."""
        self._marks = ""
        self._header = ""
        self._scanner: CallScanner | None = None
        self._num_begun = 0
        self._index: int | None = None
        self.num_calls = 0
        """Calls that were whole."""
        if known_name is not None:
            self._begin_call(known_name)

    def feed(self, text: str) -> list[Event]:
        """What a further piece of the text tells."""
        # what may begin a marker is shorter than one, so little is looked at twice
        text, self._partial, at = self._partial + text, "", 0
        while at < len(text):
            if self._mode is _Mode.CONTENT:
                at = self._read_content(text, at)
            elif self._mode is _Mode.CALL:
                at = self._read_call(text, at)
            else:
                at = self._read_marks(text, at)
        return self._take_events()

    def finish(self) -> list[Event]:
        """What the end of the text tells: a call that is not whole is none."""
        if self._mode is _Mode.CALL:
            self._break_call()
        elif self._mode is not _Mode.CONTENT:
            self._give_back()
        partial, self._partial = self._partial, ""
        if partial or not self._is_behind_call:
            self._say(partial)
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # ---- content

    def _say(self, text: str) -> None:
        """Content, with the white space in front of it."""
        whole = "".join(self._spaces) + text
        self._spaces.clear()
        if whole:
            self._events.append(Content(whole))
            self._is_behind_call = False

    def _say_but_spaces(self, text: str) -> None:
        """Content whose last white space waits for what follows: in front of a call it is none."""
        shown = text.rstrip(WHITESPACE)
        if shown:
            self._say(shown)
        self._spaces.append(text[len(shown) :])

    def _read_content(self, text: str, at: int) -> int:
        marker = self._dialect.marker
        if marker is None or (self._max_calls is not None and self.num_calls >= self._max_calls):
            self._say_but_spaces(text[at:])
            return len(text)
        found = text.find(marker, at)
        if found < 0:
            end = len(text) - _overlap(text, at, marker)
            self._say_but_spaces(text[at:end])
            self._partial = text[end:]
            return len(text)
        self._say_but_spaces(text[at:found])
        self._held, self._marks, self._mode = [marker], "", _Mode.BEGIN
        return found + len(marker)

    def _give_back(self) -> None:
        """What was held is content."""
        held, self._held, self._mode = "".join(self._held), [], _Mode.CONTENT
        self._marks = self._header = ""
        self._say_but_spaces(held)

    # ---- around calls

    def _read_marks(self, text: str, at: int) -> int:
        """One character in front of a call or behind one."""
        character = text[at]
        if self._mode is _Mode.HEADER:
            return self._read_header(character, at)
        if character in WHITESPACE:
            self._held.append(character)
            return at + 1
        marks = self._marks + character
        leads_to = self._dialect.after if self._mode is _Mode.AFTER else self._dialect.begin
        mode = leads_to.get(marks)
        if mode is _Mode.CALL:
            if self._mode is _Mode.AFTER and self.num_calls == self._max_calls:
                self._give_back()
                return at
            self._begin_call()
            return at  # its brace is the scanner's
        if mode is not None:
            self._held, self._mode, self._marks = [], mode, ""
            return at + 1
        if any(known.startswith(marks) for known in leads_to):
            self._held.append(character)
            self._marks = marks
            return at + 1
        if self._mode is _Mode.BEGIN and self._dialect.has_headers and not self._marks:
            self._mode, self._header = _Mode.HEADER, ""
            return at
        self._give_back()
        return at

    def _read_header(self, character: str, at: int) -> int:
        if character == "{":
            match = _HEADER.fullmatch(self._header)
            if match is not None and match.group(1) in self._names:
                self._begin_call(match.group(1))
            else:
                self._give_back()
            return at
        if len(self._header) >= MAX_HEADER_CHARS or not _HEADER_CHARACTER.match(character):
            self._give_back()
            return at
        self._header += character
        self._held.append(character)
        return at + 1

    # ---- a call

    def _begin_call(self, known_name: str | None = None) -> None:
        self._scanner = CallScanner(self._names, known_name)
        self._mode, self._marks, self._index, self._header = _Mode.CALL, "", None, ""

    def _read_call(self, text: str, at: int) -> int:
        scanner = self._scanner
        assert scanner is not None
        at = scanner.read(text, at)
        if scanner.outcome is Outcome.BROKEN:
            self._break_call()
            return at
        if scanner.has_begun:
            self._tell_of(scanner)
        if scanner.outcome is Outcome.WHOLE:
            assert self._index is not None
            self._events.append(CallEnded(self._index))
            self.num_calls += 1
            self._scanner, self._held, self._mode = None, [], _Mode.AFTER
            self._spaces.clear()
            self._is_behind_call = True
        return at

    def _tell_of(self, scanner: CallScanner) -> None:
        if self._index is None:
            assert scanner.name is not None
            self._index = self._num_begun
            self._num_begun += 1
            self._events.append(CallBegun(self._index, self._make_id(), scanner.name))
        arguments = scanner.take_arguments()
        if arguments:
            self._events.append(CallArguments(self._index, arguments))

    def _break_call(self) -> None:
        assert self._scanner is not None
        if self._index is not None:
            self._events.append(CallBroken(self._index))
        self._held.append(self._scanner.raw)
        self._scanner = None
        self._give_back()

    def _make_id(self) -> str:
        length = self._dialect.id_length
        return f"call_{uuid.uuid4().hex[:24]}" if length is None else uuid.uuid4().hex[:length]


def _overlap(text: str, start: int, marker: str) -> int:
    """Characters at the end of text[start:] that may begin a marker."""
    for length in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
