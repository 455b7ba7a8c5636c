"""Bad requests and faults over HTTP: one clear error each, neighbours untouched, every block back, no 500."""

import contextlib
import json
import socket
import threading
import time

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_harness import events_of, read_all, running_server

from jaxpaged import LLM, SamplingParams
from jaxpaged.core.scheduler_output import RunnerOutput
from jaxpaged.engine.chat_template import ChatTemplate
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.grammars import _Library
from jaxpaged.runner.model_runner import InFlight, ModelRunner
from jaxpaged.server.tool_parser import Content, ToolParser

JSON = {"content-type": "application/json"}


def refused(answer, status, *, code=None, param=None, text=""):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param
    assert text in error["message"]
    return error


def slow_steps(monkeypatch, seconds=0.01):
    step = Engine.step

    def slow_step(engine):
        time.sleep(seconds)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)


# ---- 1 to 8: what a request says


def test_a_prompt_longer_than_the_model_is_refused_with_both_numbers(server):
    error = refused(server.complete([5] * 128), 400, code="context_length_exceeded")
    assert "128 tokens" in error["message"]
    assert "max_model_len is 128" in error["message"]
    assert server.complete([5] * 127, max_tokens=None).json()["usage"]["completion_tokens"] == 1


def test_a_request_larger_than_the_pool_is_refused_with_both_numbers(server):
    error = refused(server.complete([5] * 60, max_tokens=60, n=4, temperature=1), 400, code="context_length_exceeded")
    assert "the pool has 12" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 10**6}, "n"),
        ({"n": 200}, "n"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": ["a"] * 10**6}, "prompt"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 1e308}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"1024": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"prompt": [-1]}, None),
        ({"prompt": [1024]}, None),
        ({"prompt": [True, False]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": {"prompt": "x"}}, "prompt"),
        ({"prompt": [{"prompt": "x"}]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stream": "yes"}, "stream"),
        ({"request_id": "a b"}, "request_id"),
        ({"stream_options": {"x": 1}}, "stream_options"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(server, body, param):
    refused(server.complete(**body), 400, param=param)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty", "repetition_penalty", "min_p", "seed"])
def test_a_number_that_is_none_is_refused_by_name(server, name, value):
    content = f'{{"prompt": "x", "{name}": {value}}}'
    refused(server.http.post("/v1/completions", content=content, headers=JSON), 400, param=name)


def test_a_number_that_is_none_is_found_in_free_forms_too(server):
    content = b'{"messages": [{"role": "user", "content": "x", "y": [1, {"z": NaN}]}]}'
    refused(server.http.post("/v1/chat/completions", content=content, headers=JSON), 400, param="messages")
    content = b'{"prompt": "x", "logit_bias": {"1": Infinity}}'
    refused(server.http.post("/v1/completions", content=content, headers=JSON), 400, param="logit_bias")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"prompt": "x"', b"[]", b"3", b"null", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 100_000, b'{"prompt": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "x"} {}', b"\xef\xbb\xbf{}",
        b'{"prompt": "a\x00"}',
    ],
    ids=lambda content: repr(content[:24]),
)  # fmt: skip
def test_what_is_no_json_object_is_refused(server, content):
    refused(server.http.post("/v1/completions", content=content, headers=JSON), 400, code="invalid_json")


def test_nul_is_text(server):
    assert server.complete("a\0b").status_code == 200


def test_up_to_1024_biases_take_effect(server):
    bias = {str(token_id): -100 for token_id in range(1024) if token_id != 41}
    assert server.complete(logit_bias=bias).json()["choices"][0]["text"] == "HHHH"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("prompt", "messages", "n", "max_tokens", "temperature", "top_p", "top_k", "stop", "logprobs", "logit_bias",
         "stream", "echo", "seed", "model", "stream_options", "bad_words", "tools", "chat_template_kwargs", "tokens",
         "top_logprobs", "priority", "request_id", "cache_salt", "min_tokens", "stop_token_ids")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    base=st.sampled_from([{"prompt": "x", "max_tokens": 2}, {"messages": [{"role": "user", "content": "x"}]}, {}]),
    more=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON_VALUES, max_size=4),
)
def test_no_body_gives_a_500(server, path, base, more):
    content = json.dumps(base | {"max_tokens": 2} | more).encode()
    answer = server.http.post(path, content=content, headers=JSON)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.text) < 2500


@pytest.mark.parametrize("model", ["../../etc/passwd", "http://127.0.0.1:1/model", "other", ""])
def test_another_model_is_not_found_and_not_looked_for(server, model):
    refused(server.complete(model=model), 404, code="model_not_found", param="model")
    refused(server.chat(model=model), 404, code="model_not_found", param="model")


# ---- 5, 14, 15: bytes and time


def test_a_body_over_the_limit_is_refused_before_it_is_read(llm):
    with running_server(llm, max_body_bytes=4096) as server:
        refused(server.complete("x" * 5000), 413, text="4096 bytes")

        def pieces():
            for _ in range(10):
                yield b'{"prompt": "' + b"x" * 1000

        try:
            answer = server.http.post("/v1/completions", content=pieces(), headers=JSON)
        except OSError:
            pass  # the server had closed while this client still sent
        else:
            refused(answer, 413)
        # a length that is only announced
        with server.connect() as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: 50000000000\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert server.complete().status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {}, {**JSON, "content-encoding": "gzip"},
     {"content-type": "application/x-www-form-urlencoded"}],
)  # fmt: skip
def test_another_type_of_body_is_refused(server, headers):
    refused(server.http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers), 415)
    utf8 = {"content-type": "application/json; charset=utf-8"}
    body = b'{"prompt": "x", "max_tokens": 1}'
    assert server.http.post("/v1/completions", content=body, headers=utf8).status_code == 200


