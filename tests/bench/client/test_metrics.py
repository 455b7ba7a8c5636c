"""The numbers of a run, worked by hand."""

import re

import numpy as np
import pytest

from bench.client.arrivals import arrival_times
from bench.client.load import LoadRun, Outcome
from bench.client.metrics import details_of, remarks, summarize


def a_run(**changes):
    """Three answers in 4 s: five tokens in three chunks, one token, and an error."""
    outcomes = [
        Outcome(start_s=0.0, delay_s=0.0, ttft_s=0.5, latency_s=2.5, gaps_s=[1.5, 0.5], input_len=7, output_len=5),
        Outcome(start_s=1.0, delay_s=0.1, ttft_s=1.0, latency_s=1.0, output_len=1),
        Outcome(start_s=2.0, delay_s=0.2, error="HTTP 429: full"),
    ]
    facts = {"duration_s": 4.0, "cpu_s": 0.3, "lags_s": [0.001, 0.003], "max_concurrent": 2}
    return LoadRun(outcomes=outcomes, **(facts | changes))


def test_the_numbers_of_a_run_are_those_of_its_answers():
    result = summarize(a_run(), [6, 8, 9], percentiles=[50, 90], goodput_ms={"ttft": 900, "tpot": 500})
    assert (result["completed"], result["failed"], result["error_counts"]) == (2, 1, {"HTTP 429: full": 1})
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (7 + 8, 5 + 1)
    assert result["request_throughput"] == 2 / 4
    assert (result["output_throughput"], result["total_token_throughput"]) == (6 / 4, 21 / 4)
    # first tokens after 500 and 1000 ms
    assert (result["mean_ttft_ms"], result["std_ttft_ms"], result["p90_ttft_ms"]) == (750, 250, pytest.approx(950))
    # two seconds for four tokens; the one token alone has no time per token
    assert (result["mean_tpot_ms"], result["p50_tpot_ms"]) == (500, 500)
    assert (result["mean_itl_ms"], result["median_e2el_ms"]) == (1000, 1750)
    # the first keeps both limits
    assert result["request_goodput"] == 1 / 4
    # five tokens in three chunks at 0.5, 2.0 and 2.5 s, one at 2.0 s: the third second has 10 / 3 + 1
    assert result["max_output_tokens_per_s"] == pytest.approx(13 / 3, abs=1e-3)
    assert result["tokens_per_chunk"] == 6 / 4
    assert (result["input_lens"], result["output_lens"]) == ([7, 8, 9], [5, 1, 0])
    client = result["client"]
    assert (client["busy_fraction"], client["cpu_us_per_output_token"]) == (pytest.approx(0.075), pytest.approx(5e4))
    assert client["mean_send_delay_ms"] == pytest.approx(100)


def test_details_have_an_entry_for_each_request():
    details = details_of(a_run())
    assert details["ttfts"] == [0.5, 1.0, 0.0]
    assert details["itls"] == [[1.5, 0.5], [], []]
    assert details["errors"] == ["", "", "HTTP 429: full"]


@pytest.mark.parametrize(
    ("changes", "facts", "told"),
    [
        ({"cpu_s": 3.6}, {}, "THE CLIENT WAS TOO SLOW .busy 90 %"),
        # a quarter of the second between chunks, which is more than 20 ms
        ({"lags_s": [0.26]}, {}, "THE CLIENT WAS TOO SLOW .busy 8 %, p99 260 ms"),
        ({}, {"request_rate": 2.0}, "sent later than they were due, by 100 ms on average and 198 ms at p99"),
        ({}, {"request_rate": 2.0, "max_concurrency": 1}, "due, for --max-concurrency, by 100 ms"),
    ],
)
def test_what_a_reader_must_know_is_told(changes, facts, told):
    def lines(facts, **changes):
        result = summarize(a_run(**changes), [1, 1, 1], percentiles=[], goodput_ms={})
        return remarks({**result, "request_rate": "inf", "max_concurrency": None, **facts})

    assert any(re.search(told, line) for line in lines(facts, **changes))
    assert "  1x HTTP 429: full" in lines(facts, **changes)
    assert not any(re.search(told, line) for line in lines({}, lags_s=[0.24]))


def test_arrivals_have_their_rate_and_their_spread():
    """Gaps of a gamma process with shape k deviate by 1 / sqrt(k) of their mean."""
    for burstiness in (0.25, 1.0, 16.0):
        gaps = np.diff(arrival_times(20_001, 5.0, burstiness, np.random.default_rng(0)))
        assert gaps.mean() == pytest.approx(0.2, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrival_times(3, float("inf"), 1.0, np.random.default_rng(0)) == [0, 0, 0]
    assert arrival_times(1, 5.0, 1.0, np.random.default_rng(0)) == [0]
