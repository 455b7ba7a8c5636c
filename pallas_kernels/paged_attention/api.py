"""The op, its checks, the table of its implementations, and the one rule that picks one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arguments import check_count, check_floats, dtype_name, is_number
from pallas_kernels.paged_attention import (
    mosaic_gpu_layout,
    mosaic_tpu_layout,
    native_cpu,
    quantization,
    reference,
    triton_gpu_layout,
    xla,
)
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.platform import target_compute_capability, target_platform


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """What the choice of an implementation depends on; all of it is known before anything is compiled."""

    platform: str = field(default_factory=target_platform)
    """cpu, gpu, tpu; like the next, that of the device that is traced for, if not given."""
    compute_capability: str | None = field(default_factory=target_compute_capability)
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    """Logical dtype of the cache."""
    num_q_heads: int | None = None
    """None where it is not known yet, as for a layout."""
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    def __post_init__(self) -> None:
        """ValueError for what no implementation could be asked about."""
        for name in ("num_kv_heads", "head_dim", "block_size"):
            check_count(name, getattr(self, name))
        dtype_name(self.dtype)
        if self.num_q_heads is not None:
            check_count("num_q_heads", self.num_q_heads)
            if self.num_q_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_q_heads={self.num_q_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
                )

    def __str__(self) -> str:
        """The case in words, for errors."""
        query = "" if self.num_q_heads is None else f"{self.num_q_heads} query heads on "
        options = [f"window {self.window}"] if self.window is not None else []
        options += [f"soft cap {self.soft_cap}"] if self.soft_cap is not None else []
        options += ["sinks"] if self.has_sinks else []
        where = self.platform if self.compute_capability is None else f"{self.platform} {self.compute_capability}"
        return (
            f"{query}{self.num_kv_heads} key-value heads of {self.head_dim} in {self.dtype}, blocks of "
            f"{self.block_size} tokens{''.join(', ' + option for option in options)}, on {where}"
        )


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One row of the table: how a backend stores a layer's keys and values, and how it attends to them."""

    name: str
    summary: str
    platforms: tuple[str, ...]
    """Where it runs."""
    dtypes: tuple[str, ...]
    """Logical dtypes of keys and values that it keeps; how they are stored, those of `quantization` with scales, is its
    own business."""
    misfits: Callable[[AttentionCase], list[str]]
    """Every reason, beside platform and dtype, why a case is not served; empty when it is."""
    cache_shapes: Callable[[int, int, int, int, jnp.dtype], Any]
    """(num_blocks, block_size, num_kv_heads, head_dim, dtype) -> tree of jax.ShapeDtypeStruct."""
    pack: Callable[[Any, Any], Any]
    """Keys and values [blocks, block_size, kv_heads, head_dim] (numpy, or Quantized of it) -> layer cache (numpy)."""
    unpack: Callable[[Any, int, int], tuple[Any, Any]]
    """(layer cache, num_kv_heads, head_dim) -> keys and values: the way back."""
    attend: Callable[..., tuple[Any, Any]]
    """`paged_attention` without its checks; every keyword is given."""


def _no_misfits(case: AttentionCase) -> list[str]:
    return []


def _native_misfits(case: AttentionCase) -> list[str]:
    reason = native_cpu.LIBRARY.why_unavailable() if case.platform == "cpu" else None
    return [] if reason is None else [reason]


def _mosaic_tpu_misfits(case: AttentionCase) -> list[str]:
    return mosaic_tpu_layout.misfits(case.num_kv_heads, case.head_dim, case.block_size, case.dtype)


def _attend_mosaic_tpu(*arrays: Any, **options: Any) -> tuple[Any, Any]:
    from pallas_kernels.paged_attention import mosaic_tpu  # noqa: PLC0415  Pallas takes 0.2 s to import

    return mosaic_tpu.attend(*arrays, **options)


def _mosaic_gpu_misfits(case: AttentionCase) -> list[str]:
    capability = case.compute_capability if case.platform in GPU_PLATFORMS else mosaic_gpu_layout.COMPUTE_CAPABILITY
    return mosaic_gpu_layout.misfits(
        case.num_kv_heads, case.num_q_heads, case.head_dim, case.block_size, case.dtype, capability
    )


def _attend_mosaic_gpu(*arrays: Any, **options: Any) -> tuple[Any, Any]:
    from pallas_kernels.paged_attention import mosaic_gpu  # noqa: PLC0415  as above

    return mosaic_gpu.attend(*arrays, **options)


