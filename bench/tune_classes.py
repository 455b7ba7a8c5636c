"""What `bench.kernels tune` searches: sizes of kernels, with their candidates, and the shape classes they are for."""

import importlib
from dataclasses import dataclass, replace

from bench.device_cases import (
    CHUNKS,
    DECODES,
    DTYPE,
    GROUP_1,
    GROUP_4,
    GROUP_8,
    SMALL_SEQUENCES,
    DeviceCase,
    check_of,
    told,
)
from pallas_kernels.cases import HEAD_SHAPES, BatchCase, HeadShape
from pallas_kernels.paged_attention.quantization import LARGEST
from pallas_kernels.paged_attention.tuning import ShapeClass, Sizes


@dataclass(frozen=True)
class Size:
    """One size to be searched: where it stands, what it may be, and whose time it decides."""

    kind: str
    """launch or tiles."""
    name: str
    values: tuple[int, ...]
    """Of decode_programs: quarters of the default, which follows from the device."""
    is_for_prefills: bool = False

    def candidates(self, implementation: str) -> list[int]:
        if self.name != "decode_programs":
            return list(self.values)
        module = importlib.import_module(f"pallas_kernels.paged_attention.{implementation}")
        return [value * module.default_launch().decode_programs // 4 for value in self.values]


QUARTERS = (1, 2, 4, 8, 16)
SEARCHED: dict[str, tuple[Size, ...]] = {
    "mosaic_gpu": (
        Size("launch", "decode_programs", QUARTERS),
        Size("launch", "programs_per_multiprocessor", (1, 2, 3, 4)),
        Size("launch", "decode_chunk_tokens", (64, 128)),
        Size("launch", "max_decode_stages", (2, 3, 4, 6)),
        Size("launch", "min_item_chunks", (1, 2, 4, 8, 16)),
        Size("tiles", "tile_size", (64, 128, 256), is_for_prefills=True),
    ),
    "triton_gpu": (
        Size("launch", "decode_programs", QUARTERS),
        Size("launch", "decode_turn_tokens", (16, 32, 64, 128)),
        Size("launch", "decode_warps", (2, 4, 8)),
        Size("launch", "min_item_chunks", (1, 2, 4, 8, 16)),
        Size("launch", "num_stages", (2, 3, 4)),
        Size("tiles", "tile_size", (16, 32, 64, 128), is_for_prefills=True),
    ),
    "mosaic_tpu": (
        Size("launch", "decode_chunk_bytes", tuple(2**exponent for exponent in (19, 20, 21, 22, 23))),
        Size("launch", "max_decode_chunk_tokens", (256, 512, 1024, 2048)),
        Size("tiles", "tile_size", (32, 64, 128), is_for_prefills=True),
        Size("tiles", "key_chunk_tokens", (128, 256, 512), is_for_prefills=True),
    ),
}


@dataclass(frozen=True)
class Plan:
    """A shape class, by its heads and block size, and the cases it is timed on."""

    heads: HeadShape
    block_size: int
    dtype: str = DTYPE
    """Of the cache."""
    decodes: tuple[tuple[int, int], ...] = ((1, 8192), (8, 4096), (32, 4096), (256, 1024))
    """(batch, context)."""
    prefills: tuple[tuple[int, int], ...] = ((1, 2048), (4, 2048))
    checked_sequences: tuple[tuple[int, int], ...] = DECODES + CHUNKS

    @property
    def name(self) -> str:
        heads = self.heads
        group = heads.num_q_heads // heads.num_kv_heads
        name = f"{heads.num_kv_heads} heads of {heads.head_dim}, group {group}, block {self.block_size}"
        return name + told(self.dtype)

    def shape(self, implementation: str) -> ShapeClass:
        heads = self.heads
        return ShapeClass(
            implementation=implementation, dtype=self.dtype, head_dim=heads.head_dim, block_size=self.block_size,
            num_kv_heads=heads.num_kv_heads, group=heads.num_q_heads // heads.num_kv_heads,
        )  # fmt: skip

    def cases(self, is_for_prefills: bool) -> list[DeviceCase]:
        return [
            DeviceCase(
                name=f"{batch} x {context}", heads=self.heads, batch=batch, context=context,
                num_new=context if is_for_prefills else 1, block_size=self.block_size, dtype=self.dtype,
            )  # fmt: skip
            for batch, context in (self.prefills if is_for_prefills else self.decodes)
        ]

    def checked(self) -> BatchCase:
        """What a candidate must get right."""
        return check_of(self.cases(is_for_prefills=False)[0], self.checked_sequences)


PLANS = (
    *(Plan(GROUP_4, block_size) for block_size in (16, 32, 64)),
    Plan(GROUP_8, 16),
    Plan(GROUP_1, 16),
    Plan(HEAD_SHAPES["gpt-oss-20b"], 16),
    Plan(HEAD_SHAPES["tinyllama"], 16),
    *(Plan(GROUP_4, 16, dtype) for dtype in LARGEST),
)
SMALL_PLANS = (Plan(HeadShape(4, 2, 64), 16, DTYPE, ((3, 40),), ((1, 20),), SMALL_SEQUENCES),)
SMALL_SEARCH = (Size("launch", "max_decode_chunk_tokens", (16, 1024)),)


def with_size(sizes: Sizes, size: Size, value: int) -> Sizes:
    return replace(sizes, **{size.kind: getattr(sizes, size.kind) | {size.name: value}})
