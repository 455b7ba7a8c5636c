"""Log-probabilities as OpenAI's two formats have them, and the text of single tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxpaged.core.request import TokenLogprobs
from jaxpaged.engine.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI's number for it."""
REPLACEMENT = "\ufffd"


class TokenTexts:
    """The text of each token as it reads amid a text. Safe from several threads: at worst a text is made twice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def length_shown(self, token_id: int) -> int:
        """Characters it adds to a text that is shown without special tokens."""
        return 0 if token_id in self._tokenizer.special_token_ids else len(self[token_id])

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._make(token_id)
        return text

    def _make(self, token_id: int) -> str:
        # behind itself, as some tokenizers drop the space in front of a first token
        decode = self._tokenizer.decode
        once = decode([token_id], skip_special_tokens=False)
        twice = decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(once) :] if twice.startswith(once) else once


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def completion_logprobs(
    entries: Iterable[TokenLogprobs | None], token_ids: Iterable[int], texts: TokenTexts, num_top: int, offset: int
) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice, or of a piece of it.

    Args:
        entries: One per token; None for the first of a prompt, which nothing foretells.
        offset: Where in the whole text the first token begins.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for token_id, entry in zip(token_ids, entries, strict=True):
        text = texts[token_id]
        tokens.append(text)
        offsets.append(offset)
        offset += texts.length_shown(token_id)
        logprobs.append(None if entry is None else _finite(entry.logprob))
        tops.append(None if entry is None else _top_by_text(entry, texts, num_top))
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _top_by_text(entry: TokenLogprobs, texts: TokenTexts, num_top: int) -> dict[str, float]:
    """The likeliest tokens and the one that stands there; of two with one text, the likelier."""
    found: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        found.setdefault(texts[token_id], _finite(logprob))
    return found


def chat_logprobs(
    entries: Sequence[TokenLogprobs], texts: TokenTexts, num_top: int
) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice, or of a chunk."""
    content = [
        {
            **_chat_token(entry.token_id, entry.logprob, texts),
            "top_logprobs": [_chat_token(token_id, logprob, texts) for token_id, logprob in entry.top[:num_top]],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text = texts[token_id]
    # a part of a character has no text of its own, so its bytes are not known here
    return {
        "token": text,
        "logprob": _finite(logprob),
        "bytes": None if REPLACEMENT in text else list(text.encode()),
    }


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], texts: TokenTexts) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token the ones most likely there and itself, by id."""
    shown: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            shown.append(None)
            continue
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)]
        ranked.append((entry.token_id, entry.logprob, entry.rank))
        shown.append({
            str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": texts[token_id]}
            for token_id, logprob, rank in ranked
        })
    return shown
