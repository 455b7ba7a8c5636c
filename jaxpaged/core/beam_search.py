"""Beam search: which hypotheses live on, which are kept as finished, and when a search is over.

The rules are those of Hugging Face's `generate(num_beams=..., do_sample=False)`: of the best `num_candidates`
continuations of all beams together, those that end a text are finished if they are among the first `width`, and the
first `width` of the others live on. What the block manager makes of it (fork, drop) is the scheduler's business.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.core.request import BeamSettings, FinishReason, Sequence, TokenLogprobs
from jaxpaged.core.scheduler_output import Candidate


class Entry(NamedTuple):
    """One output token of a hypothesis, and those before it; hypotheses share what they have in common."""

    logprobs: TokenLogprobs | None
    before: "Entry | None"


@dataclass(frozen=True, slots=True)
class Beam:
    """What a hypothesis is worth so far, and its output tokens' log-probabilities."""

    cumulative_logprob: float = 0.0
    last: Entry | None = None

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Of each output token, where the request asked for them."""
        entries, entry = [], self.last
        while entry is not None:
            if entry.logprobs is not None:
                entries.append(entry.logprobs)
            entry = entry.before
        return tuple(reversed(entries))


class Continuation(NamedTuple):
    """A beam and one more token."""

    parent: Sequence
    token_id: int
    beam: Beam


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One that is given back."""

    token_ids: tuple[int, ...]
    """Prompt and output."""
    beam: Beam
    score: float
    finish_reason: FinishReason
    stop_reason: int | str | None


StopCheck = Callable[[Continuation], tuple[FinishReason, int | str | None] | None]
"""Whether a continuation ends its text, and by what."""


@dataclass(slots=True)
class BeamSearch:
    """The search of one request."""

    settings: BeamSettings
    beams: dict[Sequence, Beam] = field(default_factory=dict)
    """The live ones by sequence, best first."""
    finished: list[Hypothesis] = field(default_factory=list)
    """At most `width`, best first."""
    awaited: set[Sequence] = field(default_factory=set)
    """Live sequences whose candidates were asked for and have not come."""
    candidates: dict[Sequence, tuple[Candidate, ...]] = field(default_factory=dict)
    """Those that have come, while others are still to be computed."""
    can_improve: bool = True
    """Whether a live beam may still become better than the worst that is finished."""

    def collect(self, sequence: Sequence, candidates: tuple[Candidate, ...]) -> bool:
        """Keep what a step gave; whether every live sequence now has its candidates, and none is computed anew."""
        self.awaited.discard(sequence)
        self.candidates[sequence] = candidates
        return not self.awaited and len(self.candidates) == len(self.beams)

    def best_continuations(self) -> list[Continuation]:
        """The best of all beams, best first; takes the candidates. Banned ones (of probability 0) are none."""
        found = [
            (beam.cumulative_logprob + candidate.score, -place, -index, sequence, beam, candidate)
            for place, (sequence, beam) in enumerate(self.beams.items())
            for index, candidate in enumerate(self.candidates[sequence])
            if candidate.score > -float("inf")
        ]
        self.candidates.clear()
        best = heapq.nlargest(self.settings.num_candidates, found, key=lambda entry: entry[:3])
        return [
            Continuation(sequence, candidate.token_id, Beam(score, Entry(candidate.logprobs, beam.last)))
            for score, _, _, sequence, beam, candidate in best
        ]

    def choose(self, continuations: Iterable[Continuation], num_outputs: int, is_stop: StopCheck) -> list[Continuation]:
        """Finish what ends and return what lives on, best first; `num_outputs` tokens are then in each.

        Empty when the search is over.
        """
        settings = self.settings
        live: list[Continuation] = []
        ended: list[Hypothesis] = []
        has_valid = False
        is_full = settings.early_stopping and len(self.finished) == settings.width
        for place, continuation in enumerate(continuations):
            if place >= settings.width and len(live) == settings.width:
                break  # none of the others is of any use
            stop = is_stop(continuation)
            if stop is None:
                has_valid = True
                if len(live) < settings.width:
                    live.append(continuation)
            elif place < settings.width and self.can_improve and not is_full:
                ended.append(self._hypothesis(continuation, num_outputs, *stop))
        # among equals those that were finished before stay
        merged = sorted([*self.finished, *ended], key=lambda hypothesis: -hypothesis.score)
        self.finished = merged[: settings.width]
        is_full = len(self.finished) == settings.width
        if live and is_full:
            best_possible = self.score(live[0].beam.cumulative_logprob, num_outputs)
            self.can_improve = self.can_improve and best_possible > self.finished[-1].score
        is_over = not has_valid or not self.can_improve or (settings.early_stopping and is_full)
        return [] if is_over else live

    def best_so_far(self) -> list[Hypothesis]:
        """At most `width` of what is finished and what lives, best first, as if the search were cut off here."""
        live = []
        for sequence, beam in self.beams.items():
            score = self.score(beam.cumulative_logprob, sequence.num_output_tokens)
            live.append(Hypothesis(tuple(sequence.token_ids), beam, score, FinishReason.ABORT, None))
        merged = sorted([*self.finished, *live], key=lambda hypothesis: -hypothesis.score)
        return merged[: self.settings.width]

    def score(self, cumulative_logprob: float, num_outputs: int) -> float:
        """What a hypothesis of that many tokens is worth; one without any (cut off before its first) as one of one."""
        return cumulative_logprob / max(num_outputs, 1) ** self.settings.length_penalty

    def _hypothesis(
        self, continuation: Continuation, num_outputs: int, reason: FinishReason, stop_reason: int | str | None
    ) -> Hypothesis:
        beam = continuation.beam
        token_ids = (*continuation.parent.token_ids, continuation.token_id)
        return Hypothesis(token_ids, beam, self.score(beam.cumulative_logprob, num_outputs), reason, stop_reason)