def test_what_stalls_is_cut_off_and_others_are_not_kept_waiting(llm):
    with running_server(llm, header_timeout_s=0.6, body_timeout_s=0.6) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with server.connect() as no_head, server.connect() as half_head, server.connect() as half_body:
            half_head.sendall(head)
            half_body.sendall(head + b'content-length: 100\r\n\r\n{"prompt": ')
            assert server.complete().status_code == 200
            stopping = threading.Event()

            def drip():
                while not stopping.wait(0.1):
                    try:
                        half_head.sendall(b"x")  # each byte does not wind the clock up again
                    except OSError:
                        return

            dripping = threading.Thread(target=drip)
            dripping.start()
            try:
                for connection in (no_head, half_head, half_body):
                    received = read_all(connection)
                    assert received.startswith(b"HTTP/1.1 408"), received
                    assert b'"error"' in received
            finally:
                stopping.set()
                dripping.join()
        assert server.complete().status_code == 200


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nlong: " + b"x" * 65_536 + b"\r\n\r\n", (b"400", b"431")),
        (b"GET / HTTP/1.1\r\nhost: [::1]\r\n" + b"".join(b"h%d: x\r\n" % i for i in range(1000)) + b"\r\n", (b"431",)),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 150 + b"\r\n", (b"431",)),
        (b"POST /tokenize HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
         (b"400",)),
        (b"POST /tokenize HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", (b"400",)),
        (b"POST /tokenize HTTP/1.1\r\nhost: [::1]\r\ncontent-length: -5\r\n\r\nhello", (b"400",)),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (b"400",)),
        (b"GET / HTTP/1.1\r\n\r\n", (b"400",)),
    ],
    ids=["64 KB", "1000 headers", "150 headers", "two lengths", "two counts", "negative", "tls", "no host"],
)  # fmt: skip
def test_heads_that_are_wrong_are_refused(server, request_bytes, statuses):
    with server.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request_bytes)
        received = read_all(connection)
        assert received.split(b" ")[1] in statuses, received[:200]
        assert b'"error"' in received
    assert server.complete().status_code == 200


def test_a_reader_that_reads_nothing_is_cut_off_and_its_request_ended(llm, monkeypatch):
    with running_server(llm, write_timeout_s=0.5) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        # long pieces: every token's log-probabilities, of many samples, so that the kernel's buffers fill
        body = {"prompt": "ROMEO:", "stream": True, "max_tokens": 90, "logprobs": 20, "ignore_eos": True}
        ends = server.llm.engine.finished_counts.by_reason
        others = [server.send_raw("/v1/completions", {**body, "max_tokens": 4}) for _ in range(2)]
        num_aborted = ends["abort"]
        monkeypatch.setattr("jaxpaged.server.exchange.to_json", lambda value: json.dumps(value).encode() + b" " * 2**20)
        slow_steps(monkeypatch, 0.03)
        server.send_raw("/v1/completions", body, connection)
        server.wait_until(lambda: ends["abort"] > num_aborted)
        monkeypatch.undo()
        for other in others:
            other.close()
        connection.close()
        server.settle()
        assert server.complete().status_code == 200


