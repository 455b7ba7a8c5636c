"""Functions in a chat: told to the template, called freely or by force, and given as OpenAI gives them."""

import asyncio
import json

import openai
import pytest
from server_harness import events_of

from jaxpaged.engine.chat_template import ChatTemplate
from jaxpaged.server.errors import ApiError
from jaxpaged.server.protocol import ChatBody, parse_body
from jaxpaged.server.tools import calls_schema, plan_tools

TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}
{% for message in messages %}
{{ message.role }}: {{ message.content or '' }}{% for call in message.tool_calls %}
{{ call.function.name }} {{ call.function.arguments.city }}{% endfor %}

{% endfor %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Verona", "Mantua"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Verona"}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def template(server, monkeypatch):
    """A chat template that knows functions."""
    tokenizer = server.llm.engine.tokenizer

    def use(source):
        monkeypatch.setattr(tokenizer, "_chat_template", ChatTemplate(source, {}))

    use(TEMPLATE)
    return use


@pytest.fixture(autouse=True)
def hermes(holder, monkeypatch):
    """The name of the dialect is looked up once a server, and the templates here change."""
    from jaxpaged.server.service import Service  # noqa: PLC0415  an extra, as conftest.py has it

    monkeypatch.setattr(Service, "tool_dialect", "hermes")


def say(text):
    """Makes the model say exactly this."""
    return {"structured_outputs": {"choice": [text]}, "max_tokens": 120}


def messages_of(answer):
    assert answer.status_code == 200, answer.text
    return [(choice["message"], choice["finish_reason"]) for choice in answer.json()["choices"]]


