"""A request and the sequences it makes: the data that engine, scheduler, block manager and runner share."""

import enum
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.sampling_params import SamplingParams

TOKEN_TYPE = "i"
"""Type code of arrays of token ids: 4 bytes a token, and nothing in them for the garbage collector to walk."""


class SequenceStatus(enum.Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds device blocks and a row
    SWAPPED = "swapped"  # holds host blocks
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: of the token that stands there, and of the most likely ones."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), most likely first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSettings:
    """What a request asks of its beam search."""

    width: int
    """Hypotheses that live at once, and that are given back."""
    length_penalty: float
    """A finished hypothesis of n output tokens scores its cumulative log-probability / n ** length_penalty."""
    early_stopping: bool
    """Whether the search is over once `width` hypotheses are finished, or goes on while a live one might be better."""
    num_candidates: int
    """Continuations looked at in a step: enough that `width` live on, however many of them are stop tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was asked, with every default resolved: the scheduler needs no tokenizer and no model to read it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """Most tokens to generate, already cut to what the model's length leaves."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end generation: the user's, and the checkpoint's unless `ignore_eos`."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """The token sequences that `params.bad_words` stands for."""
    seed: int = 0
    """64-bit; the user's or one drawn by the engine."""
    arrival_time_s: float = 0.0
    arrival_index: int = 0
    """Breaks ties of arrival time; unique in an engine."""
    priority: int = 0
    """Lower runs earlier, as in vLLM."""
    cache_salt: str = ""
    """Prompts share cached blocks only with prompts of the same salt."""
    beams: BeamSettings | None = None
    """Search with beams instead of sampling; `params.n` is then 1."""

    @property
    def num_sequences(self) -> int:
        """Sequences it may have at once."""
        return self.params.n if self.beams is None else self.beams.width

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class RowOrigin(NamedTuple):
    """The row that a forked sequence's own may begin as, while it is that of (sequence, epoch) still."""

    row: int
    sequence_id: int
    epoch: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One output in the making. Written by the scheduler (and its block manager) only."""

    sequence_id: int
    request: Request
    sample_index: int
    token_ids: "array[int]"
    """Prompt and output tokens that the host knows (`TOKEN_TYPE`)."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache once every dispatched step has run."""
    num_pending_tokens: int = 0
    """Tokens sampled by dispatched steps that the host has not read yet: 1, and 2 while it schedules ahead."""
    status: SequenceStatus = SequenceStatus.WAITING
    block_ids: list[int] = field(default_factory=list)
    """The block table (`TableLayout`): device blocks while running, host blocks while swapped, empty otherwise."""
    row: int | None = None
    """Index of this sequence's row in the runner's per-sequence device state; held while running."""
    num_preemptions: int = 0
    epoch: int = 0
    """Of its row: a runner that sees (sequence, epoch) anew fills the row afresh."""
    row_origin: RowOrigin | None = None
    """Of a fork, in its first epoch: a row that holds its lists, and all of its tokens but the last."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it, if one did."""
    cumulative_logprob: float | None = None
    """Of an ended beam."""
    score: float | None = None
    """Of an ended beam: the former, length-penalised."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of an ended beam, one entry a token where the request asked for logprobs."""

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.request.num_prompt_tokens:].tolist()

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request: scheduled, preempted and resumed together."""

    request: Request
    sequences: list[Sequence]
    """One until the prompt is computed, then `params.n` (forks of the first), or as many beams as live, best first; at
    the end of a beam search the hypotheses that it found."""
    is_forked: bool = False
    """The prompt was computed and the samples were forked (always true for n == 1 after its first token)."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache at first admission."""
    num_preemptions: int = 0
    num_swapped_blocks: int = 0
    """Blocks copied to the host for this group so far."""
    num_shared_blocks: int = 0
    """Most blocks its tables have saved at once by sharing."""
    first_scheduled_time_s: float | None = None

    @property
    def unfinished(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.is_finished]

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)
