"""What is asked from a server before it is loaded: its model, its context, and what words cost in tokens."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.client.http import Connections, HttpError
from bench.client.load import Sender
from bench.client.prompts import PROBE_WORDS, BodyMaker, WordPrompts, words
from bench.record import note

ASK_TIMEOUT_S = 30.0
ASK_AGAIN_S = 0.5
UNREADY = (502, 503, 504)
"""What a server answers, or the proxy before it, while it starts."""

Found = TypeVar("Found")


class NotReadyError(ValueError):
    """The server is not there, or not yet able to serve."""


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What the server says of itself."""

    model: str
    max_model_len: int | None
    """None where it does not say."""
    version: Any
    """What it answers on /version, where it does."""


async def ask_server(connections: Connections, *, base_url: str, model: str | None, api_key_env: str) -> ServerFacts:
    """The model to ask (the first that is served, unless given) and its context. ValueError with the remedy."""
    try:
        status, body = await _get(connections, "/v1/models")
    except HttpError as error:
        raise NotReadyError(
            f"the server at {base_url} cannot be asked: {error}; start one, as with `jaxpaged serve MODEL`, or say "
            "where it is with --base-url"
        ) from error
    if status in UNREADY:
        raise NotReadyError(f"the server at {base_url} is not ready (HTTP {status}): --ready-timeout would wait for it")
    if status in (401, 403):
        raise ValueError(f"the server at {base_url} wants an API key (HTTP {status}): put it in ${api_key_env}")
    cards = _cards(body) if status == 200 else []
    if model is None and not cards:
        raise ValueError(f"the server at {base_url} names no model (GET /v1/models: HTTP {status}): give --model")
    if model is None:
        model = cards[0]["id"]
        if len(cards) > 1:
            note(f"the server has {len(cards)} models, of which {model} is asked: choose with --model")
    context = next((card.get("max_model_len") for card in cards if card["id"] == model), None)
    version = None
    try:
        status, body = await _get(connections, "/version")
        version = json.loads(body) if status == 200 else None
    except ValueError:  # HttpError too: not every server has the route
        pass
    return ServerFacts(model=model, max_model_len=context if isinstance(context, int) else None, version=version)


def _cards(body: bytes) -> list[dict[str, Any]]:
    try:
        cards = json.loads(body)["data"]
    except (ValueError, TypeError, KeyError):
        return []
    if not isinstance(cards, list):
        return []
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


async def _get(connections: Connections, path: str) -> tuple[int, bytes]:
    """Status and body. HttpError where nothing comes."""
    body = bytearray()

    def take(status: int, piece: bytes, now: float) -> None:
        body.extend(piece)

    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            response = await connections.exchange(connections.target.request(path), take)
    except TimeoutError:
        raise HttpError(f"no answer to GET {path} within {ASK_TIMEOUT_S:g} s") from None
    return response.status, bytes(body)


async def when_ready(ask: Callable[[], Awaitable[Found]], deadline_s: float) -> Found:
    """What `ask` finds, asked again while the server is not ready, until then (time.monotonic)."""
    while True:
        try:
            return await ask()
        except NotReadyError:
            if time.monotonic() >= deadline_s:
                raise
        await asyncio.sleep(ASK_AGAIN_S)


async def first_request(sender: Sender, make: BodyMaker, text: str) -> int | None:
    """The prompt tokens that the server counts in a text, if it does. ValueError where the request fails."""
    outcome = await sender.send(make.body(text, 1), began_s=0.0, due_s=0.0)
    if outcome.error:
        told = f"the first request failed: {outcome.error}"
        if outcome.error.startswith(tuple(f"HTTP {status}" for status in UNREADY)):
            raise NotReadyError(f"{told}; --ready-timeout would wait for the server")
        raise ValueError(told)
    return outcome.input_len


async def calibrate(sender: Sender, make: BodyMaker, seed: int, sample: str | None) -> WordPrompts:
    """What words cost in tokens, from two short requests, and what a sample of other texts does, from one more."""
    found: list[int] = []
    for num_words in PROBE_WORDS:
        num_tokens = await first_request(sender, make, words(num_words, (seed, 2, num_words)))
        if num_tokens is None:
            note("the server counts no prompt tokens (usage): a word is taken for a token; --tokenizer would count")
            return WordPrompts()
        found.append(num_tokens)
    prompts = WordPrompts.calibrated((found[0], found[1]))
    if sample is not None:
        num_tokens = await first_request(sender, make, sample)
        assert num_tokens is not None
        prompts.tokens_per_char = max(1.0, num_tokens - prompts.overhead) / len(sample)
    return prompts
