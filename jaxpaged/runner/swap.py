"""Blocks between device and host: gather to a staging array, copy out; copy in, scatter back.

The host pool is numpy, one array per leaf of the KV cache, with the block as the leading axis as on the device.
Copies out are asynchronous: a staging array leaves the device while later steps run, and is put in its place when
somebody needs it or enough of them wait (`_drain`). Sizes are bucketed, so that nothing compiles after warm-up.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpaged.core.scheduler_output import BlockCopy
from pallas_kernels import copy_blocks, gather_blocks, scatter_blocks

STAGING_SIZES = (4, 16, 64)
"""Blocks per staging array; more copies go in rounds of the largest."""
MAX_WAITING = 4
"""Staging arrays that may wait for their copy to the host."""


class SwapError(RuntimeError):
    """A copy between device and host failed; the device's cache is as it was before."""


def _staging_size(count: int) -> int:
    return next((size for size in STAGING_SIZES if size >= count), STAGING_SIZES[-1])


def _padded(ids: list[int]) -> np.ndarray:
    """Block ids [staging size], filled up with the null block."""
    padded = np.zeros(_staging_size(len(ids)), np.int32)
    padded[: len(ids)] = ids
    return padded


def _rounds(copies: Sequence[BlockCopy]) -> list[Sequence[BlockCopy]]:
    return [copies[i : i + STAGING_SIZES[-1]] for i in range(0, len(copies), STAGING_SIZES[-1])]


class BlockMover:
    """Owns the host pool and the three compiled copies. One thread, the one that owns the KV cache, may call it."""

    def __init__(self, kv: Any, num_host_blocks: int) -> None:
        # np.zeros takes address space, and memory only as blocks are written
        self._host: Any = jax.tree.map(lambda leaf: np.zeros((num_host_blocks, *leaf.shape[1:]), leaf.dtype), kv)
        self._waiting: list[tuple[list[int], Any]] = []
        self._gather = jax.jit(gather_blocks)
        self._scatter = jax.jit(scatter_blocks, donate_argnums=0)
        self._copy = jax.jit(copy_blocks, donate_argnums=0)

    def swap_out(self, kv: Any, copies: Sequence[BlockCopy]) -> None:
        """Start copying device blocks to host blocks; `kv` is only read. Raises SwapError."""
        try:
            for part in _rounds(copies):
                staged = self._gather(kv, _padded([copy.source for copy in part]))
                for leaf in jax.tree.leaves(staged):
                    leaf.copy_to_host_async()
                self._waiting.append(([copy.target for copy in part], staged))
                if len(self._waiting) > MAX_WAITING:
                    self._drain()
        except (RuntimeError, MemoryError, OSError) as error:
            targets = {copy.target for copy in copies}
            self._waiting = [(ids, staged) for ids, staged in self._waiting if not targets.intersection(ids)]
            raise SwapError(f"swap out of {len(copies)} blocks failed: {error}") from error

    def swap_in(self, kv: Any, copies: Sequence[BlockCopy]) -> Any:
        """Copy host blocks to device blocks; `kv` is donated, the new one returned. SwapError before any write."""
        try:
            self._drain()
            staged = [self._stage([copy.source for copy in part]) for part in _rounds(copies)]
        except (RuntimeError, MemoryError, OSError) as error:
            raise SwapError(f"swap in of {len(copies)} blocks failed: {error}") from error
        for part, blocks in zip(_rounds(copies), staged, strict=True):
            kv = self._scatter(kv, _padded([copy.target for copy in part]), blocks)
        return kv

    def copy(self, kv: Any, copies: Sequence[BlockCopy]) -> Any:
        """Copy device blocks to device blocks (copy-on-write); `kv` is donated, the new one returned."""
        for part in _rounds(copies):
            sources = _padded([copy.source for copy in part])
            targets = _padded([copy.target for copy in part])
            kv = self._copy(kv, sources, targets)
        return kv

    def warm_up(self, kv: Any) -> Any:
        """Compile every staging size; writes reach the null block only. `kv` is donated."""
        for size in STAGING_SIZES:
            null_copies = [BlockCopy(0, 0)] * size
            self.swap_out(kv, null_copies)
            kv = self.swap_in(kv, null_copies)
            kv = self.copy(kv, null_copies)
        return kv

    def time_copies(self, kv: Any) -> tuple[Any, int]:
        """Copy the largest staging size out and in once, for the caller to time; returns (kv, number of blocks)."""
        null_copies = [BlockCopy(0, 0)] * STAGING_SIZES[-1]
        self.swap_out(kv, null_copies)
        kv = jax.block_until_ready(self.swap_in(kv, null_copies))
        return kv, len(null_copies)

    def finish(self) -> None:
        """Wait until every copy to the host has arrived."""
        self._drain()

    def _stage(self, ids: list[int]) -> Any:
        index = _padded(ids)
        return jax.tree.map(lambda pool: jax.device_put(pool[index]), self._host)

    def _drain(self) -> None:
        while self._waiting:
            ids, staged = self._waiting.pop(0)

            def place(pool: np.ndarray, blocks: Any, ids: list[int] = ids) -> None:
                pool[ids] = np.asarray(blocks)[: len(ids)]

            jax.tree.map(place, self._host, staged)