# ---- 16: clients that leave


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("when", ["queued", "prefilling", "decoding"])
def test_a_client_that_leaves_ends_its_request_within_a_step(server, monkeypatch, when, is_streamed):
    slow_steps(monkeypatch)
    scheduler = server.llm.engine.scheduler
    others = []
    if when == "queued":  # behind four that hold every row
        others = [server.send_raw("/v1/completions", {"prompt": [5], "max_tokens": 60, "ignore_eos": True})
                  for _ in range(4)]  # fmt: skip
        server.wait_until(lambda: scheduler.counts().running == 4)
    length = 100 if when == "prefilling" else 4  # 32 tokens a step
    body = {"prompt": [7] * length, "max_tokens": 20, "ignore_eos": True, "stream": is_streamed}
    connection = server.send_raw("/v1/completions", body)
    server.wait_until(lambda: server.num_live == len(others) + 1)
    (mine,) = [group for group in scheduler.groups if group.request.num_prompt_tokens == length]
    if when == "queued":
        time.sleep(0.05)
        assert mine.first_scheduled_time_s is None
    if when == "decoding":
        server.wait_until(lambda: mine.sequences[0].num_output_tokens >= 2)
    connection.close()
    num_steps = server.llm.engine.host_times.num_steps
    server.wait_until(lambda: mine.is_finished)
    assert server.llm.engine.host_times.num_steps - num_steps < 10
    assert mine.sequences[0].finish_reason.value == "abort"
    assert len(mine.sequences[0].output_token_ids) < 20
    for other in others:
        other.close()


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_while_its_request_is_swapped_out_ends_it(server, monkeypatch, is_streamed):
    slow_steps(monkeypatch)
    body = {"max_tokens": 100, "ignore_eos": True, "stream": is_streamed}
    connections = [server.send_raw("/v1/completions", {**body, "prompt": [number] * 20}) for number in range(4)]
    scheduler = server.llm.engine.scheduler
    server.wait_until(lambda: scheduler.counts().swapped > 0)
    for connection in connections:
        connection.close()
    server.settle()


# ---- 17 to 22: the engine's faults


def test_requests_for_more_than_the_pool_all_end_with_the_tokens_of_an_ample_one(server, llm):
    prompts = [f"{word} {number}:\n" for number in range(8) for word in ("ROMEO", "KING")]
    ample = LLM("demo", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, num_device_blocks=64,
                host_memory_bytes=0, show_progress=False)
    expected = [
        ample.generate(prompt, _greedy(70), use_tqdm=False)[0].outputs[0].text for prompt in prompts
    ]
    num_before = llm.stats().num_preemptions
    answer = server.complete(prompts, max_tokens=70, ignore_eos=True).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert llm.stats().num_preemptions > num_before
    # the engine's thread hands its counters over between steps
    server.wait_until(lambda: server.metric("vllm:num_preemptions_total") == llm.stats().num_preemptions)


def _greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def test_a_full_queue_answers_at_once_when_to_come_again(llm, monkeypatch):
    slow_steps(monkeypatch, 0.02)
    with running_server(llm, max_queued_requests=5) as server:
        body = {"prompt": [5], "max_tokens": 60, "ignore_eos": True}
        held = [server.send_raw("/v1/completions", body) for _ in range(5)]
        server.wait_until(lambda: server.engine.num_unfinished == 5)
        answer = server.complete()
        assert server.engine.num_unfinished == 5  # it did not wait for any of them
        refused(answer, 429, code="queue_full")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1
        refused(server.complete(["x"] * 6), 400, text="max_queued_requests")
        for connection in held:
            assert b'"completion_tokens":60' in read_all(connection)
            connection.close()
        assert server.metric("jaxpaged:requests_rejected_total", reason="queue_full") == 1