def _triton_gpu_misfits(case: AttentionCase) -> list[str]:
    # on another platform that it is another is reason enough
    capability = case.compute_capability if case.platform in GPU_PLATFORMS else triton_gpu_layout.MIN_COMPUTE_CAPABILITY
    return triton_gpu_layout.misfits(case.head_dim, capability)


def _attend_triton_gpu(*arrays: Any, **options: Any) -> tuple[Any, Any]:
    from pallas_kernels.paged_attention import triton_gpu  # noqa: PLC0415  as above

    return triton_gpu.attend(*arrays, **options)


GPU_PLATFORMS = ("gpu", "cuda")
QUANTIZED = tuple(quantization.LARGEST)

# Best first; a new backend is one file and one row here.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        name="mosaic_tpu",
        summary="Pallas kernel for TPU, copies block by block while it computes; default on TPU",
        platforms=("tpu",),
        dtypes=("float32", "bfloat16", *QUANTIZED),
        misfits=_mosaic_tpu_misfits,
        cache_shapes=mosaic_tpu_layout.cache_shapes,
        pack=mosaic_tpu_layout.pack,
        unpack=mosaic_tpu_layout.unpack,
        attend=_attend_mosaic_tpu,
    ),
    Implementation(
        name="mosaic_gpu",
        summary="Pallas kernels for Hopper GPUs: bulk copies, matrix instructions, split decodes; default there",
        platforms=GPU_PLATFORMS,
        dtypes=("bfloat16", *QUANTIZED),
        misfits=_mosaic_gpu_misfits,
        cache_shapes=mosaic_gpu_layout.cache_shapes,
        pack=mosaic_gpu_layout.pack,
        unpack=mosaic_gpu_layout.unpack,
        attend=_attend_mosaic_gpu,
    ),
    Implementation(
        name="triton_gpu",
        summary="Pallas kernels for CUDA GPUs from Ampere on, by Triton, which jax has deprecated; after mosaic_gpu",
        platforms=GPU_PLATFORMS,
        dtypes=("float32", "bfloat16", *QUANTIZED),
        misfits=_triton_gpu_misfits,
        # one layout for both, so that either reads a cache made for the other
        cache_shapes=mosaic_gpu_layout.cache_shapes,
        pack=mosaic_gpu_layout.pack,
        unpack=mosaic_gpu_layout.unpack,
        attend=_attend_triton_gpu,
    ),
    Implementation(
        name="native_cpu",
        summary="C++ compiled here at first use, threads of XLA; default on CPU where there is a compiler",
        platforms=("cpu",),
        dtypes=("float32", "bfloat16"),
        misfits=_native_misfits,
        cache_shapes=native_cpu.cache_shapes,
        pack=native_cpu.pack,
        unpack=native_cpu.unpack,
        attend=native_cpu.attend,
    ),
    Implementation(
        name="xla",
        summary="plain XLA, loops over tiles with dynamic length; serves where no other row does",
        platforms=("cpu", "gpu", "cuda", "rocm", "tpu"),
        dtypes=("float32", "bfloat16", *QUANTIZED),
        misfits=_no_misfits,
        cache_shapes=xla.cache_shapes,
        pack=xla.pack,
        unpack=xla.unpack,
        attend=xla.attend,
    ),
    Implementation(
        name="reference",
        summary="one dense score matrix per token: the truth for tests, slow",
        platforms=("cpu", "gpu", "cuda", "rocm", "tpu"),
        dtypes=("float32", "bfloat16", *QUANTIZED),
        misfits=_no_misfits,
        cache_shapes=reference.cache_shapes,
        pack=reference.pack,
        unpack=reference.unpack,
        attend=reference.attend,
    ),
)


def find(name: str) -> Implementation:
    """The row called `name`; ValueError with the known names otherwise."""
    for row in IMPLEMENTATIONS:
        if row.name == name:
            return row
    known = ", ".join(repr(row.name) for row in IMPLEMENTATIONS)
    raise ValueError(f"attention implementation {name!r} is unknown: use one of {known}, or None to have it picked")


def misfits(row: Implementation, case: AttentionCase) -> list[str]:
    """Every reason why `row` does not serve `case`; empty when it does."""
    reasons = [] if case.platform in row.platforms else [f"runs on {', '.join(row.platforms)}, not on {case.platform}"]
    if case.dtype not in row.dtypes:
        *others, last = row.dtypes
        kept = f"{', '.join(others)} or {last}" if others else last
        reasons.append(f"keeps keys and values as {kept}, not {case.dtype}")
    return reasons + row.misfits(case)


