"""The race beside peers: what is read from the command line, what the tables say, and a server as a peer."""

import http.server
import json
import sys
import threading

import numpy as np
import pytest

from bench.contest import Contestant, PeerConfig, checked, play
from bench.peers import openai_peer
from bench.side_by_side import main, parse, read_peers, rows_of
from bench.workloads import BenchRequest

ASKED = [BenchRequest(prompt_token_ids=(3, 4), max_tokens=2), BenchRequest(prompt_token_ids=(5,), max_tokens=3)]


class CompletionServer(http.server.BaseHTTPRequestHandler):
    """Answers as an OpenAI server does; a prompt that begins with 13 is refused, one with 14 ends early."""

    bodies: list[dict] = []

    def log_message(self, *arguments):
        pass

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.answer(200 if self.path == "/v1/models" else 404, {"data": [{"id": "served"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if body["prompt"][0] == 13:
            self.answer(400, {"error": {"message": "no thirteens"}})
        else:
            num = body["max_tokens"] - (body["prompt"][0] == 14)
            self.answer(200, {"choices": [{"text": "x" * num}], "usage": {"completion_tokens": num}})


@pytest.fixture
def base_url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CompletionServer) as server:
        CompletionServer.bodies.clear()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_a_server_is_given_token_ids_and_forced_lengths(base_url):
    peer = openai_peer.OpenAIPeer()
    assert "model served" in peer.load("", "float32", {"base_url": base_url})["device"]
    reply = peer.generate([[3, 4], [5]], [2, 3])
    assert reply["num_tokens"] == [2, 3]
    assert checked(ASKED, reply)["tokens_per_s"] == pytest.approx(5 / reply["elapsed_s"])
    assert sorted(CompletionServer.bodies, key=lambda body: body["max_tokens"])[0] == {
        "model": "served", "prompt": [3, 4], "max_tokens": 2, "temperature": 0, "ignore_eos": True,
    }
    with pytest.raises(RuntimeError, match="answered 400.*no thirteens"):
        peer.generate([[13]], [1])
    with pytest.raises(ValueError, match="request 0 got 1 tokens instead of 2"):
        checked(ASKED[:1], peer.generate([[14]], [2]))


class StubWorker:
    def __init__(self, log, name, seconds):
        self.log, self.name, self.seconds = log, name, seconds

    def call(self, call, *, prompts, max_tokens, **arguments):
        self.log.append((self.name, call, arguments))
        return {"elapsed_s": self.seconds, "token_ids": [[7] * num for num in max_tokens]}


def test_the_engine_runs_before_each_configuration_of_each_peer_in_every_round():
    log = []
    engine = Contestant("jaxpaged", StubWorker(log, "ours", 1.0), {}, [], PeerConfig(name="generate"))
    slow, fast = PeerConfig(name="slow", arguments={"slots": 1}), PeerConfig(name="fast", call="many")
    peer = Contestant("p", StubWorker(log, "theirs", 2.0), {}, [slow, fast], slow)
    engine_runs, peer_runs = play(engine, [peer], ASKED, ASKED, 2)
    turn = [("ours", "generate", {}), ("theirs", "generate", {"slots": 1}), ("ours", "generate", {}),
            ("theirs", "many", {})]  # fmt: skip
    assert log == turn * 2
    assert (len(engine_runs), {key: len(runs) for key, runs in peer_runs.items()}) == (
        4, {("p", "slow"): 2, ("p", "fast"): 2},
    )  # fmt: skip
    assert [row["ratio"] for row in rows_of(engine_runs, peer_runs)] == [2.0, 2.0]


def test_the_best_configuration_is_the_fastest_of_its_peer_and_8_bits_are_no_equal_precision():
    def runs(elapsed_s):
        return [checked(ASKED, {"elapsed_s": elapsed_s, "token_ids": [[1, 2], [3, 4, 5]]})]

    rows = rows_of(
        runs(1.0),
        {("a", "x"): runs(4.0), ("a", "y"): runs(2.0), ("llama_cpp q8_0", "x"): runs(0.5)},
    )
    assert [(row["ratio"], row.get("is_best", False), row["is_equal_precision"]) for row in rows] == [
        (4.0, False, True), (2.0, True, True), (0.5, True, False),
    ]
    assert rows[0]["agreement"]["equal_requests"] == 1.0


def test_peers_are_named_with_their_interpreters():
    assert read_peers([], None) == dict.fromkeys(("transformers", "llama_cpp", "vllm"), sys.executable)
    assert read_peers(["vllm=/env/python"], "http://here/v1") == {"vllm": "/env/python", "openai": sys.executable}
    with pytest.raises(ValueError, match="--peer tgi is not known: choose among transformers"):
        read_peers(["tgi"], None)
    with pytest.raises(ValueError, match="needs --base-url"):
        read_peers(["openai"], None)


def test_a_configuration_that_no_peer_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--configs", "slots-3"])
    assert "slots-3 is not known: choose among" in capsys.readouterr().err


@pytest.mark.slow
def test_a_race_skips_what_cannot_be_loaded_and_says_why(base_url, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--shape", "tiny", "--dtype", "float32", "--num-requests", "3", "--repeats", "1"]
    arguments += ["--peer", "vllm=/no/such/python", "--base-url", base_url, "--output", str(output)]
    assert main(arguments) == 0
    (entry,) = json.loads(output.read_text())["precisions"]
    assert entry["skipped"] == {"vllm": "cannot start /no/such/python: No such file or directory"}
    assert [(row["peer"], row["config"], row["agreement"]) for row in entry["peers"]] == [("openai", "generate", None)]
    assert [row["peer"] for row in entry["batch_1"]] == ["jaxpaged", "openai"]
    assert "skipped: vllm: cannot start" in capsys.readouterr().out


def test_llama_cpp_gets_the_rows_of_a_head_in_turn_from_its_halves():
    gguf_file = pytest.importorskip("bench.peers.gguf_file", reason="the gguf package of the peer is not installed")
    weight = np.arange(8)[:, None]
    # two heads of four rows: halves (0, 1) and (2, 3), then (4, 5) and (6, 7)
    assert gguf_file.paired(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
