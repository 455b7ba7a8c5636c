"""Grammars: compiled once, and followed for each sequence; which tokens may come next, as bit masks.

Compiling and masks are llguidance's (the extra `structured`); it reads the model's tokenizer from its JSON form. Its
state lives on the host, belongs to a sequence's tokens and to nothing on the device, so that no preemption touches it.

Decisions
1. 2026-11-25. Time and memory of a grammar are bounded by the limits below, not by a clock: a clock cannot stop a call
   into another library. What they gave is in the engine's README.
2. 2026-11-25. A grammar is compiled, and its first mask made, before its request is admitted: whatever is wrong with it
   is an error of the call. What goes wrong later (a limit met half-way) ends that request alone.
3. 2026-11-25. A matcher is made from a sequence's tokens when somebody asks for it. So samples that fork, and
   sequences that a search makes anew, need no hook here.
   A beam's is found by its tokens (5), with the same freedom.
4. 2026-11-25. The end of a grammar ends the sequence at once, without waiting for an end-of-sequence token, and even
   before `min_tokens`: nothing more can be said.
5. 2026-11-25. Beams are known by their tokens. Whether a grammar ends with a candidate is found by a matcher copied
   from its parent's (half a microsecond: llguidance shares what copies have in common), which is kept for the beam that
   goes on so; what nobody went on with is let go two tokens later. A beam that no token can follow dies, a limit ends
   its request. Refused: a hook for forks and drops (what is found by tokens cannot be out of step with them).
6. 2026-11-25. Who finds the lexer full goes on with one of its own, compiled anew. Copies of a matcher share a lexer,
   and with it the bound on its states: 20 strings of 600 characters filled it in three requests, and every later one
   of that schema ended in an error. A lexer of its own (compiled in 1 ms there) reads the sequence's tokens again; one
   that is full within 64 tokens is its own sequence's fault. Requests to come get a fresh one, too. Refused: a lexer
   for each request (each would find every state anew); no bound (memory).
"""

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from jaxpaged.core.request import Sequence
from jaxpaged.core.scheduler_output import SchedulerOutput
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.structured_outputs import StructuredOutputsParams

Answer = TypeVar("Answer")

