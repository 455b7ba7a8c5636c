"""How many tokens a second does an 8B Llama give on one accelerator, and what of its memory bandwidth do decodes reach?

Decode is bound by memory bandwidth: its ceiling is all weights (but the embedding, of which a row a token is read) and
the keys and values in use, read once a step, at the copy bandwidth measured in the same run before the model is made.
Weights are random bfloat16, drawn on the device; requests are greedy, end at their full length and share no prefix.

First decode steps are timed, of 1 sequence and of many: runs that differ in output length only, whose prompts are in
the prefix cache. Then workloads of equal requests (prompt tokens / output tokens) that wait all at once, as many as
fill the KV cache or the engine's rows: output tokens a second, beside published figures of other engines on such
devices, which were measured by their makers, with other weights and some in FP8. Of each step it is told how long the
host worked and how long it waited for the device: where it waits in most steps, its work is hidden.

    python -m bench.llama8b

prints each result as it comes and writes bench/results/llama8b-<device>.json after each. What would begin after
`--time-limit-s` is left out, and said; `--resume` with that file goes on with what it lacks. On a CPU, or with
`--small`, a tiny model shows that all of it runs.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.device_kernels import COPY_BYTES, copy_bandwidth
from bench.record import add_resume_flags, describe_run, note, resumed, save_result, sources_digest, write_result
from jaxpaged.config import EngineConfig
from jaxpaged.engine.engine import Engine
from jaxpaged.llm import keep_compiles
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.random_model import random_model
from jaxpaged.runner.shapes import memory_plan, resolve_shapes, with_checked_attention
from jaxpaged.sampling_params import SamplingParams

LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128_256, model_dim=4096, mlp_dim=14_336, num_layers=32, num_q_heads=32,
    num_kv_heads=8, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=5e5, tie_embeddings=False,
    dtype="bfloat16",
)  # fmt: skip
"""Llama-3.1-8B, but for the scaling of its rotary positions, which costs nothing."""
SMALL = dataclasses.replace(
    LLAMA_8B, vocab_size=512, model_dim=64, mlp_dim=128, num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=256, dtype="float32",
)  # fmt: skip


SOURCES = ("pallas_kernels/**/*.py", "pallas_kernels/**/*.json", "jaxpaged/**/*.py", "bench/llama8b.py")
"""What a result depends on."""


@dataclass(frozen=True)
class Workload:
    """Equal requests, all there from the start."""

    prompt_len: int
    output_len: int
    num_waves: int = 1
    """So many times as many requests as run at once."""

    @property
    def name(self) -> str:
        return f"{self.prompt_len}/{self.output_len}"

    def num_requests(self, engine: Engine) -> int:
        """As many as fill the engine at their full length, in each wave: none has to be preempted."""
        plan = engine.memory_plan
        blocks = -(-(self.prompt_len + self.output_len) // plan.block_size)
        return self.num_waves * max(min(engine.config.max_num_seqs, (plan.num_device_blocks - 1) // blocks), 1)


@dataclass(frozen=True)
class Scale:
    """All that differs between the measurement and its small proof."""

    model: ModelConfig
    options: dict[str, Any]
    """Of EngineConfig."""
    workloads: tuple[Workload, ...]
    decodes: tuple[tuple[int, int], ...]
    """(sequences, context) of the decode steps that are timed."""
    num_decode_steps: int
    copy_bytes: int

    @property
    def engine_config(self) -> EngineConfig:
        return EngineConfig(**self.options, preemption="recompute", host_memory_bytes=0)


FULL_SCALE = Scale(
    LLAMA_8B,
    {"max_num_seqs": 512, "max_num_batched_tokens": 2048, "max_model_len": 2304},
    (Workload(1000, 1000), Workload(128, 128, num_waves=4), Workload(128, 2048), Workload(2048, 128)),
    ((1, 128), (1, 2000), (64, 1000), (256, 1000)),
    num_decode_steps=64,
    copy_bytes=COPY_BYTES,
)
SMALL_SCALE = Scale(
    SMALL,
    {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, "num_device_blocks": 40},
    (Workload(16, 16), Workload(8, 8, num_waves=2), Workload(8, 32), Workload(32, 8)),
    ((1, 16), (4, 16)),
    num_decode_steps=8,
    copy_bytes=2**22,
)

TENSORRT = "TensorRT-LLM, H200, FP8 (its perf-overview.md)"
H100_OFFLINE = "H100, bfloat16, 1000 ShareGPT requests (research.aimultiple.com/inference-engines)"
PUBLISHED = (
    ("128/128", 27_911, TENSORRT),
    ("1000/1000", 17_744, TENSORRT),
    ("128/2048", 26_221, TENSORRT),
    ("2048/128", 3_538, TENSORRT),
    ("ShareGPT", 16_215, f"SGLang, {H100_OFFLINE}"),
    ("ShareGPT", 16_132, f"LMDeploy, {H100_OFFLINE}"),
    ("ShareGPT", 12_553, f"vLLM, {H100_OFFLINE}"),
)
"""(workload, output tokens a second, whose and on what) for Llama-3.1-8B; none of it was measured here."""


HOST_PARTS = ("schedule", "build", "dispatch", "update", "publish")
HIDDEN_WAIT = 0.05
"""Part of a step that the host must wait for the device, for its own work to count as hidden behind it."""


def make_engine(scale: Scale, seed: int) -> Engine:
    """An engine around a model of random weights, which the device draws itself."""
    config = with_checked_attention(scale.engine_config, scale.model, scale.model.dtype)
    shapes = resolve_shapes(config, scale.model, scale.model.dtype)
    model = random_model(scale.model, seed, max_model_len=config.max_model_len)
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    weight_bytes = sum(leaf.nbytes for leaf in leaves)
    plan = memory_plan(config, scale.model, shapes, weight_bytes=weight_bytes, dtype=scale.model.dtype)
    return Engine(model, scale.model, config, shapes, plan, tokenizer=None)


def step_bytes(model: ModelConfig, num_seqs: int, context_len: float) -> float:
    """What a decode step reads at least: weights but the embedding, and each sequence's keys and values."""
    attention = 2 * model.model_dim * model.head_dim * (model.num_q_heads + model.num_kv_heads)
    layer = attention + 3 * model.model_dim * model.mlp_dim + 2 * model.model_dim
    weights = model.num_layers * layer + model.vocab_size * model.model_dim
    keys_and_values = 2 * model.num_layers * model.num_kv_heads * model.head_dim * context_len
    return (weights + num_seqs * keys_and_values) * jnp.dtype(model.dtype).itemsize


