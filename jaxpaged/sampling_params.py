"""What a user may ask of the sampler, checked once at the door (names and defaults follow vLLM's Python API)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from jaxpaged.refusals import naming_unknown_fields, refuse, shown
from jaxpaged.structured_outputs import StructuredOutputsParams

MAX_LOGIT_BIAS = 1024
"""Most entries of `logit_bias`."""
MAX_BAD_WORDS = 256
"""Most entries of `bad_words`."""
MAX_STOP_STRINGS = 64
"""Most entries of `stop`."""
MAX_STOP_TOKENS = 64
"""Most stop tokens of a request, those of the checkpoint included."""
MAX_ALLOWED_TOKENS = 2**20
"""Most entries of `allowed_token_ids`: above any vocabulary."""
MAX_LOGITS_PROCESSORS = 16
"""Most logits processors of an engine, and so of a request."""
MAX_ARGUMENT_NUMBERS = 2**20
"""Most numbers in the arguments that a request gives to its logits processors."""
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
REMEDIES: Mapping[str, str] = {
    "best_of": "use n, and keep the best by cumulative_logprob",
    "use_beam_search": "use BeamSearchParams",
    "beam_width": "use BeamSearchParams",
    "length_penalty": "use BeamSearchParams",
    "early_stopping": "use BeamSearchParams",
    "guided_decoding": "use structured_outputs=StructuredOutputsParams(...)",
    "extra_args": "use logits_processors={name: {argument: value}}",
    "max_new_tokens": "use max_tokens",
    "min_new_tokens": "use min_tokens",
    "do_sample": "use temperature; 0 is greedy",
    "num_beams": "use BeamSearchParams(beam_width=...)",
    "num_return_sequences": "use n",
    "typical_p": "use top_p or min_p",
    "stop_strings": "use stop",
    "eos_token_id": "use stop_token_ids",
}
"""What to use instead of names that other engines have."""
NO_DRAW = "a search draws nothing: leave it out, or use SamplingParams"
NO_PENALTIES = "beams have no penalties: use logits_processors, or SamplingParams"
ALL_ARE_GIVEN = "beam_width is also the number of hypotheses that are given back: use it alone"
BEAM_REMEDIES: Mapping[str, str] = {
    **REMEDIES,
    **dict.fromkeys(("n", "best_of", "num_return_sequences"), ALL_ARE_GIVEN),
    **dict.fromkeys(("top_p", "top_k", "min_p", "seed", "do_sample"), NO_DRAW),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), NO_PENALTIES),
    "num_beams": "use beam_width",
    "use_beam_search": "leave it out",
    "min_tokens": "use length_penalty, or ignore_eos=True",
    "prompt_logprobs": "use SamplingParams(prompt_logprobs=..., max_tokens=1)",
}
"""The same for beams, and for what only sampling has."""

def _check_number(name: str, value: object, low: float, high: float, allowed: str, *, above_low: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number (no bool) in [low, high], or in (low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse(name, value, allowed)
    # an int too large for a float is out of every range here
    if isinstance(value, int) and abs(value) > 2**64:
        raise refuse(name, value, allowed)
    if not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        raise refuse(name, value, allowed)


def _check_int(name: str, value: object, low: int, high: int, allowed: str) -> int:
    """The value as an int, which numpy's integers become, too."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise refuse(name, value, allowed)
    return int(value)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"{name} has {count} entries; at most {most} are allowed")


def _check_strings(name: str, value: object, most: int) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple, set, frozenset)):
        raise refuse(name, value, "a non-empty string or a list of them")
    if isinstance(strings, (set, frozenset)):
        strings = sorted(strings, key=str)  # in one order in every process
    _check_count(name, len(strings), most)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise refuse(f"{name} entry", string, "a non-empty string")
        if any("\ud800" <= character <= "\udfff" for character in string):
            raise refuse(f"{name} entry", ascii(string), "valid Unicode text (it has a lone surrogate)")
    return tuple(strings)


def _check_token_ids(name: str, value: object, most: int) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        raise refuse(name, value, "a list of token ids")
    _check_count(name, len(value), most)
    return tuple(
        _check_int(f"{name} entry", token_id, 0, 2**31 - 1, "a token id (an integer of 0 or more)")
        for token_id in value
    )


