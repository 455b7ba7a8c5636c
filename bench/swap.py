"""How fast do KV blocks travel to the host and back, by the number of blocks and by how many are staged at once?

Bound by the link between device and host: its ceiling, each way, is one large array sent from device to host memory and
back in the same run. The gather and the scatter at the device's end are bound by its memory: their ceiling is a copy
within the device, read and write counted. On a CPU both memories are one, and a swap is only copies in it. Blocks are
scattered over the cache, swapped out and waited for, then swapped in again; every byte is counted once. Host blocks
have been used before, so that no time goes into making memory.

    python -m bench.swap --shape 110M --num-blocks 4 16 64 256 --staging 4 16 64
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import describe_run, note, save_result, write_result
from bench.shapes import SHAPES
from jaxpaged.core.scheduler_output import BlockCopy
from jaxpaged.runner.host_pool import PinnedPool
from jaxpaged.runner.swap import STAGING_SIZES, BlockMover
from pallas_kernels import KVLayout

CEILING_BYTES = 256 * 2**20
"""Of the arrays that measure the ceilings: more than any cache on the way holds."""


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def measured_ceilings(num_bytes: int, repeats: int) -> dict[str, float]:
    """Bytes a second of a copy within the device (read + written), and of one array to its host and back; the best.

    On a CPU the link is numpy's copy from one array to another.
    """
    device = jax.devices()[0]
    array = jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), device)
    on_host = array.sharding.with_memory_kind(PinnedPool.MEMORY_KIND)
    copied = jax.jit(lambda array: array + 1)
    host = jax.block_until_ready(jax.device_put(array, on_host))
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    copy = (num_bytes, lambda: np.copyto(target, source))
    works: dict[str, tuple[int, Callable[[], Any]]] = {
        "device_copy": (2 * num_bytes, lambda: copied(array)),
        "link_out": (num_bytes, lambda: jax.device_put(array, on_host)),
        "link_in": (num_bytes, lambda: jax.device_put(host, array.sharding)),
    }
    if device.platform == "cpu":
        works |= {"link_out": copy, "link_in": copy}
    return {
        name: counted / min([seconds(work) for _ in range(repeats + 1)][1:]) for name, (counted, work) in works.items()
    }


def make_cache(layout: KVLayout, *, num_layers: int, num_blocks: int) -> Any:
    """A cache of random bits, on the device it is committed to."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(rng.integers(0, 100, leaf.shape, np.int8)).astype(leaf.dtype)

    layers = tuple(jax.tree.map(fill, layout.init(num_blocks)) for _ in range(num_layers))
    return jax.device_put(layers, jax.devices()[0])


def time_swaps(mover: BlockMover, kv: Any, num_blocks: int, repeats: int) -> tuple[Any, dict[str, list[float]]]:
    """The cache, which is donated, and seconds of each swap of `num_blocks` blocks out and in, after one unmeasured."""
    total = jax.tree.leaves(kv)[0].shape[0]
    rng = np.random.default_rng(num_blocks)
    times: dict[str, list[float]] = {"out": [], "in": []}
    for _ in range(repeats + 1):
        device_ids = (rng.permutation(total - 1)[:num_blocks] + 1).tolist()
        out = [BlockCopy(block, i + 1) for i, block in enumerate(device_ids)]
        back = [BlockCopy(copy.target, copy.source) for copy in out]
        start = time.perf_counter()
        mover.swap_out(kv, out)
        mover.finish()
        times["out"].append(time.perf_counter() - start)
        start = time.perf_counter()
        kv = jax.block_until_ready(mover.swap_in(kv, back))
        times["in"].append(time.perf_counter() - start)
    return kv, {name: values[1:] for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110M", help="model whose KV blocks travel")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of keys and values")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--staging", type=int, nargs="+", default=list(STAGING_SIZES), help="blocks staged at once")
    parser.add_argument("--pool", choices=["auto", "numpy", "pinned"], default="auto", help="where host blocks lie")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(arguments)
    if min(args.block_size, args.repeats, *args.num_blocks, *args.staging) < 1:
        parser.error("block size, numbers of blocks, staging sizes and repeats must be 1 or more")

    shape = SHAPES[args.shape]
    layout = KVLayout(
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, block_size=args.block_size, dtype=args.dtype
    )
    kv = make_cache(layout, num_layers=shape.num_layers, num_blocks=2 * max(args.num_blocks) + 1)
    block_bytes = sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(kv))
    ceilings = measured_ceilings(CEILING_BYTES, args.repeats)
    is_pinned = None if args.pool == "auto" else args.pool == "pinned"
    result = {**describe_run("bench.swap", arguments), "jax": jax.__version__, "pool": args.pool}
    result |= {"device": jax.devices()[0].device_kind, "shape": shape.name, "dtype": args.dtype}
    result["block_bytes"] = block_bytes
    rows: list[dict[str, Any]] = []
    for staging in args.staging:
        note(f"{staging} blocks staged at once")
        mover = BlockMover(kv, max(args.num_blocks) + 1, staging_sizes=(staging,), is_pinned=is_pinned)
        start = time.perf_counter()
        kv = jax.block_until_ready(mover.warm_up(kv))
        compile_s = time.perf_counter() - start
        for num_blocks in args.num_blocks:
            kv, times = time_swaps(mover, kv, num_blocks, args.repeats)
            for way, values in times.items():
                rate = num_blocks * block_bytes / statistics.median(values)
                rows.append({
                    "staging": staging, "num_blocks": num_blocks, "way": way, "ms": statistics.median(values) * 1e3,
                    "ms_min": min(values) * 1e3, "bytes_per_s": rate, "compile_s": compile_s,
                })  # fmt: skip
        save_result({**result, "ceilings_bytes_per_s": ceilings, "rows": rows}, args.output)
    after = measured_ceilings(CEILING_BYTES, args.repeats)
    ceilings = {name: max(value, after[name]) for name, value in ceilings.items()}
    for row in rows:
        row["fraction_of_link"] = row["bytes_per_s"] / ceilings[f"link_{row['way']}"]
    found = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in ceilings.items())
    print(f"a block is {block_bytes / 1024:,.0f} KiB; ceilings in GB/s: {found}")
    print(f"{'staged':>7}{'blocks':>8}  {'way':<5}{'ms':>9}{'min':>9}{'GB/s':>8}{'of link':>9}")
    for row in rows:
        print(f"{row['staging']:>7}{row['num_blocks']:>8}  {row['way']:<5}{row['ms']:9.2f}{row['ms_min']:9.2f}"
              f"{row['bytes_per_s'] / 1e9:8.2f}{row['fraction_of_link']:9.0%}")  # fmt: skip
    write_result({**result, "ceilings_bytes_per_s": ceilings, "rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
