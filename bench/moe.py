"""How long does a mixture of experts take when only the experts that are hit are multiplied, and when all are?

One layer's experts, router apart, rows sorted by expert. With few tokens it is bound by memory: its ceiling is the
kernels of the experts that are hit, read once. With many it is bound by products: each row's with its own expert.
"dense" multiplies every row with every expert, what XLA makes of a ragged product outside of TPUs. The implementations
take turns.

    python -m bench.moe --num-experts 8 --per-token 2 --model-dim 1024 --expert-dim 3584 --tokens 1 8 64 512
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import describe_run, note, write_result
from jaxpaged.layers.moe import IMPLEMENTATIONS, Kernels


def dense(rows: jax.Array, counts: jax.Array, kernels: Kernels, activation: Callable[..., jax.Array]) -> jax.Array:
    """Each row through every expert, of which its own is kept."""
    gate, up, down = kernels
    expert = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(rows.shape[0]), side="right")
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    inner = activation(product("rd,emd->erm", rows, gate)) * product("rd,emd->erm", rows, up)
    outputs = product("erm,edm->erd", inner.astype(rows.dtype), down)
    return outputs[expert, jnp.arange(rows.shape[0])].astype(rows.dtype)


def time_in_turn(
    functions: Mapping[str, Callable[..., jax.Array]], inputs: tuple[Any, ...], repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each function's runs, after one unmeasured, and the largest difference of any result from dense's."""
    results = {name: np.asarray(function(*inputs), np.float32) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            times[name].append(time.perf_counter() - start)
    return times, max(float(np.abs(result - results["dense"]).max()) for result in results.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.moe", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--per-token", type=int, default=2, help="experts of a token")
    parser.add_argument("--model-dim", type=int, default=1024)
    parser.add_argument("--expert-dim", type=int, default=3584)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(arguments)
    if min(args.num_experts, args.per_token, args.model_dim, args.expert_dim, args.repeats, *args.tokens) < 1:
        parser.error("all numbers must be 1 or more")
    if args.per_token > args.num_experts:
        parser.error(f"--per-token {args.per_token} must not be above --num-experts {args.num_experts}")

    shapes = ((args.expert_dim, args.model_dim),) * 2 + ((args.model_dim, args.expert_dim),)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    kernels = tuple(
        (jax.random.normal(key, (args.num_experts, *shape)) / shape[1] ** 0.5).astype(args.dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    names = ["blocks", *(["grouped"] if jax.devices()[0].platform == "tpu" else [])]
    functions = {
        name: jax.jit(partial(function, activation=jax.nn.silu))
        for name, function in {**{name: IMPLEMENTATIONS[name] for name in names}, "dense": dense}.items()
    }
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for num_tokens in args.tokens:
        note(f"{num_tokens} tokens")
        chosen = np.concatenate([rng.permutation(args.num_experts)[: args.per_token] for _ in range(num_tokens)])
        counts = jnp.asarray(np.bincount(chosen, minlength=args.num_experts), jnp.int32)
        inputs = jnp.asarray(rng.normal(size=(chosen.size, args.model_dim)), args.dtype)
        times, difference = time_in_turn(functions, (inputs, counts, kernels), args.repeats)
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        rows.append({
            "num_tokens": num_tokens, "num_experts_hit": int((counts > 0).sum()), "ms": medians,
            "ms_min": {name: min(values) * 1e3 for name, values in times.items()},
            "dense_over_blocks": medians["dense"] / medians["blocks"], "largest_difference": difference,
        })  # fmt: skip
    print(f"{'tokens':>7} {'hit':>4} " + " ".join(f"{name + ' ms':>12}" for name in functions) + "  dense / blocks")
    for row in rows:
        cells = " ".join(f"{row['ms'][name]:12.2f}" for name in functions)
        print(f"{row['num_tokens']:7d} {row['num_experts_hit']:4d} {cells} {row['dense_over_blocks']:15.1f}")
    result = {**describe_run("bench.moe", arguments), "jax": jax.__version__}
    result |= {"device": jax.devices()[0].device_kind, "rows": rows}
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
