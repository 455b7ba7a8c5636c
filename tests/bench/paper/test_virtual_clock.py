"""The virtual clock and step costs, worked by hand; attention in blocks and in one piece gives the same."""

import argparse

import numpy as np
import pytest

from bench.paper import kernel
from bench.paper.curves import sustained_rate
from bench.paper.reservation import ReservationGate
from bench.paper.step_costs import FITTED, LinearCosts, StepWork, fit
from bench.paper.virtual_clock import Arrival, Memory, poisson, simulate
from jaxpaged.runner.buckets import make_buckets

BUCKETS = make_buckets(max_num_batched_tokens=64, max_num_seqs=8)
MEMORY = Memory(num_slots=128, block_size=16, max_model_len=64, max_num_seqs=8)
ONE_SECOND = LinearCosts(1.0, dict.fromkeys(FITTED, 0.0))


def test_a_request_alone_takes_a_step_a_token_from_its_arrival():
    outcome = simulate([Arrival(2.5, 10, 4)], ONE_SECOND, MEMORY, BUCKETS)
    assert outcome.latencies_s == [4.0]
    assert outcome.normalized_latencies_s == [1.0]
    assert outcome.elapsed_s == 6.5


def test_one_that_comes_during_a_step_joins_the_step_that_is_planned_next():
    """At 0.5 the first step runs and none is planned behind it before it ends at 1, when the second runs already."""
    outcome = simulate([Arrival(0.0, 10, 6), Arrival(0.5, 10, 2)], ONE_SECOND, MEMORY, BUCKETS)
    assert outcome.latencies_s[0] == 6.0
    assert outcome.latencies_s[1] == 4 - 0.5  # planned at 1, it runs from 2 to 4


def test_a_reservation_makes_the_second_wait_for_the_first_and_blocks_do_not():
    arrivals = [Arrival(0.0, 10, 4), Arrival(0.0, 10, 4)]
    assert simulate(arrivals, ONE_SECOND, MEMORY, BUCKETS).latencies_s == [4.0, 4.0]
    gate = ReservationGate("max", num_slots=64, max_model_len=64)
    first, second = simulate(arrivals, ONE_SECOND, MEMORY, BUCKETS, gate=gate).latencies_s
    assert first == 4.0
    assert second >= 8.0


@pytest.mark.parametrize("method", ["sampling", "beams"])
def test_samples_and_beams_share_blocks(method):
    outcome = simulate([Arrival(0.0, 40, 20)], ONE_SECOND, MEMORY, BUCKETS, method=method, number=2)
    assert 0 < outcome.percent_blocks_saved < 50


def test_arrivals_at_another_rate_are_the_same_ones_scaled():
    slow, fast = (poisson([(5, 6)] * 50, rate, 3) for rate in (1.0, 4.0))
    assert [each.arrival_s for each in slow] == pytest.approx([4 * each.arrival_s for each in fast])


def test_costs_are_found_again_though_some_steps_were_disturbed():
    rng = np.random.default_rng(0)
    truth = LinearCosts(0.002, dict(zip(FITTED, (1e-4, 2e-4, 1e-5, 1e-6, 0.0, 0.0), strict=True)))
    works = [StepWork(8, *map(int, rng.integers(1, (64, 64, 64, 5000, 5000, 2)))) for _ in range(400)]
    seconds = [truth.seconds(work) * rng.normal(1, 0.02) for work in works]
    seconds[::40] = [5 * each for each in seconds[::40]]
    found = fit(works, seconds)
    expected = [truth.seconds(work) for work in works]
    assert [found.seconds(work) for work in works] == pytest.approx(expected, rel=0.08)


def test_a_sustained_rate_lies_between_the_points_around_the_limit():
    points = [{"rate": rate, "normalized_latency_s": each} for rate, each in ((1.0, 1.0), (2.0, 10.0))]
    assert sustained_rate(points, 10**0.5) == pytest.approx(1.5)
    assert sustained_rate(points, 20.0) is None


def test_attention_in_blocks_and_in_one_piece_agree(capsys):
    assert kernel.main(["--small"]) == 0
    times = (("xla", True, 30.0), ("native_cpu", True, 12.0), ("dense", False, 10.0))
    rows = [
        {"num_seqs": 1, "context": 16, "implementation": name, "is_paged": is_paged, "us_a_layer": us}
        for name, is_paged, us in times
    ]
    (told,) = kernel.overheads(rows)
    assert told["overhead"] == pytest.approx(0.2)
    assert told["overhead_of_the_same_kernel"] is None


def test_contexts_that_are_no_block_are_refused(capsys):
    with pytest.raises(SystemExit):
        kernel.main(["--contexts", "48"])
    assert "must be powers of two" in capsys.readouterr().err


def test_on_a_device_contestants_are_timed_or_the_reason_is_told():
    args = argparse.Namespace(num_seqs=[2], contexts=[32], heads="stories260k", block_size=16, num_layers=2, repeats=1)
    rows, not_timed = kernel.measure_on_device(args, ["xla", "mosaic_gpu", "contiguous_xla", "contiguous_cudnn"])
    assert [(row["implementation"], row["is_paged"]) for row in rows] == [("xla", True), ("contiguous_xla", False)]
    assert all(row["us_a_layer"] > 0 for row in rows)
    reasons = {row["implementation"]: row["because"] for row in not_timed}
    assert "cuDNN" in reasons["contiguous_cudnn"]
    assert "cpu" in reasons["mosaic_gpu"]
