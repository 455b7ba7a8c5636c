import pytest
from core.fake_runner import Loop, make_request

from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.group_queue import by_priority
from jaxpaged.core.request import FinishReason, SequenceStatus
from jaxpaged.core.scheduler import Scheduler
from jaxpaged.core.scheduler_output import RunnerOutput, SequenceOutput


def make_scheduler(num_device_blocks=30, num_host_blocks=30, **options):
    manager = BlockManager(num_device_blocks=num_device_blocks, num_host_blocks=num_host_blocks, block_size=4)
    options = {
        "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "max_num_logits": 16,
        "preemption": "swap",
    } | options
    return Scheduler(block_manager=manager, clock=lambda: 5.0, **options)


def results(output, token=1, **options):
    """The same token for every sample of the plan."""
    given = {"logprobs": (), "prompt_logprobs": (), "is_finite": True} | options
    return RunnerOutput(tuple(SequenceOutput((token,) * item.num_samples, **given) for item in output.scheduled))


def plan_of(output):
    """(request id, start, new tokens, samples) of each entry."""
    return [(item.sequence.request.request_id, *item[1:]) for item in output.scheduled]


def test_prompts_share_one_token_budget_and_decodes_come_first():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    for index, num_tokens in enumerate((6, 7, 3)):
        scheduler.add(make_request(f"r{index}", [index] * num_tokens, arrival_index=index))
    first = scheduler.schedule()
    assert plan_of(first) == [("r0", 0, 6, 1), ("r1", 0, 4, 0)]
    second = scheduler.schedule()  # before the first is read: the pending token of r0 is planned
    assert plan_of(second) == [("r0", 6, 1, 1), ("r1", 4, 3, 1), ("r2", 0, 3, 1)]
    events = scheduler.update(first, results(first))
    assert [(event.sequence.request.request_id, event.token_id) for event in events.tokens] == [("r0", 1)]
    assert [item.sequence.num_pending_tokens for item in second.scheduled] == [1, 1, 1]
    assert scheduler.counts()[:4] == (0, 3, 0, 3)


def test_nothing_is_planned_while_the_last_token_is_on_its_way():
    scheduler = make_scheduler()
    group = scheduler.add(make_request("r", [1, 2, 3], max_tokens=2))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert plan_of(second) == [("r", 3, 1, 1)]
    assert scheduler.schedule().is_empty
    scheduler.update(first, results(first))
    assert scheduler.schedule().is_empty
    events = scheduler.update(second, results(second))
    assert events.finished == group.sequences
    assert (group.sequences[0].finish_reason, group.sequences[0].output_token_ids) == (FinishReason.LENGTH, [1, 1])
    assert not scheduler.has_unfinished
    scheduler.check()


def test_a_stop_token_ends_a_sequence_and_its_extra_token_is_dropped():
    scheduler = make_scheduler()
    group = scheduler.add(make_request("r", [1, 2, 3], stop_token_ids=[9], min_tokens=2))
    sequence = group.sequences[0]
    steps = [scheduler.schedule(), scheduler.schedule()]
    scheduler.update(steps[0], results(steps[0], 9))
    assert not sequence.is_finished  # not before min_tokens
    steps.append(scheduler.schedule())
    scheduler.update(steps[1], results(steps[1], 9))
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, 9)
    events = scheduler.update(steps[2], results(steps[2], 9))
    assert not events.tokens
    assert sequence.output_token_ids == [9, 9]
    assert scheduler.counts().finished[FinishReason.STOP] == 1


def test_samples_share_the_prompt_and_wait_for_their_first_tokens():
    scheduler = make_scheduler()
    group = scheduler.add(make_request("r", range(6), n=3))
    first = scheduler.schedule()
    assert plan_of(first) == [("r", 0, 6, 3)]
    assert scheduler.schedule().is_empty
    outcome = RunnerOutput((SequenceOutput((7, 8, 9), (), (), True),))
    events = scheduler.update(first, outcome)
    assert [(event.sequence.sample_index, event.token_id) for event in events.tokens] == [(0, 7), (1, 8), (2, 9)]
    assert [sequence.block_ids for sequence in group.sequences] == [[1, 2]] * 3
    assert sorted(sequence.row for sequence in group.sequences) == [0, 1, 2]
    assert group.num_shared_blocks == 4
    second = scheduler.schedule()
    assert second.copies == ((2, 3), (2, 4))  # the last writer keeps the block
    assert [sequence.block_ids for sequence in group.sequences] == [[1, 3], [1, 4], [1, 2]]
    scheduler.check()


