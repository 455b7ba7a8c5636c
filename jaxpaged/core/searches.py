"""The beam searches of live requests: what a step of one does to the sequences and block tables of its group."""

from collections.abc import Callable

from jaxpaged.core.beam_search import Beam, BeamSearch, Continuation
from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.request import FinishReason, Sequence, SequenceGroup
from jaxpaged.core.scheduler_output import Candidate
from jaxpaged.core.sequences import Sequences

Ending = tuple[FinishReason, int | str | None]
"""Finish reason and stop reason."""
EndFinder = Callable[[Sequence, int], Ending | None]
"""What ends a beam's text where it goes on with this token, if anything does."""


class EndError(RuntimeError):
    """The `EndFinder` raised: that request's search cannot go on. The message says why."""


class Searches:
    """One search for each live request with beams; which beams live on is `BeamSearch`'s business."""

    def __init__(self, block_manager: BlockManager, sequences: Sequences, max_model_len: int) -> None:
        self._block_manager = block_manager
        self._sequences = sequences
        self._max_model_len = max_model_len
        self._of_request: dict[str, BeamSearch] = {}
        self.find_end: EndFinder | None = None
        """Set by an engine that knows text and grammars; asked for requests with stop strings or a grammar."""

    def start(self, sequence: Sequence) -> None:
        """Begin the search of a request that was accepted; `sequence` is its only one."""
        request = sequence.request
        if request.beams is not None:
            self._of_request[request.request_id] = BeamSearch(request.beams, {sequence: Beam()})

    def forget(self, request_id: str) -> None:
        self._of_request.pop(request_id, None)

    def expect(self, sequence: Sequence) -> None:
        """A step that was scheduled will give the sequence's candidates."""
        self._of(sequence).awaited.add(sequence)

    def expect_no_more(self, sequence: Sequence) -> None:
        """That step was taken back."""
        self._of(sequence).awaited.discard(sequence)

    def is_awaited(self, request_id: str) -> bool:
        """Whether a step in flight will give candidates to some beam of the request."""
        search = self._of_request.get(request_id)
        return search is not None and bool(search.awaited)

    def collect(self, sequence: Sequence, candidates: tuple[Candidate, ...]) -> bool:
        """Keep what a step gave; whether every live beam now has its candidates."""
        return self._of(sequence).collect(sequence, candidates)

    def _of(self, sequence: Sequence) -> BeamSearch:
        return self._of_request[sequence.request.request_id]

    def advance(self, group: SequenceGroup) -> bool:
        """One step of a search: beams without a continuation are dropped, those with several are forked.

        False, and nothing done, where the search is over. Raises EndError.
        """
        group.is_forked = True
        search = self._of_request[group.request.request_id]
        num_outputs = group.sequences[0].num_output_tokens + 1
        live = search.choose(search.best_continuations(), num_outputs, self._stop_of)
        if not live:
            return False
        parents = {continuation.parent for continuation in live}
        for sequence in group.sequences:
            if sequence not in parents:
                # what it has computed may still be the prefix of somebody's prompt
                self._block_manager.commit(sequence, sequence.num_computed_tokens)
                self._sequences.drop(sequence)  # before rows are taken for others
        beams: dict[Sequence, Beam] = {}
        for rank, (parent, _, beam) in enumerate(live):
            child = parent
            if parent in beams:
                child = self._sequences.fork(parent, rank)
            child.sample_index = rank
            beams[child] = beam
        group.sequences = list(beams)
        search.beams = beams
        # all have forked: now tokens may be appended
        for child, (_, token_id, _) in zip(beams, live, strict=True):
            child.token_ids.append(token_id)
        if len(parents) < len(live):
            num_held = sum(len(self._block_manager.held(child)) for child in beams)
            num_saved = num_held - self._block_manager.num_distinct_blocks(group)
            group.num_shared_blocks = max(group.num_shared_blocks, num_saved)
        return True

    def _stop_of(self, continuation: Continuation) -> Ending | None:
        """What ends a beam that is continued so, if anything does."""
        parent, token_id, _ = continuation
        request = parent.request
        if token_id in request.stop_token_ids:
            return FinishReason.STOP, token_id
        if self.find_end is not None and (request.params.stop or request.params.structured_outputs is not None):
            try:
                found = self.find_end(parent, token_id)
            except Exception as error:  # one request's trouble is its own
                raise EndError(f"{type(error).__name__}: {error}") from error
            if found is not None:
                return found
        if parent.num_output_tokens + 1 >= request.max_tokens or len(parent.token_ids) + 1 >= self._max_model_len:
            return FinishReason.LENGTH, None
        return None

    def close(self, group: SequenceGroup, *, is_aborted: bool = False) -> FinishReason | None:
        """Drop the beams; the group's sequences become the hypotheses found, and why the search ended is returned.

        None, and nothing done, without any hypothesis. One that is aborted gives the best so far.
        """
        search = self._of_request[group.request.request_id]
        found = search.best_so_far() if is_aborted else search.finished
        if not found:
            return None
        for sequence in group.sequences:
            self._block_manager.commit(sequence, sequence.num_computed_tokens)
            self._sequences.drop(sequence)
        group.sequences = []
        for rank, hypothesis in enumerate(found):
            sequence = self._sequences.create_ended(group.request, rank, hypothesis.token_ids)
            sequence.finish_reason, sequence.stop_reason = hypothesis.finish_reason, hypothesis.stop_reason
            self._tell(sequence, hypothesis.beam, hypothesis.score)
            group.sequences.append(sequence)
        return FinishReason.ABORT if is_aborted else found[0].finish_reason

    def score(self, sequence: Sequence) -> None:
        """Tell a beam that ends before its search what it is worth; for other sequences nothing is done."""
        search = self._of_request.get(sequence.request.request_id)
        if search is not None:
            beam = search.beams[sequence]
            self._tell(sequence, beam, search.score(beam.cumulative_logprob, sequence.num_output_tokens))

    def _tell(self, sequence: Sequence, beam: Beam, score: float) -> None:
        sequence.cumulative_logprob, sequence.score, sequence.logprobs = beam.cumulative_logprob, score, beam.logprobs
