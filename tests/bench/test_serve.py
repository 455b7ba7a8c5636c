"""The load generator against a server of known delays and faults: times and rates are those, errors never count."""

import json
import math

import pytest

from bench.serve import main
from bench.serving import ServerProcess
from tests.bench.scripted_server import END, HEAD, ScriptedServer, event, raw, tokens, whole


@pytest.fixture
def bench(capsys):
    """Runs the bench against a server; the exit code, the last line as JSON, and what was told on stderr."""

    def run(server, *flags):
        code = main(["--base-url", server.url, "--quiet", "--num-warmups", "0", "--lengths", "fixed", *flags])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


def test_known_delays_give_the_known_times(bench):
    """First token after 150 ms, then one every 20 ms: 11 tokens take 350 ms, 4 at a time, 8 in two rounds."""
    with ScriptedServer(tokens(ttft_s=0.15, gap_s=0.02)) as server:
        code, result, _ = bench(
            server, "--num-prompts", "8", "--output-len", "11", "--input-len", "40", "--max-concurrency", "4"
        )
    assert code == 0
    assert (result["completed"], result["failed"]) == (8, 0)
    # nothing comes sooner than it was sent; on a busy machine things are seen later, the first token too
    assert 150 <= result["median_ttft_ms"] < 300
    assert 12 < result["median_tpot_ms"] < 50
    assert 12 < result["median_itl_ms"] < 50
    assert 350 <= result["median_e2el_ms"] < 900
    assert 0.7 <= result["duration"] < 3
    assert result["request_throughput"] == pytest.approx(8 / result["duration"])
    assert result["output_throughput"] == pytest.approx(88 / result["duration"])
    assert (result["max_concurrent_requests"], server.max_open) == (4, 4)
    assert result["total_output_tokens"] == 88
    assert result["total_input_tokens"] == 8 * 40  # the server has two tokens a word, which was found out
    assert result["tokens_per_word"] == 2
    assert result["output_tokens_counted_by"] == "usage"
    assert result["tokens_per_chunk"] == 1


def test_goodput_counts_requests_that_keep_every_limit(bench):
    with ScriptedServer(tokens(), tokens(ttft_s=0.5)) as server:
        _, result, _ = bench(server, "--num-prompts", "8", "--output-len", "2", "--goodput", "ttft:250", "e2el:9000")
    assert result["completed"] == 8
    assert result["request_goodput"] == pytest.approx(4 / result["duration"])
    assert result["goodput_limits_ms"] == {"ttft": 250, "e2el": 9000}