MAX_COMPILED = 64
"""Compiled grammars that are kept, least recently used first out."""
LIMITS: dict[str, Any] = {
    "max_items_in_row": 1_000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 150_000,
    "step_max_items": 5_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""llguidance's bounds of a grammar's size and of the work for one mask."""
NO_TOKEN = "NoExtension"
"""How the library's word for a state that no token can follow begins."""
EXHAUSTED = "lexer error: too many"
"""In the library's word for a lexer that has reached its bounds; copies share one, so others may have filled it."""
RENEWAL_TOKENS = 64
"""Output tokens that a lexer of its own must have lasted for before it is made anew once more."""
_END = {
    "content": "<|end of a form|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
    "special": True,
}


class GrammarError(ValueError):
    """A grammar cannot be compiled, or met a limit as it was followed."""


class Grammars:
    """The grammars of one engine's requests, and where each sequence stands in its own.

    Args:
        vocab_size: The model's; ids that the tokenizer does not have are never allowed.
        eos_token_ids: Tokens that may follow where a grammar could end.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._library: _Library | None = None
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()
        """Matchers at the start of their grammars."""
        self._of_request: dict[str, Any] = {}
        self._states: dict[str, dict[Sequence, _State]] = {}
        self._beams: dict[str, _BeamMatchers] = {}
        self.failures: list[tuple[str, str]] = []
        """(request id, message) of grammars that failed as masks were made; whoever reads them empties the list."""

    @property
    def is_available(self) -> bool:
        """Whether the extra is installed and there is a tokenizer, so that requests with grammars may come."""
        return self._tokenizer is not None and importlib.util.find_spec("llguidance") is not None

    def compile(self, wanted: StructuredOutputsParams) -> Any:
        """The grammar, ready to be followed. Raises GrammarError with the reason where nothing could follow it."""
        if wanted in self._compiled:
            self._compiled.move_to_end(wanted)
            return self._compiled[wanted]
        if self._library is None:
            self._library = _Library(self._tokenizer, self._vocab_size, self._eos_token_ids)
        matcher = self._library.compile(wanted)
        self._compiled[wanted] = matcher
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return matcher

    def admit(self, request_id: str, compiled: Any) -> None:
        """The request's outputs follow this grammar of `compile` from now on."""
        self._of_request[request_id] = compiled
        self._states[request_id] = {}
        self._beams[request_id] = _BeamMatchers(compiled)

    def forget(self, request_id: str) -> None:
        """The request has ended, or never had a grammar."""
        self._of_request.pop(request_id, None)
        self._states.pop(request_id, None)
        self._beams.pop(request_id, None)

    def follow(self, sequence: Sequence) -> bool:
        """Read the sequence's new output tokens; True where its grammar has come to its end.

        Raises GrammarError where the grammar does not allow them, or met a limit.
        """
        return self._asked(sequence, lambda: self._state(sequence).is_at_end)

    def is_at_end_after(self, parent: Sequence, token_id: int) -> bool:
        """Whether a beam's grammar comes to its end where it goes on with this token. Raises GrammarError likewise."""
        request_id, token_ids = parent.request.request_id, (*parent.output_token_ids, token_id)
        return self._asked(parent, lambda: bool(self._beams[request_id].after(token_ids).is_stopped()))

    def _asked(self, sequence: Sequence, question: Callable[[], Answer]) -> Answer:
        """The answer to what reads the sequence's matcher, with a lexer of its own where the shared one is full."""
        try:
            return question()
        except GrammarError as error:
            if EXHAUSTED not in str(error) or not self._renew(sequence):
                raise
        return question()

    def _renew(self, sequence: Sequence) -> bool:
        """Give a sequence, or all beams of a search, a lexer of its own; False where the one it has was such a one."""
        request_id, num_tokens = sequence.request.request_id, sequence.num_output_tokens
        is_search = sequence.request.beams is not None
        held = self._beams[request_id] if is_search else self._states[request_id][sequence]
        if held.renewed_at is not None and num_tokens < held.renewed_at + RENEWAL_TOKENS:
            return False
        wanted = sequence.request.params.structured_outputs
        assert self._library is not None
        assert wanted is not None
        self._compiled.pop(wanted, None)
        fresh = self._library.compile(wanted)
        if is_search:
            self._beams[request_id] = _BeamMatchers(fresh, num_tokens)
        else:
            self._states[request_id][sequence] = _State(fresh, num_tokens)
        return True

    def _mask(self, sequence: Sequence) -> np.ndarray:
        library = self._library
        assert library is not None
        return self._asked(sequence, lambda: library.mask(self._matcher(sequence)))

    def _matcher(self, sequence: Sequence) -> Any:
        """Where a sequence or beam stands, all of its known tokens read."""
        if sequence.request.beams is None:
            return self._state(sequence).matcher
        return self._beams[sequence.request.request_id].after(tuple(sequence.output_token_ids))

    def _state(self, sequence: Sequence) -> "_State":
        """Where the sequence stands, all of its known tokens read."""
        request_id = sequence.request.request_id
        states = self._states[request_id]
        state = states.get(sequence)
        if state is None:
            state = states[sequence] = _State(self._of_request[request_id].deep_copy())
        state.read(sequence)
        return state

    def masks(
        self, plan: SchedulerOutput, spans: tuple[tuple[int, int, int], ...], num_rows: int
    ) -> np.ndarray:
        """uint32 [num_rows, words]: bit v % 32 of word v // 32 is set where the row's grammar allows token v.

        A grammar that fails leaves its rows open, and a word in `failures`. A beam that no token can follow has no bit.
        """
        assert self._library is not None
        num_words = -(-self._vocab_size // 32)
        masks = np.zeros((num_rows, num_words), np.uint32)
        for item, (first, num_prompt_rows, num_samples) in zip(plan.scheduled, spans, strict=True):
            request_id = item.sequence.request.request_id
            row = first + num_prompt_rows
            if item.sequence.is_finished:  # by the step before: what it samples once more is dropped
                masks[row : row + num_samples] = 0xFFFFFFFF
                continue
            if not num_samples or request_id not in self._of_request:
                continue
            try:
                masks[row] = self._mask(item.sequence)
            except Exception as error:  # whatever the library says: one request's trouble is its own
                if item.sequence.request.beams is not None and str(error).startswith(NO_TOKEN):
                    continue
                reason = str(error).removeprefix("structured_outputs: ")
                self.failures.append((request_id, f"structured_outputs: {reason}"))
                masks[row] = 0xFFFFFFFF
            masks[row + 1 : row + num_samples] = masks[row]
        return masks


class _State:
    """A matcher, and how many output tokens it has read.

    Args:
        renewed_at: The number of output tokens at which it got a lexer of its own.
    """

    def __init__(self, matcher: Any, renewed_at: int | None = None) -> None:
        self.matcher = matcher
        self.renewed_at = renewed_at
        self._num_read = 0

    def read(self, sequence: Sequence) -> None:
        token_ids = sequence.token_ids
        start = sequence.request.num_prompt_tokens + self._num_read
        for token_id in token_ids[start:]:
            _consume(self.matcher, token_id)
            self._num_read += 1

    @property
    def is_at_end(self) -> bool:
        return bool(self.matcher.is_stopped())


class _BeamMatchers:
    """Matchers of one search by the output tokens they have read: of the longest, and of those one token shorter.

    Args:
        renewed_at: The number of output tokens at which they got a lexer of their own.
    """

    def __init__(self, start: Any, renewed_at: int | None = None) -> None:
        self._start = start
        self.renewed_at = renewed_at
        self._kept: dict[tuple[int, ...], Any] = {}
        self._length = 0

    def after(self, token_ids: tuple[int, ...]) -> Any:
        """The matcher that has read these; GrammarError where the grammar does not allow them, or met a limit."""
        matcher = self._kept.get(token_ids)
        if matcher is not None:
            return matcher
        parent = self._kept.get(token_ids[:-1]) if token_ids else None
        matcher = (self._start if parent is None else parent).deep_copy()
        for token_id in token_ids if parent is None else token_ids[-1:]:
            _consume(matcher, token_id)
        if len(token_ids) > self._length:
            self._length = len(token_ids)
            self._kept = {read: kept for read, kept in self._kept.items() if len(read) >= self._length - 1}
        self._kept[token_ids] = matcher
        return matcher


def _consume(matcher: Any, token_id: int) -> None:
    if not matcher.consume_token(token_id):
        raise GrammarError(f"structured_outputs: the grammar cannot be followed: {_reason(matcher)}")


def _reason(matcher: Any) -> str:
    """The first line of what the library says went wrong."""
    return (matcher.get_error().strip().splitlines() or ["the token is not allowed"])[0]


class _Library:
    """llguidance over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        if tokenizer is None:
            raise GrammarError("structured_outputs need a tokenizer: this model was loaded without one")
        try:
            import llguidance  # noqa: PLC0415  an extra
        except ImportError as error:
            raise GrammarError(
                "structured_outputs need llguidance, which is not installed: pip install 'jaxpaged[structured]'"
            ) from error
        self._matcher_type = llguidance.LLMatcher
        self._limits = llguidance.LLParserLimits(**LIMITS)
        num_words = tokenizer.vocab_size
        self._eos_token_ids = tuple(token_id for token_id in eos_token_ids if token_id < min(num_words, vocab_size))
        source, ends = tokenizer.to_json(), list(self._eos_token_ids)
        if not ends:
            # the library wants an end-of-sequence token: one more, which no mask shows
            content = json.loads(source)
            content["added_tokens"].append(_END | {"id": num_words})
            source, ends, num_words = json.dumps(content), [num_words], num_words + 1
        is_token = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        is_token[: min(tokenizer.vocab_size, vocab_size)] = 1
        self._is_token = np.packbits(is_token, bitorder="little").view(np.uint32)
        try:
            self._tokens = llguidance.LLTokenizer(source, n_vocab=max(num_words, vocab_size), eos_token=ends)
        except Exception as error:  # the library raises plain Exception
            raise GrammarError(f"structured_outputs cannot be had with this model's tokenizer: {error}") from error

    def compile(self, wanted: StructuredOutputsParams) -> Any:
        """A matcher at the start of the grammar."""
        matcher = self._matcher_type(self._tokens, self._source(wanted), log_level=0, limits=self._limits)
        name = next(name for name in ("json", "regex", "choice", "grammar", "json_object") if getattr(wanted, name))
        if matcher.is_error():
            is_foreign = name == "grammar" and "::=" in getattr(wanted, name)
            hint = "; write rules as Lark does, start: ..., not root ::= ..." if is_foreign else ""
            raise GrammarError(f"structured_outputs: {name} cannot be compiled: {_first_lines(matcher)}{hint}")
        # on copies: making a mask may leave a matcher in error
        trial = matcher.deep_copy()
        nothing = f"structured_outputs: no token can satisfy {name}: give one that allows some text"
        try:
            mask = self.mask(trial)
            self.mask(matcher.deep_copy())  # that the first outgrew what copies share, the library tells only now
        except GrammarError as error:
            if str(error).startswith(NO_TOKEN):
                raise GrammarError(nothing) from error
            raise GrammarError(f"structured_outputs: {name} is too complex: {error}") from error
        for token_id in self._eos_token_ids:
            mask[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        if trial.is_stopped() or not mask.any():
            raise GrammarError(nothing)
        return matcher

    def _source(self, wanted: StructuredOutputsParams) -> str:
        matcher = self._matcher_type
        if wanted.regex is not None:
            return matcher.grammar_from_regex(wanted.regex)
        if wanted.grammar is not None:
            return matcher.grammar_from_lark(wanted.grammar)
        if wanted.choice is not None:
            return matcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, wanted.choice))}")
        options: Any = {"lenient": False, "whitespace_flexible": not wanted.disable_any_whitespace}
        if wanted.whitespace_pattern is not None:
            options["whitespace_pattern"] = wanted.whitespace_pattern
        schema: Any = wanted.json if wanted.json is not None else '{"type": "object"}'
        return matcher.grammar_from_json_schema(schema, overrides=options)

    def mask(self, matcher: Any) -> np.ndarray:
        """uint32 [words] of the tokens that may come next; GrammarError where a limit is met."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        return bits[: len(self._is_token)] & self._is_token


def _first_lines(matcher: Any) -> str:
    """What the library says, without its drawings of the source."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    return "; ".join(line for line in lines if line and "|" not in line and set(line) - {"^", " "})[:400]
