"""Who may come in: the key on every route but health, decided on the path as it came."""

import base64
import json
import logging

import pytest
from server_harness import running_server

from jaxpaged.server.hosts import AllowedHosts

KEY = "open sesame"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_health_alone_needs_no_key(guarded):
    for path in ("/health", "/health/live", "/health/ready"):
        assert guarded.http.get(path).status_code == 200
    for path in ("/", "/metrics", "/version", "/v1/models", "/v1/models/demo", "/nowhere", "/docs"):
        answer = guarded.http.get(path)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "www-authenticate" in answer.headers
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert guarded.post(path, {}).status_code == 401


@pytest.mark.parametrize("key", ["open", KEY + "x", KEY[:-1], KEY.upper(), "\xff"])
def test_a_wrong_key_is_refused(guarded, key):
    headers = {"authorization": f"Bearer {key}".encode("latin-1")}
    assert guarded.http.get("/v1/models", headers=headers).status_code == 401


def test_the_right_key_lets_in_as_a_bearer_or_as_a_browsers_password(guarded):
    password = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for value in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {password}"):
        assert guarded.http.get("/v1/models", headers={"authorization": value}).status_code == 200
    for value in (KEY, f"Token {KEY}", "Basic !", "Basic " + base64.b64encode(b"x").decode()):
        assert guarded.http.get("/v1/models", headers={"authorization": value}).status_code == 401


@pytest.mark.parametrize(
    "target",
    ["//health", "/health/", "/health/../v1/models", "/%68ealth", "/health%2f..%2fv1/models", "/health;/v1/models",
     "/v1/models?/health", "/v1/models#/health", "http://x/health", "/HEALTH", "*"],
)  # fmt: skip
def test_no_trick_with_the_path_opens_another_route(guarded, target):
    with guarded.connect() as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 401"


@pytest.mark.parametrize("host", ["x/health?", "/health", "127.0.0.1/health#", "health"])
def test_no_trick_with_the_host_opens_another_route(guarded, host):
    with guarded.connect() as connection:
        connection.sendall(f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        assert connection.recv(12) in (b"HTTP/1.1 401", b"HTTP/1.1 400")


LOCAL = ("localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8000", "192.168.1.7")


def status_for_host(server, host):
    with server.connect() as connection:
        connection.sendall(f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        return int(connection.recv(12)[9:])


def test_a_name_of_somebody_elses_that_leads_here_is_not_let_in(server):
    assert [status_for_host(server, host) for host in LOCAL] == [200] * len(LOCAL)
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "localhost:x",
                 "[::1", "0x7f.1", "x"):  # fmt: skip
        assert status_for_host(server, host) == 403, host
    answer = server.http.get("/v1/models", headers={"host": "evil.example"})
    assert answer.json()["error"]["code"] == "host_not_allowed"
    assert server.post("/v1/completions", {"prompt": "x"}, headers={"host": "evil.example"}).status_code == 403
    assert server.http.get("/health", headers={"host": "pod.cluster"}).status_code == 200


@pytest.mark.parametrize(
    ("listened", "allowed", "host", "is_let_in"),
    [
        ("127.0.0.1", None, b"llm.example", False),
        ("127.0.0.1", "llm.example,Other.example", b"llm.example:80", True),
        ("127.0.0.1", "llm.example, Other.example".replace(" ", ""), b"other.example", True),
        ("127.0.0.1", "llm.example", b"a.llm.example", False),
        ("127.0.0.1", "*", b"anything", True),
        ("llm.example", None, b"llm.example", True),
        ("0.0.0.0", None, b"10.0.0.3", True),
        ("0.0.0.0", None, b"llm.example", False),
        ("127.0.0.1", None, b"", False),
    ],
)
def test_the_operator_says_which_names_are_the_servers(listened, allowed, host, is_let_in):
    assert AllowedHosts(listened, allowed).allow([host]) is is_let_in


def test_other_sites_pages_get_no_permission(server):
    answer = server.http.get("/v1/models", headers={"origin": "https://example.com"})
    assert "access-control-allow-origin" not in answer.headers
    assert server.http.options("/v1/completions").status_code == 405


def test_routes_and_methods_that_are_none_are_told(server):
    assert server.http.get("/nowhere").json()["error"]["code"] == "not_found"
    answer = server.http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert server.http.head("/v1/models").status_code == 200
    assert server.http.get("/version").json().keys() == {"version"}


def test_an_answer_bears_its_requests_id(server):
    given = {"x-request-id": "my-id.7"}
    assert server.http.get("/v1/models", headers=given).headers["x-request-id"] == "my-id.7"
    for bad in ("a b", "x" * 200, "a\"b"):
        assert server.http.get("/v1/models", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_each_request_is_one_line_of_json(llm, caplog):
    from jaxpaged.server.logs import JsonFormatter  # noqa: PLC0415

    with caplog.at_level(logging.INFO, "jaxpaged.server"), running_server(llm, log_requests=True) as server:
        server.http.get("/health")  # asked all the time, and not logged
        server.post("/v1/completions", {"prompt": "x", "max_tokens": 3}, headers={"x-request-id": "a"})
        server.post("/v1/completions", {"prompt": "x\ny", "model": "z"}, headers={"x-request-id": "b"})
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.msg == "request"]
    assert [(line["request_id"], line["status"]) for line in lines] == [("a", 200), ("b", 404)]
    assert lines[0]["completion_tokens"] == 3
    assert lines[0]["finish_reasons"] == ["length"]
    assert "model" in lines[1]["error"]


def test_metrics_have_vllms_names_and_add_up(server):
    before = server.metric("vllm:generation_tokens_total")
    num_compiles = server.metric("jaxpaged:compiles_after_ready_total")
    server.complete(max_tokens=7)
    server.complete(max_tokens=5, stream=True)
    server.settle()
    assert server.metric("vllm:generation_tokens_total") - before == 12
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert server.metric(f"vllm:{name}", model_name="demo") == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "inter_token_latency_seconds"):
        assert server.metric(f"vllm:{name}_count") > 0
    accepted, finished = (server.metric(f"jaxpaged:requests_{name}_total") for name in ("accepted", "finished"))
    assert accepted == finished > 0
    assert server.metric("jaxpaged:compiles_after_ready_total") == num_compiles  # beams of another file have some
    assert server.metric("jaxpaged:http_requests_total", route="/v1/completions", status="200") >= 2
