"""What a preempted group costs, and how it is to come back."""

from dataclasses import dataclass
from typing import Literal

from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.request import SequenceGroup

Preemption = Literal["swap", "recompute", "auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreemptionCosts:
    """Measured by the engine on its device; while nothing is measured swapping counts as the cheaper way."""

    seconds_per_block_copy: float = 0.0
    """One block, one way."""
    seconds_per_prefill_token: float = 0.0

    def is_swap_cheaper(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether copying `num_blocks` out and in again takes no longer than computing `num_tokens` again."""
        return 2 * num_blocks * self.seconds_per_block_copy <= num_tokens * self.seconds_per_prefill_token


def num_common_blocks(group: SequenceGroup, block_size: int) -> int:
    """Full blocks of the prompt: what the samples of a forked group always share."""
    return group.request.num_prompt_tokens // block_size


def is_to_swap(group: SequenceGroup, preemption: Preemption, costs: PreemptionCosts, manager: BlockManager) -> bool:
    """Whether the group's blocks should go to the host rather than be computed again."""
    if preemption != "auto":
        return preemption == "swap"
    live = group.unfinished
    num_common_tokens = num_common_blocks(group, manager.block_size) * manager.block_size
    num_tokens = sum(sequence.num_computed_tokens for sequence in live)
    num_tokens -= sum(min(sequence.num_computed_tokens, num_common_tokens) for sequence in live[1:])
    return costs.is_swap_cheaper(manager.num_distinct_blocks(group), num_tokens)
