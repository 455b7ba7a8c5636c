"""Lives here: attention over a paged cache of keys and values, copies of its blocks, and linear layers' products.
May import: jax, numpy, jaxtyping, and this package.
Must never come in: jaxpaged, converters, flax; requests, schedulers, models; globals or environment variables.
Read first: AttentionMetadata.
"""

from pallas_kernels.checks import check_copies, check_metadata
from pallas_kernels.copy_blocks.copy_blocks import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.linear.linear import linear, linear_at, linear_misfit
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, AttentionCase, explain, misfits, paged_attention, pick
from pallas_kernels.paged_attention.layout import KVLayout
from pallas_kernels.paged_attention.metadata import AttentionMetadata, make_metadata
from pallas_kernels.platform import lowering_for, target_compute_capability, target_platform

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionCase",
    "AttentionMetadata",
    "KVLayout",
    "check_copies",
    "check_metadata",
    "copy_blocks",
    "explain",
    "gather_blocks",
    "linear",
    "linear_at",
    "linear_misfit",
    "lowering_for",
    "make_metadata",
    "misfits",
    "paged_attention",
    "pick",
    "scatter_blocks",
    "target_compute_capability",
    "target_platform",
]
