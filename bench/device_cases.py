"""What is timed on an accelerator, what has to be right first, and the goals that times are held against."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from pallas_kernels.cases import CASES, BatchCase, HeadShape
from pallas_kernels.paged_attention.metadata import KEY_CHUNK_TOKENS, TILE_SIZE
from pallas_kernels.paged_attention.quantization import is_quantized

DTYPE = "bfloat16"
"""Of queries, and of keys and values where a case does not say that they are stored as bytes."""


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




DECODES = ((8200, 1), (2100, 1), (700, 1), (65, 1), (1, 1))
"""Of some items each, and around the ends of blocks."""
CHUNKS = ((700, 600), (64, 64), (97, 40), (70, 3))
SMALL_SEQUENCES = ((40, 1), (1, 1), (20, 20))


def check_of(case: DeviceCase, sequences: tuple[tuple[int, int], ...] = DECODES + CHUNKS) -> BatchCase:
    """A ragged batch of the heads, blocks and dtype of `case`, which must be right for its times to mean anything."""
    heads = case.heads
    shape = f"{heads.num_q_heads} heads on {heads.num_kv_heads} of {heads.head_dim}"
    return BatchCase(
        name=f"ragged, {shape}, block {case.block_size}, {case.dtype}", heads=heads, sequences=sequences,
        block_size=case.block_size, dtype=case.dtype, input_dtype=DTYPE, tile_size=TILE_SIZE,
        key_chunk_tokens=max(KEY_CHUNK_TOKENS, case.block_size),
    )  # fmt: skip


def as_checked(case: BatchCase) -> BatchCase:
    """The case in the dtypes that are timed: caches of bytes stay as they are."""
    return replace(case, dtype=case.dtype if is_quantized(case.dtype) else DTYPE, input_dtype=DTYPE)


def checks_for(cases: tuple[DeviceCase, ...], is_small: bool = False) -> tuple[BatchCase, ...]:
    """What has to be right: batches of the shapes that are timed, and all of `pallas_kernels/cases.py`."""
    sequences = SMALL_SEQUENCES if is_small else DECODES + CHUNKS
    of_shapes = dict.fromkeys(check_of(case, sequences) for case in cases)
    return (*of_shapes, *(as_checked(case) for case in (CASES[:1] if is_small else CASES)))


# GOALS

DECODE_GOAL, PREFILL_GOAL = 0.85, 0.60
"""The least part of the copy bandwidth, and of the bfloat16 matmul rate; set for an H200."""
CONTIGUOUS_GOAL = 1.1
"""The most times the time of contiguous attention."""


def has_goal(case: DeviceCase) -> bool:
    """Whether a goal is set for the case: decodes of many long sequences, and prompts of 8k tokens."""
    is_decode = case.num_new == 1 and case.batch >= 32 and case.context >= 4096
    return case.dtype == DTYPE and (is_decode or case.num_new == case.context >= 8192)


def ceiling_goal(case: DeviceCase) -> float:
    """The least part of its ceiling that a case with a goal is to reach."""
    return DECODE_GOAL if case.num_new == 1 else PREFILL_GOAL
