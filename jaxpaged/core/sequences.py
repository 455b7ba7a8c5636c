"""Sequences come and go: their ids, their rows in the runner's device state, and the blocks they hold."""

import heapq
import itertools
from array import array

from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.request import TOKEN_TYPE, Request, RowOrigin, Sequence, SequenceStatus


class Sequences:
    """Makes sequences, forks them and lets them go."""

    def __init__(self, block_manager: BlockManager, num_rows: int) -> None:
        self._block_manager = block_manager
        self._ids = itertools.count()
        self.free_rows = list(range(num_rows))
        """A heap: low rows first keep the batch dense."""

    def create(self, request: Request) -> Sequence:
        """The first sequence of a request, without blocks."""
        return Sequence(next(self._ids), request, 0, array(TOKEN_TYPE, request.prompt_token_ids))

    def create_ended(self, request: Request, sample_index: int, token_ids: tuple[int, ...]) -> Sequence:
        """One that never ran: it holds nothing, and is finished."""
        status = SequenceStatus.FINISHED
        return Sequence(next(self._ids), request, sample_index, array(TOKEN_TYPE, token_ids), status=status)

    def fork(self, parent: Sequence, sample_index: int) -> Sequence:
        """A sequence with the parent's tokens and blocks, in the memory the parent is in."""
        child = Sequence(
            sequence_id=next(self._ids),
            request=parent.request,
            sample_index=sample_index,
            token_ids=parent.token_ids[:],
            num_computed_tokens=parent.num_computed_tokens,
            status=parent.status,
            num_preemptions=parent.num_preemptions,
        )
        if parent.row is not None:
            child.row_origin = RowOrigin(parent.row, parent.sequence_id, parent.epoch)
        self._block_manager.fork(parent, child)
        if parent.status is SequenceStatus.RUNNING:
            self.take_row(child)  # reserved on admission
        return child

    def drop(self, sequence: Sequence) -> None:
        """Its blocks and its row are free again."""
        self._block_manager.retire(sequence)
        if sequence.status is SequenceStatus.RUNNING:
            self.return_row(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.num_pending_tokens = 0

    def take_row(self, sequence: Sequence) -> None:
        sequence.row = heapq.heappop(self.free_rows)

    def return_row(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        heapq.heappush(self.free_rows, sequence.row)
        sequence.row = None
