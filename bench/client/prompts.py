"""Prompts of a given number of tokens for a server whose tokenizer may be unknown, and the bodies that carry them.

Without a tokenizer a prompt is common words, and what a word costs is asked from the server: the usage of two requests
gives tokens a word, and what stands around them (a chat template). With one, a completion's prompt is token ids.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bench.plans import RequestPlan

WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they", "at",
    "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were", "when", "we",
    "there", "can", "an", "your", "which", "their", "said", "if", "do", "will", "each", "about", "how", "up", "out",
    "them", "then", "she", "many", "some", "so", "these", "would", "other", "into", "has", "more", "her", "two",
    "like", "him", "see", "time", "could", "no", "make", "than", "first", "been", "its", "who", "now", "people", "my",
    "made", "over", "did", "down", "only", "way", "find", "use", "may", "water", "long", "little", "very", "after",
    "words", "called", "just", "where", "most", "know", "get", "through", "back",
)  # fmt: skip
"""One token each, with the space before, in most vocabularies."""
PREFIX_BLOCK_TOKENS = 512
"""Of the blocks that a trace's `hash_ids` name."""
PROBE_WORDS = (16, 80)

Seeds = tuple[int, ...]


class WordPrompts:
    """Prompts of seeded random words."""

    def __init__(self, tokens_per_word: float = 1.0, overhead: float = 0.0) -> None:
        """`overhead` is the tokens around the words of a prompt."""
        self.tokens_per_word, self.overhead = tokens_per_word, overhead
        self.tokens_per_char = tokens_per_word / (1 + sum(map(len, WORDS)) / len(WORDS))
        """Of the texts to count, as far as is known."""

    @classmethod
    def calibrated(cls, num_tokens: tuple[int, int]) -> "WordPrompts":
        """From the tokens that prompts of PROBE_WORDS words had. ValueError where more words were not more tokens."""
        per_word = (num_tokens[1] - num_tokens[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
        if per_word <= 0:
            raise ValueError(
                f"the server counts {num_tokens[0]} and {num_tokens[1]} tokens in prompts of {PROBE_WORDS[0]} and "
                f"{PROBE_WORDS[1]} words: lengths need a usage that counts, or --tokenizer"
            )
        return cls(per_word, max(0.0, num_tokens[0] - PROBE_WORDS[0] * per_word))

    def piece(self, num_tokens: float, seeds: Seeds) -> str:
        return words(max(1, round(num_tokens / self.tokens_per_word)), seeds)

    def prompt(self, plan: RequestPlan, seed: int, index: int) -> str:
        """Of about the plan's length; blocks of one name have one text in all prompts of a seed."""
        pieces = [self.piece(size, seeds) for size, seeds in _segments(plan, self.overhead, seed, index)]
        return " ".join(pieces)

    def count(self, text: str) -> int:
        """An estimate."""
        return round(len(text) * self.tokens_per_char)


class TokenPrompts:
    """Prompts of seeded random token ids, none of them special."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._ids = np.array([index for index in range(tokenizer.get_vocab_size()) if index not in special])

    def prompt(self, plan: RequestPlan, seed: int, index: int) -> list[int]:
        """Of exactly the plan's length; blocks as `WordPrompts.prompt`."""
        ids: list[int] = []
        for size, seeds in _segments(plan, 0, seed, index):
            ids += np.random.default_rng(seeds).choice(self._ids, round(size)).tolist()
        return ids

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)  # as a prompt: with the token of its beginning


def words(num: int, seeds: Seeds) -> str:
    chosen = np.random.default_rng(seeds).integers(0, len(WORDS), num)
    return " ".join(WORDS[index] for index in chosen)


def _segments(plan: RequestPlan, overhead: float, seed: int, index: int) -> list[tuple[float, Seeds]]:
    """Tokens and seeds of the pieces of a prompt: its named blocks, then what is its own."""
    left = max(1.0, plan.input_len - overhead)
    segments: list[tuple[float, Seeds]] = []
    for name in plan.prefix_ids:
        if left <= 0:
            break
        segments.append((min(left, PREFIX_BLOCK_TOKENS), (seed, 1, name)))
        left -= PREFIX_BLOCK_TOKENS
    if left > 0:
        segments.append((left, (seed, 0, index)))
    return segments


def load_tokenizer(folder: str) -> Tokenizer:
    """That of a model's folder. ValueError where it has no tokenizer.json."""
    path = Path(folder).expanduser() / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"--tokenizer {folder}: there is no {path.name} in it; leave it out to let the server count")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # its errors have no class of their own
        raise ValueError(f"--tokenizer {folder}: {path.name} cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class BodyMaker:
    """Makes the JSON bodies of requests."""

    model: str
    is_chat: bool
    extra: Mapping[str, Any]
    """Fields that are added, or take the place of ours; null takes one away."""

    def body(self, prompt: str | list[int] | tuple[tuple[str, str], ...], max_tokens: int) -> bytes:
        """Of one streamed request for exactly `max_tokens`, greedy."""
        fields: dict[str, Any] = {"model": self.model}
        if self.is_chat:
            turns = prompt if isinstance(prompt, tuple) else (("user", prompt),)
            fields["messages"] = [{"role": role, "content": content} for role, content in turns]
        else:
            fields["prompt"] = prompt
        fields |= {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        fields |= self.extra
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def bodies_of(
    plans: list[RequestPlan], make: BodyMaker, prompt_of: Callable[[RequestPlan, int], str | list[int]]
) -> list[bytes]:
    """The bodies of all plans: texts and conversations as they are, the others with prompts by plan and index."""
    bodies = []
    for index, plan in enumerate(plans):
        prompt: Any = plan.text if plan.text is not None else prompt_of(plan, index)
        if plan.messages and make.is_chat:
            prompt = plan.messages
        bodies.append(make.body(prompt, plan.output_len))
    return bodies
