"""From runs to what is reported: medians, ratios, fractions of the machine's ceilings, and the table for people."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.shapes import LlamaShape
from bench.workloads import BenchRequest

Run = Mapping[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "num_runs": len(values)}


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, float]:
    """Fraction of requests with the same tokens, and of tokens before each request's first difference.

    Not a test (sums are rounded differently, and one near-tie changes all that follows), but shows that both sides did
    the same work. `theirs` may hold the first few requests only.
    """
    num_equal = num_before = num_tokens = 0
    for left, right in zip(ours, theirs, strict=False):
        differences = (index for index, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
        first = next(differences, len(left))
        num_equal += first == len(left)
        num_before += first
        num_tokens += len(left)
    return {"equal_requests": num_equal / len(theirs), "tokens_before_first_difference": num_before / num_tokens}


def throughput_result(
    shape: LlamaShape,
    requests: Sequence[BenchRequest],
    engine_runs: Sequence[Run],
    peer_runs: Mapping[str, Sequence[Run]],
    device: str,
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    """Tokens a second of all, ratios to the best peer of each kind, host time a step, fraction of the matmul rate."""
    ours = spread([run["tokens_per_s"] for run in engine_runs])
    peers = {name: spread([run["tokens_per_s"] for run in runs]) for name, runs in peer_runs.items()}
    best: dict[str, Any] = {}
    for kind in ("static", "continuous"):
        names = [name for name in peers if name.startswith(kind)]
        if names:
            name = max(names, key=lambda candidate: peers[candidate]["median"])
            best[kind] = {"name": name, "ratio": ours["median"] / peers[name]["median"]}
    host = [run["host"] for run in engine_runs]
    flops_per_s = shape.flops(requests) / statistics.median(run["elapsed_s"] for run in engine_runs)
    is_cpu = device.startswith("cpu")
    return {
        "num_requests": len(requests),
        "num_peer_requests": len(next(iter(peer_runs.values()))[0]["token_ids"]) if peer_runs else 0,
        "num_prompt_tokens": sum(len(request.prompt_token_ids) for request in requests),
        "num_output_tokens": sum(request.max_tokens for request in requests),
        "engine_tokens_per_s": ours,
        "peer_tokens_per_s": peers,
        "best": best,
        "num_steps": statistics.median(run["num_steps"] for run in host),
        "host_ms_per_step": statistics.median(1e3 * run["host_s"] / max(run["num_steps"], 1) for run in host),
        "flops_per_s": flops_per_s,
        "fraction_of_matmul_rate": flops_per_s / ceilings["matmul_flops_per_s"] if is_cpu else None,
        "agreement": {
            name: agreement(engine_runs[0]["token_ids"], runs[0]["token_ids"]) for name, runs in peer_runs.items()
        },
    }


def batch_1_result(
    shape: LlamaShape,
    dtype: str,
    prompt_len: int,
    output_len: int,
    rates: Sequence[float],
    peer_rates: Sequence[float],
    device: str,
    bandwidths: Sequence[float],
) -> dict[str, Any]:
    """Decode of one sequence: tokens a second, ratio to the peer, fraction of the bandwidth measured in between."""
    ours, theirs = spread(rates), spread(peer_rates) if peer_rates else None
    step_bytes = shape.decode_bytes(prompt_len + output_len / 2, dtype)
    ceiling = spread(bandwidths)
    return {
        "prompt_len": prompt_len,
        "output_len": output_len,
        "engine_tokens_per_s": ours,
        "peer_tokens_per_s": theirs,
        "ratio": ours["median"] / theirs["median"] if theirs else None,
        "bytes_per_step": step_bytes,
        "read_bytes_per_s": ceiling,
        "fraction_of_bandwidth": step_bytes * ours["median"] / ceiling["median"] if device.startswith("cpu") else None,
    }


def print_report(result: Mapping[str, Any]) -> None:
    """The table for people."""
    print(f"{result['command']}\n{result['date']}, commit {result['commit']}, {result['host']['cpu']}")
    for entry in result["shapes"]:
        _print_shape(entry, result["dtype"])


def _print_shape(entry: Mapping[str, Any], dtype: str) -> None:
    throughput, single, ceilings, engine = (
        entry[name] for name in ("throughput", "batch_1", "ceilings", "engine")
    )
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    print(f"\n== {entry['shape']['name']} {dtype}, {entry['shape']['num_params'] / 1e6:.0f}M parameters ({versions})")
    print(f"{throughput['num_requests']} requests, {throughput['num_prompt_tokens']} prompt tokens, "
          f"{throughput['num_output_tokens']} output tokens")
    num_peer_requests = throughput["num_peer_requests"]
    if 0 < num_peer_requests < throughput["num_requests"]:
        print(f"THE PEER WAS GIVEN ONLY {num_peer_requests} OF THEM: ratios are not comparable")
    if entry["peer_skipped"]:
        print(f"the peer was skipped: {entry['peer_skipped']}")
    ours = throughput["engine_tokens_per_s"]
    best = {each["name"] for each in throughput["best"].values()}
    print(f"{'tokens/s':24}{'median':>9}{'min':>9}{'max':>9}{'runs':>6}{'jaxpaged is':>14}")
    rows = [("jaxpaged", ours), *throughput["peer_tokens_per_s"].items()]
    rows += [("batch 1: jaxpaged", single["engine_tokens_per_s"])]
    rows += [("batch 1: transformers", single["peer_tokens_per_s"])] if single["peer_tokens_per_s"] else []
    for name, row in rows:
        base = single["engine_tokens_per_s"] if name.startswith("batch 1") else ours
        ratio = f"{base['median'] / row['median']:.2f}x" if "jaxpaged" not in name else ""
        mark = " (best)" if name in best else ""
        print(f"{name + mark:24}{row['median']:9.1f}{row['min']:9.1f}{row['max']:9.1f}{row['num_runs']:6d}{ratio:>14}")
    print(f"host time a step: {throughput['host_ms_per_step']:.3f} ms over {throughput['num_steps']:.0f} steps; "
          f"load {engine['load_s']:.1f} s, first runs (with compiles) {engine['warm_up_s']:.1f} s, "
          f"compiles after warm-up {engine['num_compiles_after_warmup']}")
    print(f"measured: {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s read, "
          f"{ceilings['matmul_flops_per_s'] / 1e9:.1f} GFLOP/s float32 matmul")
    if throughput["fraction_of_matmul_rate"] is not None:
        print(f"batched: {100 * throughput['fraction_of_matmul_rate']:.1f} % of the matmul rate; "
              f"batch 1: {100 * single['fraction_of_bandwidth']:.1f} % of the bandwidth beside it "
              f"({single['read_bytes_per_s']['median'] / 1e9:.1f} GB/s)")
    peer_memory = f", transformers {entry['peer']['peak_memory_bytes'] / 2**20:.0f} MiB" if entry["peer"] else ""
    print(f"peak memory: jaxpaged {engine['peak_memory_bytes'] / 2**20:.0f} MiB{peer_memory}")
    if throughput["agreement"]:
        lowest = min(each["equal_requests"] for each in throughput["agreement"].values())
        print(f"same tokens as the peer: in {100 * lowest:.0f} % of the requests or more")
