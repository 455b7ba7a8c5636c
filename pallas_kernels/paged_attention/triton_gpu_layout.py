"""What triton_gpu.py serves, and how it cuts heads; the cache is that of mosaic_gpu_layout.py, also in float32.

Both kernels read one layout, so a cache need not know which of them will attend. A row of any number of lanes is read
as pieces whose sizes are powers of two, as Triton has no other: 80 lanes are 64 and 16, and no memory is padding.
"""

import re

MIN_COMPUTE_CAPABILITY = "8.0"
"""Ampere: the first with asynchronous copies and bfloat16 matrix instructions."""
MAX_HEAD_DIM = 256
"""Wider accumulators would not fit in registers."""
MIN_PIECE = 16
"""Lanes of the shortest matrix product; the cache pads heads to a multiple of it."""


def pieces(lanes: int) -> tuple[tuple[int, int], ...]:
    """(first lane, size) of the parts of a row, sizes falling powers of two; `lanes` is a multiple of MIN_PIECE."""
    found, first = [], 0
    while first < lanes:
        size = 1 << ((lanes - first).bit_length() - 1)
        found.append((first, size))
        first += size
    return tuple(found)


def misfits(head_dim: int, compute_capability: str | None) -> list[str]:
    """Why such heads cannot be served on such a GPU; empty when they can."""
    reasons = []
    least = MIN_COMPUTE_CAPABILITY
    if compute_capability is None:
        reasons.append(f"needs compute capability {least} or above, not an unknown one")
    elif not re.fullmatch(r"\d+\.\d+", compute_capability):
        reasons.append(f"needs an NVIDIA GPU of compute capability {least} or above, not {compute_capability}")
    elif int(compute_capability.split(".")[0]) < int(least.split(".")[0]):
        reasons.append(f"needs compute capability {least} or above, not {compute_capability}")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"needs a head dim of at most {MAX_HEAD_DIM}, not {head_dim}")
    return reasons
