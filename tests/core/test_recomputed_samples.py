"""Samples of one prompt that are computed again, where layers have windows: the prompt is computed once."""

import pytest
from core.fake_runner import Loop, make_request

from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.scheduler import Scheduler
from jaxpaged.core.step_plan import StepPlan

NUM_PROMPT, NUM_OUTPUTS, N = 12, 10, 3
ALL_TOKENS = NUM_PROMPT + N * (NUM_OUTPUTS - 1)
"""The prompt once, and every output but the last of each sample, which nothing comes after."""


def start(*, enable_prefix_caching=False, windows=(5, None), budget=2):
    """A group of three samples that have computed five outputs each, to be recomputed; blocks of 4 tokens."""
    manager = BlockManager(
        num_device_blocks=60, num_host_blocks=60, block_size=4, windows=windows,
        enable_prefix_caching=enable_prefix_caching,
    )  # fmt: skip
    scheduler = Scheduler(
        block_manager=manager, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=40, max_num_logits=8,
        preemption="recompute",
    )  # fmt: skip
    loop = Loop(scheduler, num_ahead=0)
    group = loop.add(make_request("r", range(100, 100 + NUM_PROMPT), max_tokens=NUM_OUTPUTS, n=N, seed=1))
    while len(group.sequences) < N or group.sequences[-1].num_output_tokens < 6:
        loop.step()
    preempt(loop, group)
    object.__setattr__(scheduler.limits, "max_num_batched_tokens", budget)
    return loop, group


def preempt(loop, group):
    step = StepPlan(0, 0)
    loop.scheduler._running.remove(group)
    loop.scheduler._preempt(group, step)
    loop.scheduler.check()
    loop.runner.run(step.output())


def count_to_the_end(loop):
    num_tokens = 0
    while loop.scheduler.has_unfinished:
        num_tokens += sum(item.num_new_tokens for item in loop.step().scheduled)
        loop.scheduler.check()
    loop.check_outputs()
    return num_tokens


@pytest.mark.parametrize("windows", [(None,), (5,), (5, None), (1, 3)])
@pytest.mark.parametrize("budget", [1, 2, 5, 8])
def test_a_prompt_is_computed_once_for_all_samples(windows, budget):
    """Also where a step has fewer tokens than there are samples, so that one runs far ahead of the others."""
    loop, _ = start(windows=windows, budget=budget)
    assert count_to_the_end(loop) == ALL_TOKENS


def test_a_group_that_is_swapped_before_its_samples_have_started_keeps_what_they_will_share():
    loop, group = start(budget=8)
    loop.step()
    loop.step()
    # token 16 sees 12 to 16, and the samples that go on from token 12 see 8 to 12
    assert [sequence.num_computed_tokens for sequence in group.sequences] == [16, 0, 0]
    loop.scheduler.preemption = "swap"
    preempt(loop, group)
    assert loop.scheduler.block_manager.host.num_referenced > 0
    assert count_to_the_end(loop) == ALL_TOKENS - 16


def test_the_first_to_start_matches_no_further_than_the_prompt():
    """Its outputs are found too, but behind them its table would lack the prompt's last window."""
    loop, group = start(enable_prefix_caching=True)
    manager = loop.scheduler.block_manager
    assert len(manager.match(group.sequences[0])) == 4 * manager.num_groups
    loop.step()
    assert [sequence.num_computed_tokens >= NUM_PROMPT for sequence in group.sequences] == [True] * N
    count_to_the_end(loop)