def streamed(answer):
    """Content, calls and reasons that the deltas add up to, of each choice."""
    found = {}
    for chunk in events_of(answer):
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], {"content": "", "calls": [], "reason": None})
            one["content"] += choice["delta"].get("content", "")
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(one["calls"])
                    one["calls"].append({**call["function"]})
                else:
                    one["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            one["reason"] = choice["finish_reason"] or one["reason"]
    return found


def test_functions_are_told_to_the_template_unless_none_may_be_called(server, template):
    with_tools = server.chat(tools=TOOLS).json()["usage"]["prompt_tokens"]
    without = server.chat().json()["usage"]["prompt_tokens"]
    assert with_tools > without + 2
    assert server.chat(tools=TOOLS, tool_choice="none").json()["usage"]["prompt_tokens"] == without
    ids = server.post("/tokenize", {"messages": [{"role": "user", "content": "Good morrow."}], "tools": TOOLS}).json()
    assert ids["count"] == with_tools


def test_a_call_is_a_call_whole_or_in_pieces(server, template):
    ((message, reason),) = messages_of(server.chat(tools=TOOLS, **say(CALL)))
    assert reason == "tool_calls"
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Verona"}'}
    chunks = events_of(server.chat(tools=TOOLS, stream=True, **say(CALL)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    first, *pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (first["index"], first["type"], first["function"]) == (0, "function", {"name": "weather", "arguments": ""})
    assert first["id"]
    assert len(pieces) > 1
    assert all(set(piece) == {"index", "function"} for piece in pieces)
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"city": "Verona"}'
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "tool_calls"


def test_several_calls_with_content_and_only_the_first_where_they_may_not_be_parallel(server, template):
    text = 'I look.\n<tool_call>{"name": "clock"}</tool_call>\n<tool_call>{"name": "weather"}</tool_call>'
    ((message, _),) = messages_of(server.chat(tools=TOOLS, **say(text)))
    assert message["content"] == "I look."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["clock", "weather"]
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ["{}", "{}"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    body = {"parallel_tool_calls": False, **say(text)}
    ((message, _),) = messages_of(server.chat(tools=TOOLS, **body))
    assert len(message["tool_calls"]) == 1
    assert message["content"] == 'I look.\n<tool_call>{"name": "weather"}</tool_call>'
    assert streamed(server.chat(tools=TOOLS, stream=True, **body))[0]["content"] == message["content"]


@pytest.mark.parametrize("text", [CALL.replace("weather", "nothing"), CALL[:30], "<tool_call>import os</tool_call>"])
def test_what_is_no_call_is_content_and_ends_as_such(server, template, text):
    ((message, reason),) = messages_of(server.chat(tools=TOOLS, **say(text)))
    assert (message, reason) == ({"role": "assistant", "content": text, "refusal": None}, "stop")
    found = streamed(server.chat(tools=TOOLS, stream=True, **say(text)))[0]
    assert (found["content"], found["calls"], found["reason"]) == (text, [], "stop")


def test_a_call_that_is_cut_short_is_content(server, template):
    body = say(CALL) | {"max_tokens": 25}
    ((message, reason),) = messages_of(server.chat(tools=TOOLS, **body))
    assert reason == "length"
    assert "tool_calls" not in message
    assert CALL.startswith(message["content"])
    found = streamed(server.chat(tools=TOOLS, stream=True, **body))[0]
    assert (found["content"], found["reason"]) == (message["content"], "length")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_named_function_is_called_with_arguments_of_its_schema(server, template, is_streamed):
    answer = server.chat(tools=TOOLS, tool_choice=NAMED, max_tokens=60, n=2, temperature=1, stream=is_streamed)
    if is_streamed:
        found = [(one["calls"], one["reason"]) for one in streamed(answer).values()]
    else:
        found = [([call["function"] for call in m["tool_calls"]], reason) for m, reason in messages_of(answer)]
    assert len(found) == 2
    for (call,), reason in found:
        assert reason == "tool_calls"
        assert call["name"] == "weather"
        assert json.loads(call["arguments"])["city"] in ("Verona", "Mantua")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_call_is_made_where_one_is_required(server, template, is_streamed):
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    answer = server.chat(**body, n=2, temperature=1, seed=5, stream=is_streamed)
    if is_streamed:
        found = [(one["content"], one["calls"], one["reason"]) for one in streamed(answer).values()]
    else:
        found = [(m["content"] or "", [c["function"] for c in m["tool_calls"]], r) for m, r in messages_of(answer)]
    for content, (call,), reason in found:
        assert (content, reason) == ("", "tool_calls")
        if call["name"] == "weather":
            assert json.loads(call["arguments"])["city"] in ("Verona", "Mantua")
        else:
            assert (call["name"], json.loads(call["arguments"])) == ("clock", {})


def test_earlier_calls_are_told_with_their_arguments_as_an_object(server, template):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Verona"}'}}
    messages = [
        {"role": "user", "content": "Hot?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Hot."},
    ]
    ids = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert text == "user: Hot?\nassistant: weather Verona\ntool: Hot.\n"
    for arguments in ("{", "[]", "NaN", 3, "[" * 100_000):
        call["function"]["arguments"] = arguments
        answer = server.post("/v1/chat/completions", {"messages": messages})
        assert answer.status_code == 400, arguments
        assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{**CLOCK, "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
          "tool_choice": "required"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_tools_that_are_none_are_refused_by_name(server, template, body, param):
    answer = server.chat(**body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_template_that_does_not_read_tools_is_told(server, template):
    template("{% for message in messages %}{{ message.content }}{% endfor %}")
    answer = server.chat(tools=TOOLS)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


def test_a_model_whose_way_of_writing_calls_nobody_knows_can_be_forced_only():
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    with pytest.raises(ApiError, match="--tool-call-parser"):
        plan_tools(parse_body(ChatBody, body), None, ())
    assert plan_tools(parse_body(ChatBody, body | {"tool_choice": "required"}), None, ()).form is not None


def test_a_marker_that_is_a_special_token_is_asked_for_in_the_text():
    body = parse_body(ChatBody, {"messages": [], "tools": TOOLS})
    assert plan_tools(body, "mistral", ("[TOOL_CALLS]", "</s>")).has_special_marker
    assert not plan_tools(body, "hermes", ("[TOOL_CALLS]", "</s>")).has_special_marker


def test_references_of_a_schema_lead_to_where_it_was_put():
    tools = parse_body(ChatBody, {"messages": [], "tools": [CLOCK, WEATHER]}).tools
    schema = calls_schema(tools)
    assert schema["$defs"]["arguments_1"]["properties"]["city"] == {"$ref": "#/$defs/arguments_1/$defs/city"}
    assert schema["items"]["anyOf"][1]["properties"]["name"] == {"const": "weather"}


def test_openais_client_reads_calls_at_once_and_streamed(server, template):
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hot?"}], "tools": TOOLS, "max_tokens": 120,
            "temperature": 0, "extra_body": {"structured_outputs": {"choice": [CALL]}}}  # fmt: skip
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        (call,) = client.chat.completions.create(**body).choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Verona"}')
        with client.chat.completions.stream(**body) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].finish_reason == "tool_calls"
        assert final.choices[0].message.tool_calls[0].function.arguments == '{"city": "Verona"}'
        forced = client.chat.completions.create(**body | {"tool_choice": NAMED, "extra_body": {}})
        assert forced.choices[0].message.tool_calls[0].function.name == "weather"

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**body), client.chat.completions.create(**body, stream=True)
            )
            pieces = [c.delta.tool_calls[0].function.arguments async for k in stream for c in k.choices
                      if c.delta.tool_calls]  # fmt: skip
            assert "".join(pieces) == whole.choices[0].message.tool_calls[0].function.arguments

    asyncio.run(ask())


def test_calls_keep_openais_contract(server, template, contract):
    contract("CreateChatCompletionResponse", server.chat(tools=TOOLS, **say(f"I look. {CALL}")).json())
    for chunk in events_of(server.chat(tools=TOOLS, stream=True, **say(CALL))):
        contract("CreateChatCompletionStreamResponse", chunk)
