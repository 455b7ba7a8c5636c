"""The baselines of the paper's evaluation: pieces never overlap, come back whole, and decide who may run."""

import random
from array import array

import pytest

from bench.paper.reservation import BuddyAllocator, IdealAllocator, ReservationGate, reserved_tokens
from jaxpaged.core.request import TOKEN_TYPE, Request, Sequence, SequenceGroup
from jaxpaged.sampling_params import SamplingParams


def request_of(num_prompt: int, max_tokens: int, n: int = 1, name: str = "a") -> Request:
    params = SamplingParams(n=n, temperature=1.0 if n > 1 else 0.0)
    return Request(request_id=name, prompt_token_ids=(5,) * num_prompt, params=params, max_tokens=max_tokens)


def group_of(*arguments: int, name: str = "a") -> SequenceGroup:
    request = request_of(*arguments, name=name)
    return SequenceGroup(request, [Sequence(0, request, 0, array(TOKEN_TYPE, request.prompt_token_ids))])


def test_each_policy_reserves_what_the_paper_says():
    request = request_of(100, 25)
    assert reserved_tokens(request, "oracle", 2048) == 125
    assert reserved_tokens(request, "pow2", 2048) == 132  # 25 becomes 32
    assert reserved_tokens(request, "max", 2048) == 2048
    assert reserved_tokens(request_of(100, 600), "pow2", 1000) == 1000  # 1024 more would not fit


def test_a_piece_is_the_next_power_of_two_and_halves_are_joined_again():
    memory = BuddyAllocator(16)
    assert memory.allocate(5) == 0  # 8 slots
    assert memory.allocate(2) == 8
    assert memory.allocate(3) == 12
    assert memory.allocate(3) is None  # 2 slots are left, at 10
    assert memory.allocate(2) == 10
    memory.free(8)
    memory.free(10)
    assert memory.allocate(4) == 8
    for start in (0, 8, 12):
        memory.free(start)
    assert memory.allocate(16) == 0


def test_room_that_is_no_power_of_two_is_used_to_the_last_whole_piece():
    """15,700 slots are 8192 + 4096 + 2048 + 1024 + ...: seven pieces of 2048, as the paper's Orca (Max) has."""
    memory = BuddyAllocator(15_700)
    pieces = [memory.allocate(2048) for _ in range(8)]
    assert pieces[7] is None
    assert len(set(pieces)) == 8


def test_pieces_never_overlap_and_all_come_back():
    rng, memory = random.Random(0), BuddyAllocator(1000)
    live: dict[int, int] = {}
    for _ in range(3000):
        if live and rng.random() < 0.45:
            start = rng.choice(list(live))
            memory.free(start)
            del live[start]
        size = rng.randint(1, 200)
        start = memory.allocate(size)
        if start is not None:
            end = start + size
            assert end <= 1000
            assert all(end <= other or start >= other + length for other, length in live.items())
            live[start] = size
    for start in live:
        memory.free(start)
    assert [memory.allocate(size) is not None for size in (512, 256, 128, 64, 32, 8)] == [True] * 6
    assert memory.allocate(1) is None
    with pytest.raises(KeyError):
        memory.free(3)


def test_ideal_packing_loses_nothing():
    memory = IdealAllocator(100)
    first, second = memory.allocate(60), memory.allocate(40)
    assert memory.allocate(1) is None
    assert first != second
    memory.free(first)
    assert memory.allocate(60) is not None


def test_the_gate_reserves_for_every_sample_or_none_and_takes_back_at_the_end():
    gate = ReservationGate("oracle", num_slots=64, max_model_len=64)
    two, one = group_of(10, 6, 2, name="two"), group_of(10, 30, name="one")
    assert gate.admit(two)  # two pieces of 16
    assert gate.admit(two)  # asked again, it has them
    assert not gate.admit(group_of(10, 6, 3, name="three"))  # the third piece is not there: nothing is kept
    assert not gate.admit(group_of(20, 40, name="whole"))
    gate.leave(group_of(10, 6, name="never admitted"))
    assert not gate.admit(group_of(30, 34, name="whole"))
    gate.leave(two)
    assert gate.admit(one)  # 40 tokens take all 64 slots
    assert not gate.admit(group_of(1, 1, name="late"))


def test_a_request_that_can_never_run_is_an_error_and_not_a_wait_for_ever():
    gate = ReservationGate("max", num_slots=100, max_model_len=128)
    with pytest.raises(ValueError, match="1 pieces of 128 tokens do not fit in 100 slots"):
        gate.admit(group_of(10, 6))
