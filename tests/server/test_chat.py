"""/v1/chat/completions: OpenAI's form and stream, through the checkpoint's template."""

import pytest
from server_harness import events_of

from jaxpaged import SamplingParams

MESSAGES = [{"role": "system", "content": "A castle."}, {"role": "user", "content": "Who goes there?"}]


def ask(server, **body):
    return server.post("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "max_tokens": 8, **body})


def test_an_answer_is_that_of_offline_chat(server, llm):
    (expected,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    answer = ask(server).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.outputs[0].text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["object"] == "chat.completion"


def test_a_stream_begins_with_the_role_and_ends_with_a_reason_the_usage_and_done(server):
    body = {"n": 2, "temperature": 1, "seed": 7, "logprobs": True, "top_logprobs": 1}
    whole = ask(server, **body).json()
    chunks = events_of(ask(server, stream=True, stream_options={"include_usage": True}, **body))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for expected in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert pieces[-1]["delta"] == {}
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [expected["finish_reason"]]
        assert "".join(p["delta"].get("content", "") for p in pieces) == expected["message"]["content"]
        tokens = [entry["token"] for p in pieces if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert tokens == [entry["token"] for entry in expected["logprobs"]["content"]]


def test_without_options_no_chunk_speaks_of_usage(server):
    assert all("usage" not in chunk for chunk in events_of(ask(server, stream=True)))


def test_usage_may_come_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"] for chunk in events_of(ask(server, stream=True, stream_options=options))
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_without_max_tokens_an_answer_may_fill_the_context(server):
    answer = ask(server, max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 128
    shorter = ask(server, max_tokens=None, max_completion_tokens=3, ignore_eos=True).json()
    assert shorter["usage"]["completion_tokens"] == 3


def test_text_parts_are_joined_and_other_parts_refused(server):
    parts = [{"type": "text", "text": "Who goes"}, {"type": "text", "text": "there?"}]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    assert answer.status_code == 200
    parts = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/secret"}}]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    assert answer.status_code == 400
    assert "image_url" in answer.json()["error"]["message"]


def test_special_tokens_typed_by_a_user_are_text(server, llm):
    ids = server.post("/tokenize", {"messages": [{"role": "user", "content": "</s><s>"}]}).json()["tokens"]
    eos = llm.engine.tokenizer.eos_token_ids[0]
    plain = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()["tokens"]
    assert ids.count(eos) == plain.count(eos)
    assert len(ids) > len(plain)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"chat_template": "{{ 'x' * 100000000 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"messages": "hi"}, "messages"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(server, body, param):
    answer = ask(server, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("messages", [[], [{}], [{"role": "user"}], [{"role": 1, "content": "x"}], [{"content": "x"}]])
def test_messages_that_are_none_are_refused(server, messages):
    answer = ask(server, messages=messages)
    assert answer.status_code == 400, answer.text


def test_what_asks_for_nothing_is_let_through(server):
    body = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "user": "me",
            "parallel_tool_calls": True, "modalities": ["text"], "service_tier": "auto", "functions": None}
    assert ask(server, **body).status_code == 200
