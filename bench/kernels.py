"""How long does paged attention take, implementation against implementation, and how far is it from its ceiling?

Decode is bound by memory bandwidth: its ceiling is every key and value in use, read once, at the bandwidth measured in
the same run. Prefill is bound by arithmetic: its ceiling is the causal products at the matmul rate measured here. One
jitted layer is timed on a number of separate layer caches in turn, so that none is still in the processor's caches,
and its time is multiplied by that number. "mapped" is the yardstick: the textbook loop over sequences, 256 keys a
turn, keys and values both [blocks, kv_heads, block_size, head_dim]; it serves decodes alone.

    python -m bench.kernels --repeats 5 --output bench/results/kernels.json

On a GPU or TPU (or with `--device`) it is another bench (`kernels_on_device.py`): every case is compared with attention
in float64, decodes and prefills of real sizes are timed against JAX's own kernels and contiguous attention, and the
result is written to bench/results/kernels-<device>.json as it comes. What matters most comes first
(`kernel_agenda.py`), and nothing is begun after `--minutes`; what is missing then, another run goes on with:

    python -m bench.kernels --resume bench/results/kernels-NVIDIA-H200.json

On a CPU the cases are small and the kernels interpreted: that proves that the bench runs, and its times are not those
of any hardware.

`python -m bench.kernels tune` searches the sizes of its kernels instead (`tune.py`).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench import kernels_on_device, tune
from bench.ceilings import measured_bandwidth, measured_matmul_rate
from bench.record import describe_run, note, write_result
from pallas_kernels import (
    IMPLEMENTATIONS,
    AttentionCase,
    AttentionMetadata,
    KVLayout,
    misfits,
    paged_attention,
)
from pallas_kernels.cases import BENCH_CASES, Batch, BatchCase, make_batch, with_options

MAPPED_TURN_TOKENS = 256
MAX_DENSE_ELEMENTS = 2**25
"""The reference gathers every slot of its table for every token; beyond this many elements it is left out."""


def mapped(
    query: Any, key: Any, value: Any, kv: Any, metadata: AttentionMetadata, *, scale: float, **options: None
) -> tuple[Any, Any]:
    """The yardstick: decodes only, no window, cap or sinks."""
    keys, values = kv
    _, num_kv_heads, block_size, head_dim = keys.shape
    blocks, offsets = metadata.slot_mapping // block_size, metadata.slot_mapping % block_size
    keys, values = keys.at[blocks, :, offsets].set(key), values.at[blocks, :, offsets].set(value)
    turn_blocks = MAPPED_TURN_TOKENS // block_size
    tables = jnp.pad(metadata.block_tables, ((0, 0), (0, -metadata.block_tables.shape[1] % turn_blocks)))[: len(query)]

    def attend(one: tuple[Any, Any, Any]) -> Any:
        rows, table, context = one
        rows = rows.reshape(num_kv_heads, -1, head_dim) * scale

        def turn(index: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            weighted, highest, total = carry
            ids = lax.dynamic_slice(table, (index * turn_blocks,), (turn_blocks,))
            chunk = keys[ids].transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)
            scores = jnp.einsum("hgd,hkd->hgk", rows, chunk)
            position = index * MAPPED_TURN_TOKENS + jnp.arange(MAPPED_TURN_TOKENS)
            scores = jnp.where(position < context, scores, -1e30)
            now = jnp.maximum(highest, scores.max(-1))
            weights, shrink = jnp.exp(scores - now[..., None]), jnp.exp(highest - now)
            chunk = values[ids].transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)
            weighted = weighted * shrink[..., None] + jnp.einsum("hgk,hkd->hgd", weights, chunk)
            return weighted, now, total * shrink + weights.sum(-1)

        start = jnp.zeros(rows.shape), jnp.full(rows.shape[:2], -1e30), jnp.zeros(rows.shape[:2])
        weighted, _, total = lax.fori_loop(0, -(-context // MAPPED_TURN_TOKENS), turn, start)
        return (weighted / total[..., None]).reshape(-1, head_dim)

    return lax.map(attend, (query, tables, metadata.context_lens[: len(query)])), (keys, values)


@dataclass
class Contestant:
    """One compiled layer and its caches."""

    name: str
    batch: Batch
    layer: Callable[..., tuple[Any, Any]]
    caches: list[Any]
    compile_s: float
    output: Any


def enter(name: str, function: Callable[..., tuple[Any, Any]], batch: Batch, num_layers: int) -> Contestant:
    """A contestant, compiled and run once per cache."""
    layer = jax.jit(partial(function, **batch.options), donate_argnums=3)
    start = time.perf_counter()
    compiled = layer.lower(batch.query, batch.key, batch.value, batch.kv, batch.metadata).compile()
    compile_s = time.perf_counter() - start
    caches = [jax.tree.map(jnp.copy, batch.kv) for _ in range(num_layers)]
    for index, cache in enumerate(caches):
        output, caches[index] = compiled(batch.query, batch.key, batch.value, cache, batch.metadata)
    return Contestant(name, batch, compiled, caches, compile_s, np.asarray(output.astype(jnp.float32)))


def clean(kv: Any) -> Any:
    """The cache with its poison taken out: the yardstick does not clear values it must not use."""
    return jax.tree.map(lambda leaf: jnp.nan_to_num(leaf) if leaf.dtype == jnp.float32 else leaf, kv)


def reasons_to_skip(case: BatchCase) -> dict[str, str]:
    """Why an implementation, or the yardstick, is not timed on this case; those that are timed are not in it."""
    heads = case.heads
    shape = AttentionCase(
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_size=case.block_size,
        dtype=case.dtype,
        num_q_heads=heads.num_q_heads,
    )
    reasons = {row.name: misfits(row, shape) for row in IMPLEMENTATIONS}
    num_gathered = sum(length for _, length in case.sequences) * max(context for context, _ in case.sequences)
    num_gathered *= 2 * heads.num_kv_heads * heads.head_dim
    if num_gathered > MAX_DENSE_ELEMENTS:
        reasons["reference"].append(f"would gather {num_gathered} elements")
    reasons["mapped"] = []
    if case.dtype != "float32":
        reasons["mapped"].append(f"keeps keys and values as float32, not {case.dtype}")
    if any(length > 1 for _, length in case.sequences):
        reasons["mapped"].append("serves decodes alone")
    return {name: "; ".join(found) for name, found in reasons.items() if found}


def contestants(case: BatchCase, names: Sequence[str], num_layers: int) -> list[Contestant]:
    entered = []
    skipped = reasons_to_skip(case)
    for row in IMPLEMENTATIONS:
        if row.name in names and row.name not in skipped:
            function = partial(paged_attention, implementation=row.name)
            entered.append(enter(row.name, function, make_batch(case, row.name), num_layers))
    if "mapped" in names and "mapped" not in skipped:
        batch = make_batch(case, "xla")
        layout = KVLayout(
            num_kv_heads=case.heads.num_kv_heads,
            head_dim=case.heads.head_dim,
            block_size=case.block_size,
            dtype=case.dtype,
            implementation="xla",
        )
        plain = tuple(jnp.asarray(part.transpose(0, 2, 1, 3)) for part in layout.unpack(batch.kv))
        entered.append(enter("mapped", mapped, Batch(**(vars(batch) | {"kv": clean(plain)})), num_layers))
    return entered


def ceiling_s(case: BatchCase, bandwidth: float, matmul_rate: float) -> float:
    """The shortest time a layer could take: bytes of the keys and values in use, or products of causal attention."""
    heads = case.heads
    seen = sum(length * context - length * (length - 1) // 2 for context, length in case.sequences)
    flops = 4 * seen * heads.num_q_heads * heads.head_dim
    num_keys = sum(context for context, _ in case.sequences)
    num_bytes = 2 * num_keys * heads.num_kv_heads * heads.head_dim * jnp.dtype(case.dtype).itemsize
    return max(num_bytes / bandwidth, flops / matmul_rate)


def time_in_turn(entered: Sequence[Contestant], *, num_layers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of single layers by name, everybody's layer before anybody's next one."""
    times: dict[str, list[float]] = {one.name: [] for one in entered}
    for _ in range(repeats):
        for index in range(num_layers):
            for one in entered:
                batch = one.batch
                start = time.perf_counter()
                output, one.caches[index] = one.layer(
                    batch.query, batch.key, batch.value, one.caches[index], batch.metadata
                )
                jax.block_until_ready(output)
                times[one.name].append(time.perf_counter() - start)
    return times


