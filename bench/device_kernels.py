"""How long does a paged-attention kernel take on an accelerator, against its peers and against the device's ceilings?

Decode is bound by memory bandwidth: its ceiling is every key and value in use, read once, at the copy bandwidth
measured in the same run. Prefill is bound by arithmetic: its ceiling is the causal products at the measured bfloat16
matmul rate. First every case of `pallas_kernels/cases.py` is compared with the reference. Then uniform batches are
timed: one program runs `num_layers` layers, each on a cache of its own and each fed by the one before, and its time is
divided by their number, so that launches from the host hide behind one another as they do in a model. Peers: plain
XLA, JAX's own paged kernels, and `jax.nn.dot_product_attention` on contiguous keys and values (cuDNN where it serves),
which is what paging costs nothing against. Used by `bench.kernels`.
"""

import contextlib
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import note
from pallas_kernels import AttentionCase, KVLayout, lowering_for, make_metadata, misfits, paged_attention
from pallas_kernels.cases import CASES, BatchCase, HeadShape, make_batch, with_options
from pallas_kernels.paged_attention.api import find
from pallas_kernels.paged_attention.metadata import KEY_CHUNK_TOKENS, TILE_SIZE
from pallas_kernels.paged_attention.quantization import is_quantized
from pallas_kernels.paged_attention.tuning import Sizes

DTYPE = "bfloat16"
"""Of queries, and of keys and values where a case does not say that they are stored as bytes."""
TOLERANCE = 1e-2
"""Of the comparison with the reference: bfloat16 rounds the output to 8 bits."""
COPY_BYTES = 2**31
MATMUL_SIZE = 8192
PEERS = ("jax_paged", "contiguous")


@dataclass(frozen=True, kw_only=True)
class DeviceCase:
    """A uniform batch: `batch` sequences of `context` tokens, of which `num_new` are new (1: decodes)."""

    name: str
    heads: HeadShape
    batch: int
    context: int
    num_new: int = 1
    block_size: int = 16
    dtype: str = DTYPE
    """Of the cache."""

    @property
    def num_bytes(self) -> int:
        """Of all keys and values in use, with their scales where they have any."""
        head_bytes = self.heads.head_dim * jnp.dtype(self.dtype).itemsize + (4 if is_quantized(self.dtype) else 0)
        return 2 * self.batch * self.context * self.heads.num_kv_heads * head_bytes

    @property
    def flops(self) -> int:
        """Of causal attention: two products a query and key."""
        seen = self.num_new * self.context - self.num_new * (self.num_new - 1) // 2
        return 4 * self.batch * seen * self.heads.num_q_heads * self.heads.head_dim


def _decode(batch: int, context: int, heads: HeadShape, block_size: int = 16, dtype: str = DTYPE) -> DeviceCase:
    group = heads.num_q_heads // heads.num_kv_heads
    name = f"decode {batch} x {context}, group {group}, block {block_size}" + told(dtype)
    return DeviceCase(name=name, heads=heads, batch=batch, context=context, block_size=block_size, dtype=dtype)


def _prefill(batch: int, context: int, num_new: int, dtype: str = DTYPE) -> DeviceCase:
    name = f"prefill {batch} x {num_new}" + ("" if num_new == context else f" behind {context - num_new}") + told(dtype)
    return DeviceCase(name=name, heads=GROUP_4, batch=batch, context=context, num_new=num_new, dtype=dtype)


def told(dtype: str) -> str:
    """A dtype in a name, where it is not the usual one."""
    return "" if dtype == DTYPE else f", {dtype}"


