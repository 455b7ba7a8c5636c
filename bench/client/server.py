"""What is asked from a server before it is loaded: its model, its context, and what words cost in tokens."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from bench.client.http import Connections, HttpError
from bench.client.load import Sender
from bench.client.prompts import PROBE_WORDS, BodyMaker, WordPrompts, words
from bench.record import note

ASK_TIMEOUT_S = 30.0


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
        raise ValueError(
            f"the server at {base_url} cannot be asked: {error}; start one, as with `jaxpaged serve MODEL`, or say "
            "where it is with --base-url"
        ) from error
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


async def calibrate(sender: Sender, make: BodyMaker, seed: int) -> WordPrompts:
    """What words cost in tokens, from two short requests: the first of a run, whose failure ends it (ValueError)."""
    found: list[int] = []
    for num_words in PROBE_WORDS:
        body = make.body(words(num_words, (seed, 2, num_words)), 1)
        outcome = await sender.send(body, began_s=0.0, due_s=0.0)
        if outcome.error:
            raise ValueError(f"the first request failed: {outcome.error}")
        if outcome.input_len is None:
            note("the server counts no prompt tokens (usage): a word is taken for a token; --tokenizer would count")
            return WordPrompts()
        found.append(outcome.input_len)
    return WordPrompts.calibrated((found[0], found[1]))