def test_an_error_of_the_device_ends_what_it_touched_and_the_server_goes_on(server, monkeypatch):
    begin, calls = ModelRunner.begin, iter(range(10**6))

    def failing_once(runner, *arguments):
        if next(calls) == 6:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return begin(runner, *arguments)

    expected = server.complete(max_tokens=9).json()["choices"][0]["text"]
    monkeypatch.setattr(ModelRunner, "begin", failing_once)
    error = refused(server.complete(max_tokens=50, ignore_eos=True), 500, code="generation_failed")
    assert "RESOURCE_EXHAUSTED" in error["message"]
    assert error["type"] == "server_error"
    assert server.http.get("/health").status_code == 200
    assert server.complete(max_tokens=9).json()["choices"][0]["text"] == expected


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_whose_logits_are_nan_ends_alone_and_is_counted(server, monkeypatch, is_streamed):
    read, bad = InFlight.read, (7, 8, 9)

    def with_nan(step):
        outputs = read(step).outputs
        return RunnerOutput(tuple(
            one._replace(is_finite=one.is_finite and not (
                item.sequence.request.prompt_token_ids == bad and item.sequence.num_output_tokens > 3
            ))
            for item, one in zip(step.plan.scheduled, outputs, strict=bool(outputs))
        ))

    counted = {"name": "vllm:request_success_total", "finished_reason": "error"}
    num_before = server.metric(**counted)
    slow_steps(monkeypatch)  # so that pieces come before the fault
    with server.send_raw("/v1/completions", {"prompt": "x", "max_tokens": 30, "ignore_eos": True}) as other:
        monkeypatch.setattr(InFlight, "read", with_nan)
        answer = server.complete(list(bad), max_tokens=30, ignore_eos=True, stream=is_streamed)
        if is_streamed:
            *chunks, last = events_of(answer)
            assert chunks
            error = last["error"]
        else:
            error = refused(answer, 500)
        assert error["code"] == "generation_failed"
        assert "NaN" in error["message"]
        assert b'"completion_tokens":30' in read_all(other)
    assert server.http.get("/health").status_code == 200
    assert server.metric(**counted) == num_before + 1


