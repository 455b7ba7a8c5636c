"""What Prometheus reads: vLLM's names, so that dashboards and gateways work as they are, and ours beside them."""

import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from jaxpaged.engine.outputs import RequestOutput
from jaxpaged.server.async_engine import AsyncEngine, EngineState

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
LABELS = ("model_name",)
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("Arrival to first token.", SECONDS),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a streamed sample.", SECONDS),
    "vllm:request_time_per_output_token_seconds": ("Mean time of a token behind the first, by request.", SECONDS),
    "vllm:e2e_request_latency_seconds": ("Arrival to end.", SECONDS),
    "vllm:request_queue_time_seconds": ("Arrival to the first step that computed some of it.", SECONDS),
    "vllm:request_prefill_time_seconds": ("From then to the first token.", SECONDS),
    "vllm:request_decode_time_seconds": ("First token to last.", SECONDS),
    "vllm:request_inference_time_seconds": ("First step to last token.", SECONDS),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request.", TOKENS),
    "vllm:request_params_n": ("Samples asked for.", (1, 2, 5, 10, 20, 50, 100)),
}
GAUGES = {
    "vllm:num_requests_running": ("Requests with blocks on the device.", "num_requests_running"),
    "vllm:num_requests_waiting": ("Requests that wait for blocks or a row.", "num_requests_waiting"),
    "vllm:num_requests_swapped": ("Requests with their blocks in host memory.", "num_requests_swapped"),
    "jaxpaged:num_blocks": ("KV blocks of the device, the null block too.", "num_blocks"),
    "jaxpaged:num_used_blocks": ("KV blocks held by requests.", "num_used_blocks"),
    "jaxpaged:num_shared_blocks": ("KV blocks held by more than one table.", "num_shared_blocks"),
    "jaxpaged:blocks_saved_fraction": ("Blocks that sharing saves, mean over steps.", "blocks_saved_fraction"),
    "jaxpaged:host_seconds_per_step": ("Host time of a step, mean.", "host_seconds_per_step"),
}
COUNTERS = {
    "vllm:num_preemptions": ("Requests taken off the device.", "num_preemptions"),
    "jaxpaged:swap_preemptions": ("Those whose blocks went to host memory.", "num_swap_preemptions"),
    "jaxpaged:recompute_preemptions": ("Those that are computed again.", "num_recompute_preemptions"),
    "jaxpaged:failed_swaps": ("Copies to or from host memory that failed.", "num_failed_swaps"),
    "jaxpaged:swapped_out_blocks": ("Blocks copied to host memory.", "num_swapped_out_blocks"),
    "jaxpaged:swapped_in_blocks": ("Blocks copied back.", "num_swapped_in_blocks"),
    "jaxpaged:copied_blocks": ("Blocks copied on write.", "num_copied_blocks"),
    "jaxpaged:compiles_after_ready": ("Programs compiled while serving; more than 0 is a fault.",
                                      "num_compiles_after_warmup"),
    "jaxpaged:steps": ("Steps of the engine.", "num_steps"),
    "jaxpaged:requests_accepted": ("Prompts the engine accepted.", "num_requests_accepted"),
    "jaxpaged:requests_finished": ("Prompts that have ended.", "num_requests_finished"),
}