def test_rows_are_kept_for_samples_to_come():
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=2)
    scheduler.add(make_request("pair", [1, 2, 3], n=2))
    scheduler.add(make_request("other pair", [4], n=2, arrival_index=1))
    scheduler.add(make_request("single", [5], arrival_index=2))
    scheduler.schedule()
    scheduler.schedule()
    assert scheduler.counts()[:2] == (2, 1)  # one row is left; the head of the line needs two, and nobody passes it


def test_a_prefix_is_shared_from_the_step_after_it_was_computed():
    scheduler = make_scheduler()
    prompt = list(range(9))
    scheduler.add(make_request("first", prompt))
    follower = scheduler.add(make_request("follower", prompt, arrival_index=1))
    assert plan_of(scheduler.schedule()) == [("first", 0, 9, 1)]  # the follower waits one step for what it can share
    assert plan_of(scheduler.schedule()) == [("first", 9, 1, 1), ("follower", 8, 1, 1)]
    assert (follower.num_cached_tokens, follower.num_shared_blocks, follower.first_scheduled_time_s) == (8, 2, 5.0)
    cache = scheduler.block_manager.prefix_cache
    assert (cache.num_queries, cache.num_hits) == (18, 8)


def test_prompt_logprobs_are_computed_not_found():
    scheduler = make_scheduler()
    prompt = list(range(9))
    scheduler.add(make_request("first", prompt))
    scheduler.schedule()
    scheduler.add(make_request("second", prompt, prompt_logprobs=1, arrival_index=1))
    assert plan_of(scheduler.schedule())[1] == ("second", 0, 9, 1)


def test_the_newest_gives_way_and_comes_back_when_there_is_room():
    scheduler = make_scheduler(num_device_blocks=4)  # three blocks
    old = scheduler.add(make_request("old", [1] * 4, max_tokens=6))
    new = scheduler.add(make_request("new", [2] * 4, max_tokens=6, arrival_index=1))
    first = scheduler.schedule()
    assert plan_of(first) == [("old", 0, 4, 1), ("new", 0, 4, 1)]
    second = scheduler.schedule()
    # one block is free: the older takes it, the newer goes out with its token still on its way
    assert plan_of(second) == [("old", 4, 1, 1)]
    assert second.swap_out == ((2, 1),)
    assert (new.num_preemptions, new.sequences[0].row, new.num_swapped_blocks) == (1, None, 1)
    scheduler.update(first, results(first))
    assert new.sequences[0].output_token_ids == [1]
    plan = scheduler.schedule()
    assert plan_of(plan) == [("old", 5, 1, 1)]  # the one free block would hold what went out, and no token more
    scheduler.update(second, results(second))
    while not old.is_finished:
        last, plan = plan, scheduler.schedule()
        scheduler.update(last, results(last))
    plan = scheduler.schedule()
    # the older took block 2 for its ninth token, so the newer's is copied back
    assert [copy.source for copy in plan.swap_in] == [1]
    assert plan_of(plan) == [("new", 4, 1, 1)]
    scheduler.check()
    assert (old.num_preemptions, scheduler.num_swap_preemptions) == (0, 1)


def test_priority_decides_who_gives_way():
    scheduler = make_scheduler(num_device_blocks=4, order=by_priority, preemption="recompute")
    scheduler.add(make_request("low", [1] * 4, max_tokens=6, priority=5))
    high = scheduler.add(make_request("high", [2] * 4, max_tokens=6, priority=1, arrival_index=1))
    assert [entry[0] for entry in plan_of(scheduler.schedule())] == ["high", "low"]
    assert [entry[0] for entry in plan_of(scheduler.schedule())] == ["high"]
    assert scheduler.counts()[:3] == (1, 1, 0)
    assert high.num_preemptions == 0


def test_a_recomputed_sample_takes_the_prompt_from_its_leader_one_step_later():
    scheduler = make_scheduler(preemption="recompute")
    scheduler.block_manager.enable_prefix_caching = False
    group = scheduler.add(make_request("r", range(9), n=2))
    first = scheduler.schedule()
    scheduler.update(first, results(first))
    scheduler._preempt(scheduler._running.pop_last(), scheduler._latest[1])
    assert [sequence.status for sequence in group.sequences] == [SequenceStatus.WAITING] * 2
    assert plan_of(scheduler.schedule()) == [("r", 0, 10, 1)]
    assert plan_of(scheduler.schedule()) == [("r", 10, 1, 1), ("r", 8, 2, 1)]
    leader, member = group.sequences
    assert leader.block_ids[:2] == member.block_ids[:2]
    scheduler.check()


