"""Who holds which block: ids, reference counts and the free list of one memory (device or host)."""

from collections import OrderedDict


class BlockPool:
    """Blocks 0 .. num_blocks - 1 with reference counts; block 0 is the null block and is never given out.

    A block with count 0 is on the free list, least recently freed first, and keeps its content until it is allocated.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} leaves no room for the null block: give at least 1")
        self.num_blocks = num_blocks
        self.reference_counts = [0] * num_blocks
        """Of every block; written by this class only."""
        self.num_shared = 0
        """Blocks with a count of 2 or more."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def allocate(self) -> int:
        """Return the block that has been free the longest, with count 1."""
        if not self._free:
            raise ValueError(f"all {self.num_usable} blocks are in use: ask num_free before allocating")
        block, _ = self._free.popitem(last=False)
        self.reference_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference; a free block leaves the free list with its content."""
        counts = self.reference_counts
        if counts[block] == 0:
            del self._free[block]  # KeyError for the null block: it can never be held
        elif counts[block] == 1:
            self.num_shared += 1
        counts[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference; the last one puts the block at the young end of the free list."""
        counts = self.reference_counts
        if counts[block] == 0:
            raise ValueError(f"block {block} has no reference to release")
        counts[block] -= 1
        if counts[block] == 0:
            self._free[block] = None
        elif counts[block] == 1:
            self.num_shared -= 1

    def check(self, held: dict[int, int]) -> None:
        """Raise RuntimeError unless free + referenced + null = all blocks and the counts are those of `held`."""
        for block, count in enumerate(self.reference_counts):
            if count != held.get(block, 0):
                raise RuntimeError(f"block {block} has count {count}, but {held.get(block, 0)} tables hold it")
            if (block in self._free) != (count == 0 and block != 0):
                raise RuntimeError(f"block {block} with count {count} is on the wrong side of the free list")
        referenced = sum(count > 0 for count in self.reference_counts)
        if referenced + len(self._free) + 1 != self.num_blocks or referenced != self.num_referenced:
            raise RuntimeError(f"{referenced} referenced + {len(self._free)} free + 1 null is not {self.num_blocks}")
        if self.num_shared != sum(count > 1 for count in self.reference_counts):
            raise RuntimeError(f"num_shared={self.num_shared} is not the number of blocks with several references")
