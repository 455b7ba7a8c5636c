"""The laws of the host wing under random load: conservation, one terminal event, outputs no pressure can change."""

import random

import pytest
from core.fake_runner import VOCAB, Loop, make_request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxpaged.core.admission import num_worst_case_blocks
from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.group_queue import by_priority, first_come_first_served
from jaxpaged.core.preemption import PreemptionCosts
from jaxpaged.core.request import BeamSettings
from jaxpaged.core.scheduler import Scheduler

MAX_MODEL_LEN = 40
MAX_NUM_SEQS = 7


def make_loop(
    *, num_device_blocks, num_host_blocks, block_size=4, windows=(None,), preemption="swap", num_ahead=1,
    enable_prefix_caching=True, **options,
):
    manager = BlockManager(
        num_device_blocks=num_device_blocks,
        num_host_blocks=num_host_blocks,
        block_size=block_size,
        windows=windows,
        enable_prefix_caching=enable_prefix_caching,
    )
    options = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 16, "max_num_logits": 12} | options
    scheduler = Scheduler(block_manager=manager, max_model_len=MAX_MODEL_LEN, preemption=preemption, **options)
    return Loop(scheduler, num_ahead=num_ahead)


def random_beams(rng):
    """Settings of a beam search: as many candidates as two stop tokens need."""
    width = rng.choice([1, 2, 3, 4])
    return BeamSettings(
        width=width, length_penalty=rng.choice([0.0, 0.6, 1.0, 2.0]), early_stopping=rng.random() < 0.5,
        num_candidates=3 * width,
    )  # fmt: skip


