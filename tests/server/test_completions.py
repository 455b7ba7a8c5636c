"""/v1/completions: OpenAI's form, vLLM's further names, and the same tokens as offline."""

import pytest
from server_harness import events_of

from jaxpaged import SamplingParams

PROMPTS = ["ROMEO:\n", "JULIET:\n", "KING:\n"]
GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=2)


@pytest.fixture(scope="module")
def offline(loaded):
    return {output.prompt: output for output in loaded.generate(PROMPTS, GREEDY, use_tqdm=False)}


def test_texts_are_those_of_offline_generation(server, offline):
    answer = server.complete(PROMPTS, max_tokens=8, model="demo").json()
    assert [choice["text"] for choice in answer["choices"]] == [offline[p].outputs[0].text for p in PROMPTS]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    num_prompt = sum(len(offline[p].prompt_token_ids) for p in PROMPTS)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        num_prompt, 24, num_prompt + 24
    )


def test_token_ids_are_prompts_too(server, offline):
    ids = [list(offline[p].prompt_token_ids) for p in PROMPTS]
    texts = [offline[p].outputs[0].text for p in PROMPTS]
    assert [c["text"] for c in server.complete(ids, max_tokens=8).json()["choices"]] == texts
    assert [c["text"] for c in server.complete(ids[0], max_tokens=8).json()["choices"]] == texts[:1]


def test_samples_are_numbered_prompt_by_prompt_and_depend_on_the_seed(server, llm):
    body = {"temperature": 1, "n": 3, "seed": 5, "max_tokens": 6}
    first, second = (server.complete(PROMPTS[:2], **body).json()["choices"] for _ in range(2))
    params = SamplingParams(temperature=1, n=3, seed=5, max_tokens=6)
    expected = [one.text for output in llm.generate(PROMPTS[:2], params, use_tqdm=False) for one in output.outputs]
    assert [choice["text"] for choice in first] == expected
    assert [choice["text"] for choice in second] == expected
    assert [choice["index"] for choice in first] == list(range(6))
    assert len({choice["text"] for choice in first[:3]}) > 1


@pytest.mark.parametrize("n", [1, 2])
def test_a_streams_pieces_make_up_the_whole(server, n):
    body = {"n": n, "temperature": 1 if n > 1 else 0, "seed": 3, "max_tokens": 9, "logprobs": 1, "echo": True}
    whole = server.complete(PROMPTS[:2], **body).json()
    chunks = events_of(server.complete(PROMPTS[:2], stream=True, stream_options={"include_usage": True}, **body))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert {k: v for k, v in chunks[-1]["usage"].items() if k.endswith("_tokens")} == {
        k: v for k, v in whole["usage"].items() if k.endswith("_tokens")
    }
    assert len({chunk["id"] for chunk in chunks}) == 1
    for expected in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(piece["text"] for piece in pieces) == expected["text"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [expected["finish_reason"]]
        for name in ("tokens", "text_offset"):
            joined = [value for p in pieces if p["logprobs"] for value in p["logprobs"][name]]
            assert joined == expected["logprobs"][name], name
        logprobs = [value for p in pieces if p["logprobs"] for value in p["logprobs"]["token_logprobs"]]
        assert logprobs[1:] == pytest.approx(expected["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_logprobs_are_those_of_offline_generation(server, offline):
    (choice,) = server.complete(PROMPTS[0], max_tokens=8, logprobs=2).json()["choices"]
    expected = offline[PROMPTS[0]].outputs[0]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-4)
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert all(len(top) >= 2 for top in logprobs["top_logprobs"])


def test_echo_of_no_output_gives_the_prompts_logprobs_as_evaluation_harnesses_ask(server, llm):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (expected,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    answer = server.complete(PROMPTS[0], max_tokens=0, echo=True, logprobs=1).json()
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPTS[0]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert logprobs[1:] == pytest.approx([e.logprob for e in expected.prompt_logprobs[1:]], abs=1e-4)
    # with one token of output, as others ask, the prompt's are the same
    longer = server.complete(PROMPTS[0], max_tokens=1, echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    assert longer["token_logprobs"][:-1] == logprobs


def test_prompt_logprobs_come_by_token_id(server):
    (choice,) = server.complete(PROMPTS[0], prompt_logprobs=2).json()["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for entry in others:
        assert len(entry) in (2, 3)
        assert all(set(value) == {"logprob", "rank", "decoded_token"} for value in entry.values())


@pytest.mark.parametrize(
    ("body", "check"),
    [
        ({"stop": ["\n"], "max_tokens": 60, "prompt": "ROMEO:"}, lambda c: (c["stop_reason"], c["text"]) == ("\n", "")),
        ({"allowed_token_ids": [41]}, lambda c: c["text"] == "HHHH"),
        ({"logit_bias": {"41": 100}}, lambda c: c["text"] == "HHHH"),
        ({"stop_token_ids": [41], "logit_bias": {"41": 100}},
         lambda c: (c["finish_reason"], c["stop_reason"]) == ("stop", 41)),
        ({"stop_token_ids": [41], "logit_bias": {"41": 100}, "min_tokens": 2, "max_tokens": 9},
         lambda c: c["finish_reason"] == "stop" and c["text"] != ""),
        ({"temperature": 1, "top_k": 1, "min_p": 0.5, "repetition_penalty": 1.2, "top_p": 0.9, "seed": 1,
          "presence_penalty": 0.5, "frequency_penalty": 0.5, "ignore_eos": True, "skip_special_tokens": False,
          "include_stop_str_in_output": True, "bad_words": ["thou"], "cache_salt": "mine", "user": "someone",
          "metadata": {"a": "b"}, "best_of": 1, "suffix": None, "use_beam_search": False},
         lambda c: c["finish_reason"] == "length"),
    ],
)  # fmt: skip
def test_further_names_take_effect(server, body, check):
    answer = server.complete(**body)
    assert answer.status_code == 200, answer.text
    assert check(answer.json()["choices"][0])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"beam_width": 2}, "beam_width"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"suffix": "x"}, "suffix"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": {}}, "guided_json"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"priority": 3}, "priority"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(server, body, param):
    answer = server.complete(**body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
