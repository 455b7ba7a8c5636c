"""Counts of the engine: blocks, sharing, preemption, compiles, host time."""

import weakref
from dataclasses import dataclass, field
from types import TracebackType

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A picture of the engine at one moment. Blocks are device blocks unless said otherwise."""

    num_blocks: int
    num_free_blocks: int
    num_used_blocks: int
    num_shared_blocks: int
    """Blocks held by more than one table now."""
    blocks_saved_fraction: float
    """1 - blocks held / blocks that would be held without sharing, averaged over the steps."""
    num_swapped_out_blocks: int
    num_swapped_in_blocks: int
    num_copied_blocks: int
    """Blocks copied on write."""
    num_preemptions: int
    num_swap_preemptions: int
    num_recompute_preemptions: int
    num_failed_swaps: int
    prefix_cache_hit_rate: float
    """Prompt tokens found in the cache / prompt tokens looked up."""
    num_compiles_after_warmup: int
    num_requests_accepted: int
    num_requests_finished: int
    num_requests_running: int
    num_requests_waiting: int
    num_requests_swapped: int
    num_steps: int
    num_prompt_tokens: int
    """Prompt tokens of finished requests."""
    num_generated_tokens: int
    host_seconds_per_step: float
    """Mean host time of a step: schedule, build, update (detokenizing and waiting for the device excluded)."""


@dataclass
class HostTimes:
    """Seconds the host spent, summed over steps."""

    num_steps: int = 0
    schedule_s: float = 0.0
    build_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    update_s: float = 0.0
    publish_s: float = 0.0

    @property
    def host_seconds_per_step(self) -> float:
        return (self.schedule_s + self.build_s + self.update_s) / max(self.num_steps, 1)


@dataclass
class FinishedCounts:
    """Sums over finished requests."""

    by_reason: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


class CompileCounter:
    """Counts compiles that happen inside its `with` block, wherever in jax they come from."""

    def __init__(self) -> None:
        self.num_compiles = 0
        self._is_counting = False
        self_reference = weakref.ref(self)

        def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
            counter = self_reference()
            if counter is not None and counter._is_counting and event == COMPILE_EVENT:
                counter.num_compiles += 1

        jax.monitoring.register_event_duration_secs_listener(on_event)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, on_event)

    def __enter__(self) -> "CompileCounter":
        self._is_counting = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_counting = False
