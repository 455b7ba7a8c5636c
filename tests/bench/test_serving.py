"""The bench of the server: its client reads streams however they are cut, and its numbers are those of the runs."""

import json
import socket
import threading

import pytest

from bench.serving import bodies_of, latencies, main, result_of
from bench.stream_client import run
from bench.workloads import sharegpt_like


def chunked(body, size):
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def event(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class Server:
    """Answers each connection with the same bytes, in pieces of so many."""

    def __init__(self, answer, piece_size):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run, args=(answer, piece_size))
        self.thread.start()

    def run(self, answer, piece_size):
        for _ in range(2):
            connection, _ = self.listener.accept()
            with connection:
                received = b""
                while b"max_tokens" not in received:
                    received += connection.recv(65536)
                for at in range(0, len(answer), piece_size):
                    connection.sendall(answer[at : at + piece_size])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()
        self.thread.join(30)


BODIES = [{"prompt": [1], "max_tokens": 3}] * 2
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = [{"choices": [{"text": text}]} for text in ("a", "b\n\nc", "d")]
USAGE = {"choices": [], "usage": {"completion_tokens": 3}}


@pytest.mark.parametrize(("chunk", "piece"), [(1, 1), (7, 3), (1000, 5), (1000, 1000), (31, 1000)])
def test_streams_are_read_alike_however_they_are_cut(chunk, piece):
    body = b"".join(map(event, [*EVENTS, USAGE])) + b"data: [DONE]\n\n"
    with Server(HEAD + chunked(body, chunk), piece) as server:
        reply = run(server.port, BODIES)
    for stream in reply["streams"]:
        assert stream["text"] == "ab\n\ncd"
        assert stream["usage"] == {"completion_tokens": 3}
        assert len(stream["times_s"]) in ((3,) if chunk > 100 else (0, 1, 2, 3))
        assert stream["times_s"] == sorted(stream["times_s"])
    assert reply["elapsed_s"] > 0


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\n{}", "429"),
        (HEAD + chunked(event(EVENTS[0]), 100), "ended in"),
        (HEAD + chunked(event({"error": {"message": "lost"}}) + b"data: [DONE]\n\n", 100), "lost"),
    ],
)
def test_an_answer_that_is_no_whole_stream_is_an_error(answer, told):
    with Server(answer, 1000) as server, pytest.raises(RuntimeError, match=told):
        run(server.port, BODIES)


def test_latencies_are_those_of_all_streams():
    runs = [{"streams": [{"times_s": [1.0, 1.5, 2.5]}]}, {"streams": [{"times_s": [3.0, 4.0, 5.0]}]}]
    found = latencies(runs)
    assert found["ttft_p50_s"] == 2.0
    assert found["itl_p50_s"] == 1.0  # of 0.5, 1, 1, 1
    assert found["itl_p99_s"] == 1.0


def test_the_ratio_is_that_of_the_medians():
    offline = [{"elapsed_s": seconds, "cpu_s": 1.0} for seconds in (1.0, 2.0, 1.25)]
    streams = [{"times_s": [0.1, 0.2]}]
    served = [
        {"tokens_per_s": rate, "server_cpu_s": 2.0, "client_cpu_s": 0.5, "streams": streams} for rate in (72, 90, 40)
    ]
    result = result_of(offline, served, 100)
    assert result["offline_tokens_per_s"] == [100, 50, 80]
    assert result["ratio"] == 72 / 80
    assert result["ratios"] == [0.72, 1.8, 0.5]
    assert (result["server_cpu_s"], result["client_cpu_s"], result["num_pieces"]) == (2.0, 0.5, 2)


def test_no_round_finds_the_prompts_of_another_in_the_cache():
    requests = sharegpt_like(num_requests=4, vocab_size=512)
    one, other = bodies_of(requests, "1"), bodies_of(requests, "2")
    assert {body["cache_salt"] for body in one} == {"1"}
    assert [body["prompt"] for body in one] == [body["prompt"] for body in other]


@pytest.mark.slow
def test_the_bench_runs_whole(capsys, tmp_path):
    output = tmp_path / "serving.json"
    assert main(["--shape", "tiny", "--num-requests", "4", "--max-num-seqs", "4", "--repeats", "1", "--output",
                 str(output)]) == 0  # fmt: skip
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["readiness"]["num_compiles_after_ready"] == 0
    assert result["readiness"]["exit_codes"] == [0, 0]
    assert result["serving"]["num_streams_with_the_same_text"] == 4
    assert result["serving"]["num_compiles_after_ready"] == 0
    assert result["serving"]["ratio"] > 0
