"""Forms of output and beam search over HTTP: what the engine gives for them, or a 400 with the reason."""

import json
import re

import pytest
from server_harness import events_of

from jaxpaged import BeamSearchParams, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["knight", "king"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
STRICT = {"name": "person", "schema": SCHEMA, "strict": True}


def text_of(answer):
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("send", ["complete", "chat"])
def test_an_output_has_the_form_asked_for_under_either_name(server, send):
    ask = getattr(server, send)
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": STRICT}},
        {"structured_outputs": {"json": SCHEMA, "regex": None, "whitespace_pattern": "[ ]?"}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
    ):
        value = json.loads(text_of(ask(max_tokens=60, **body)))
        assert value["kind"] in ("knight", "king")
        assert 1 <= value["age"] <= 9
    assert text_of(ask(max_tokens=20, structured_outputs={"choice": ["yes", "no"]})) in ("yes", "no")
    assert re.fullmatch("[ab]{3}c", text_of(ask(max_tokens=20, structured_outputs={"regex": "[ab]{3}c"})))
    assert text_of(ask(max_tokens=20, structured_outputs={"grammar": 'start: "thou" " art"'})) == "thou art"


def test_a_json_object_begins_as_one_and_is_that_of_the_engine(server, llm):
    form = StructuredOutputsParams(json_object=True, whitespace_pattern=" ?")
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=form)
    (expected,) = llm.generate("ROMEO:\n", params, use_tqdm=False)
    (choice,) = server.complete(max_tokens=20, response_format={"type": "json_object"}).json()["choices"]
    assert choice["text"] == expected.outputs[0].text
    assert choice["text"].startswith("{")


def test_a_stream_with_a_form_is_the_whole_answer_in_pieces(server):
    body = {"max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": STRICT}}
    whole = text_of(server.chat(**body))
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in events_of(server.chat(stream=True, **body))]
    assert "".join(pieces) == whole
    assert len(pieces) > 3


def test_text_is_no_form(server):
    plain = server.complete(max_tokens=9).json()["choices"]
    assert server.complete(max_tokens=9, response_format={"type": "text"}).json()["choices"] == plain


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
         "response_format", "cannot be compiled"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format", "one"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex cannot be compiled"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs", "string"),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs", "grammar cannot be compiled"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "non-empty"),
        ({"structured_outputs": {"ebnf": "x"}}, "structured_outputs", "Lark"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "not supported"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not valid JSON"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs", "65536"),
        ({"guided_json": SCHEMA}, "guided_json", "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_form_that_is_none_is_refused_before_anything_is_generated(server, body, param, text, is_streamed):
    accepted = server.metric("jaxpaged:requests_accepted_total")
    for answer in (server.complete(stream=is_streamed, **body), server.chat(stream=is_streamed, **body)):
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert text in error["message"]
    assert server.metric("jaxpaged:requests_accepted_total") == accepted


# ---- beam search


def test_beams_are_those_of_the_engine_best_first(server, llm):
    params = BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.5, early_stopping=True)
    (expected,) = llm.beam_search("ROMEO:\n", params, use_tqdm=False)
    texts = [one.text for one in expected.outputs]
    body = {"use_beam_search": True, "max_tokens": 8, "length_penalty": 0.5, "early_stopping": True}
    for width in ({"n": 3}, {"beam_width": 3}, {"beam_width": 3, "n": 3}):
        answer = server.complete(**body, **width).json()
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    best = server.complete(**body, beam_width=3, n=1).json()
    assert [choice["text"] for choice in best["choices"]] == texts[:1]
    assert best["usage"]["completion_tokens"] == len(expected.outputs[0].token_ids)


def test_beams_of_several_prompts_and_of_a_chat(server, llm):
    prompts = ["ROMEO:\n", "KING:\n"]
    expected = llm.beam_search(prompts, BeamSearchParams(beam_width=2, max_tokens=5), use_tqdm=False)
    answer = server.complete(prompts, use_beam_search=True, n=2, max_tokens=5, logprobs=1).json()
    assert [c["text"] for c in answer["choices"]] == [one.text for output in expected for one in output.outputs]
    assert all(len(choice["logprobs"]["tokens"]) == 5 for choice in answer["choices"])
    chat = server.chat(use_beam_search=True, n=2, max_tokens=5).json()
    assert len({choice["message"]["content"] for choice in chat["choices"]}) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True, "n": 2}, "stream"),
        ({}, "beam_width"),
        ({"n": 2, "temperature": 0.7}, "temperature"),
        ({"n": 2, "top_p": 0.5}, "top_p"),
        ({"n": 2, "seed": 3}, "seed"),
        ({"n": 2, "min_tokens": 3}, "min_tokens"),
        ({"n": 2, "presence_penalty": 1.0}, "presence_penalty"),
        ({"n": 4, "beam_width": 2}, "n"),
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 65}, "beam_width"),
        ({"beam_width": 5}, None),  # above max_num_seqs
        ({"n": 2, "length_penalty": 1e9}, "length_penalty"),
        ({"n": 2, "early_stopping": "never"}, "early_stopping"),
    ],
)
def test_what_a_beam_search_cannot_do_is_refused_by_name(server, body, param):
    answer = server.complete(use_beam_search=True, **body)
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param