FAULTS = {
    "429": (raw(whole(b"429 Too Many Requests", {"error": {"message": "full"}})), "HTTP 429: full"),
    "500 without JSON": (raw(b"HTTP/1.1 500 Oops\r\n\r\nboom"), "HTTP 500: boom"),
    "error within": (raw(HEAD, event({"choices": [{"text": "a"}]}), event({"error": {"message": "lost"}}), END),
                     "an error within the stream: lost"),
    "hang": (raw(HEAD, event({"choices": [{"text": "a"}]}), stays_open=True), "no end of the answer within 0.3 s"),
    "silence": (raw(stays_open=True), "no end of the answer within 0.3 s"),
    "bad JSON": (raw(HEAD, event(b'{"choices": [')), "an event is no JSON: "),
    "bad choice": (raw(HEAD, event({"choices": [5]})), "an event's choice is not as OpenAI's"),
    "bad size": (raw(HEAD, b"zz\r\n"), "a chunk's size is 'zz'"),
    "too long a chunk": (raw(HEAD, b"2\r\nabcdef\r\n"), "a chunk of 2 bytes is longer than it says"),
    "no HTTP": (raw(b"SSH-2.0-x\r\n\r\n"), "which is no HTTP"),
    "closed at once": (raw(), "the connection was closed before an answer came"),
    "closed within": (raw(HEAD, event({"choices": [{"text": "a"}]})), "the connection was closed within the answer"),
    "no end": (raw(HEAD, event({"choices": [{"text": "a"}]}), END), "without [DONE] and without a finish_reason"),
    "no token": (raw(HEAD, event(b"[DONE]"), END), "the stream ended without a token"),
    "no stream": (raw(whole(b"200 OK", {"choices": [{"text": "all at once"}]})), "application/json, not a stream"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_error_of_that_request_and_no_other(name, bench, tmp_path):
    answer, told = FAULTS[name]
    file = tmp_path / "result.json"
    with ScriptedServer(answer, tokens(), tokens()) as server:
        code, result, err = bench(
            server, "--num-prompts", "6", "--output-len", "3", "--timeout", "0.3", "--output", str(file),
            "--save-detailed",
        )  # fmt: skip
    assert code == 0
    assert (result["completed"], result["failed"]) == (4, 2)
    assert result["total_output_tokens"] == 12
    (error,) = result["error_counts"]
    assert told in error
    assert result["error_counts"][error] == 2
    assert f"2x {error}" in err
    details = json.loads(file.read_text())
    failed = [index for index, one in enumerate(details["errors"]) if one]
    assert len(failed) == 2
    assert all(details["output_lens"][index] == 0 and not details["itls"][index] for index in failed)
    assert [len(gaps) for index, gaps in enumerate(details["itls"]) if index not in failed] == [2] * 4
    assert result.items() <= details.items()


def test_where_all_fail_the_exit_code_says_so(bench):
    with ScriptedServer(FAULTS["429"][0]) as server:
        code, result, err = bench(server, "--num-prompts", "3")
    assert code == 1
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 3, None)
    assert "3 of 3 requests failed" in err


def test_chunks_of_several_tokens_are_told(bench):
    with ScriptedServer(tokens(per_chunk=4, gap_s=0.02)) as server:
        _, result, err = bench(server, "--num-prompts", "2", "--output-len", "12")
    assert result["tokens_per_chunk"] == 4
    assert 10 < result["mean_itl_ms"] < 60  # two gaps between three chunks, of 20 ms
    assert result["mean_tpot_ms"] == pytest.approx(2 * result["mean_itl_ms"] / 11)
    assert "a chunk holds 4.00 tokens" in err


def test_a_server_without_usage_has_its_chunks_counted_and_that_is_told(bench):
    with ScriptedServer(tokens(has_usage=False)) as server:
        _, result, err = bench(server, "--num-prompts", "2", "--output-len", "5", "--input-len", "30")
    assert (result["total_output_tokens"], result["output_tokens_counted_by"]) == (10, "chunks")
    assert result["total_input_tokens"] == 60  # as asked for
    assert "the server counts no tokens" in err


def test_a_chat_is_asked_as_one_and_its_opening_is_no_token(bench):
    with ScriptedServer(tokens(ttft_s=0.05)) as server:
        _, result, _ = bench(
            server, "--endpoint", "/v1/chat/completions", "--num-prompts", "2", "--output-len", "3", "--input-len", "45"
        )
    assert result["median_ttft_ms"] >= 50  # the opening came at once
    assert result["total_input_tokens"] == 90  # five of them the template's
    assert result["tokens_per_chunk"] == 1
    assert server.bodies[0]["messages"][0]["role"] == "user"
    assert result["backend"] == "openai-chat"


def test_connections_are_kept_and_one_closed_meanwhile_is_no_error(bench):
    closing = raw(HEAD, event({"choices": [{"text": "a", "finish_reason": "stop"}]}), event(b"[DONE]"), END)
    with ScriptedServer(tokens(), tokens(), closing) as server:
        _, result, _ = bench(server, "--num-prompts", "9", "--max-concurrency", "1")
    assert result["completed"] == 9
    assert server.num_connections == 1 + 2  # two were closed before the next request, three at the end


def test_what_is_sent_is_what_was_asked_for(bench, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with ScriptedServer(tokens(), api_key="secret") as server:
        code, result, _ = bench(
            server, "--num-prompts", "3", "--output-len", "7", "--api-key-env", "MY_KEY", "--model", "other",
            "--extra-body", '{"cache_salt": "run 1", "ignore_eos": null, "temperature": 0.5}', "--request-rate", "50",
        )  # fmt: skip
    assert code == 0
    assert "secret" not in json.dumps(result)
    assert len({body.pop("prompt") for body in server.bodies}) == 3
    assert server.bodies == [
        {
            "model": "other", "max_tokens": 7, "temperature": 0.5, "stream": True,
            "stream_options": {"include_usage": True}, "cache_salt": "run 1",
        }
    ] * 3  # fmt: skip
    assert (result["model_id"], result["request_rate"]) == ("other", 50)


def test_a_seed_gives_the_same_requests_and_warm_ups_are_none_of_them(bench):
    def prompts(*flags):
        with ScriptedServer(tokens()) as server:
            bench(server, "--num-prompts", "3", *flags)
        return [body["prompt"] for body in server.bodies]

    first, again, other = prompts(), prompts("--num-warmups", "2"), prompts("--seed", "1")
    assert sorted(again[2:]) == sorted(first)
    assert not set(first) & {*again[:2], *other}


@pytest.mark.parametrize(
    ("server", "flags", "told"),
    [
        ({"api_key": "k"}, [], "wants an API key .HTTP 401.: put it in .OPENAI_API_KEY"),
        ({"models": whole(b"404 Not Found", {})}, [], "names no model .GET /v1/models: HTTP 404.: give --model"),
        ({}, ["--input-len", "5000"], "do not fit a model of 4096: give a smaller --input-len"),
        ({}, ["--tokenizer", "/nowhere"], "there is no tokenizer.json in it"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(server, flags, told, bench, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ScriptedServer(tokens(), **server) as running, pytest.raises(ValueError, match=told):
        bench(running, *flags)


@pytest.mark.parametrize("num_unready", [1, 3])
def test_a_server_that_is_not_ready_is_waited_for_where_that_is_asked(num_unready, bench):
    """The third request is the first one that wants tokens."""
    told = pytest.raises(ValueError, match="--ready-timeout would wait for")
    with ScriptedServer(tokens(), num_unready=num_unready) as server, told:
        bench(server, "--num-prompts", "2")
    with ScriptedServer(tokens(), num_unready=num_unready) as server:
        code, result, _ = bench(server, "--num-prompts", "2", "--ready-timeout", "60")
    assert (code, result["completed"], len(server.bodies)) == (0, 2, 2)


def test_a_trace_is_replayed_with_its_times_and_lengths(bench, tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [(0, 100, 3), (200, 5000, 4), (400, 60, 2)]
    path.write_text("".join(
        json.dumps({"timestamp": at, "input_length": prompt, "output_length": new}) + "\n" for at, prompt, new in rows
    ))  # fmt: skip
    output = tmp_path / "result.json"
    with ScriptedServer(tokens()) as server:
        _, result, err = bench(
            server, "--trace", str(path), "--trace-unit", "ms", "--save-detailed", "--output", str(output)
        )
    details = json.loads(output.read_text())
    assert (details["output_lens"], result["num_cut_to_fit"], result["request_rate"]) == ([3, 4, 2], 1, "trace")
    assert (details["input_lens"][0], details["input_lens"][2]) == (100, 60)
    assert 3900 < details["input_lens"][1] <= 4092
    assert all(start >= at / 1000 for start, (at, _, _) in zip(details["start_times"], rows, strict=True))
    assert result["offered_request_rate"] == pytest.approx(5)
    assert "1 of 3 requests are cut to fit in 4096 tokens" in err


def test_prompts_of_a_file_are_sent_as_they_are(bench, tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = [f"this is prompt number {index}" for index in range(6)]
    path.write_text("".join(json.dumps({"prompt": prompt, "output_len": 4}) + "\n" for prompt in prompts))
    with ScriptedServer(tokens()) as server:
        _, result, err = bench(server, "--dataset", str(path), "--num-prompts", "8")
    assert {body["prompt"] for body in server.bodies} == set(prompts)
    assert (result["total_output_tokens"], result["total_input_tokens"]) == (32, 80)
    assert result["workload"] == "prompts.jsonl"
    assert "the data set has 6 prompts for 8 requests" in err


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="cannot be asked: no connection: .*start one, as with `jaxpaged serve MODEL`"):
        main(["--base-url", "http://127.0.0.1:1", "--quiet"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--goodput", "itl:5"], "--goodput itl:5 is not allowed: give ttft, tpot, e2el, a colon and milliseconds"),
        (["--request-rate", "0"], "must be above 0"),
        (["--extra-body", '{"n": 2}'], "--extra-body n must be 1"),
        (["--extra-body", "[]"], "no JSON object"),
        (["--save-detailed"], "--output"),
        (["--trace", __file__, "--request-rate", "2"], "leave out --dataset and --request-rate"),
        (["--dataset", "/nowhere"], "there is no file /nowhere"),
        (["--num-prompts", "0"], "it must be 1 or more"),
    ],
)
def test_wrong_flags_are_refused(flags, told, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert told in capsys.readouterr().err


def test_a_thousand_streams_are_open_at_once(bench):
    """Each of 8 tokens, the first after 1.5 s: all are open before one ends, and the client tells what it cost."""
    with ScriptedServer(tokens(ttft_s=1.5, gap_s=0.1)) as server:
        _, result, _ = bench(server, "--num-prompts", "1000", "--output-len", "8", "--input-len", "8")
    assert (result["completed"], server.max_open) == (1000, 1000)
    client = result["client"]
    assert 0 < client["cpu_us_per_output_token"] < 2_000
    assert client["busy_fraction"] == pytest.approx(client["cpu_s"] / result["duration"])
    assert math.isfinite(client["p99_lag_ms"])


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_our_own_server_gives_the_tokens_that_were_asked_for(endpoint, bench, tmp_path):
    pytest.importorskip("uvicorn", reason="the server needs the extra: pip install 'jaxpaged[server]'")
    output = tmp_path / "result.json"
    with ServerProcess(["demo", "--max-num-seqs", "8"], tmp_path / "server.log") as server:
        server.url = f"http://127.0.0.1:{server.port}"
        code, result, _ = bench(
            server, "--endpoint", endpoint, "--num-prompts", "6", "--output-len", "9", "--input-len", "60",
            "--request-rate", "20", "--save-detailed", "--output", str(output),
        )  # fmt: skip
        assert server.metric("jaxpaged:compiles_after_ready_total") == 0
    assert (code, result["completed"], result["output_tokens_counted_by"]) == (0, 6, "usage")
    details = json.loads(output.read_text())
    assert details["output_lens"] == [9] * 6
    assert all(abs(length - 60) <= 8 for length in details["input_lens"])
    assert 1 <= result["tokens_per_chunk"] < 2