def _check_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, (dict, tuple)):
        raise refuse("logit_bias", value, "a mapping of token id to a number from -100 to 100")
    _check_count("logit_bias", len(value), MAX_LOGIT_BIAS)
    checked: dict[int, float] = {}
    for pair in value.items() if isinstance(value, dict) else value:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise refuse("logit_bias entry", pair, "a pair of token id and number")
        token_id, bias = pair
        if isinstance(token_id, str) and token_id.isascii() and token_id.isdigit() and len(token_id) <= 10:
            token_id = int(token_id)  # JSON has string keys only
        token_id = _check_int("logit_bias key", token_id, 0, 2**31 - 1, "a token id (an integer of 0 or more)")
        _check_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0, "a number from -100 to 100")
        if token_id in checked:
            raise ValueError(f"logit_bias names token {token_id} twice: give it once")
        checked[token_id] = float(bias)
    return tuple(checked.items())


Argument = float | tuple["Argument", ...]
"""A number, or numbers nested as an array's `tolist` nests them."""


def _check_processors(value: object) -> tuple[tuple[str, tuple[tuple[str, Argument], ...]], ...]:
    """The names and arguments as tuples; whether the engine knows them is seen when the request meets it."""
    allowed = "a mapping of the names of logits processors to mappings of their arguments"
    pairs = value.items() if isinstance(value, dict) else value
    if not isinstance(value, (dict, tuple)):
        raise refuse("logits_processors", value, allowed)
    _check_count("logits_processors", len(value), MAX_LOGITS_PROCESSORS)
    checked: dict[str, tuple[tuple[str, Argument], ...]] = {}
    num_left = [MAX_ARGUMENT_NUMBERS]
    for pair in pairs:  # type: ignore[attr-defined]
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise refuse("logits_processors entry", pair, allowed)
        name, arguments = pair
        if not isinstance(arguments, (dict, tuple)):
            raise refuse(f"logits_processors[{shown(name)}]", arguments, "a mapping of its arguments ({} for none)")
        named: dict[str, Argument] = {}
        for argument in arguments.items() if isinstance(arguments, dict) else arguments:
            if not isinstance(argument, tuple) or len(argument) != 2 or not isinstance(argument[0], str):
                raise refuse(f"logits_processors[{shown(name)}] entry", argument, "a pair of argument name and value")
            what = f"logits_processors[{shown(name)}][{shown(argument[0])}]"
            named[argument[0]] = _check_argument(what, argument[1], num_left)
        if name in checked:
            raise ValueError(f"logits_processors names {shown(name)} twice: give it once")
        checked[name] = tuple(named.items())
    return tuple(checked.items())


def _check_argument(name: str, value: object, num_left: list[int], depth: int = 0) -> Argument:
    """A number or nested numbers, arrays included; `num_left` counts down over all arguments of a request."""
    allowed = "a finite number, or a list or array of them"
    if hasattr(value, "tolist") and hasattr(value, "size"):
        if isinstance(value.size, int) and value.size > num_left[0]:
            raise ValueError(f"{name} has {value.size} numbers; a request may give {MAX_ARGUMENT_NUMBERS} in all")
        value = value.tolist()
    if isinstance(value, (list, tuple)) and depth < 4:
        return tuple(_check_argument(name, item, num_left, depth + 1) for item in value)
    is_huge = isinstance(value, int) and abs(value) > 2**64  # no float holds it
    if not isinstance(value, (int, float)) or is_huge or not math.isfinite(value):
        raise refuse(name, value, allowed)
    num_left[0] -= 1
    if num_left[0] < 0:
        raise ValueError(f"{name}: a request may give {MAX_ARGUMENT_NUMBERS} numbers to its logits processors in all")
    return value


def _check_shared(params: "SamplingParams | BeamSearchParams") -> None:
    """Check and freeze the lists, counts and switches that both kinds of params have."""
    freeze = object.__setattr__
    if params.stop is not None:
        freeze(params, "stop", _check_strings("stop", params.stop, MAX_STOP_STRINGS))
    if params.stop_token_ids is not None:
        freeze(params, "stop_token_ids", _check_token_ids("stop_token_ids", params.stop_token_ids, MAX_STOP_TOKENS))
    if params.bad_words is not None:
        freeze(params, "bad_words", _check_strings("bad_words", params.bad_words, MAX_BAD_WORDS))
    if params.logit_bias is not None:
        freeze(params, "logit_bias", _check_logit_bias(params.logit_bias))
    if params.allowed_token_ids is not None:
        ids = _check_token_ids("allowed_token_ids", params.allowed_token_ids, MAX_ALLOWED_TOKENS)
        if not ids:
            raise ValueError("allowed_token_ids=[] allows no token at all: give at least one id, or None")
        freeze(params, "allowed_token_ids", ids)
    if params.logprobs is not None:
        logprobs = _check_int("logprobs", params.logprobs, 0, 2**31 - 1, "None or an integer of 0 or more")
        freeze(params, "logprobs", logprobs)
    for name in ("ignore_eos", "include_stop_str_in_output"):
        _check_bool(name, getattr(params, name))
    structured = params.structured_outputs
    if structured is not None and not isinstance(structured, StructuredOutputsParams):
        raise refuse("structured_outputs", structured, "a StructuredOutputsParams(json=..., regex=..., ...)")
    if params.logits_processors is not None:
        freeze(params, "logits_processors", _check_processors(params.logits_processors))


