"""What a run of the load generator says: the fields of `vllm bench serve`'s result files, and what they cannot say.

`ttft` first token, `tpot` (latency - first token) / (tokens - 1) of each request with two tokens or more, `itl` the
gaps between chunks, `e2el` the whole answer; in milliseconds, over the requests that succeeded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.client.load import LoadRun, Outcome

TIMES = {
    "ttft": "time to first token", "tpot": "time per output token", "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
GOODPUT_TIMES = ("ttft", "tpot", "e2el")
BUSY_FRACTION = 0.8
"""A client whose thread is busier than this times itself, not the server."""
MOST_LAG_S, MOST_LAG_OF_GAP = 0.02, 0.25
"""As is one that is later than both: seconds, and a part of the median time between chunks."""
MOST_ERRORS_TOLD = 5
MS = 1e3


def tpot_s(outcome: Outcome, num_tokens: int) -> float | None:
    """Seconds per token behind the first; None where there is no second."""
    return (outcome.latency_s - outcome.ttft_s) / (num_tokens - 1) if num_tokens > 1 else None


def summarize(
    run: LoadRun, input_lens: Sequence[int], *, percentiles: Sequence[float], goodput_ms: Mapping[str, float]
) -> dict[str, Any]:
    """Rates, latencies and errors. `input_lens` are those asked for, used where the server does not count."""
    outcomes, duration_s = run.outcomes, run.duration_s
    good = [outcome for outcome in outcomes if not outcome.error]
    prompt_lens = [
        asked if outcome.input_len is None else outcome.input_len
        for outcome, asked in zip(outcomes, input_lens, strict=True)
    ]
    output_lens = [
        outcome.num_chunks if outcome.output_len is None else outcome.output_len for outcome in outcomes
    ]
    num_input = sum(num for num, outcome in zip(prompt_lens, outcomes, strict=True) if not outcome.error)
    num_output, num_chunks = sum(output_lens), sum(outcome.num_chunks for outcome in good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "request_goodput": None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _most_tokens_in_a_second(outcomes, output_lens),
        "max_concurrent_requests": run.max_concurrent,
    }
    tpots = [tpot_s(outcome, num) for outcome, num in zip(outcomes, output_lens, strict=True) if not outcome.error]
    series = {
        "ttft": [outcome.ttft_s for outcome in good],
        "tpot": [one for one in tpots if one is not None],
        "itl": [gap for outcome in good for gap in outcome.gaps_s],
        "e2el": [outcome.latency_s for outcome in good],
    }
    for name, seconds in series.items():
        result |= _statistics(name, seconds, percentiles)
    if goodput_ms:
        # a request of one token has no time per token, and keeps any limit on it
        columns = {"ttft": series["ttft"], "tpot": [one or 0.0 for one in tpots], "e2el": series["e2el"]}
        num_kept = sum(
            all(columns[name][index] * MS <= limit for name, limit in goodput_ms.items()) for index in range(len(good))
        )
        result["request_goodput"] = num_kept / duration_s
    counted = {outcome.output_len is not None for outcome in good}
    result |= {
        "output_tokens_counted_by": {(True,): "usage", (False,): "chunks", (): None}.get(tuple(counted), "both"),
        "tokens_per_chunk": num_output / num_chunks if num_chunks else None,
        "error_counts": dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        "client": client_cost(run, num_output, series["itl"]),
        "input_lens": prompt_lens,
        "output_lens": output_lens,
    }
    return result


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, deviation and percentiles in milliseconds; None where there is nothing to time."""
    values = np.asarray(seconds) * MS
    keys = ["mean", "median", "std", *(f"p{percent:g}" for percent in percentiles)]
    found: list[float | None] = [None] * len(keys)
    if len(values):
        found = [values.mean(), np.median(values), values.std(), *np.percentile(values, percentiles)]
    return {f"{key}_{name}_ms": None if one is None else float(one) for key, one in zip(keys, found, strict=True)}


def _most_tokens_in_a_second(outcomes: Sequence[Outcome], output_lens: Sequence[int]) -> float:
    """Output tokens of the busiest whole second; a chunk holds its share of its answer's tokens."""
    times, weights = [], []
    for outcome, num_tokens in zip(outcomes, output_lens, strict=True):
        if not outcome.error:
            times.append(outcome.start_s + outcome.ttft_s + np.cumsum([0.0, *outcome.gaps_s]))
            weights.append(np.full(outcome.num_chunks, num_tokens / outcome.num_chunks))
    if not times:
        return 0.0
    counts = np.bincount(np.concatenate(times).astype(int), np.concatenate(weights))
    return round(float(counts.max()), 3)


