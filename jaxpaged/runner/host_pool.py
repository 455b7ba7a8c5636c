"""Where swapped blocks lie in host memory, and how they get there: one of two pools, picked by device.

`PinnedPool` is for accelerators: the device itself reads and writes pinned memory, so no thread of the host waits and
nothing is copied within the host. A host block is one array for each kind of cache leaf, [leaves of that kind,
...block], and the pool a table of them by host block id. `NumpyPool` is for CPUs, where both pools share the memory.
"""

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Int

from pallas_kernels import gather_blocks, scatter_blocks

MAX_WAITING = 4
"""Stagings that may be on their way to the host at once."""

Block = tuple[jax.Array, ...]
"""One block of all layers: an array [leaves, ...block] for each kind of leaf, by shape and dtype."""


@runtime_checkable
class HostPool(Protocol):
    """Host blocks, by id from 0. What is staged is a pytree that only the pool looks into."""

    @staticmethod
    def stage_out(kv: Any, ids: Int[Array, "copies"]) -> Any:
        """A pure function: the blocks `ids`, in order, staged. `kv` is only read."""
        ...

    @staticmethod
    def stage_in(kv: Any, ids: Int[Array, "copies"], staged: Any) -> Any:
        """A pure function: `kv` with the staged blocks in `ids`; rows of block 0 write nothing. `kv` is donated."""
        ...

    def put(self, ids: Sequence[int], staged: Any) -> None:
        """Start copying the first blocks that are staged to the host blocks `ids`."""
        ...

    def take(self, ids: Sequence[int], size: int) -> Any:
        """The host blocks `ids` on their way to the device, staged and filled up to `size`. KeyError for a lost one."""
        ...

    def lose(self, ids: Sequence[int]) -> None:
        """Their copy failed: they hold nothing until they are put again."""
        ...

    def finish(self) -> None:
        """Wait until every copy has arrived or failed; blocks of one that failed are lost."""
        ...


def host_pool(kv: Any, num_host_blocks: int, *, is_pinned: bool | None = None) -> HostPool:
    """The pool for caches like `kv`; `is_pinned` None picks by device: pinned memory wherever it is another memory."""
    device = min(jax.tree.leaves(kv)[0].devices(), key=lambda device: device.id)
    if is_pinned is None:
        kinds = {memory.kind for memory in device.addressable_memories()}
        is_pinned = device.platform != "cpu" and PinnedPool.MEMORY_KIND in kinds
    return PinnedPool(kv) if is_pinned else NumpyPool(kv, num_host_blocks)


class NumpyPool:
    """One numpy array for each leaf, blocks leading. A staging is put in its place when somebody needs it."""

    def __init__(self, kv: Any, num_host_blocks: int) -> None:
        # np.zeros takes address space, and memory only as blocks are written
        self._host: Any = jax.tree.map(lambda leaf: np.zeros((num_host_blocks, *leaf.shape[1:]), leaf.dtype), kv)
        self._waiting: deque[tuple[Sequence[int], Any]] = deque()
        self._lost: set[int] = set()

    @staticmethod
    def stage_out(kv: Any, ids: Int[Array, "copies"]) -> Any:
        return gather_blocks(kv, ids)

    @staticmethod
    def stage_in(kv: Any, ids: Int[Array, "copies"], staged: Any) -> Any:
        return scatter_blocks(kv, ids, staged)

    def put(self, ids: Sequence[int], staged: Any) -> None:
        for leaf in jax.tree.leaves(staged):
            leaf.copy_to_host_async()
        self._waiting.append((ids, staged))
        while len(self._waiting) > MAX_WAITING:
            self._place()

    def take(self, ids: Sequence[int], size: int) -> Any:
        self.finish()
        lost = self._lost.intersection(ids)
        if lost:
            raise KeyError(min(lost))
        index = np.zeros(size, np.int32)
        index[: len(ids)] = ids
        return jax.tree.map(lambda pool: jax.device_put(pool[index]), self._host)

    def lose(self, ids: Sequence[int]) -> None:
        self.finish()
        self._lost.update(ids)

    def finish(self) -> None:
        while self._waiting:
            self._place()

    def _place(self) -> None:
        """The oldest staging, copied to its place in the pool."""
        ids, staged = self._waiting.popleft()

        def place(pool: np.ndarray, blocks: Any) -> None:
            pool[ids] = np.asarray(blocks)[: len(ids)]

        try:
            jax.tree.map(place, self._host, staged)
        except (RuntimeError, MemoryError, OSError):
            self._lost.update(ids)  # others may be waiting for their own blocks: these show when they are taken
        else:
            self._lost.difference_update(ids)