@naming_unknown_fields(REMEDIES)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next tokens of one request are chosen. Out-of-range values raise ValueError with name, value and range.

    Lists are kept as tuples, and `logit_bias` as a tuple of (token id, bias) pairs, so that a value cannot change
    after it was checked. Ids are checked against the vocabulary when the request meets its model.
    """

    n: int = 1
    """Number of samples drawn for the prompt; they share its blocks."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; 1 is off."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 is off (-1 is accepted and means 0)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per time it was generated."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the output are divided (if positive) or multiplied (if negative) by it."""
    seed: int | None = None
    """Same seed, same noise, whatever the batch; None draws one from the engine's."""
    stop: str | Sequence[str] | None = None
    """Generation ends when one of these strings appears; it is cut off unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    """Generation ends at one of these tokens, besides the checkpoint's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token of the checkpoint."""
    max_tokens: int | None = 16
    """Most tokens to generate; None means up to the model's length."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens."""
    logprobs: int | None = None
    """Return the log-probability of each sampled token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for each prompt token."""
    detokenize: bool = True
    """Turn the output into text; stop strings need it."""
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Any = None
    """Mapping of token id to a number added to its logit (-100 to 100)."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these tokens may be generated."""
    bad_words: Sequence[str] | None = None
    """Words never to be completed: the token sequence of each, as at the start of a text and as behind a space. A word
    that the model spells in other tokens than the tokenizer does is not recognised."""
    structured_outputs: StructuredOutputsParams | None = None
    """A grammar that the output must follow; its end ends the output. Needs the extra `structured`."""
    logits_processors: Any = None
    """Mapping of the names of logits processors that the engine was given to mappings of their arguments: numbers, or
    lists of them in the declared shapes. Kept as nested tuples."""

    def __post_init__(self) -> None:
        freeze = object.__setattr__
        integers = {
            "n": (1, 16_384, "an integer from 1 to 16384, and at most the engine's max_num_seqs"),
            "top_k": (-1, 2**31 - 1, "0 or -1 (off) or an integer from 1 to 2147483647"),
            "seed": (INT64_MIN, INT64_MAX, "a 64-bit signed integer or None"),
            "max_tokens": (1, 2**31 - 1, "an integer from 1 to 2147483647, or None"),
            "min_tokens": (0, 2**31 - 1, "an integer of 0 or more"),
            "prompt_logprobs": (0, 2**31 - 1, "None or an integer of 0 or more"),
        }
        for name, (low, high, allowed) in integers.items():
            value = getattr(self, name)
            if value is not None or name not in ("seed", "max_tokens", "prompt_logprobs"):
                freeze(self, name, _check_int(name, value, low, high, allowed))
        _check_number("temperature", self.temperature, 0.0, 100.0, "a number from 0 to 100")
        _check_number("top_p", self.top_p, 0.0, 1.0, "a number above 0 and at most 1", above_low=True)
        if self.top_k == -1:
            freeze(self, "top_k", 0)
        _check_number("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0, "a number from -2 to 2")
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "a number from -2 to 2")
        # a number that float32 takes for 0 must not divide a logit
        _check_number("repetition_penalty", self.repetition_penalty, 1e-4, 1e4, "a number from 0.0001 to 10000")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: lower the first, or raise the "
                "second"
            )
        for name in ("detokenize", "skip_special_tokens"):
            _check_bool(name, getattr(self, name))
        _check_shared(self)
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True: use stop_token_ids, or turn detokenize on")


@naming_unknown_fields(BEAM_REMEDIES)
@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """What a beam search asks for: the `beam_width` best hypotheses, as Hugging Face's `generate(num_beams=...)`
    finds them."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    logit_bias: Any = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: Any = None
    logits_processors: Any = None
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_int("beam_width", self.beam_width, 1, 64, "an integer from 1 to 64")
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1, "an integer from 1 to 2147483647")
        _check_number("temperature", self.temperature, 0.0, 0.0, "0.0 (beam search is deterministic)")
        _check_number("length_penalty", self.length_penalty, -100.0, 100.0, "a finite number from -100 to 100")
        if self.early_stopping == "never":
            raise refuse("early_stopping", "never", "True or False (transformers' third rule is not offered)")
        _check_bool("early_stopping", self.early_stopping)
        _check_shared(self)
