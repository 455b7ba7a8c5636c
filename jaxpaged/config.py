"""The operator's choices, checked once at the door. What is learnt later (blocks, memory) is a value of its own."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

GIB = 2**30
Dtype = Literal["auto", "float32", "bfloat16"]
CacheDtype = Literal["auto", "float32", "bfloat16", "fp8", "fp8_e4m3", "float8_e4m3fn", "int8"]
Preemption = Literal["auto", "swap", "recompute"]
SchedulingPolicy = Literal["fcfs", "priority"]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]


def _option(default: Any, help_text: str) -> Any:
    """A field whose help text the command line and the README's table are generated from."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Choices of the operator. Raises ValueError with the name, the value and the allowed range."""

    dtype: Dtype = _option("auto", "type of weights and activations; auto is the checkpoint's own")
    kv_cache_dtype: CacheDtype = _option("auto", "type of the KV cache: float32, bfloat16, fp8, int8; auto is dtype's")
    max_model_len: int | None = _option(None, "most tokens of a sequence, prompt and output; None is the model's own")
    block_size: int = _option(16, "tokens in a KV block")
    max_num_seqs: int = _option(256, "most sequences running at once")
    max_num_batched_tokens: int = _option(2048, "most tokens in a step, prompt chunks and decodes together")
    device_memory_fraction: float = _option(0.9, "part of the device's memory the engine may fill")
    num_device_blocks: int | None = _option(
        None, "KV blocks, the null block too (device_memory_fraction is not read then); None fills the memory"
    )
    host_memory_bytes: int | Literal["auto"] = _option("auto", "host memory for swapped blocks; auto is 4 GiB at most")
    preemption: Preemption = _option("auto", "what happens to a victim: swap, recompute, or the cheaper (auto)")
    scheduling_policy: SchedulingPolicy = _option("fcfs", "first come first served, or by priority")
    enable_prefix_caching: bool = _option(True, "share the blocks of equal prompt prefixes")
    enable_chunked_prefill: bool = _option(True, "cut long prompts into chunks that share steps with decodes")
    tensor_parallel_size: int = _option(1, "devices that share the model")
    attention_implementation: str | None = _option(None, "attention kernel by name; None picks the best that fits")
    batch_invariant: bool = _option(False, "one shape for every step: outputs are bit-exact in any company")
    run_ahead: bool = _option(True, "schedule a step while the one before it still runs")
    max_logprobs: int = _option(20, "most log-probabilities a request may ask for per token")
    logprobs_mode: LogprobsMode = _option(
        "raw_logprobs", "what logprobs report: of the model's logits (raw) or of what is drawn from (processed)"
    )
    seed: int = _option(0, "seed of the requests that bring none")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", Dtype),
            ("kv_cache_dtype", CacheDtype),
            ("preemption", Preemption),
            ("scheduling_policy", SchedulingPolicy),
            ("logprobs_mode", LogprobsMode),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(get_args(allowed))}")
        for name, low, high in (
            ("block_size", 1, 1024),
            ("max_num_seqs", 1, 65_536),
            ("max_num_batched_tokens", 1, 1_048_576),
            ("tensor_parallel_size", 1, 4096),
            ("max_logprobs", 0, 1000),
            ("max_model_len", 2, 2**24),
            ("num_device_blocks", 2, 2**31 - 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "num_device_blocks"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} is not allowed: it must be an integer from {low} to {high}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} is not allowed: it must be a 64-bit signed integer")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size} is not allowed: it must be a power of two")
        fraction = self.device_memory_fraction
        is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not is_number or not math.isfinite(fraction) or not 0 < fraction <= 1:
            raise ValueError(f"device_memory_fraction={fraction!r} is not allowed: it must be above 0 and at most 1")
        host = self.host_memory_bytes
        if host != "auto" and (isinstance(host, bool) or not isinstance(host, int) or host < 0):
            raise ValueError(f"host_memory_bytes={host!r} is not allowed: it must be 'auto' or a number of bytes")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "every running sequence needs a token in a step, so raise the first or lower the second"
            )
        for name in ("enable_prefix_caching", "enable_chunked_prefill", "batch_invariant", "run_ahead"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be True or False")


OPTIONS = tuple(dataclasses.fields(EngineConfig))
"""The fields with their help texts, in order."""
