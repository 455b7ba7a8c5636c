"""Which tokens go through the model in the next step, and what the step's results mean for their requests."""

import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as ListLike

from jaxpaged.core.admission import AdmissionGate, SchedulerLimits, check_fits
from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.group_queue import GroupQueue, Order, first_come_first_served
from jaxpaged.core.preemption import Preemption, PreemptionCosts, is_to_swap, num_common_blocks
from jaxpaged.core.request import FinishReason, Request, Sequence, SequenceGroup, SequenceStatus
from jaxpaged.core.scheduler_output import RunnerOutput, ScheduledSequence, SchedulerOutput, SequenceOutput
from jaxpaged.core.searches import EndError, Searches
from jaxpaged.core.sequences import Sequences
from jaxpaged.core.step_events import PromptLogprobsEvent, SchedulerCounts, StepEvents, TokenEvent
from jaxpaged.core.step_plan import StepPlan, num_logit_rows, plan_sequence

WATERMARK_DIVISOR = 100
"""A newcomer leaves one block in this many free, so that those who run can grow a little before they preempt it."""
NO_CONTINUATION = (
    "every token is forbidden to every beam: allowed_token_ids, bad_words, structured_outputs and logits_processors "
    "together leave none; loosen one of them"
)
NONFINITE = "the model gave logits that are NaN or infinite: check the checkpoint's weights and the dtype"