def run_requests(engine: Engine, prompts: Sequence[Sequence[int]], output_len: int) -> dict[str, float]:
    """All of them at once, to their full length; seconds, and of the host by part. Compiles come before the clock."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    ids = [engine.add_request({"prompt_token_ids": list(prompt)}, params) for prompt in prompts]
    started = time.perf_counter()
    engine.warm_up(engine.buckets_for(ids), with_sampler=False)
    warm_up_s = time.perf_counter() - started
    before = dataclasses.asdict(engine.host_times)
    started = time.perf_counter()
    num_tokens = 0
    while engine.has_unfinished:
        for output in engine.step():
            if output.outputs[0].finish_reason != "length":
                raise RuntimeError(f"a request ended by {output.outputs[0].finish_reason}, not by its length")
            num_tokens += len(output.outputs[0].token_ids)
    engine.step()  # the one that was dispatched ahead
    elapsed_s = time.perf_counter() - started
    if num_tokens != len(prompts) * output_len:
        raise RuntimeError(f"{num_tokens} tokens came of {len(prompts)} requests for {output_len}")
    spent = {name: value - before[name] for name, value in dataclasses.asdict(engine.host_times).items()}
    return {"elapsed_s": elapsed_s, "warm_up_s": warm_up_s, **spent}


def measure_decode(
    engine: Engine, num_seqs: int, context_len: int, num_steps: int, bandwidth: float, rng: np.random.Generator,
    repeats: int = 3,
) -> dict[str, Any]:
    """Milliseconds of a decode step, and what of the bandwidth it reaches."""
    prompts = rng.integers(3, engine.model_config.vocab_size, (num_seqs, context_len)).tolist()
    times = []
    for _ in range(repeats + 1):  # the first compiles, and fills the prefix cache
        short = run_requests(engine, prompts, 1)["elapsed_s"]
        times.append((run_requests(engine, prompts, 1 + num_steps)["elapsed_s"] - short) / num_steps * 1e3)
    step_ms = statistics.median(times[1:])
    num_bytes = step_bytes(engine.model_config, num_seqs, context_len + num_steps / 2)
    ceiling_ms = num_bytes / bandwidth * 1e3
    return {
        "num_seqs": num_seqs, "context_len": context_len, "step_ms": step_ms, "step_ms_min": min(times[1:]),
        "step_ms_max": max(times[1:]), "output_tokens_per_s": num_seqs / step_ms * 1e3, "step_bytes": num_bytes,
        "ceiling_ms": ceiling_ms, "fraction_of_bandwidth": ceiling_ms / step_ms,
    }  # fmt: skip


def measure_workload(engine: Engine, workload: Workload, rng: np.random.Generator) -> dict[str, Any]:
    """Tokens a second of a workload, and what the host did meanwhile."""
    engine.reset_prefix_cache()
    vocab_size = engine.model_config.vocab_size
    num_requests = workload.num_requests(engine)
    prompts = rng.integers(3, vocab_size, (num_requests, workload.prompt_len)).tolist()
    preempted = engine.stats().num_preemptions
    spent = run_requests(engine, prompts, workload.output_len)
    elapsed_s, num_steps = spent["elapsed_s"], spent["num_steps"]
    # read back is where the host waits; all else it does while the device computes the step before
    parts_ms = {part: spent[f"{part}_s"] / num_steps * 1e3 for part in HOST_PARTS}
    step_ms, wait_ms = elapsed_s / num_steps * 1e3, spent["wait_s"] / num_steps * 1e3
    num_output = num_requests * workload.output_len
    return {
        "workload": workload.name, "num_requests": num_requests, "elapsed_s": elapsed_s,
        "output_tokens_per_s": num_output / elapsed_s,
        "total_tokens_per_s": (num_output + num_requests * workload.prompt_len) / elapsed_s,
        "num_steps": num_steps, "step_ms": step_ms, "host_ms": sum(parts_ms.values()), "host_parts_ms": parts_ms,
        "wait_ms": wait_ms, "is_host_hidden": wait_ms >= HIDDEN_WAIT * step_ms, "warm_up_s": spent["warm_up_s"],
        "num_preemptions": engine.stats().num_preemptions - preempted,
        "published": [{"output_tokens_per_s": figure, "by": by} for name, figure, by in PUBLISHED
                      if name == workload.name],
    }  # fmt: skip


def measure(scale: Scale, result: dict[str, Any], output: Path | None, *, seed: int, time_limit_s: float) -> None:
    """Fill `result` with what it has not yet, print each part as it comes and save it."""
    started = time.perf_counter()
    bandwidth = copy_bandwidth(num_bytes=scale.copy_bytes)
    result |= {"copy_bytes_per_s": bandwidth, "left_out": []}
    done = {f"decode of {row['num_seqs']} at {row['context_len']}" for row in result["decode"]}
    done |= {row["workload"] for row in result["workloads"]}
    note(f"copy {bandwidth / 1e9:.0f} GB/s; making {scale.model.num_layers} layers of random weights")
    engine = make_engine(scale, seed)
    result["attention"] = engine.runner.shapes.layout.row.name
    result["attending"] = dataclasses.asdict(engine.runner.shapes.attending)
    result["kv_tokens"] = engine.memory_plan.num_device_blocks * engine.memory_plan.block_size
    result["load_s"] = time.perf_counter() - started
    note(f"attention by {result['attention']}, room for {result['kv_tokens']} tokens, after {result['load_s']:.0f} s")

    def is_to_be_left(name: str) -> bool:
        if name in done:
            return True
        if time.perf_counter() - started <= time_limit_s:
            return False
        result["left_out"].append(name)
        print(f"{name}: left out, as {time_limit_s:.0f} s are over", flush=True)
        return True

    rng = np.random.default_rng(seed)
    for num_seqs, context_len in scale.decodes:
        name = f"decode of {num_seqs} at {context_len}"
        if not is_to_be_left(name):
            found = measure_decode(engine, num_seqs, context_len, scale.num_decode_steps, bandwidth, rng)
            result["decode"].append(found)
            print(
                f"{name}: {found['step_ms']:.2f} ms a step ({found['step_ms_min']:.2f} to {found['step_ms_max']:.2f}), "
                f"{found['output_tokens_per_s']:,.0f} tok/s, {found['fraction_of_bandwidth']:.0%} of the bandwidth",
                flush=True,
            )
            save_result(result, output)
    for workload in scale.workloads:
        if not is_to_be_left(workload.name):
            found = measure_workload(engine, workload, rng)
            result["workloads"].append(found)
            beside = "; ".join(f"{one['output_tokens_per_s']:,} by {one['by']}" for one in found["published"])
            print(
                f"{workload.name} x {found['num_requests']}: {found['output_tokens_per_s']:,.0f} output tok/s "
                f"(published: {beside or 'none'}); {found['step_ms']:.2f} ms a step, of which the host works "
                f"{found['host_ms']:.2f} ({'hidden' if found['is_host_hidden'] else 'not hidden'}) and waits "
                f"{found['wait_ms']:.2f}; {found['num_preemptions']} preemptions, "
                f"{found['warm_up_s']:.0f} s of warm-up before", flush=True,
            )  # fmt: skip
            save_result(result, output)
    result["num_compiles_after_warmup"] = engine.stats().num_compiles_after_warmup
    result["elapsed_s"] = time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.llama8b", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs; always on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit-s", type=float, default=480.0, help="nothing is begun after it (%(default)s)")
    add_resume_flags(parser, "llama8b")
    args = parser.parse_args(arguments)
    if not math.isfinite(args.time_limit_s) or args.time_limit_s <= 0:
        parser.error("--time-limit-s must be above 0")
    is_small = args.small or jax.default_backend() == "cpu"
    kind = jax.devices()[0].device_kind
    scale = SMALL_SCALE if is_small else FULL_SCALE
    identity = {"device": kind, "jax": jax.__version__, "is_small": is_small, "dtype": scale.model.dtype}
    identity |= {"engine_options": scale.options, "sources": sources_digest(SOURCES)}
    nothing: dict[str, Any] = {"decode": [], "workloads": []}
    found = resumed(parser, args, identity, nothing, None if is_small else "llama8b")
    if is_small:
        note("a tiny model: these figures say nothing about an 8B Llama")
    keep_compiles()
    result = {**describe_run("bench.llama8b", arguments), **identity, **found}
    result["published"] = [
        {"workload": name, "output_tokens_per_s": figure, "by": by} for name, figure, by in PUBLISHED
    ]
    measure(scale, result, args.output, seed=args.seed, time_limit_s=args.time_limit_s)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