def pick(case: AttentionCase, implementation: str | None = None) -> Implementation:
    """The first row of IMPLEMENTATIONS that serves `case`, or the one asked for.

    Raises ValueError, with every reason, when the one asked for (or each of them) does not serve it.
    """
    return _pick_among(IMPLEMENTATIONS if implementation is None else (find(implementation),), case)


def _pick_among(rows: Sequence[Implementation], case: AttentionCase) -> Implementation:
    for row in rows:
        if not misfits(row, case):
            return row
    told = "; ".join(f"{row.name}: {', '.join(misfits(row, case))}" for row in rows)
    fitting = [row.name for row in IMPLEMENTATIONS if not misfits(row, case)]
    if len(rows) == 1 and fitting:
        raise ValueError(
            f"attention implementation {rows[0].name!r} does not serve {case}; use {', '.join(fitting)}, or leave "
            f"it out (None) to have the best picked; {told}"
        )
    raise ValueError(f"no attention implementation serves {case}: {told}")


def why_no_saving(row: Implementation, case: AttentionCase) -> str | None:
    """Why a cache of bytes is not smaller in this implementation than one of bfloat16; None where it is, or has no
    bytes: rows have scales beside, and both may be padded."""
    if case.dtype not in QUANTIZED:
        return None
    taken, plain = (
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) // case.block_size
        for shapes in (
            row.cache_shapes(1, case.block_size, case.num_kv_heads, case.head_dim, jnp.dtype(dtype))
            for dtype in (case.dtype, "bfloat16")
        )
    )
    if taken < plain:
        return None
    heads = f"{case.num_kv_heads} key-value heads of {case.head_dim}"
    return (
        f"a cache of {case.dtype} saves nothing with {heads} in {row.name}: a token takes {taken} bytes a layer, in "
        f"bfloat16 {plain}; use bfloat16, which rounds less"
    )


def explain(case: AttentionCase | None = None) -> str:
    """A line per implementation: picked, usable, or every reason why not. Without a case: this machine, any shape.

    A line more for one that is picked and whose cache of bytes saves nothing.
    """
    if case is None:
        case = AttentionCase(num_kv_heads=8, head_dim=128, block_size=16, dtype="float32")
    lines, is_picked = [], False
    for row in IMPLEMENTATIONS:
        reasons = misfits(row, case)
        state = f"no: {'; '.join(reasons)}" if reasons else "usable" if is_picked else "picked"
        lines.append(f"{row.name:<12} {state:<8} ({row.summary})")
        if state == "picked" and (warning := why_no_saving(row, case)) is not None:
            lines.append(f"{'':<12} {warning}")
        is_picked |= not reasons
    return "\n".join(lines)


def cache_block_size(row: Implementation, kv: Any, num_kv_heads: int, head_dim: int) -> tuple[int, str] | None:
    """(block size, logical dtype) of a layer cache made for `row`; None when it was made for another or is none."""
    tree: Any
    leaves, tree = jax.tree.flatten(kv)
    if not leaves or any(not hasattr(leaf, "shape") or leaf.ndim < 2 for leaf in leaves):
        return None
    given = [(leaf.shape, leaf.dtype) for leaf in leaves]
    for dtype in row.dtypes:
        for block_size in dict.fromkeys(leaves[0].shape[1:]):
            expected = row.cache_shapes(leaves[0].shape[0], block_size, num_kv_heads, head_dim, jnp.dtype(dtype))
            expected_leaves, expected_tree = jax.tree.flatten(expected)
            if tree == expected_tree and given == [(leaf.shape, leaf.dtype) for leaf in expected_leaves]:
                return block_size, dtype
    return None


