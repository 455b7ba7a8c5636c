"""What one step is to do, and what it gave back: the whole contract of host and device."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxpaged.core.request import Sequence, TokenLogprobs


class BlockCopy(NamedTuple):
    """One block to copy: within the device for copy-on-write, to the host for swap out, from it for swap in."""

    source: int
    target: int


class ScheduledSequence(NamedTuple):
    """The tokens [start, start + num_new_tokens) of a sequence go through the model in this step."""

    sequence: Sequence
    start: int
    num_new_tokens: int
    num_samples: int
    """Tokens to sample from the last of them: 0 where a chunk ends earlier, n before the samples fork, else 1."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The device does, in this order: swap_out, swap_in, copies, then the step over `scheduled`."""

    scheduled: tuple[ScheduledSequence, ...]
    swap_out: tuple[BlockCopy, ...]
    """Device block -> host block. Its source may be reused by anything later in this step."""
    swap_in: tuple[BlockCopy, ...]
    """Host block -> device block. Never together with swap_out."""
    copies: tuple[BlockCopy, ...]
    """Copy-on-write; no target is another's source."""

    @property
    def is_empty(self) -> bool:
        return not (self.scheduled or self.swap_out or self.swap_in or self.copies)


class Candidate(NamedTuple):
    """A token that may continue a beam."""

    token_id: int
    score: float
    """Its log-probability, with what the request adds to logits; -inf where it is banned."""
    logprobs: TokenLogprobs | None
    """Where the request asked for logprobs."""


class SequenceOutput(NamedTuple):
    """What one ScheduledSequence gave."""

    token_ids: tuple[int, ...]
    """num_samples sampled tokens."""
    logprobs: tuple[TokenLogprobs, ...]
    """One per sampled token where the request asked for logprobs, else empty."""
    prompt_logprobs: tuple[tuple[int, TokenLogprobs], ...]
    """(position of the prompt token, its entry) where asked for, else empty."""
    is_finite: bool
    """Whether every logit row of it was free of NaN and had a finite maximum."""
    error: str | None = None
    """Why the request must end where `is_finite` is false, if the runner knows more than that."""
    candidates: tuple[Candidate, ...] = ()
    """Of a beam whose last token was scheduled, the likeliest continuations, best first."""


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    outputs: tuple[SequenceOutput, ...]
    """In the order of SchedulerOutput.scheduled."""