class Scheduler:
    """Hands out token counts; the only writer of requests' state.

    `schedule` for step k + 1 may be called before `update` of step k: it counts the tokens that step k will give as
    pending, and plans on. Steps run on the device in the order they were scheduled.
    """

    def __init__(
        self,
        *,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_logits: int,
        preemption: Preemption = "auto",
        enable_chunked_prefill: bool = True,
        order: Order = first_come_first_served,
        costs: PreemptionCosts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if preemption not in ("swap", "recompute", "auto"):
            raise ValueError(f"preemption={preemption!r} must be 'swap', 'recompute' or 'auto'")
        self.limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_num_logits=max_num_logits,
            enable_chunked_prefill=enable_chunked_prefill,
        )
        self.block_manager = block_manager
        self._block_size = block_manager.block_size
        self.preemption: Preemption = preemption
        self.costs = costs or PreemptionCosts()
        """May be replaced between steps, as the engine learns them."""
        self.num_preemptions = 0
        self.num_swap_preemptions = 0
        """Those that swapped; the others are recomputed."""
        self.num_swap_failures = 0
        """Groups that fell back to recomputing because a copy of theirs failed."""
        self.num_nonfinite = 0
        """Requests ended because their logits were not finite."""
        self._clock = clock
        self._groups: dict[str, SequenceGroup] = {}
        self._waiting = GroupQueue(order)
        self._running = GroupQueue(order)
        self._swapped = GroupQueue(order)
        self._num_accepted = 0
        self._num_finished = dict.fromkeys(FinishReason, 0)
        self._sequences = Sequences(block_manager, max_num_seqs)
        self.searches = Searches(block_manager, self._sequences, max_model_len)
        self._num_unreserved_rows = max_num_seqs
        """Free rows that are not kept for the samples of a group whose prompt is still computed."""
        self._awaiting_fork: set[SequenceGroup] = set()
        """Their n first tokens were scheduled and are not known yet."""
        self.gate: AdmissionGate | None = None
        """A further condition of admission, for experiments: set it while no request lives."""
        self._num_prompt_logprobs: dict[str, int] = {}
        """Prompt positions below this were reported."""
        self._to_commit: list[Sequence] = []
        self._latest: tuple[SchedulerOutput, StepPlan] | None = None

    # -- the door

    def add(self, request: Request) -> SequenceGroup:
        """Accept the request, to wait its turn; ValueError for a duplicate id or one that could never finish."""
        if request.request_id in self._groups:
            raise ValueError(f"request id {request.request_id!r} is in use: choose another, or abort it first")
        check_fits(request, self.limits, self.block_manager.device.num_usable, self.block_manager.layout)
        sequence = self._sequences.create(request)
        group = SequenceGroup(request, [sequence])
        self._groups[request.request_id] = group
        self.searches.start(sequence)
        self._waiting.add(group)
        self._num_accepted += 1
        return group

    def abort(self, request_id: str) -> bool:
        """End the request now, with what it has; False if no such request lives."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        if group.request.beams is not None:
            self._close_search(group, is_aborted=True)
            return True
        for sequence in group.unfinished:
            self.finish(sequence, FinishReason.ABORT)
        return True

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """End one sequence, and its request if it was the last; False if it had ended. Results to come are dropped."""
        if sequence.is_finished:
            return False
        self.block_manager.commit(sequence, sequence.num_computed_tokens)
        self._end(self._groups[sequence.request.request_id], sequence, reason, stop_reason)
        return True

    def _end(
        self, group: SequenceGroup, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        status = sequence.status
        if status is SequenceStatus.RUNNING and group.request.beams is None:
            self._num_unreserved_rows += 1 if group.is_forked else group.request.params.n
        self.searches.score(sequence)
        self._sequences.drop(sequence)
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        if group.is_finished:
            self._end_group(group, status, reason)

    def _end_group(self, group: SequenceGroup, status: SequenceStatus, reason: FinishReason) -> None:
        """Forget a group whose last sequence ended; `status` is what it had."""
        request = group.request
        if status is SequenceStatus.RUNNING and request.beams is not None:
            self._num_unreserved_rows += request.beams.width
        self._queue(status).remove(group)
        if self.gate is not None:
            self.gate.leave(group)
        self._awaiting_fork.discard(group)
        self._num_prompt_logprobs.pop(request.request_id, None)
        self.searches.forget(request.request_id)
        del self._groups[request.request_id]
        self._num_finished[reason] += 1

    def _queue(self, status: SequenceStatus) -> GroupQueue:
        if status is SequenceStatus.RUNNING:
            return self._running
        return self._swapped if status is SequenceStatus.SWAPPED else self._waiting

    # -- one step down

    def schedule(self) -> SchedulerOutput:
        """Plan the next step: running groups first, then swapped ones, then waiting ones, each in order.

        An empty plan while a step's results are awaited is normal.
        """
        # dispatched by now, so whatever comes later on the device may read it
        for sequence in self._to_commit:
            self.block_manager.commit(sequence, sequence.num_computed_tokens)
        self._to_commit = []
        step = StepPlan(self.limits.max_num_batched_tokens, self.limits.max_num_logits)
        self._schedule_running(step)
        if not step.has_preempted:
            self._resume_swapped(step)
            self._admit_waiting(step)
        output = step.output()
        self._latest = (output, step)
        if step.scheduled:
            self.block_manager.record_step()
        return output

    def _schedule_running(self, step: StepPlan) -> None:
        manager, running = self.block_manager, self._running
        has_windows = manager.has_windows
        for group in running:
            if not step.num_tokens_left:
                return
            items = self._plan_group(group, step)
            if not items:
                continue
            if has_windows:
                for item in items:
                    manager.leave(item.sequence, item.start)
            # everything behind the group is not scheduled yet in this step: the last of them gives way first
            num_blocks = manager.num_blocks_to_append(items)
            while num_blocks and num_blocks > manager.num_free_blocks:
                victim = running.pop_last()
                self._preempt(victim, step)
                if victim is group:
                    return
                num_blocks = manager.num_blocks_to_append(items)  # a victim may have shared a block of the group
            self._schedule_items(group, items, num_blocks, step)

    def _resume_swapped(self, step: StepPlan) -> None:
        manager = self.block_manager
        while self._swapped and step.num_tokens_left:
            group = self._swapped.first
            if self._is_awaited(group) or not self._has_rows(group):
                return
            items = self._plan_group(group, step)
            num_blocks = manager.num_blocks_to_append(items)
            num_needed = manager.num_blocks_to_swap_in(group) + num_blocks + self._num_watermark_blocks()
            if not items or num_needed > manager.num_free_blocks:
                return
            step.swap_in.extend(manager.swap_in(group))
            step.groups_in.append(group)
            self._swapped.remove(group)
            self._run(group)
            self._to_commit.extend(group.unfinished)
            self._schedule_items(group, items, num_blocks, step)

    def _admit_waiting(self, step: StepPlan) -> None:
        """Admit waiting groups while nobody is swapped out: those have been running before."""
        manager = self.block_manager
        while self._waiting and not self._swapped and step.num_tokens_left:
            group = self._waiting.first
            if self._is_awaited(group) or not self._has_rows(group):
                return
            leader, *members = group.unfinished
            match = self._match(group, leader)
            num_matched = len(match) // manager.num_groups
            num_matched_tokens = num_matched * manager.block_size
            if self._is_next_block_computed(group, leader, num_matched, step):
                return
            budgets = (step.num_tokens_left, step.num_logits_left)
            num_samples = 1 if group.is_forked else group.request.params.n
            if plan_sequence(leader, num_matched_tokens, num_samples, *budgets, self.limits) is None:
                return
            num_blocks = self._num_blocks_to_start(group, leader, members, match)
            if num_blocks + self._num_watermark_blocks() > manager.num_free_blocks:
                return
            if self.gate is not None and not self.gate.admit(group):
                return
            counts = manager.device.reference_counts
            num_shared = sum(counts[block] > 0 for block in match)
            group.num_shared_blocks = max(group.num_shared_blocks, num_shared)
            manager.allocate(leader, match)
            leader.num_computed_tokens = num_matched_tokens
            if group.first_scheduled_time_s is None:
                group.first_scheduled_time_s = self._clock()
                group.num_cached_tokens = num_matched_tokens
                if self._may_match(group):
                    manager.prefix_cache.count(leader.num_tokens, num_matched_tokens)
            self._waiting.remove(group)
            self._run(group)
            items = self._plan_group(group, step)
            self._schedule_items(group, items, manager.num_blocks_to_append(items), step)

    def _num_blocks_to_start(
        self, group: SequenceGroup, leader: Sequence, members: ListLike[Sequence], match: ListLike[int]
    ) -> int:
        """Free blocks that all known tokens of a waiting group may take."""
        manager, step_tokens = self.block_manager, self.limits.max_num_batched_tokens
        num_blocks = manager.num_blocks_to_start(match, leader.num_tokens, step_tokens)
        num_common = num_common_blocks(group, manager.block_size)
        for member in members:
            num_blocks += manager.layout.most_blocks(member.num_tokens, step_tokens, num_common)
        return num_blocks

    def _is_awaited(self, group: SequenceGroup) -> bool:
        """Whether a step in flight will still add tokens to it; a group does not come back before that."""
        return (
            group in self._awaiting_fork
            or any(sequence.num_pending_tokens for sequence in group.unfinished)
            or self.searches.is_awaited(group.request.request_id)
        )

    def _is_next_block_computed(self, group: SequenceGroup, leader: Sequence, index: int, step: StepPlan) -> bool:
        """Whether this very step computes, for another, the block the group needs next: worth a step of waiting."""
        if not step.computing or not self._may_match(group) or index >= (len(leader.token_ids) - 1) // self._block_size:
            return False
        return self.block_manager.block_keys(leader, index, index + 1)[0] in step.computing

    def _has_rows(self, group: SequenceGroup) -> bool:
        return self._num_rows(group) <= self._num_unreserved_rows

    def _num_rows(self, group: SequenceGroup) -> int:
        if group.request.beams is not None:
            return group.request.beams.width  # however many live, the next step may need them all
        return len(group.unfinished) if group.is_forked else group.request.params.n

    def _num_watermark_blocks(self) -> int:
        return self.block_manager.device.num_blocks // WATERMARK_DIVISOR if self._running else 0

    def _may_match(self, group: SequenceGroup) -> bool:
        """Whether its prompt may come from the prefix cache; not while every prompt token's logits are still wanted."""
        return group.is_forked or group.request.params.prompt_logprobs is None

    def _match(self, group: SequenceGroup, sequence: Sequence) -> list[int]:
        if not self._may_match(group):
            return []
        manager, most_columns = self.block_manager, None
        if manager.has_windows and not sequence.block_ids and self._has_unstarted(group, sequence):
            # its mates are to go on from the end of the prompt: it must not begin behind the window they need there
            most_columns = num_common_blocks(group, manager.block_size) or None
        return manager.match(sequence, most_columns)

    def _has_unstarted(self, group: SequenceGroup, sequence: Sequence) -> bool:
        """Whether samples besides `sequence` are to be recomputed and have no block yet."""
        return any(mate is not sequence and not mate.num_computed_tokens for mate in group.unfinished)

    def _run(self, group: SequenceGroup) -> None:
        self._num_unreserved_rows -= self._num_rows(group)
        for sequence in group.unfinished:
            sequence.status = SequenceStatus.RUNNING
            self._sequences.take_row(sequence)
        self._running.add(group)

    # -- the share of one group in a step

    def _plan_group(self, group: SequenceGroup, step: StepPlan) -> list[ScheduledSequence]:
        """What the group's sequences may compute within the budgets left; empty while it waits for results."""
        sequences = group.sequences
        num_tokens, num_logits = step.num_tokens_left, step.num_logits_left
        if len(sequences) == 1:
            sequence = sequences[0]
            num_samples = 1 if group.is_forked else group.request.params.n
            item = plan_sequence(
                sequence, sequence.num_computed_tokens, num_samples, num_tokens, num_logits, self.limits
            )
            return [] if item is None else [item]
        items = []
        for sequence in group.unfinished:
            if not sequence.num_computed_tokens and not self._start_sample(group, sequence):
                continue
            if not num_tokens:
                continue  # but a sample starts now: its mate may let go of what the sample needs before the next step
            item = plan_sequence(sequence, sequence.num_computed_tokens, 1, num_tokens, num_logits, self.limits)
            if item is not None:
                items.append(item)
                num_tokens -= item.num_new_tokens
                num_logits -= num_logit_rows(item)
        return items

    def _start_sample(self, group: SequenceGroup, sequence: Sequence) -> bool:
        """Give a sample that is to be recomputed its part of the prompt, as soon as a mate has computed it.

        Only from a mate: the prefix cache may know a twin of those blocks, which would break the bound of the door.
        """
        manager = self.block_manager
        num_common = num_common_blocks(group, manager.block_size)
        num_common_tokens = num_common * manager.block_size
        live = group.unfinished
        if sequence.status is not SequenceStatus.RUNNING:
            return sequence is live[0] or not num_common  # planning ahead of a swap-in: nothing to share yet
        if num_common:
            mates = (
                mate
                for mate in live
                if mate is not sequence
                and mate.num_computed_tokens >= num_common_tokens
                and manager.can_share_prefix(mate, num_common)
            )
            mate = next(mates, None)
            if mate is None and sequence is not live[0]:
                return False
            if mate is not None:
                manager.share_prefix(mate, sequence, num_common)
        match = self._match(group, sequence)[len(sequence.block_ids) :]
        num_columns = (len(sequence.block_ids) + len(match)) // manager.num_groups
        sequence.num_computed_tokens = num_columns * manager.block_size
        manager.leave(sequence, sequence.num_computed_tokens)  # what its mate still had, and the match goes beyond
        manager.allocate(sequence, match)
        return True

    def _schedule_items(
        self, group: SequenceGroup, items: ListLike[ScheduledSequence], num_blocks: int, step: StepPlan
    ) -> None:
        """Enter what was planned and fits: tables grow by `num_blocks`, the sequences count as computed that far."""
        manager = self.block_manager
        block_size = self._block_size
        for item in items:
            sequence, start, num_new, num_samples = item
            if num_blocks:
                step.copies.extend(manager.append(sequence, start, num_new))
            end = start + num_new
            sequence.num_computed_tokens = end
            if num_samples and group.request.beams is not None:
                self.searches.expect(sequence)
            elif num_samples == 1 and (group.is_forked or group.request.params.n == 1):
                sequence.num_pending_tokens += 1
            elif num_samples:
                self._awaiting_fork.add(group)
            step.num_tokens_left -= num_new
            step.num_logits_left -= num_logit_rows(item)
            if end // block_size > start // block_size:
                self._to_commit.append(sequence)
                if num_new > 1:
                    step.computing.update(manager.block_keys(sequence, start // block_size, end // block_size))
        step.scheduled.extend(items)

    # -- preemption

    def _preempt(self, group: SequenceGroup, step: StepPlan) -> None:
        """Take all blocks and rows from a running group that has left the queue; all or nothing."""
        step.has_preempted = True
        if self.block_manager.has_windows:
            live = group.unfinished
            # while samples are still to start, a mate keeps what they will share
            for sequence in live if all(sequence.num_computed_tokens for sequence in live) else ():
                self.block_manager.leave(sequence, sequence.num_computed_tokens)
        self._give_way(group)
        copies = None
        if is_to_swap(group, self.preemption, self.costs, self.block_manager):
            copies = self.block_manager.swap_out(group)
        if copies is None:
            self._recompute(group)
            return
        self.num_swap_preemptions += 1
        step.swap_out.extend(copies)
        step.groups_out.append((group, len(copies)))
        group.num_swapped_blocks += len(copies)
        for sequence in group.unfinished:
            sequence.status = SequenceStatus.SWAPPED
        self._swapped.add(group)

    def _give_way(self, group: SequenceGroup) -> None:
        self.num_preemptions += 1
        group.num_preemptions += 1
        self._num_unreserved_rows += self._num_rows(group)
        for sequence in group.unfinished:
            sequence.num_preemptions += 1
            sequence.epoch += 1
            self._sequences.return_row(sequence)

    def _recompute(self, group: SequenceGroup) -> None:
        """Back to the waiting ones without a block; tokens still pending are appended when they come."""
        for sequence in group.unfinished:
            self.block_manager.free(sequence)
            sequence.num_computed_tokens = 0
            sequence.status = SequenceStatus.WAITING
        self._waiting.add(group)

    def swap_failed(self, output: SchedulerOutput) -> SchedulerOutput:
        """Return what is left of the latest plan when its swap copies failed: no swaps, the groups in them recompute.

        To be called before the plan runs. Raises ValueError for any plan but the latest.
        """
        if self._latest is None or self._latest[0] is not output:
            raise ValueError("only the latest plan can be taken back: call swap_failed before the next schedule")
        step = self._latest[1]
        manager = self.block_manager
        manager.num_swapped_out_blocks -= len(output.swap_out)
        manager.num_swapped_in_blocks -= len(output.swap_in)
        for group, num_blocks in step.groups_out:
            self.num_swap_preemptions -= 1
            group.num_swapped_blocks -= num_blocks
            if not group.is_finished:
                self.num_swap_failures += 1
                self._swapped.remove(group)
                self._recompute(group)
        for group in step.groups_in:
            if not group.is_finished:
                self.num_swap_failures += 1
                self._running.remove(group)
                self._give_way(group)
                self._recompute(group)
        failed = {sequence for group in step.groups_in for sequence in group.sequences}
        for item in output.scheduled:
            if item.sequence in failed and not item.sequence.is_finished:
                sequence = item.sequence
                group = self._groups[sequence.request.request_id]
                if group.request.beams is not None:
                    self.searches.expect_no_more(sequence)
                elif group.is_forked or group.request.params.n == 1:
                    sequence.num_pending_tokens -= item.num_samples
                elif item.num_samples:
                    self._awaiting_fork.discard(group)
        copies = tuple(copy for copy in output.copies if manager.device.reference_counts[copy.target])
        manager.num_copied_blocks -= len(output.copies) - len(copies)
        self._latest = None
        return SchedulerOutput(
            scheduled=tuple(item for item in output.scheduled if item.sequence not in failed),
            swap_out=(),
            swap_in=(),
            copies=copies,
        )

    # -- one step up

    def update(self, output: SchedulerOutput, runner_output: RunnerOutput) -> StepEvents:
        """Append the tokens a step gave, fork, finish. Results of sequences that have ended meanwhile are dropped."""
        events = StepEvents()
        for item, result in zip(output.scheduled, runner_output.outputs, strict=True):
            sequence = item.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            group = self._groups[sequence.request.request_id]
            if not result.is_finite:
                self._fail(group, events, result.error or NONFINITE)
                continue
            if result.prompt_logprobs:
                self._report_prompt_logprobs(group, result, events)
            if not item.num_samples:
                continue
            if group.request.beams is not None:
                if self.searches.collect(sequence, result.candidates):
                    self._advance(group, events)
                continue
            if not group.is_forked:
                if group.request.params.n > 1:
                    self._fork(group, result, events)
                    continue
                group.is_forked = True
            sequence.num_pending_tokens -= 1
            self._append_token(group, sequence, result, 0, events)
        return events

    def _append_token(
        self, group: SequenceGroup, sequence: Sequence, result: SequenceOutput, index: int, events: StepEvents
    ) -> None:
        """Append the result's token `index`, and end the sequence if that was its last."""
        token_id = result.token_ids[index]
        token_ids, request = sequence.token_ids, sequence.request
        token_ids.append(token_id)
        events.tokens.append(TokenEvent(sequence, token_id, result.logprobs[index] if result.logprobs else None))
        num_outputs = len(token_ids) - len(request.prompt_token_ids)
        if token_id in request.stop_token_ids and num_outputs >= request.params.min_tokens:
            self.finish(sequence, FinishReason.STOP, token_id)
        elif num_outputs >= request.max_tokens or len(token_ids) >= self.limits.max_model_len:
            self.finish(sequence, FinishReason.LENGTH)
        else:
            return
        events.finished.append(sequence)

    def _fork(self, group: SequenceGroup, result: SequenceOutput, events: StepEvents) -> None:
        """Make the samples of a computed prompt, wherever its blocks are by now, each with its own first token."""
        parent = group.sequences[0]
        n = group.request.params.n
        self._awaiting_fork.discard(group)
        group.is_forked = True
        for sample_index in range(1, n):
            group.sequences.append(self._sequences.fork(parent, sample_index))
        group.num_shared_blocks += (n - 1) * len(self.block_manager.held(parent))
        for sample_index, sequence in enumerate(list(group.sequences)):
            self._append_token(group, sequence, result, sample_index, events)

    def _advance(self, group: SequenceGroup, events: StepEvents) -> None:
        """One step of a search, which may be its last; one that found nothing (all was banned) ends in an error."""
        trouble = NO_CONTINUATION
        try:
            if self.searches.advance(group):
                return
            is_closed = self._close_search(group)
        except EndError as error:
            is_closed, trouble = False, str(error)
        if not is_closed:
            for sequence in group.unfinished:
                self._end(group, sequence, FinishReason.ERROR, trouble)
        events.finished.extend(group.sequences)

    def _close_search(self, group: SequenceGroup, *, is_aborted: bool = False) -> bool:
        """End a request with the hypotheses that its search has found; False, and nothing done, if there are none."""
        status = group.sequences[0].status
        reason = self.searches.close(group, is_aborted=is_aborted)
        if reason is not None:
            self._end_group(group, status, reason)
        return reason is not None

    def _report_prompt_logprobs(self, group: SequenceGroup, result: SequenceOutput, events: StepEvents) -> None:
        request_id = group.request.request_id
        num_reported = self._num_prompt_logprobs.get(request_id, 0)
        for position, logprobs in result.prompt_logprobs:
            if position >= num_reported:
                events.prompt_logprobs.append(PromptLogprobsEvent(group, position, logprobs))
                num_reported = position + 1
        self._num_prompt_logprobs[request_id] = num_reported

    def _fail(self, group: SequenceGroup, events: StepEvents, message: str) -> None:
        """End a request whose logits were of no use; nothing of it stays to be found by others."""
        self.num_nonfinite += 1
        live = group.unfinished
        for sequence in live:
            self.block_manager.discard(sequence)
        for sequence in live:
            self._end(group, sequence, FinishReason.ERROR, message)
            events.finished.append(sequence)

    # -- figures

    def prompt_steps(self, group: SequenceGroup) -> list[tuple[int, int]]:
        """(tokens, logit rows) of each step that would compute a waiting group's prompt, if it ran alone now."""
        (sequence,) = group.sequences
        start = len(self._match(group, sequence)) * self._block_size
        budgets = (self.limits.max_num_batched_tokens, self.limits.max_num_logits)
        steps = []
        while start < sequence.num_tokens:
            item = plan_sequence(sequence, start, group.request.params.n, *budgets, self.limits)
            assert item is not None  # the door lets in what can be planned alone
            steps.append((item.num_new_tokens, num_logit_rows(item)))
            start += item.num_new_tokens
        return steps

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    @property
    def groups(self) -> Collection[SequenceGroup]:
        """The live groups, in the order they were added; a view."""
        return self._groups.values()

    def counts(self) -> SchedulerCounts:
        return SchedulerCounts(
            len(self._waiting), len(self._running), len(self._swapped), self._num_accepted, dict(self._num_finished)
        )

    def check(self) -> None:
        """Raise RuntimeError unless blocks, rows and requests are all accounted for."""
        self.block_manager.check(self.groups)
        counts = self.counts()
        live = counts.waiting + counts.running + counts.swapped
        if live != len(self._groups) or live + sum(counts.finished.values()) != counts.accepted:
            raise RuntimeError(f"requests do not add up: {counts} with {len(self._groups)} live")
        rows = list(self._sequences.free_rows)
        for status in (SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.SWAPPED):
            for group in self._queue(status):
                for sequence in group.unfinished:
                    if sequence.status is not status or (sequence.row is None) == (status is SequenceStatus.RUNNING):
                        raise RuntimeError(f"{sequence.status.value} with row {sequence.row} among the {status.value}")
                    if sequence.row is not None:
                        rows.append(sequence.row)
        if sorted(rows) != list(range(self.limits.max_num_seqs)):
            raise RuntimeError(f"rows are lost or held twice: {sorted(rows)}")
        num_reserved = sum(self._num_rows(group) for group in self._running)
        if num_reserved + self._num_unreserved_rows != self.limits.max_num_seqs:
            raise RuntimeError(f"{num_reserved} rows reserved + {self._num_unreserved_rows} unreserved is not all")
