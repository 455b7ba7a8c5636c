"""What a caller may give as prompts, brought into one form and checked as far as no model is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

MAX_PROMPTS = 1_000_000
"""Most prompts of one call."""
KEYS = ("prompt", "prompt_token_ids", "cache_salt")

Prompt = str | Mapping[str, Any] | Sequence[int]
"""Text, token ids (a list, tuple or array), or {"prompt": text} / {"prompt_token_ids": ids} with an optional
"cache_salt". With both, the ids are used and the text is only given back as `RequestOutput.prompt`, as in vLLM."""


@dataclass(frozen=True, kw_only=True)
class PromptContent:
    """One prompt: text to be tokenized, or token ids."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    cache_salt: str = ""


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of a call that may bring one or many; ValueError for none, too many, or anything else."""
    prompts = _as_plain(prompts)
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    _refuse_other_types(prompts, "prompts", "a prompt (text, token ids or a mapping) or a list of them")
    many: list[Any] = [_as_plain(prompt) for prompt in prompts]
    if not many:
        raise ValueError("prompts is empty: give at least one prompt")
    if all(isinstance(item, Integral) for item in many):
        return [many]
    if len(many) > MAX_PROMPTS:
        raise ValueError(f"{len(many)} prompts in one call; at most {MAX_PROMPTS} are allowed: make several calls")
    return many


def read_prompt(prompt: Prompt) -> PromptContent:
    """The content of one prompt. Raises ValueError saying what a prompt may be; ids are checked by the engine."""
    prompt = _as_plain(prompt)
    if isinstance(prompt, str):
        return PromptContent(text=prompt)
    if not isinstance(prompt, Mapping):
        _refuse_other_types(prompt, "a prompt")
        return PromptContent(token_ids=_read_ids(prompt))
    unknown = [key for key in prompt if key not in KEYS]
    if unknown:
        raise ValueError(f"a prompt has unknown keys {unknown}: use prompt or prompt_token_ids, and cache_salt")
    text, ids, salt = (_as_plain(prompt.get(key)) for key in KEYS)
    if salt is not None and not isinstance(salt, str):
        raise ValueError(f"cache_salt={salt!r} is not a string")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"a prompt has a {type(text).__name__} under 'prompt': give text there, or 'prompt_token_ids'")
    if text is None and ids is None:
        raise ValueError("a prompt mapping needs a text under 'prompt' or ids under 'prompt_token_ids'")
    if ids is not None:
        _refuse_other_types(ids, "prompt_token_ids", "a list of integers")
    return PromptContent(text=text, token_ids=None if ids is None else _read_ids(ids), cache_salt=salt or "")


def _read_ids(ids: Any) -> tuple[int, ...]:
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            nested = isinstance(token_id, (str, Mapping, list, tuple))
            remedy = "; texts, or several prompts, go into one list that is not nested" if nested else ""
            shown = repr(token_id)[:80]
            raise ValueError(f"prompt token id {shown} is not an integer{remedy}")
    return tuple(map(int, ids))


def _as_plain(value: Any) -> Any:
    """Arrays and their scalars (numpy's, jax's) as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def _refuse_other_types(value: Any, name: str, allowed: str = "text, token ids or a mapping") -> None:
    if isinstance(value, (bytes, bytearray)):
        raise ValueError(f"{name}: bytes are neither text nor token ids: decode them, as with .decode('utf-8')")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be {allowed}, not {type(value).__name__}")