def _check_arrays(query: Array, key: Array, value: Array, metadata: AttentionMetadata, sinks: Array | None) -> None:
    """ValueError where they are no arrays of floating-point numbers, or shapes do not agree with one another."""
    for name, array, heads in (("query", query, "q_heads"), ("key", key, "kv_heads"), ("value", value, "kv_heads")):
        check_floats(name, array, f"tokens {heads} head_dim")
    if key.shape != value.shape:
        raise ValueError(f"key {key.shape} and value {value.shape} must have equal shapes")
    num_q_heads, num_kv_heads = query.shape[1], key.shape[1]
    is_multiple = num_q_heads > 0 and num_kv_heads > 0 and num_q_heads % num_kv_heads == 0
    if key.shape[0] != query.shape[0] or key.shape[2] != query.shape[2] or not is_multiple:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must have equal tokens and head_dim, and a number of query heads "
            "that is a multiple of the number of key-value heads"
        )
    if sinks is not None:
        check_floats("sinks", sinks, "q_heads")
        if sinks.shape != (num_q_heads,):
            raise ValueError(f"sinks {sinks.shape} must have one entry per query head: ({num_q_heads},)")
    if not isinstance(metadata, AttentionMetadata):
        raise ValueError(f"metadata is a {type(metadata).__name__}: make_metadata makes an AttentionMetadata")
    # of what is no array or has no axes, 0: it is refused below
    num_seqs, num_tiles, num_columns = (
        (0, *getattr(array, "shape", ()))[-1]
        for array in (metadata.context_lens, metadata.tile_sequences, metadata.block_tables)
    )
    expected = {
        "context_lens": (num_seqs,),
        "block_tables": (num_seqs, num_columns),
        "query_starts": (num_seqs + 1,),
        "slot_mapping": (query.shape[0],),
        "num_decodes": (),
        "tile_sequences": (num_tiles,),
        "tile_starts": (num_tiles,),
        "tile_lens": (num_tiles,),
        "num_tiles": (),
    }
    for name, shape in expected.items():
        array = getattr(metadata, name)
        found = f"{getattr(array, 'dtype', type(array).__name__)}{getattr(array, 'shape', '')}"
        if found != f"int32{shape}":
            raise ValueError(f"metadata.{name} is {found}: it must be int32{shape}")


def _check_options(scale: float, window: int | None, soft_cap: float | None, metadata: AttentionMetadata) -> None:
    if not is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number; head_dim ** -0.5 is usual")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window={window!r} must be a whole number of tokens, 1 or more, the query's own included; None for no "
            "window"
        )
    if soft_cap is not None and (not is_number(soft_cap) or not 0 < soft_cap < math.inf):
        raise ValueError(f"soft_cap={soft_cap!r} must be a finite number above 0; None for no cap")
    for name in ("tile_size", "key_chunk_tokens"):
        check_count(f"metadata.{name}", getattr(metadata, name))


def _no_cache(kv: Any, rows: Sequence[Implementation], num_kv_heads: int, head_dim: int) -> str:
    """Why `kv` is not attended to: nothing that any of `rows` would make."""

    def told(leaf: Any) -> str:
        return f"{leaf.dtype}{leaf.shape}" if hasattr(leaf, "shape") else repr(leaf)

    named = f", implementation={rows[0].name!r}" if len(rows) == 1 else ""
    platform = target_platform()
    is_elsewhere = len(rows) == 1 and platform not in rows[0].platforms
    elsewhere = f"; {rows[0].name} runs on {', '.join(rows[0].platforms)}, not on {platform}" if is_elsewhere else ""
    return (
        f"kv {jax.tree.map(told, kv)} is no layer cache of {' or '.join(row.name for row in rows)} for {num_kv_heads} "
        f"heads of {head_dim}: make it with KVLayout(num_kv_heads={num_kv_heads}, head_dim={head_dim}, ...{named})"
        f".init(num_blocks){elsewhere}"
    )


def paged_attention(
    query: Float[Array, "tokens q_heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    kv: Any,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "q_heads"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Any]:
    """Write the new keys and values into their slots, then attend each token to its own sequence up to itself.

    `kv` is a layer cache of `KVLayout`; donate it (in the enclosing jit) to have it updated in place. Scores are
    `soft_cap * tanh(q k scale / soft_cap)`; with `window` a token sees itself and the window - 1 tokens before it; a
    sink is one more score of its head that takes weight and brings no value. All arithmetic is float32, the output
    has the query's dtype; rows of padding tokens are 0. Without `implementation`, the first one is used that `kv` was
    laid out for and that serves the case. Raises ValueError for shapes, options and layouts that do not fit.
    """
    _check_arrays(query, key, value, metadata, sinks)
    _check_options(scale, window, soft_cap, metadata)
    num_kv_heads, head_dim = key.shape[1:]
    rows = IMPLEMENTATIONS if implementation is None else (find(implementation),)
    laid_out_for = [(row, found) for row in rows if (found := cache_block_size(row, kv, num_kv_heads, head_dim))]
    if not laid_out_for:
        raise ValueError(_no_cache(kv, rows, num_kv_heads, head_dim))
    block_size, dtype = laid_out_for[0][1]
    if metadata.key_chunk_tokens % block_size:
        raise ValueError(
            f"key_chunk_tokens={metadata.key_chunk_tokens} must be a multiple of the block size {block_size}"
        )
    case = AttentionCase(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        num_q_heads=query.shape[1],
        window=window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
    )
    return _pick_among([row for row, _ in laid_out_for], case).attend(
        query, key, value, kv, metadata, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
    )
