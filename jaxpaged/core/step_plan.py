"""A step in the making: its budgets, and what one sequence may take of them."""

from dataclasses import dataclass, field

from jaxpaged.core.admission import SchedulerLimits
from jaxpaged.core.request import Sequence, SequenceGroup
from jaxpaged.core.scheduler_output import BlockCopy, ScheduledSequence, SchedulerOutput


@dataclass(slots=True)
class StepPlan:
    """Filled by the scheduler while it plans; `output` is what leaves it."""

    num_tokens_left: int
    num_logits_left: int
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    swap_out: list[BlockCopy] = field(default_factory=list)
    swap_in: list[BlockCopy] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    groups_out: list[tuple[SequenceGroup, int]] = field(default_factory=list)
    """(group, its blocks copied)."""
    groups_in: list[SequenceGroup] = field(default_factory=list)
    has_preempted: bool = False
    computing: set[bytes] = field(default_factory=set)
    """Chain keys of the full blocks this step computes: from the next step on they can be shared."""

    def output(self) -> SchedulerOutput:
        return SchedulerOutput(tuple(self.scheduled), tuple(self.swap_out), tuple(self.swap_in), tuple(self.copies))


def num_prompt_logprob_rows(item: ScheduledSequence) -> int:
    """Scheduled prompt positions whose next token is a prompt token too, if the request asks for their logprobs."""
    request = item.sequence.request
    if request.params.prompt_logprobs is None:
        return 0
    return max(0, min(item.start + item.num_new_tokens, request.num_prompt_tokens - 1) - item.start)


def num_logit_rows(item: ScheduledSequence) -> int:
    """Logit rows of the item: its samples, and each prompt position whose next token's logprob is wanted."""
    return item.num_samples + num_prompt_logprob_rows(item)


def plan_sequence(
    sequence: Sequence, start: int, num_samples: int, num_tokens: int, num_logits: int, limits: SchedulerLimits
) -> ScheduledSequence | None:
    """The most tokens from `start` on that fit the budgets, None for none; at the end `num_samples` are sampled."""
    request = sequence.request
    num_prompt = len(request.prompt_token_ids)
    total = len(sequence.token_ids) + sequence.num_pending_tokens
    remaining = total - start
    if not remaining or total - num_prompt >= request.max_tokens or total >= limits.max_model_len:
        return None  # all is scheduled; or its last token is sampled, and the host has yet to see it end
    num_new = remaining if remaining < num_tokens else num_tokens
    num_prompt_rows = 0
    if request.params.prompt_logprobs is not None and start < num_prompt - 1:
        if min(start + num_new, num_prompt - 1) - start > num_logits:
            num_new = num_logits
        num_prompt_rows = min(start + num_new, num_prompt - 1) - start
    if num_new == remaining and num_prompt_rows + num_samples > num_logits:
        num_new -= 1  # everything but the token that samples
    if not num_new or (num_new < remaining and not limits.enable_chunked_prefill):
        return None
    return ScheduledSequence(sequence, start, num_new, num_samples if num_new == remaining else 0)
