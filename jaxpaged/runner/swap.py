"""Blocks between device and host: gather to a staging array, copy out; copy in, scatter back.

Copies out are asynchronous: what is staged leaves the device while later steps run. Sizes are bucketed, so that
nothing compiles after warm-up. Where blocks lie on the host is `host_pool.py`'s.

    device   cache of each layer   --gather-->   staged blocks  --transfer-->  host pool
                                   <--scatter--  staged blocks  <--transfer--
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxpaged.core.scheduler_output import BlockCopy
from jaxpaged.runner.host_pool import host_pool
from pallas_kernels import copy_blocks

STAGING_SIZES = (4, 16, 64)
"""Blocks staged at once; more copies go in rounds of the largest."""
STAGING_BYTES = 64 * 2**20
"""Device memory one staging may take: sizes that need more are left out, but for the smallest."""


class SwapError(RuntimeError):
    """A copy between device and host failed; the device's cache is as it was before."""


class BlockMover:
    """Owns the host pool and the three compiled copies. One thread, the one that owns the KV cache, may call it.

    Two threads in it at once are a ValueError: a cache that one reads while another donates it is lost.

    Args:
        kv: The cache that will be copied from and to; only its shapes and shardings are read.
        num_host_blocks: Host block ids are below this.
        staging_sizes: Blocks staged at once, ascending.
        is_pinned: Whether host blocks lie in pinned memory; None picks by device.
    """

    def __init__(
        self,
        kv: Any,
        num_host_blocks: int,
        *,
        staging_sizes: Sequence[int] = STAGING_SIZES,
        is_pinned: bool | None = None,
    ) -> None:
        block_bytes = sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(kv))
        self.staging_sizes = (
            staging_sizes[0], *(size for size in staging_sizes[1:] if size * block_bytes <= STAGING_BYTES)
        )  # fmt: skip
        self._host = host_pool(kv, num_host_blocks, is_pinned=is_pinned)
        self._gather = jax.jit(self._host.stage_out)
        self._scatter = jax.jit(self._host.stage_in, donate_argnums=0)
        self._copy = jax.jit(copy_blocks, donate_argnums=0)
        self._in_use = threading.Lock()

    def swap_out(self, kv: Any, copies: Sequence[BlockCopy]) -> None:
        """Start copying device blocks to host blocks; `kv` is only read. Raises SwapError."""
        with self._sole_use():
            try:
                for part in self._rounds(copies):
                    staged = self._gather(kv, self._padded([copy.source for copy in part]))
                    self._host.put([copy.target for copy in part], staged)
            except (RuntimeError, MemoryError, OSError) as error:
                self._host.lose([copy.target for copy in copies])
                raise SwapError(f"swap out of {len(copies)} blocks failed: {error}") from error

    def swap_in(self, kv: Any, copies: Sequence[BlockCopy]) -> Any:
        """Copy host blocks to device blocks; `kv` is donated, the new one returned. SwapError before any write."""
        with self._sole_use():
            rounds = self._rounds(copies)
            try:
                staged = [
                    self._host.take([copy.source for copy in part], self._staging_size(len(part))) for part in rounds
                ]
            except KeyError as error:
                raise SwapError(f"host block {error} holds nothing: its swap out failed, or there was none") from error
            except (RuntimeError, MemoryError, OSError) as error:
                raise SwapError(f"swap in of {len(copies)} blocks failed: {error}") from error
            for part, blocks in zip(rounds, staged, strict=True):
                kv = self._scatter(kv, self._padded([copy.target for copy in part]), blocks)
            return kv

    def copy(self, kv: Any, copies: Sequence[BlockCopy]) -> Any:
        """Copy device blocks to device blocks (copy-on-write); `kv` is donated, the new one returned."""
        with self._sole_use():
            for part in self._rounds(copies):
                sources = self._padded([copy.source for copy in part])
                targets = self._padded([copy.target for copy in part])
                kv = self._copy(kv, sources, targets)
            return kv

    def warm_up(self, kv: Any) -> Any:
        """Compile every staging size; no block is written. `kv` is donated."""
        for size in self.staging_sizes:
            null_copies = [BlockCopy(0, 0)] * size
            self.swap_out(kv, null_copies)
            kv = self.swap_in(kv, null_copies)
            kv = self.copy(kv, null_copies)
        return kv

    def warm_up_copies(self, kv: Any, num_copies: int) -> Any:
        """Compile the copies within the device of 1 to `num_copies` blocks; none is written. `kv` is donated."""
        for size in self.staging_sizes:
            if size <= self._staging_size(num_copies):
                kv = self.copy(kv, [BlockCopy(0, 0)] * size)
        return kv

    def time_copies(self, kv: Any) -> tuple[Any, int]:
        """Copy the largest staging size out and in once, for the caller to time; returns (kv, number of blocks)."""
        null_copies = [BlockCopy(0, 0)] * self.staging_sizes[-1]
        self.swap_out(kv, null_copies)
        kv = jax.block_until_ready(self.swap_in(kv, null_copies))
        return kv, len(null_copies)

    def finish(self) -> None:
        """Wait until every copy to the host has arrived, or failed; one that failed shows when it is swapped in."""
        with self._sole_use():
            self._host.finish()

    def _staging_size(self, count: int) -> int:
        return next((size for size in self.staging_sizes if size >= count), self.staging_sizes[-1])

    def _padded(self, ids: list[int]) -> np.ndarray:
        """Block ids [staging size], filled up with the null block."""
        padded = np.zeros(self._staging_size(len(ids)), np.int32)
        padded[: len(ids)] = ids
        return padded

    def _rounds(self, copies: Sequence[BlockCopy]) -> list[Sequence[BlockCopy]]:
        largest = self.staging_sizes[-1]
        return [copies[i : i + largest] for i in range(0, len(copies), largest)]

    @contextlib.contextmanager
    def _sole_use(self) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise ValueError(
                f"thread {threading.current_thread().name!r} copies blocks of a KV cache while another thread does: "
                "let one thread own the engine, and hand it requests through a queue"
            )
        try:
            yield
        finally:
            self._in_use.release()