GROUP_1, GROUP_4, GROUP_8 = (HeadShape(*shape) for shape in ((32, 32, 128), (32, 8, 128), (64, 8, 128)))
DEVICE_CASES = (
    *(_decode(1, context, GROUP_4) for context in (512, 4096, 32_768, 131_072)),
    *(_decode(8, context, GROUP_4) for context in (512, 4096, 32_768)),
    *(_decode(32, context, GROUP_4) for context in (512, 4096, 16_384)),
    *(_decode(128, context, GROUP_4) for context in (512, 4096)),
    *(_decode(256, context, GROUP_4) for context in (512, 4096)),
    *(_decode(32, 4096, heads) for heads in (GROUP_1, GROUP_8)),
    *(_decode(32, 4096, GROUP_4, block_size) for block_size in (32, 64)),
    *(_prefill(1, length, length) for length in (512, 2048, 8192)),
    _prefill(4, 2048, 2048),
    _prefill(1, 8192, 512),
    *(_decode(batch, context, GROUP_4, dtype="int8") for batch, context in ((1, 32_768), (32, 4096), (128, 4096))),
    _decode(32, 4096, GROUP_4, 64, "int8"),
    _decode(32, 4096, GROUP_4, dtype="float8_e4m3fn"),
    _prefill(1, 2048, 2048, "int8"),
)
"""What is timed: the heads of Llama-3.1-8B, of its 70B relative (8 queries a head) and of multi-head attention; of the
first also some caches of bytes."""
SMALL_CASES = (
    DeviceCase(name="decode 3 x 40", heads=HeadShape(4, 2, 64), batch=3, context=40),
    DeviceCase(name="decode 3 x 40, int8", heads=HeadShape(4, 2, 64), batch=3, context=40, dtype="int8"),
    DeviceCase(name="prefill 1 x 20", heads=HeadShape(4, 2, 64), batch=1, context=20, num_new=20),
)
"""For a machine without an accelerator: they prove that the bench runs, and their times say nothing."""


@contextlib.contextmanager
def interpreting(name: str) -> Iterator[None]:
    """On a CPU: a context in which the Pallas kernels of another device are interpreted."""
    from jax.experimental.pallas import tpu as pltpu  # noqa: PLC0415  Pallas takes long to import

    if name == "mosaic_tpu" and jax.default_backend() == "cpu":
        with lowering_for("tpu", "TPU v5 lite"), pltpu.force_tpu_interpret_mode():
            yield
    else:
        yield


def copy_bandwidth(*, num_bytes: int = COPY_BYTES, repeats: int = 8) -> float:
    """Bytes a second that the device reads and writes when it copies an array; the best of repeats."""
    array = jnp.ones(num_bytes // 4, jnp.uint32)
    add = jax.jit(lambda array: array + jnp.uint32(1))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        add(array).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * array.nbytes / best


def matmul_rate(*, size: int = MATMUL_SIZE, repeats: int = 8) -> float:
    """Operations a second of a square bfloat16 product with float32 sums; the best of repeats."""
    left = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.bfloat16))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        multiply(left, left).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def attend_with(name: str, sizes: Sizes | None) -> Callable[..., tuple[Any, Any]]:
    """The op by one implementation; `sizes` None takes what it takes by itself, else they and defaults are taken."""
    if sizes is None:
        return partial(paged_attention, implementation=name)
    module = importlib.import_module(f"pallas_kernels.paged_attention.{name}")
    launch = replace(module.default_launch(), **sizes.launch)
    return partial(find(name).attend, window=None, soft_cap=None, sinks=None, launch=launch)


def largest_error(case: BatchCase, name: str, sizes: Sizes | None = None) -> float:
    """Of an implementation against the reference, which runs on the host's CPU in float32; NaN counts as infinite."""
    case = with_options(case, dtype=checked_dtype(case), **({} if sizes is None else sizes.tiles))

    def outputs(implementation: str) -> np.ndarray:
        batch = make_batch(case, implementation)
        op = attend_with(implementation, sizes if implementation == name else None)
        attend = jax.jit(partial(op, **batch.options))
        output, _ = attend(batch.query, batch.key, batch.value, batch.kv, batch.metadata)
        return np.asarray(output[: batch.num_tokens].astype(jnp.float32))

    with interpreting(name):
        found = outputs(name)
    with jax.default_device(jax.devices("cpu")[0]):
        truth = outputs("reference")
    return float(np.nan_to_num(np.abs(found - truth), nan=np.inf).max())


def checked_dtype(case: BatchCase) -> str:
    """Caches of bytes are checked as they are, all others in the dtype that is timed."""
    return case.dtype if is_quantized(case.dtype) else DTYPE


