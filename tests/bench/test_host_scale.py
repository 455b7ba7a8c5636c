"""The crowds of `bench.host_scale`, small, and the bar by counts: what a step does hangs on none of the two sizes."""

import sys
from dataclasses import replace

import pytest

from bench.host_scale import growth, make_series, parse
from bench.host_scale_worker import Crowd, Steady, measure_memory

SMALL = Crowd(num_running=20, num_blocks=800, num_waiting=10, context_len=40)


def num_calls(crowd):
    """Python and C functions called in a step of a crowd."""
    steady, count = Steady(crowd), 0

    def listen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(listen)
    try:
        for _ in range(10):
            steady.step()
    finally:
        sys.setprofile(None)
    counts = steady.loop.scheduler.counts()
    assert (counts.running, counts.waiting) == (crowd.num_running, crowd.num_waiting)
    return count / 10


def test_a_step_does_the_same_whatever_the_pool_and_the_queue():
    small = num_calls(SMALL)
    assert num_calls(replace(SMALL, num_blocks=20_000)) <= 1.01 * small
    # a newcomer finds its place in a longer queue by a few more comparisons
    assert num_calls(replace(SMALL, num_waiting=4000)) <= 1.15 * small
    assert num_calls(replace(SMALL, num_waiting=4000, has_priorities=True)) <= 1.15 * small


def test_a_step_does_twice_as_much_for_twice_as_many_sequences():
    assert 1.5 < num_calls(replace(SMALL, num_running=80)) / num_calls(replace(SMALL, num_running=40)) < 2.05


def test_a_free_block_takes_twelve_bytes_and_a_waiting_token_four():
    crowd = replace(SMALL, num_blocks=100_000, num_waiting=2000)
    short, long = measure_memory(crowd), measure_memory(replace(crowd, context_len=440))
    assert short["bytes_per_block"] == pytest.approx(12, abs=0.5)
    # 400 tokens more, of which the scheduler keeps its own copy
    assert long["bytes_per_waiting_request"] - short["bytes_per_waiting_request"] == pytest.approx(1600, abs=50)
    assert short["bytes_per_waiting_request"] < 1000


@pytest.mark.parametrize("power", [0, 1, 2])
def test_growth_is_the_exponent_of_a_power_law(power):
    assert growth([1, 10, 100], [3 * size**power for size in (1, 10, 100)]) == pytest.approx(power)


def test_every_series_varies_one_size_up_to_what_was_asked_for():
    for series in make_series(1000, 100_000, 10_000):
        values = [getattr(crowd, series.varied) for crowd in series.crowds]
        assert values == sorted(set(values))
        assert values[-1] == {"num_running": 1000, "num_blocks": 100_000, "num_waiting": 10_000}[series.varied]
        assert len({replace(crowd, **{series.varied: 1}) for crowd in series.crowds}) == 1


def test_a_pool_that_could_not_hold_the_crowd_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--num-running", "1000", "--num-blocks", "50000"])
    assert "--num-blocks=50000 is too small for this crowd: give 100000 or more" in capsys.readouterr().err