def race(case: BatchCase, names: Sequence[str], *, num_layers: int, repeats: int) -> list[dict[str, Any]]:
    """Interleaved layer by layer; times are of `num_layers` layers."""
    entered = contestants(case, names, num_layers)
    if not entered:
        return []
    times = time_in_turn(entered, num_layers=num_layers, repeats=repeats)
    num_tokens = entered[0].batch.num_tokens
    truth = entered[-1].output[:num_tokens]
    return [
        {
            "case": case.name,
            "implementation": one.name,
            "ms": statistics.median(times[one.name]) * num_layers * 1e3,
            "ms_min": min(times[one.name]) * num_layers * 1e3,
            "compile_s": one.compile_s,
            "largest_difference": float(np.abs(one.output[:num_tokens] - truth).max()),
        }
        for one in entered
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["tune"]:
        return tune.main(arguments[1:])
    if "--device" in arguments or jax.default_backend() != "cpu":
        return kernels_on_device.main(arguments)
    names = [*(row.name for row in IMPLEMENTATIONS), "mapped"]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--implementations", nargs="+", choices=names, default=names)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in BENCH_CASES], help="default: all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(arguments)
    if args.num_layers < 1 or args.repeats < 1:
        parser.error("--num-layers and --repeats must be 1 or more")
    bandwidth, matmul_rate = measured_bandwidth(), measured_matmul_rate()
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for case in BENCH_CASES:
        if args.cases is None or case.name in args.cases:
            note(case.name)
            case = with_options(case, dtype=args.dtype)
            reasons = reasons_to_skip(case)
            skipped += [{"case": case.name, "implementation": name, "because": reasons[name]}
                        for name in args.implementations if name in reasons]  # fmt: skip
            ceiling_ms = ceiling_s(case, bandwidth, matmul_rate) * args.num_layers * 1e3
            for row in race(case, args.implementations, num_layers=args.num_layers, repeats=args.repeats):
                rows.append(row | {"ceiling_ms": ceiling_ms, "fraction_of_ceiling": ceiling_ms / row["ms"]})
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s, matmul {matmul_rate / 1e9:.0f} GFLOP/s, {args.num_layers} layers")
    print(f"{'case':<30}{'implementation':<16}{'ms':>9}{'min':>9}{'ceiling':>9}{'of it':>7}{'compile s':>11}")
    for row in rows:
        print(f"{row['case']:<30}{row['implementation']:<16}{row['ms']:9.1f}{row['ms_min']:9.1f}{row['ceiling_ms']:9.1f}"
              f"{row['fraction_of_ceiling']:7.0%}{row['compile_s']:11.1f}")  # fmt: skip
    for row in skipped:
        print(f"{row['case']:<30}{row['implementation']:<16}not timed: {row['because']}")
    result = {**describe_run("bench.kernels", arguments), "dtype": args.dtype}
    result |= {"device": jax.devices()[0].device_kind, "num_layers": args.num_layers}
    result |= {"read_bytes_per_s": bandwidth, "matmul_flops_per_s": matmul_rate, "rows": rows, "not_timed": skipped}
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