class PinnedPool:
    """Arrays in pinned host memory by block id; a block keeps its memory until its id is put again.

    Commit the cache to its device (`jax.device_put(kv, device)`) for the way back to be the device's own transfer too;
    otherwise jax copies from the pinned memory to a buffer of its own first.

    Args:
        kv: Caches of which blocks are put; only shapes, dtypes and shardings are read.
    """

    MEMORY_KIND = "pinned_host"

    def __init__(self, kv: Any) -> None:
        self._host: dict[int, Block] = {}
        self._leaving: deque[list[Block]] = deque()
        leaves = jax.tree.leaves(kv)
        # a block's arrays have the axes of its leaves, with leaves for blocks, so they are sharded alike
        self._on_device: tuple[Sharding, ...] = tuple(leaves[members[0]].sharding for members in _members_by_kind(kv))
        self._on_host = tuple(sharding.with_memory_kind(self.MEMORY_KIND) for sharding in self._on_device)
        self._is_committed = bool(leaves[0].committed)

    @staticmethod
    def stage_out(kv: Any, ids: Int[Array, "copies"]) -> tuple[Block, ...]:
        leaves = jax.tree.leaves(gather_blocks(kv, ids))
        # without the barrier XLA gathers each block's arrays anew, in a kernel that takes it many seconds to make
        kinds = jax.lax.optimization_barrier(
            [jnp.stack([leaves[i] for i in members], axis=1) for members in _members_by_kind(kv)]
        )
        return tuple(tuple(kind[i] for kind in kinds) for i in range(ids.shape[0]))

    @staticmethod
    def stage_in(kv: Any, ids: Int[Array, "copies"], staged: tuple[Block, ...]) -> Any:
        tree: Any
        leaves, tree = jax.tree.flatten(kv)
        for kind, members in enumerate(_members_by_kind(kv)):
            stacked = jax.lax.optimization_barrier(jnp.stack([block[kind] for block in staged]))
            for position, i in enumerate(members):
                leaves[i] = stacked[:, position]
        return scatter_blocks(kv, ids, jax.tree.unflatten(tree, leaves))

    def put(self, ids: Sequence[int], staged: tuple[Block, ...]) -> None:
        blocks = jax.device_put(list(staged[: len(ids)]), [self._on_host] * len(ids))
        self._host.update(zip(ids, blocks, strict=True))
        self._leaving.append(blocks)
        while len(self._leaving) > MAX_WAITING:
            self._wait()

    def take(self, ids: Sequence[int], size: int) -> tuple[Block, ...]:
        blocks = [self._host[block_id] for block_id in ids]
        jax.block_until_ready(blocks)  # an error on their way out must show here
        if self._is_committed:
            staged = jax.device_put(blocks, [self._on_device] * len(ids))
        else:  # a transfer between memories commits to a device, and every program that meets such a cache is another
            staged = jax.tree.map(lambda array: jax.device_put(np.asarray(array)), blocks)
        return (*staged, *[staged[-1]] * (size - len(ids)))

    def lose(self, ids: Sequence[int]) -> None:
        for block_id in ids:
            self._host.pop(block_id, None)

    def finish(self) -> None:
        while self._leaving:
            self._wait()

    def _wait(self) -> None:
        with contextlib.suppress(RuntimeError):  # the blocks keep their error, for `take` to raise
            jax.block_until_ready(self._leaving.popleft())


def _members_by_kind(kv: Any) -> list[list[int]]:
    """The leaves of each shape and dtype, by their position in the flattened cache."""
    kinds: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for i, leaf in enumerate(jax.tree.leaves(kv)):
        kinds.setdefault((leaf.shape, str(leaf.dtype)), []).append(i)
    return list(kinds.values())
