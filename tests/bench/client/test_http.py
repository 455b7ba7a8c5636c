"""Responses and events are read alike wherever the network cut them."""

import json

import pytest

from bench.client.http import HttpError, Response, Target
from bench.client.stream import EventSplitter, StreamError, TokenStream

BODY = b"data: one\n\ndata: two\n\n"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\nB;x=1\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n0\r\n\r\n"
ANSWERS = {
    "chunked": CHUNKED,
    "trailers": CHUNKED.removesuffix(b"\r\n") + b"a: b\r\nc: d\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n" + BODY,
    "continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n" + BODY,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_response_is_the_same_however_it_is_cut(name):
    answer = ANSWERS[name]
    for size in range(1, len(answer) + 1):
        response = Response()
        pieces = []
        for start in range(0, len(answer), size):
            assert not response.is_complete
            pieces += response.feed(answer[start : start + size])
        assert (b"".join(pieces), response.status, response.is_complete, response.keeps_open) == (BODY, 200, True, True)


def test_a_body_without_a_length_ends_with_its_connection():
    response = Response()
    assert response.feed(b"HTTP/1.1 200 OK\r\n\r\nabc") == [b"abc"]
    assert not response.is_complete
    response.end()
    assert (response.is_complete, response.keeps_open) == (True, False)


@pytest.mark.parametrize(
    ("head", "keeps_open"),
    [(b"HTTP/1.1 200 OK\r\nconnection: close", False), (b"HTTP/1.0 200 OK", False),
     (b"HTTP/1.0 200 OK\r\nconnection: keep-alive", True)],
)  # fmt: skip
def test_a_connection_is_kept_as_the_server_says(head, keeps_open):
    response = Response()
    response.feed(head + b"\r\ncontent-length: 0\r\n\r\n")
    assert response.keeps_open is keeps_open


@pytest.mark.parametrize("answer", [CHUNKED[:-1], CHUNKED[:60], OK + b"content-length: 9\r\n\r\nabc", b""])
def test_a_response_cut_short_is_an_error(answer):
    response = Response()
    response.feed(answer)
    with pytest.raises(HttpError, match="the connection was closed"):
        response.end()


EVENTS = b"data: a\n\n: a comment\n\nevent: x\r\ndata:b\r\ndata: c\r\n\r\ndata: d\r\n\r\nid: 7\n\ndata: e\n\n"


def test_events_are_the_same_however_they_are_cut():
    for size in range(1, len(EVENTS) + 1):
        splitter = EventSplitter()
        found = []
        for start in range(0, len(EVENTS), size):
            found += splitter.feed(EVENTS[start : start + size])
        assert found == [b"a", b"b\nc", b"d", b"e"], size
        assert splitter.end() == []


def told(*events, keeps_text=False):
    stream = TokenStream(10.0, keeps_text=keeps_text)
    for number, event in enumerate(events, 1):
        data = event if isinstance(event, bytes) else json.dumps(event).encode()
        stream.take(200, b"data: " + data + b"\n\n", 10.0 + number)
    return stream


def test_chunks_are_events_that_bring_tokens():
    """An opening, an end without text and a usage bring none; a part of a character is a token without text."""
    stream = told(
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"content": ""}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 4}},
        b"[DONE]", keeps_text=True,
    )  # fmt: skip
    stream.finish(200, "text/event-stream")
    assert stream.chunk_times_s == [12.0, 13.0, 14.0, 15.0]
    assert (stream.last_s, stream.text, stream.usage) == (16.0, "hma", {"completion_tokens": 4})


def test_a_last_event_without_its_empty_line_is_read():
    stream = told({"choices": [{"text": "a"}]})
    stream.take(200, b"data: [DONE]", 12.0)
    stream.finish(200, "text/event-stream")
    assert stream.is_done


@pytest.mark.parametrize("event", [b"5", b'{"choices": [{"delta": 5}]}', b'{"choices": {"a": 1}}', b'{"error": "x"}'])
def test_an_event_that_is_none_is_an_error(event):
    with pytest.raises(StreamError):
        told(event)


@pytest.mark.parametrize(
    ("url", "host", "port", "request_line"),
    [
        ("http://localhost:8000", "localhost", 8000, b"GET /v1/models HTTP/1.1"),
        ("http://localhost:8000/v1/", "localhost", 8000, b"GET /v1/models HTTP/1.1"),
        ("localhost:80", "localhost", 80, b"GET /v1/models HTTP/1.1"),
        ("https://host/some/v1", "host", 443, b"GET /some/v1/models HTTP/1.1"),
        ("http://[::1]:8000", "::1", 8000, b"GET /v1/models HTTP/1.1"),
    ],
)
def test_addresses_are_read_as_clients_write_them(url, host, port, request_line):
    target = Target.parse(url, None)
    assert (target.host, target.port) == (host, port)
    assert target.request("/v1/models").splitlines()[0] == request_line


@pytest.mark.parametrize(
    ("url", "key"), [("ftp://x", None), ("http://", None), ("http://x:99999", None), ("x", "a\nb")]
)
def test_what_is_no_address_or_no_key_is_refused(url, key):
    with pytest.raises(ValueError, match=r"--base-url|API key"):
        Target.parse(url, key)