def random_request(rng, index):
    shared = [[7] * 12, [1, 2, 3, 4, 5, 6, 7, 8, 9], []]
    prompt = rng.choice(shared) + [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
    max_tokens = rng.randrange(1, 20)
    if rng.random() < 0.25:
        return make_request(
            f"r{index}", prompt, max_tokens=min(max_tokens, MAX_MODEL_LEN - len(prompt)), beams=random_beams(rng),
            arrival_index=index, priority=rng.randrange(3), stop_token_ids=rng.sample(range(VOCAB), 2), stop="x",
        )
    return make_request(
        f"r{index}", prompt, max_tokens=min(max_tokens, MAX_MODEL_LEN - len(prompt)), n=rng.choice([1, 1, 1, 2, 3, 4]),
        min_tokens=rng.randrange(0, min(3, max_tokens)), seed=rng.randrange(3), arrival_index=index,
        priority=rng.randrange(3), cache_salt=rng.choice(["", "", "salt"]),
        stop_token_ids=rng.sample(range(VOCAB), 2), prompt_logprobs=rng.choice([None, None, 0]),
    )


WINDOWS = [(None,), (6,), (None, 5), (9, None, 9), (1,), (2, 14)]


def run_random_load(rng, preemption, num_ahead, windows):
    """Sixty requests, some aborted or poisoned, with failing swaps, against a pool that holds a few."""
    is_chunked = rng.random() < 0.8
    num_columns = rng.choice([10, 13, 17])
    loop = make_loop(
        num_device_blocks=1 + sum(num_columns if window is None else num_columns // 2 + 1 for window in windows),
        num_host_blocks=rng.choice([0, 6, 40]) * len(windows), preemption=preemption, windows=windows,
        num_ahead=num_ahead, enable_prefix_caching=rng.random() < 0.7, enable_chunked_prefill=is_chunked,
        max_num_batched_tokens=rng.choice([3, 9, 30]) if is_chunked else 40, max_num_logits=rng.choice([4, 40]),
        order=rng.choice([first_come_first_served, by_priority]),
        costs=PreemptionCosts(seconds_per_block_copy=1.0 / len(windows), seconds_per_prefill_token=0.5),
    )
    aborted = set()
    for index in range(60):
        request = random_request(rng, index)
        try:
            loop.add(request)
        except ValueError:
            continue
        if rng.random() < 0.05:
            loop.nonfinite.add((request.request_id, rng.randrange(3)))
        for _ in range(rng.randrange(4)):
            loop.step(lambda: rng.random() < 0.1)
            loop.scheduler.check()
        if rng.random() < 0.05:
            request_id = rng.choice(list(loop.groups))
            if loop.scheduler.abort(request_id):
                aborted.add(request_id)
            assert not loop.scheduler.abort(request_id)
    loop.drain(lambda: rng.random() < 0.1)
    loop.check_outputs(aborted)
    assert (loop.runner.num_unread > 0) == (windows != (None,))
    return loop


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("windows", [(None,), (None, 5, 5), (6,)])
def test_outputs_do_not_depend_on_pressure(windows, preemption, num_ahead):
    rng = random.Random(f"{preemption} {num_ahead}")
    loops = [run_random_load(rng, preemption, num_ahead, windows) for _ in range(6 if windows == (None,) else 14)]
    met = [loop.scheduler for loop in loops]
    # it met what it tests
    assert sum(scheduler.num_preemptions for scheduler in met) > 15
    assert sum(scheduler.num_nonfinite for scheduler in met) > 0
    assert sum(scheduler.block_manager.num_copied_blocks for scheduler in met) > 0
    searches = [group for loop in loops for group in loop.groups.values() if group.request.beams is not None]
    assert sum(group.num_preemptions > 0 for group in searches) > 2
    assert sum(len(group.sequences) > 1 and group.sequences[0].score is not None for group in searches) > 15
    assert sum(scheduler.block_manager.prefix_cache.num_hits for scheduler in met) > 0
    num_swapped = sum(scheduler.block_manager.num_swapped_in_blocks for scheduler in met)
    assert (num_swapped > 0) == (preemption != "recompute")
    if preemption == "swap":
        assert sum(scheduler.num_swap_failures for scheduler in met) > 0


def test_a_pool_that_holds_few_swaps_and_every_request_ends_as_in_an_ample_one():
    requests = [make_request(f"r{i}", [i, 1, 2, 3, 4, 5], max_tokens=14, arrival_index=i) for i in range(12)]
    outputs = {}
    for name, num_blocks in (("ample", 200), ("tight", 8)):
        loop = make_loop(num_device_blocks=num_blocks, num_host_blocks=60, max_num_batched_tokens=64)
        for request in requests:
            loop.add(request)
        loop.drain()
        loop.check_outputs()
        outputs[name] = [loop.groups[request.request_id].sequences[0].output_token_ids for request in requests]
        manager = loop.scheduler.block_manager
        assert (manager.num_swapped_out_blocks > 0) == (name == "tight")
        assert manager.num_swapped_in_blocks <= manager.num_swapped_out_blocks
        swapped = sum(group.num_swapped_blocks for group in loop.groups.values())
        assert swapped == manager.num_swapped_out_blocks
    assert outputs["ample"] == outputs["tight"]


class HostWing(RuleBasedStateMachine):
    """Pool, manager and scheduler, driven at random; blocks, rows and requests are audited after every move."""

    @initialize(
        num_device_blocks=st.integers(6, 16), num_host_blocks=st.integers(0, 12), block_size=st.integers(1, 5),
        preemption=st.sampled_from(["swap", "recompute", "auto"]), num_ahead=st.integers(0, 1),
        enable_prefix_caching=st.booleans(), enable_chunked_prefill=st.booleans(),
        max_num_batched_tokens=st.integers(1, 20), max_num_logits=st.integers(1, 20),
        windows=st.sampled_from(WINDOWS), max_num_seqs=st.integers(1, MAX_NUM_SEQS),
        order=st.sampled_from([first_come_first_served, by_priority]),
    )
    def start(self, num_device_blocks, windows, max_num_batched_tokens, enable_chunked_prefill, **options):
        self.loop = make_loop(
            num_device_blocks=(num_device_blocks - 1) * len(windows) + 1, windows=windows,
            max_num_batched_tokens=max_num_batched_tokens + (0 if enable_chunked_prefill else MAX_MODEL_LEN),
            enable_chunked_prefill=enable_chunked_prefill, **options,
        )
        self.aborted = set()
        self.index = 0

    @rule(
        prefix=st.sampled_from([(), (7,) * 8, (1, 2, 3, 4, 5, 6)]),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=8),
        max_tokens=st.integers(1, 12), n=st.integers(1, 4), prompt_logprobs=st.sampled_from([None, None, 1]),
        priority=st.integers(0, 2), stop=st.integers(0, VOCAB - 1), nonfinite=st.sampled_from([None] * 8 + [0, 1, 4]),
        beams=st.one_of(st.none(), st.none(), st.randoms(use_true_random=False).map(random_beams)),
    )
    def add(self, prefix, tail, nonfinite, stop, beams, **options):
        if beams is not None:
            options |= {"n": 1, "prompt_logprobs": None, "beams": beams, "stop": "x"}
        request = make_request(f"r{self.index}", prefix + tuple(tail), arrival_index=self.index,
                               stop_token_ids=[stop], **options)
        self.index += 1
        scheduler = self.loop.scheduler
        limits, manager = scheduler.limits, scheduler.block_manager
        try:
            self.loop.add(request)
        except ValueError:
            assert (
                request.num_sequences > min(limits.max_num_seqs, limits.max_num_logits)
                or num_worst_case_blocks(request, limits, manager.layout) > manager.device.num_usable
                or not limits.enable_chunked_prefill
            )
        else:
            if nonfinite is not None:
                self.loop.nonfinite.add((request.request_id, nonfinite))

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.loop.step()

    @rule()
    def step_whose_swap_fails(self):
        self.loop.step(lambda: True)

    @rule(data=st.data())
    def abort(self, data):
        if self.loop.groups:
            request_id = data.draw(st.sampled_from(sorted(self.loop.groups)))
            if self.loop.scheduler.abort(request_id):
                self.aborted.add(request_id)
        assert not self.loop.scheduler.abort("nobody")

    @rule(copy=st.floats(0, 1), prefill=st.floats(0, 1))
    def learn_costs(self, copy, prefill):
        self.loop.scheduler.costs = PreemptionCosts(seconds_per_block_copy=copy, seconds_per_prefill_token=prefill)

    @rule()
    def reset_prefix_cache(self):
        self.loop.scheduler.block_manager.reset_prefix_cache()

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "loop"):
            self.loop.scheduler.check()

    def teardown(self):
        if hasattr(self, "loop"):
            self.loop.drain()
            self.loop.check_outputs(self.aborted)


TestHostWing = HostWing.TestCase
TestHostWing.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