def client_cost(run: LoadRun, num_tokens: int, gaps_s: Sequence[float]) -> dict[str, Any]:
    """What the client cost, and whether it was too slow for its times to be the server's."""
    busy = run.cpu_s / run.duration_s
    most_lag_s = max(MOST_LAG_S, MOST_LAG_OF_GAP * float(np.median(gaps_s)) if gaps_s else 0.0)
    lag_p99_s = float(np.percentile(run.lags_s, 99))
    delays_s = [outcome.delay_s for outcome in run.outcomes]
    return {
        "cpu_s": run.cpu_s,
        "busy_fraction": busy,
        "cpu_us_per_output_token": run.cpu_s / num_tokens * 1e6 if num_tokens else None,
        "median_lag_ms": float(np.median(run.lags_s)) * MS,
        "p99_lag_ms": lag_p99_s * MS,
        "mean_send_delay_ms": float(np.mean(delays_s)) * MS,
        "p99_send_delay_ms": float(np.percentile(delays_s, 99)) * MS,
        "is_saturated": busy > BUSY_FRACTION or lag_p99_s > most_lag_s,
    }


def details_of(run: LoadRun) -> dict[str, Any]:
    """One entry for each request, in their order, as `vllm bench serve --save-detailed` writes them."""
    outcomes = run.outcomes
    return {
        "start_times": [outcome.start_s for outcome in outcomes],
        "ttfts": [outcome.ttft_s for outcome in outcomes],
        "itls": [outcome.gaps_s for outcome in outcomes],
        "latencies": [outcome.latency_s for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def print_metrics(result: Mapping[str, Any]) -> None:
    """The table for people."""
    rows: list[tuple[str, Any]] = [
        ("requests that succeeded", result["completed"]), ("requests that failed", result["failed"]),
        ("seconds", result["duration"]), ("most requests at once", result["max_concurrent_requests"]),
        ("input tokens", result["total_input_tokens"]), ("output tokens", result["total_output_tokens"]),
        ("requests/s", result["request_throughput"]),
    ]  # fmt: skip
    if result["request_goodput"] is not None:
        rows.append(("requests/s within the limits (goodput)", result["request_goodput"]))
    rows += [
        ("output tokens/s", result["output_throughput"]), ("output tokens/s, busiest second",
         result["max_output_tokens_per_s"]), ("input and output tokens/s", result["total_token_throughput"]),
    ]  # fmt: skip
    for label, value in rows:
        print(f"{label:40}{value:>12,}" if isinstance(value, int) else f"{label:40}{value:12,.2f}")
    names = [key.removesuffix("_ttft_ms") for key in result if key.endswith("_ttft_ms") and key != "p50_ttft_ms"]
    print(f"{'milliseconds':28}" + "".join(f"{name:>10}" for name in names))
    for time_name, label in TIMES.items():
        values = [result[f"{name}_{time_name}_ms"] for name in names]
        shown = "".join(f"{'-':>10}" if value is None else f"{value:10.1f}" for value in values)
        print(f"{label:28}{shown}")
    client = result["client"]
    if client["cpu_us_per_output_token"] is not None:
        print(f"client: {100 * client['busy_fraction']:.0f} % of a core, {client['cpu_us_per_output_token']:.0f} us a "
              f"token, p99 {client['p99_lag_ms']:.1f} ms late")  # fmt: skip


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before they quote the numbers."""
    told = []
    client = result["client"]
    if client["is_saturated"]:
        told.append(
            f"THE CLIENT WAS TOO SLOW (busy {100 * client['busy_fraction']:.0f} %, p99 {client['p99_lag_ms']:.0f} ms "
            "late): its times are not the server's; run it on a quieter machine, or send less"
        )
    # all at once is as soon as it can be
    if result["request_rate"] != "inf" and client["p99_send_delay_ms"] > MOST_LAG_S * MS:
        mean_ms, p99_ms = client["mean_send_delay_ms"], client["p99_send_delay_ms"]
        cause = "" if result["max_concurrency"] is None else ", for --max-concurrency"
        told.append(
            f"requests were sent later than they were due{cause}, by {mean_ms:.0f} ms on average and {p99_ms:.0f} ms "
            "at p99: no time in this result holds that"
        )
    if result["failed"]:
        told.append(f"{result['failed']} of {result['failed'] + result['completed']} requests failed:")
        counts = list(result["error_counts"].items())
        told += [f"  {number}x {error}" for error, number in counts[:MOST_ERRORS_TOLD]]
        if len(counts) > MOST_ERRORS_TOLD:
            told.append(f"  and {len(counts) - MOST_ERRORS_TOLD} other errors: see the result's error_counts")
    if result["output_tokens_counted_by"] in ("chunks", "both"):
        told.append("the server counts no tokens (usage): a chunk was taken for a token")
    elif result["tokens_per_chunk"] and not 0.95 < result["tokens_per_chunk"] < 1.05:
        told.append(
            f"a chunk holds {result['tokens_per_chunk']:.2f} tokens: inter-token latency is between chunks, "
            "time per output token is per token"
        )
    return told
