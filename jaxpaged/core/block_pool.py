"""Who holds which block: ids, reference counts and the free list of one memory (device or host)."""

from array import array
from collections.abc import Mapping


class BlockPool:
    """Blocks 0 .. num_blocks - 1 with reference counts; block 0 is the null block and is never given out.

    A block with count 0 is on the free list, least recently freed first, and keeps its content until it is allocated.
    The free list is a ring through the null block, in two arrays: 12 bytes a block, nothing that the garbage collector
    walks, and no operation that touches more than its neighbours.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} leaves no room for the null block: give at least 1")
        self.num_blocks = num_blocks
        self.reference_counts = array("i", bytes(4 * num_blocks))
        """Of every block; written by this class only."""
        self.num_shared = 0
        """Blocks with a count of 2 or more."""
        self.num_free = num_blocks - 1
        self._next = array("i", range(1, num_blocks + 1))
        """Of a free block, the one freed after it; of the null block, the one that has been free the longest."""
        self._next[-1] = 0
        self._previous = array("i", range(-1, num_blocks - 1))
        self._previous[0] = num_blocks - 1

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def allocate(self) -> int:
        """Return the block that has been free the longest, with count 1."""
        block = self._next[0]
        if not block:
            raise ValueError(f"all {self.num_usable} blocks are in use: ask num_free before allocating")
        self._next[0] = following = self._next[block]
        self._previous[following] = 0
        self.num_free -= 1
        self.reference_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference; a free block leaves the free list with its content."""
        count = self.reference_counts[block]
        if count == 0:
            if not block:
                raise ValueError("the null block cannot be held: leave it out of what is shared")
            before, following = self._previous[block], self._next[block]
            self._next[before] = following
            self._previous[following] = before
            self.num_free -= 1
        elif count == 1:
            self.num_shared += 1
        self.reference_counts[block] = count + 1

    def release(self, block: int) -> None:
        """Drop a reference; the last one puts the block at the young end of the free list."""
        count = self.reference_counts[block] - 1
        if count < 0:
            raise ValueError(f"block {block} has no reference to release")
        self.reference_counts[block] = count
        if count == 0:
            youngest = self._previous[0]
            self._next[youngest] = self._previous[0] = block
            self._previous[block] = youngest
            self._next[block] = 0
            self.num_free += 1
        elif count == 1:
            self.num_shared -= 1

    def _free_blocks(self) -> list[int]:
        """The free list, oldest first; RuntimeError where its links do not mirror each other."""
        blocks: list[int] = []
        before, block = 0, self._next[0]
        while block:
            if self._previous[block] != before or len(blocks) == self.num_free:
                raise RuntimeError(f"the free list is broken behind block {before}")
            blocks.append(block)
            before, block = block, self._next[block]
        if self._previous[0] != before:
            raise RuntimeError(f"the free list ends with block {before}, but block {self._previous[0]} is entered")
        return blocks

    def check(self, held: Mapping[int, int]) -> None:
        """Raise RuntimeError unless free + referenced + null = all blocks and the counts are those of `held`."""
        free = set(self._free_blocks())
        for block, count in enumerate(self.reference_counts):
            if count != held.get(block, 0):
                raise RuntimeError(f"block {block} has count {count}, but {held.get(block, 0)} tables hold it")
            if (block in free) != (count == 0 and block != 0):
                raise RuntimeError(f"block {block} with count {count} is on the wrong side of the free list")
        referenced = sum(count > 0 for count in self.reference_counts)
        if referenced + len(free) + 1 != self.num_blocks or referenced != self.num_referenced:
            raise RuntimeError(f"{referenced} referenced + {len(free)} free + 1 null is not {self.num_blocks}")
        if self.num_shared != sum(count > 1 for count in self.reference_counts):
            raise RuntimeError(f"num_shared={self.num_shared} is not the number of blocks with several references")