def test_an_error_behind_the_first_piece_goes_into_the_stream(server, monkeypatch):
    append = Engine._append

    def failing_later(engine, live, event, now):
        if event.sequence.num_output_tokens == 5 and live.is_streamed:
            raise RuntimeError("a bad token")
        append(engine, live, event, now)

    monkeypatch.setattr(Engine, "_append", failing_later)
    other = server.send_raw("/v1/completions", {"prompt": "x", "max_tokens": 20, "ignore_eos": True})
    *chunks, last = events_of(server.complete(stream=True, max_tokens=20, ignore_eos=True))
    assert chunks
    assert "a bad token" in last["error"]["message"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert b'"completion_tokens":20' in read_all(other)  # its neighbour is untouched
    other.close()


def test_a_fault_of_the_server_itself_is_one_500_without_its_inner_words(server, monkeypatch, caplog):
    monkeypatch.setattr("jaxpaged.server.app.CompletionJob.start", lambda *a: (_ for _ in ()).throw(KeyError("secret")))
    answer = server.complete()
    error = refused(answer, 500, code="internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    monkeypatch.undo()
    assert server.complete().status_code == 200


TOOLS = [{"type": "function", "function": {"name": "clock"}}]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_fault_in_reading_calls_ends_that_request_alone(server, monkeypatch, is_streamed):
    source = "{{ tools }}{% for message in messages %}{{ message.content }}{% endfor %}"
    monkeypatch.setattr(server.llm.engine.tokenizer, "_chat_template", ChatTemplate(source, {}))
    slow_steps(monkeypatch)  # so that no two pieces come as one
    calls = iter(range(10**6))

    def failing(parser, text):
        if next(calls) == (1 if is_streamed else 0):
            raise KeyError("secret")
        return [Content(text)]

    monkeypatch.setattr(ToolParser, "feed", failing)
    body = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 30, "stream": is_streamed}
    with server.send_raw("/v1/completions", {"prompt": "x", "max_tokens": 30, "ignore_eos": True}) as other:
        answer = server.chat(**body)
        if is_streamed:
            *chunks, last = events_of(answer)
            assert chunks
            assert last["error"]["code"] == "internal_error"
        else:
            refused(answer, 500, code="internal_error")
        assert "secret" not in answer.text
        assert b'"completion_tokens":30' in read_all(other)


def test_a_grammar_that_fails_half_way_ends_that_request_alone(server, monkeypatch):
    mask = _Library.mask

    def failing(library, matcher):
        if next(calls) == 4:
            raise RuntimeError("a limit was met")
        return mask(library, matcher)

    calls = iter(range(10**6))
    with server.send_raw("/v1/completions", {"prompt": "x", "max_tokens": 30, "ignore_eos": True}) as other:
        monkeypatch.setattr(_Library, "mask", failing)
        error = refused(server.complete(max_tokens=30, structured_outputs={"regex": "[a-z ]{50}"}), 500)
        assert error["code"] == "generation_failed"
        assert "a limit was met" in error["message"]
        assert b'"completion_tokens":30' in read_all(other)
    assert server.complete(max_tokens=60, structured_outputs={"regex": "[ab]{5}"}).status_code == 200


def test_a_dead_engine_is_told_by_health_and_by_every_answer(monkeypatch):
    llm = LLM("demo", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, num_device_blocks=13,
              host_memory_bytes=2**22, preemption="swap", show_progress=False)
    with running_server(llm, is_checked=False) as server:
        is_to_die, step = threading.Event(), Engine.step

        def dying(engine):
            time.sleep(0.01)
            if is_to_die.is_set():
                raise RuntimeError("lost")
            return step(engine)

        monkeypatch.setattr(Engine, "step", dying)
        body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
        with server.send_raw("/v1/completions", body) as held:
            with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as streamed:
                lines = streamed.iter_lines()
                assert json.loads(next(lines).removeprefix("data: "))["choices"]
                is_to_die.set()
                *_, error, done = [line for line in lines if line]
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
            assert done == "data: [DONE]"
            assert read_all(held).startswith(b"HTTP/1.1 500")
        for path in ("/health", "/health/ready", "/health/live"):
            answer = server.http.get(path)
            assert (answer.status_code, answer.json()) == (503, {"state": "dead"})
        refused(server.complete(), 503, code="engine_dead")
        assert server.metric("jaxpaged:engine_state", state="dead") == 1
        assert server.metric("jaxpaged:requests_failed_total", reason="engine_dead") == 2


def test_a_step_that_hangs_is_told_by_health_and_ends_its_requests_until_it_goes_on(llm, monkeypatch, caplog):
    with running_server(llm, step_timeout_s=0.3) as server:
        is_to_go_on, step = threading.Event(), Engine.step

        def hanging(engine):
            assert is_to_go_on.wait(30)
            return step(engine)

        monkeypatch.setattr(Engine, "step", hanging)
        try:
            refused(server.complete(), 500, code="engine_hung", text="step_timeout_s")
            for path in ("/health", "/health/ready", "/health/live"):
                answer = server.http.get(path)
                assert answer.status_code == 503
                assert answer.json()["state"] == "hung"
                assert "0.3 s" in answer.json()["reason"]
            refused(server.complete(), 503, code="engine_hung")
            assert server.metric("jaxpaged:requests_failed_total", reason="engine_hung") == 1
            assert server.metric("jaxpaged:requests_rejected_total", reason="engine_hung") == 1
        finally:
            is_to_go_on.set()
        server.wait_until(lambda: server.http.get("/health/live").status_code == 200)
        assert server.http.get("/health").json() == {"state": "ready"}
        assert server.complete().status_code == 200
    assert [record.msg for record in caplog.records if "engine" in record.msg] == [
        "the engine hangs", "the engine goes on"
    ]


# ---- 24: names


def test_a_request_id_in_use_is_refused(server, monkeypatch):
    slow_steps(monkeypatch)
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "request_id": "mine"}
    held = server.send_raw("/v1/completions", body)
    server.wait_until(lambda: server.num_live == 1)
    refused(server.complete(request_id="mine"), 409, code="duplicate_request_id", param="request_id")
    held.close()
    server.settle()
    assert server.complete(request_id="mine").json()["id"] == "cmpl-mine"
