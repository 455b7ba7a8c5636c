"""Which buckets the requests of one call can reach: what is compiled before they run, and no more."""

from collections.abc import Sequence as List

from jaxpaged.core.request import SequenceGroup
from jaxpaged.core.scheduler import Scheduler
from jaxpaged.runner.buckets import Bucket, Buckets


def reachable_buckets(
    buckets: Buckets, scheduler: Scheduler, groups: List[SequenceGroup], *, can_run_out_of_blocks: bool
) -> tuple[Bucket, ...]:
    """The buckets that these requests, all of them waiting, can meet while nothing else runs.

    Where the first step takes every prompt, or there is but one, the steps are known: the prompts', then decodes of
    samples that end one by one. Otherwise prompts and decodes mix, and any step up to their sum may come.
    """
    prompts = [scheduler.prompt_steps(group) for group in groups]
    num_decodes = sum(group.request.num_sequences for group in groups if group.request.max_tokens > 1)
    if len(groups) == 1:
        return buckets.of_steps([(*step, 1) for step in prompts[0]], num_decodes)
    lengths = [group.request.num_prompt_tokens for group in groups]
    if not can_run_out_of_blocks and _start_together(scheduler, groups, lengths, prompts):
        num_logits = sum(logits for ((_, logits),) in prompts)
        least = sum(tokens for ((tokens, _),) in prompts)
        # blocks that were found in the prefix cache may be evicted by the first of the prompts
        totals = range(least, sum(lengths) + 1) if least < sum(lengths) else (least,)
        return buckets.of_steps([(total, num_logits, len(groups)) for total in totals], num_decodes)
    samples = [group.request.num_sequences for group in groups]
    if can_run_out_of_blocks:  # what is computed again has its outputs in it
        lengths = [(group.request.num_prompt_tokens + group.request.max_tokens) * group.request.num_sequences
                   for group in groups]  # fmt: skip
    num_prompt_logits = sum(
        group.request.num_prompt_tokens - 1 for group in groups if group.request.params.prompt_logprobs is not None
    )
    return buckets.up_to(sum(map(max, lengths, samples)), sum(samples) + num_prompt_logits)


def _start_together(
    scheduler: Scheduler, groups: List[SequenceGroup], lengths: List[int], prompts: List[List[tuple[int, int]]]
) -> bool:
    """Whether the first step computes all prompts: they fit, and none waits for a block that another computes."""
    limits = scheduler.limits
    first_blocks = [key for group in groups for key in scheduler.block_manager.block_keys(group.sequences[0], 0, 1)]
    return (
        all(len(steps) == 1 for steps in prompts)
        and sum(lengths) <= limits.max_num_batched_tokens
        and sum(logits for steps in prompts for _, logits in steps) <= limits.max_num_logits
        and sum(group.request.num_sequences for group in groups) <= limits.max_num_seqs
        and len(set(first_blocks)) == len(first_blocks)
    )