class Metrics:
    """One server's figures. `observe` belongs to the engine's thread, `render` to any."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(name, text, LABELS, buckets=buckets, registry=self._registry).labels(model_name)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that got a first token.")
        self._generated_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._successes = Counter(
            "vllm:request_success", "Requests that ended.", (*LABELS, "finished_reason"), registry=self._registry
        )
        self._http = Counter(
            "jaxpaged:http_requests", "Answers.", (*LABELS, "route", "status"), registry=self._registry
        )
        self._seen: dict[str, tuple[int, float]] = {}
        """Of streamed requests: tokens so far, and when the last of them came."""

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self._registry).labels(self._model_name)

    def watch(self, engine: AsyncEngine) -> None:
        """Show the counters of this engine too."""
        self._registry.register(_EngineCollector(engine, self._model_name))

    def count_answer(self, route: str, status: int) -> None:
        self._http.labels(self._model_name, route, str(status)).inc()

    def observe(self, output: RequestOutput) -> None:
        """Count an output of the engine."""
        now = time.perf_counter()
        num_tokens = sum(len(one.token_ids) for one in output.outputs)
        num_before, last_s = self._seen.get(output.request_id, (0, None))
        num_new = num_tokens - num_before
        if num_new:
            self._generated_tokens.inc(num_new)
            if not num_before:
                self._prompt_tokens.inc(len(output.prompt_token_ids))
                self._observe("vllm:time_to_first_token_seconds", output.metrics.time_to_first_token_s)
            if last_s is not None:
                self._observe("vllm:inter_token_latency_seconds", now - last_s)
        if not output.finished:
            self._seen[output.request_id] = (num_tokens, now)
            return
        self._seen.pop(output.request_id, None)
        self._observe_end(output, num_tokens)

    def _observe_end(self, output: RequestOutput, num_tokens: int) -> None:
        metrics = output.metrics
        reasons = {one.finish_reason for one in output.outputs}
        reason = next(r for r in ("error", "abort", "length", "stop") if r in reasons)
        self._successes.labels(self._model_name, reason).inc()
        self._observe("vllm:e2e_request_latency_seconds", max(0.0, time.time() - metrics.arrival_time_s))
        self._observe("vllm:request_queue_time_seconds", metrics.queue_s)
        self._observe("vllm:request_prefill_time_seconds", metrics.prefill_s)
        self._observe("vllm:request_decode_time_seconds", metrics.decode_s)
        if metrics.prefill_s is not None and metrics.decode_s is not None:
            self._observe("vllm:request_inference_time_seconds", metrics.prefill_s + metrics.decode_s)
            longest = max(len(one.token_ids) for one in output.outputs)
            if longest > 1:
                self._observe("vllm:request_time_per_output_token_seconds", metrics.decode_s / (longest - 1))
        self._observe("vllm:request_prompt_tokens", len(output.prompt_token_ids))
        self._observe("vllm:request_generation_tokens", num_tokens)
        self._observe("vllm:request_params_n", len(output.outputs))

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._histograms[name].observe(value)

    def render(self) -> tuple[bytes, str]:
        """The text for Prometheus, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _EngineCollector:
    """The engine's own counters, read when they are asked for."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = [model_name]
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        if stats is not None:
            for name, (text, field) in GAUGES.items():
                yield self._gauge(name, text, getattr(stats, field))
            usage = stats.num_used_blocks / max(1, stats.num_blocks - 1)
            yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV blocks that is held; 1 is all.", usage)
            hits = "Part of looked-up prompt tokens found in the prefix cache."
            yield self._gauge("jaxpaged:prefix_cache_hit_rate", hits, stats.prefix_cache_hit_rate)
            for name, (text, field) in COUNTERS.items():
                family = CounterMetricFamily(name, text, labels=LABELS)
                family.add_metric(self._labels, getattr(stats, field))
                yield family
        yield self._gauge("jaxpaged:num_requests_unfinished", "Prompts in the server.", self._engine.num_unfinished)
        states = GaugeMetricFamily("jaxpaged:engine_state", "1 for the state it is in.", labels=(*LABELS, "state"))
        for state in EngineState:
            states.add_metric([*self._labels, state.value], float(self._engine.state is state))
        yield states
        for name, text, counts in (
            ("jaxpaged:requests_rejected", "Prompts that were never accepted.", self._engine.rejected),
            ("jaxpaged:requests_failed", "Accepted prompts that ended in an error of the server.", self._engine.failed),
        ):
            family = CounterMetricFamily(name, text, labels=(*LABELS, "reason"))
            for reason, count in sorted(counts.items()):
                family.add_metric([*self._labels, reason], count)
            yield family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family