def test_groups_of_a_failed_swap_recompute_and_leave_the_plan():
    scheduler = make_scheduler(num_device_blocks=4)
    scheduler.block_manager.enable_prefix_caching = False
    loop = Loop(scheduler)
    for index in range(2):
        loop.add(make_request(f"r{index}", [index] * 4, max_tokens=6, arrival_index=index))
    loop.step()
    plan = scheduler.schedule()
    assert plan.swap_out
    left = scheduler.swap_failed(plan)
    assert left.swap_out == ()
    assert left.scheduled == plan.scheduled
    assert scheduler.counts()[:3] == (1, 1, 0)
    assert (scheduler.num_swap_failures, scheduler.block_manager.num_swapped_out_blocks) == (1, 0)
    with pytest.raises(ValueError, match="latest plan"):
        scheduler.swap_failed(plan)
    loop.in_flight.append((left, loop.runner.run(left)))
    loop.drain()
    loop.check_outputs()


def test_logits_that_are_not_finite_end_their_request_alone():
    scheduler = make_scheduler()
    bad = scheduler.add(make_request("bad", range(8), n=2))
    good = scheduler.add(make_request("good", [9, 9], arrival_index=1))
    first = scheduler.schedule()
    outputs = results(first).outputs
    events = scheduler.update(first, RunnerOutput((outputs[0]._replace(is_finite=False), outputs[1])))
    assert [sequence.finish_reason for sequence in bad.sequences] == [FinishReason.ERROR]
    assert [event.sequence for event in events.tokens] == good.sequences
    assert (scheduler.num_nonfinite, scheduler.counts().finished[FinishReason.ERROR]) == (1, 1)
    scheduler.add(make_request("again", range(8), arrival_index=2))
    assert plan_of(scheduler.schedule())[1] == ("again", 0, 8, 1)  # nothing of it was found
    scheduler.check()


def test_an_id_in_use_is_refused_and_an_abort_ends_once():
    scheduler = make_scheduler()
    group = scheduler.add(make_request("r", [1, 2]))
    with pytest.raises(ValueError, match="'r' is in use"):
        scheduler.add(make_request("r", [3]))
    scheduler.schedule()
    assert scheduler.abort("r")
    assert not scheduler.abort("r")
    assert group.sequences[0].finish_reason is FinishReason.ABORT
    assert not scheduler.finish(group.sequences[0], FinishReason.STOP)
    scheduler.add(make_request("r", [3]))
    assert scheduler.counts()[:4] == (1, 0, 0, 2)
    scheduler.check()


def test_a_newcomer_leaves_one_block_in_a_hundred_free_unless_it_is_alone():
    scheduler = make_scheduler(num_device_blocks=301, max_num_batched_tokens=2000, max_model_len=2000)
    scheduler.add(make_request("first", [1] * 100))  # 25 blocks
    scheduler.add(make_request("second", [2] * (4 * 273), arrival_index=1))  # 300 - 25 - 273 = 2 would be left
    assert [entry[0] for entry in plan_of(scheduler.schedule())] == ["first"]
    scheduler.abort("first")
    assert [entry[0] for entry in plan_of(scheduler.schedule())] == ["second"]


def test_an_unknown_way_of_preemption_is_refused():
    with pytest.raises(ValueError, match="preemption='drop'"):
        make_scheduler(preemption="drop")


class OneAtATime:
    """A gate that lets a single request run."""

    def __init__(self):
        self.inside, self.left = None, []

    def admit(self, group):
        if self.inside not in (None, group):
            return False
        self.inside = group
        return True

    def leave(self, group):
        self.left.append(group.request.request_id)
        if self.inside is group:
            self.inside = None


def test_a_gate_says_who_may_begin_and_hears_of_every_end():
    scheduler = make_scheduler()
    scheduler.gate = OneAtATime()
    for index in range(3):
        scheduler.add(make_request(f"r{index}", [index] * 3, arrival_index=index, max_tokens=1))
    first = scheduler.schedule()
    assert plan_of(first) == [("r0", 0, 3, 1)]  # there are blocks and rows for all
    assert scheduler.counts()[:2] == (2, 1)
    scheduler.abort("r1")  # never admitted
    scheduler.update(first, results(first))
    second = scheduler.schedule()
    assert plan_of(second) == [("r2", 0, 3, 1)]
    scheduler.update(second, results(second))
    assert scheduler.gate.left == ["r1", "r0", "r2"]
    assert not scheduler.has_unfinished
    scheduler.check()
