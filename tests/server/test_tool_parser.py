"""Calls in three dialects: read alike however the text is cut, in linear time, and nothing of it is lost."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.server.chat import deltas_of, message_of
from jaxpaged.server.tool_parser import DIALECTS, FORCED, CallBroken, CallEnded, Content, ToolParser, detect_dialect

NAMES = frozenset({"weather", "f"})


def parser(dialect, **options):
    return ToolParser(FORCED if dialect == "forced" else DIALECTS[dialect], NAMES, **options)


def events_of(pieces, dialect, **options):
    reader = parser(dialect, **options)
    return [event for piece in pieces for event in reader.feed(piece)] + reader.finish()


def read(text, dialect, **options):
    """Content, and (name, arguments) of each call, of a text that comes at once."""
    message = message_of(events_of([text], dialect, **options))
    return message["content"], calls_in(message)


def calls_in(message):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]


def read_deltas(pieces, dialect, **options):
    """The same, put together from the deltas of a stream, without the calls it took back."""
    events = events_of(pieces, dialect, **options)
    broken = {event.index for event in events if isinstance(event, CallBroken)}
    content, calls = "", {}
    for delta in deltas_of(events):
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] not in calls
                assert call["function"]["arguments"] == ""
                calls[call["index"]] = [call["function"]["name"], ""]
            else:
                calls[call["index"]][1] += call["function"]["arguments"]
    found = [tuple(call) for index, call in calls.items() if index not in broken]
    return (content or None) if found else content, found


A, B = ("weather", '{"city": "Paris, \\"Lutèce\\" {[</tool_call>;"}'), ("f", "{}")
ONE, TWO = (f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in (A, B))
CASES = [
    ("hermes", "Hello, world.", ("Hello, world.", [])),
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", (None, [A])),
    ("hermes", f"I look.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>\n", ("I look.", [A, B])),
    ("hermes", f"<tool_call>{ONE}</tool_call> And then?", (" And then?", [A])),
    ("hermes", f"<tool_call>{ONE}", (None, [A])),  # a stop string took the end
    ("hermes", "a < b <tool_cal <tool_call", ("a < b <tool_cal <tool_call", [])),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city"', None),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"a": [1}]}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "arguments": NaN}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": nul}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "name": "f"}</tool_call>', None),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 70 + "1" + "}" * 70 + "}</tool_call>", None),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>", None),
    ("hermes", '<tool_call>__import__("os").system("true")</tool_call>', None),
    ("hermes", '<tool_call>{"id": 7, "type": "function", "name": "f"}</tool_call>', (None, [B])),
    ("hermes", '<tool_call>{"arguments": {"b": [1, {"c": null}]}, "name": "f"}</tool_call>',
     (None, [("f", '{"b": [1, {"c": null}]}')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', (None, [("f", '{"a": 1}')])),
    ("hermes", f"<tool_call><tool_call>{ONE}</tool_call>", ("<tool_call>", [A])),
    ("hermes", " \n ", (" \n ", [])),
    ("llama3_json", ONE.replace("arguments", "parameters"), (None, [A])),
    ("llama3_json", f"<|python_tag|>{ONE}; {TWO}", (None, [A, B])),
    ("llama3_json", f" {ONE} indeed", (" indeed", [A])),
    ("llama3_json", '{"answer": 42}', ('{"answer": 42}', [])),
    ("llama3_json", f"It is {ONE}", (f"It is {ONE}", [])),
    ("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]", (None, [A, B])),
    ("mistral", f"[TOOL_CALLS]{ONE}", (None, [A])),
    ("mistral", f"Well.[TOOL_CALLS]weather[ARGS]{A[1]}[TOOL_CALLS]f{{}}", ("Well.", [A, B])),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}", (None, [B])),
    ("mistral", "[TOOL_CALLS] I think, it rains", None),
    ("mistral", "[TOOL_CALLS]other[ARGS]{}", None),
    ("mistral", f"[TOOL_CALLS]{'f' * 400}{{}}", None),
    ("mistral", f'[TOOL_CALLS] [{ONE}, {{"name": "f", "argu', (', {"name": "f", "argu', [A])),
    ("forced", f"[{ONE}, {TWO}]", (None, [A, B])),
    ("forced", f"[{ONE[:-9]}", None),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "text", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_calls_are_found_and_all_else_is_content_wherever_a_stream_is_cut(dialect, text, expected):
    if expected is None:  # no call in it: all of it is content
        expected = (text, [])
    assert read(text, dialect) == expected
    assert read_deltas(list(text), dialect) == expected
    for at in range(0, len(text) + 1, 1 + len(text) // 200):
        assert read_deltas([text[:at], text[at:]], dialect) == expected, at
        assert message_of(events_of([text[:at], text[at:]], dialect))["content"] == expected[0], at


def test_arguments_come_as_they_are_written_behind_the_functions_name():
    text = '<tool_call>{"name": "f", "arguments": {"a": "long"}}</tool_call>'
    reader = parser("hermes")
    deltas = [delta for character in text for delta in deltas_of(reader.feed(character))]
    (first, *others) = [delta["tool_calls"][0] for delta in deltas]
    assert first["type"] == "function"
    assert first["function"] == {"name": "f", "arguments": ""}
    assert [call["function"] for call in others] == [{"arguments": character} for character in '{"a": "long"}']


def test_arguments_alone_are_those_of_the_known_function():
    assert read('{"city": "Paris"}', "forced", known_name="f") == (None, [("f", '{"city": "Paris"}')])
    assert read('{"city": "Par', "forced", known_name="f") == ('{"city": "Par', [])


def test_what_follows_the_only_call_allowed_is_content():
    text = f"<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>"
    assert read(text, "hermes", max_calls=1) == (f"\n<tool_call>{TWO}</tool_call>", [A])
    text = f"[TOOL_CALLS] [{ONE}, {TWO}]"
    assert read(text, "mistral", max_calls=1) == (f", {TWO}]", [A])
    for at in range(len(text)):
        assert read_deltas([text[:at], text[at:]], "mistral", max_calls=1) == (f", {TWO}]", [A])


def test_an_id_is_as_long_as_the_template_wants_it():
    (call,) = message_of(events_of([f"[TOOL_CALLS] [{ONE}]"], "mistral"))["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()


PARTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", ONE, TWO, "[", "]", "{", "}", ",",
         ";", '"', "\\", ":", "f", '{"name": "f"', '"arguments": ', " ", "\n", "x", "1"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    dialect=st.sampled_from([*DIALECTS, "forced"]),
    parts=st.lists(st.sampled_from(PARTS), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_no_text_is_read_otherwise_for_being_cut_and_no_letter_of_it_is_lost(dialect, parts, cuts):
    text = "".join(parts)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]
    whole, calls = read(text, dialect)
    assert read_deltas(pieces, dialect) == (whole, calls)
    assert read_deltas(list(text), dialect) == (whole, calls)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)
    if not calls:
        assert whole == text
    else:  # in order, with nothing that the text has not
        rest = iter(text)
        assert all(character in rest for character in (whole or "").strip())


ATTACKS = ["<tool_call>", "<tool_call>{", '<tool_call>{"', "<tool_call" + " ", "[TOOL_CALLS]", "[TOOL_CALLS][", "<",
           "[TOOL_CALLS]f", '{"name": "f", "arguments": {"a": ', "{", "[", '"', "\\", " ", " x", ";{", ONE + ";",
           f"<tool_call>{TWO}</tool_call>", f"[TOOL_CALLS][{TWO},"]  # fmt: skip


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("dialect", [*DIALECTS, "forced"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_four_times_the_text_takes_no_more_than_some_four_times_as_long(dialect, attack, is_cut):
    def seconds(length):
        text = (attack * (length // len(attack) + 1))[:length]
        pieces = [text[at : at + 3] for at in range(0, length, 3)] if is_cut else [text]
        started = time.process_time()
        events_of(pieces, dialect)
        return time.process_time() - started

    short = min(seconds(4_000) for _ in range(3))
    # a quadratic reader would take 16 times as long; the noise of a busy machine is met by trying again
    assert any(seconds(16_000) < 9 * short + 0.002 for _ in range(6))


def test_events_say_which_call_ended():
    events = events_of([f"a<tool_call>{ONE}</tool_call>"], "hermes")
    assert events[0] == Content("a")
    assert events[-1] == CallEnded(0)


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("<tool_call>\n<function=name>", None),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("{% if role == 'ipython' %} Respond as {\"name\": ..., \"parameters\": ...}", "llama3_json"),
        ("{{ messages }}", None),
    ],
)
def test_a_chat_template_tells_how_its_model_writes_calls(template, dialect):
    assert detect_dialect(template) == dialect