def attention_case(heads: HeadShape, block_size: int, dtype: str = DTYPE) -> AttentionCase:
    """The case as the rule that picks sees it."""
    return AttentionCase(
        num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, block_size=block_size, dtype=dtype,
        num_q_heads=heads.num_q_heads,
    )  # fmt: skip


def check(names: Sequence[str], cases: Sequence[BatchCase] = CASES) -> dict[str, float]:
    """The largest error of each implementation over the cases it serves; ValueError for one that is too large."""
    errors: dict[str, float] = {}
    for name in names:
        row = find(name)
        for case in cases:
            with interpreting(name):
                reasons = misfits(row, attention_case(case.heads, case.block_size, checked_dtype(case)))
            if not reasons:
                error = largest_error(case, name)
                if error > TOLERANCE:
                    fault = f"{name} is wrong by {error:.3g} on the case {case.name!r}"
                    raise ValueError(f"{fault}: its times mean nothing")
                errors[name] = max(errors.get(name, 0.0), error)
    return errors


def _random_leaf(shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """Normal numbers, as bfloat16, as the bits of one or two of them in a word, or as bytes; scales are like them."""
    if shape.dtype == jnp.int8:
        return jax.random.randint(key, shape.shape, -127, 128, jnp.int8)
    if shape.dtype.itemsize == 1:
        numbers = jax.random.normal(key, shape.shape, jnp.bfloat16).astype(jnp.float8_e4m3fn)
        return jax.lax.bitcast_convert_type(numbers, shape.dtype)
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.random.normal(key, shape.shape, shape.dtype)
    num_halves = shape.dtype.itemsize // 2
    halves = jax.random.normal(key, (*shape.shape, num_halves), jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(halves, shape.dtype)
    return bits[..., 0] if bits.ndim > len(shape.shape) else bits


@dataclass(frozen=True)
class Layers:
    """A program of some layers, and what it is called with."""

    run: Callable[..., tuple[Any, Any]]
    """(caches, query, *rest) -> (caches, output); the caches are donated."""
    caches: Any
    arguments: tuple[Any, ...]


def _stack(layer: Callable[..., tuple[Any, Any]], num_layers: int) -> Callable[..., tuple[Any, Any]]:
    """Layers on caches of their own; the output of one is the query of the next, so that none is left out."""
    layer = jax.jit(layer)  # traced and lowered once

    def run(caches: list[Any], query: jax.Array, *rest: Any) -> tuple[list[Any], jax.Array]:
        written = []
        for index in range(num_layers):
            query, cache = layer(query, caches[index], *rest)
            written.append(cache)
        return written, query

    return jax.jit(run, donate_argnums=0)


def _queries(case: DeviceCase) -> tuple[jax.Array, jax.Array]:
    """Query [tokens, q_heads, head_dim] and new keys, used as values too, [tokens, kv_heads, head_dim]."""
    heads, num_tokens = case.heads, case.batch * case.num_new
    query = jax.random.normal(jax.random.key(1), (num_tokens, heads.num_q_heads, heads.head_dim), jnp.bfloat16)
    key = jax.random.normal(jax.random.key(2), (num_tokens, heads.num_kv_heads, heads.head_dim), jnp.bfloat16)
    return query, key


def _tables(case: DeviceCase) -> tuple[np.ndarray, int]:
    """Block tables [batch, blocks], scattered over the cache, and its number of blocks; block 0 is nobody's."""
    per_sequence = -(-case.context // case.block_size)
    blocks = np.random.default_rng(0).permutation(case.batch * per_sequence) + 1
    return blocks.astype(np.int32).reshape(case.batch, per_sequence), case.batch * per_sequence + 1


def ours(name: str, case: DeviceCase, num_layers: int) -> Layers:
    """An implementation of this package."""
    run, arguments = our_program(name, case, num_layers, None)
    return Layers(run, our_caches(name, case, num_layers), arguments)


def our_caches(name: str, case: DeviceCase, num_layers: int) -> list[Any]:
    """A cache of random keys and values for each layer."""
    _, num_blocks = _tables(case)
    layout = KVLayout(
        num_kv_heads=case.heads.num_kv_heads, head_dim=case.heads.head_dim, block_size=case.block_size,
        dtype=case.dtype, implementation=name,
    )  # fmt: skip
    leaves, tree = jax.tree.flatten(layout.shapes(num_blocks))
    fill = jax.jit(lambda key: [_random_leaf(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)])
    return [jax.tree.unflatten(tree, fill(jax.random.key(index))) for index in range(num_layers)]


def our_program(
    name: str, case: DeviceCase, num_layers: int, sizes: Sizes | None
) -> tuple[Callable[..., tuple[Any, Any]], tuple[Any, ...]]:
    """What is run on `our_caches`, and what it is called with behind them; `sizes` as in `attend_with`."""
    tables, _ = _tables(case)
    tiles = {"tile_size": TILE_SIZE, "key_chunk_tokens": max(KEY_CHUNK_TOKENS, case.block_size)}
    metadata = make_metadata(
        block_tables=tables, context_lens=[case.context] * case.batch, query_lens=[case.num_new] * case.batch,
        block_size=case.block_size, **(tiles if sizes is None else tiles | sizes.tiles),
    )  # fmt: skip
    attend = attend_with(name, sizes)

    def layer(query: jax.Array, kv: Any, key: jax.Array, metadata: Any) -> tuple[Any, Any]:
        return attend(query, key, key, kv, metadata, scale=case.heads.head_dim**-0.5)

    query, key = _queries(case)
    return _stack(layer, num_layers), (query, key, metadata)


def contiguous(case: DeviceCase, num_layers: int) -> Layers:
    """`jax.nn.dot_product_attention` on keys and values that lie as one array; nothing is written."""
    heads = case.heads
    if case.num_new not in (1, case.context):
        raise NotImplementedError("its causal mask begins at the first key: whole prompts and decodes only")
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    shape = (2, case.batch, case.context, heads.num_kv_heads, heads.head_dim)
    caches = [jax.random.normal(jax.random.key(index), shape, jnp.bfloat16) for index in range(num_layers)]

    def layer(query: jax.Array, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        attended = jax.nn.dot_product_attention(
            query.reshape(case.batch, case.num_new, *query.shape[1:]), kv[0], kv[1],
            is_causal=case.num_new > 1, implementation=implementation,
        )  # fmt: skip
        return attended.reshape(query.shape), kv

    return Layers(_stack(layer, num_layers), caches, (_queries(case)[0],))


def jax_paged(case: DeviceCase, num_layers: int) -> Layers:
    """JAX's own kernel: for GPUs one in Triton for decodes, for TPUs a ragged one; new keys are not written."""
    heads = case.heads
    tables, num_blocks = _tables(case)
    lengths = jnp.full(case.batch, case.context, jnp.int32)
    if jax.default_backend() == "tpu":
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (  # noqa: PLC0415
            ragged_paged_attention,
        )

        shape: tuple[int, ...] = (num_blocks, case.block_size, 2 * heads.num_kv_heads, heads.head_dim)
        starts = jnp.arange(case.batch + 1, dtype=jnp.int32) * case.num_new
        rest = (lengths, jnp.asarray(tables), starts, jnp.array([case.batch], jnp.int32))

        def layer(query: jax.Array, kv: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
            return ragged_paged_attention(query, kv, *rest, sm_scale=heads.head_dim**-0.5), kv
    else:
        if case.num_new != 1:
            raise NotImplementedError("serves decodes alone")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as attend  # noqa: PLC0415

        shape = (2, heads.num_kv_heads, num_blocks, case.block_size, heads.head_dim)
        rest = (jnp.asarray(tables), lengths)
        splits = next(splits for splits in (16, 8, 4, 2, 1) if tables.shape[1] % splits == 0)
        pages = next(pages for pages in (8, 4, 2, 1) if tables.shape[1] // splits % pages == 0)
        is_interpreted = jax.default_backend() == "cpu"

        def layer(query: jax.Array, kv: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
            attended = attend(
                query, kv[0], kv[1], *rest, k_splits=splits, pages_per_compute_block=pages, interpret=is_interpreted
            )
            return attended, kv

    caches = [jax.random.normal(jax.random.key(index), shape, jnp.bfloat16) for index in range(num_layers)]
    return Layers(_stack(layer, num_layers), caches, (_queries(case)[0], *rest))


def times_ms(layers: Layers, num_layers: int, repeats: int) -> tuple[list[float], float]:
    """Milliseconds a layer in each repeat, and the seconds that compiling took."""
    start = time.perf_counter()
    compiled = layers.run.lower(layers.caches, *layers.arguments).compile()
    compile_s = time.perf_counter() - start
    caches, times = layers.caches, []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        caches, output = compiled(caches, *layers.arguments)
        output.block_until_ready()
        times.append((time.perf_counter() - start) / num_layers * 1e3)
    return times[1:], compile_s


def race(
    case: DeviceCase, names: Sequence[str], *, num_layers: int, repeats: int
) -> tuple[dict[str, tuple[list[float], float]], dict[str, str]]:
    """Times and compile seconds by name, and why others were not timed. A kernel of ours that fails is an error."""
    timed, skipped = {}, {}
    for name in names:
        if name in PEERS:
            make = {"contiguous": contiguous, "jax_paged": jax_paged}[name]
            try:
                if case.dtype != DTYPE:
                    raise NotImplementedError(f"is given keys and values as {DTYPE} alone")
                with jax.numpy_dtype_promotion("standard"):  # which the code of others counts on
                    timed[name] = times_ms(make(case, num_layers), num_layers, repeats)
            except Exception as error:  # whatever a peer raises is why it has no time
                skipped[name] = (str(error) or type(error).__name__).splitlines()[0][:200]
        else:
            row = find(name)
            with interpreting(name):
                reasons = misfits(row, attention_case(case.heads, case.block_size, case.dtype))
                if reasons:
                    skipped[name] = "; ".join(reasons)
                else:
                    timed[name] = times_ms(ours(name, case, num_layers), num_layers, repeats)
    return timed, skipped


def measure(
    names: Sequence[str], cases: Sequence[DeviceCase], *, num_layers: int, repeats: int, is_small: bool
) -> dict[str, Any]:
    """Errors, ceilings, times, as a table and as what it returns. `is_small` measures ceilings on little data."""
    errors = check([name for name in names if name not in PEERS], CASES[:2] if is_small else CASES)
    for name, error in errors.items():
        print(f"{name:<12} largest error {error:.2g} over the cases it serves")
    bandwidth = copy_bandwidth(num_bytes=2**26 if is_small else COPY_BYTES)
    rate = matmul_rate(size=512 if is_small else MATMUL_SIZE)
    print(f"{jax.devices()[0].device_kind}: copy {bandwidth / 1e9:.0f} GB/s, bfloat16 matmul {rate / 1e12:.2f} TFLOP/s")
    print(f"{'case':<40}{'implementation':<16}{'ms':>10}{'min':>10}{'ceiling':>10}{'of it':>7}{'compile s':>11}")
    rows, not_timed = [], []
    for case in cases:
        note(case.name)
        timed, skipped = race(case, names, num_layers=num_layers, repeats=repeats)
        ceiling_ms = max(case.num_bytes / bandwidth, case.flops / rate) * 1e3
        for name, (times, compile_s) in timed.items():
            median = statistics.median(times)
            print(
                f"{case.name:<40}{name:<16}{median:10.3f}{min(times):10.3f}{ceiling_ms:10.3f}"
                f"{ceiling_ms / median:7.0%}{compile_s:11.1f}", flush=True,
            )  # fmt: skip
            rows.append({
                "case": case.name, "dtype": case.dtype, "implementation": name, "ms": median, "ms_min": min(times),
                "ceiling_ms": ceiling_ms, "fraction_of_ceiling": ceiling_ms / median, "compile_s": compile_s,
            })  # fmt: skip
        for name, reason in skipped.items():
            print(f"{case.name:<40}{name:<16}not timed: {reason}", flush=True)
            not_timed.append({"case": case.name, "implementation": name, "because": reason})
    return {
        "largest_errors": errors, "copy_bytes_per_s": bandwidth, "matmul_flops_per_s": rate,
        "num_layers": num_layers, "is_small": is_small, "rows": rows, "not_timed": not_timed,
    }  # fmt: skip
