"""`jaxpaged serve` as users run it: ready, signals, exit codes, one line for what cannot work."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from server_harness import read_all

from jaxpaged.cli import main, make_parser
from jaxpaged.server.config import OPTIONS, ServerConfig

CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "xla"
FLAGS = ["--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--max-model-len", "128", "--num-device-blocks", "13",
         "--host-memory-bytes", str(2**22), "--preemption", "swap", "--port", "0"]  # fmt: skip
PRELUDE = f"""
import jax, sys, time
jax.config.update("jax_compilation_cache_dir", {str(CACHE)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from jaxpaged.cli import main
from jaxpaged.engine.engine import Engine
step = Engine.step
def slow_step(engine):
    time.sleep(0.02)
    return step(engine)
Engine.step = slow_step
"""


class Process:
    """A server of its own, with slow steps, and what it says on stderr."""

    def __init__(self, arguments, prelude=""):
        code = PRELUDE + prelude + f"sys.exit(main({['serve', 'demo', *FLAGS, *arguments]!r}))"
        self.process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        self.lines = []
        self.connections = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.port = int(re.search(r":(\d+)$", self.wait_for("listening")["url"]).group(1))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for(self, event, seconds=240):
        deadline = time.monotonic() + seconds
        while True:
            for line in list(self.lines):
                if line.startswith("{") and (found := json.loads(line))["event"] == event:
                    return found
            assert time.monotonic() < deadline, self.lines
            assert self.process.poll() is None or self._reader.is_alive(), self.lines
            time.sleep(0.01)

    def send(self, **body):
        """A request whose answer nobody has read."""
        content = json.dumps({"prompt": "ROMEO:", "ignore_eos": True, "temperature": 0} | body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        self.connections.append(connection)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        return connection

    def wait_until_running(self, count):
        def running():
            found = re.search(r'vllm:num_requests_running\{[^}]*\} (\S+)', self.http.get("/metrics").text)
            return int(float(found.group(1)))

        deadline = time.monotonic() + 30
        while running() != count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ended(self, seconds=60):
        code = self.process.wait(seconds)
        self._reader.join()
        return code


@contextmanager
def process(*arguments, prelude=""):
    served = Process(arguments, prelude)
    try:
        yield served
    finally:
        served.process.kill()
        served.ended()
        served.process.stderr.close()
        for connection in (served.http, *served.connections):
            connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_exits_with_0(number):
    with process() as served:
        served.wait_for("ready")
        assert served.http.get("/health").json() == {"state": "ready"}
        streamed, whole = served.send(max_tokens=60, stream=True), served.send(max_tokens=60)
        served.wait_until_running(2)
        served.process.send_signal(number)
        served.wait_for("draining")
        refused = served.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert served.http.get("/health/ready").status_code == 503
        assert served.http.get("/health/live").json() == {"state": "draining"}
        events = read_all(streamed)
        assert events.count(b'"finish_reason":"length"') == 1
        assert b"data: [DONE]" in events
        assert b'"completion_tokens":60' in read_all(whole)
        assert served.ended() == 0
        assert "Traceback" not in "".join(served.lines)


@pytest.mark.slow
def test_what_does_not_end_in_time_ends_with_one_error_and_still_exits_with_0():
    with process("--drain-timeout-s", "0.5") as served:
        served.wait_for("ready")
        streamed, whole = served.send(max_tokens=110, stream=True), served.send(max_tokens=110)
        served.wait_until_running(2)
        served.process.terminate()
        events = read_all(streamed)
        assert events.count(b'"code":"shutting_down"') == 1
        assert b"data: [DONE]" in events
        assert read_all(whole).startswith(b"HTTP/1.1 503")
        assert served.ended() == 0


@pytest.mark.slow
def test_the_second_signal_leaves_at_once():
    with process() as served:
        served.wait_for("ready")
        served.send(max_tokens=110)
        served.wait_until_running(1)
        served.process.terminate()
        served.wait_for("draining")
        started = time.monotonic()
        served.process.terminate()
        assert served.ended() == 128 + signal.SIGTERM
        assert time.monotonic() - started < 2


@pytest.mark.slow
def test_a_signal_while_loading_exits_with_0_and_health_tells_the_state():
    prelude = "import jaxpaged.llm\njaxpaged.llm.LLM.__init__ = lambda *arguments, **options: time.sleep(60)\n"
    with process(prelude=prelude) as served:
        answer = served.http.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"state": "loading"})
        assert served.http.get("/health/live").status_code == 200
        refused = served.http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert served.http.get("/v1/models").status_code == 503
        served.process.terminate()
        assert served.ended(10) == 0


@pytest.mark.slow
def test_a_dead_engine_is_told_and_ends_the_process_with_1():
    prelude = "count = iter(range(10**9))\n"
    prelude += "Engine.step = lambda engine: slow_step(engine) if next(count) < 9 else 1 / 0\n"
    with process(prelude=prelude) as served:
        served.wait_for("ready")
        assert b'"code":"engine_dead"' in read_all(served.send(max_tokens=50, stream=True))
        answer = served.http.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"state": "dead"})
        assert served.ended() == 1


def test_a_port_in_use_is_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}" in error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "70000"], "port=70000"),
        (["--max-queued-requests", "0"], "max_queued_requests=0"),
        (["--drain-timeout-s", "nan"], "drain_timeout_s=nan"),
        (["--api-key", ""], "api_key"),
        (["--api-key", "a", "--api-key-file", "b"], "api_key and api_key_file"),
        (["--api-key-file", "/no/such/file"], "api_key_file"),
        (["--block-size", "3"], "block_size=3"),
        (["no/such/folder"], "is not a folder"),
        (["demo", "--model", "other"], "given twice"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, told, capsys):
    assert main(["serve", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert told in error


def test_every_option_has_a_flag_and_the_defaults_are_safe():
    options = make_parser().parse_args(["serve", "demo"])
    for option in OPTIONS:
        assert not hasattr(options, option.name)  # so that the config's own default holds
    given = make_parser().parse_args(["serve", "--max-body-bytes", "5000", "--no-log-requests", "--seed", "3",
                                      "--max-logprobs", "5"])
    assert (given.max_body_bytes, given.log_requests, given.seed, given.max_logprobs) == (5000, False, 3, 5)
    assert ServerConfig().host == "127.0.0.1"


def test_a_key_can_be_read_from_a_file(tmp_path):
    path = tmp_path / "key"
    path.write_text("secret\n")
    assert ServerConfig(api_key_file=str(path)).read_api_key() == "secret"
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        ServerConfig(api_key_file=str(path)).read_api_key()


def test_without_the_extra_one_line_says_what_to_install(capsys, monkeypatch):
    for name in list(sys.modules):
        if name in ("jaxpaged.commands.serve", "jaxpaged.server.process") or name.startswith("uvicorn"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "demo"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "uvicorn is not installed" in error
    assert "pip install 'jaxpaged[server]'" in error


def test_help_needs_no_extra_and_no_jax():
    code = """
import sys
for name in ("jax", "starlette", "uvicorn", "pydantic", "prometheus_client"):
    sys.modules[name] = None
from jaxpaged.cli import main
main(["serve", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "--api-key" in done.stdout
