"""What the results of a step mean to those who asked, and how many requests stand where."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.core.request import FinishReason, Sequence, SequenceGroup, TokenLogprobs


class TokenEvent(NamedTuple):
    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None


class PromptLogprobsEvent(NamedTuple):
    group: SequenceGroup
    position: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What a step's results brought, each list in the order it happened."""

    tokens: list[TokenEvent] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobsEvent] = field(default_factory=list)
    """Every prompt position once, also where the prompt was computed again."""
    finished: list[Sequence] = field(default_factory=list)
    """Sequences that ended, with their last token's event or (ERROR, and hypotheses of a beam search) without one."""


class SchedulerCounts(NamedTuple):
    """Requests; accepted = waiting + running + swapped + those finished."""

    waiting: int
    running: int
    swapped: int
    accepted: int
    finished: dict[FinishReason, int]
