"""How the tokens of a sequence map to blocks, and how many blocks that takes: data and arithmetic only."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class TableLayout:
    """The shape of every block table.

    Layers stand in groups of one size, the layers of a group see equally far back, and a block is the memory of
    `block_size` tokens in the layers of one group. A table is one list of block ids: column i, for the tokens
    [i * block_size, (i + 1) * block_size), has its blocks at [i * num_groups, (i + 1) * num_groups), group after group.
    Where a group has a window, the columns wholly before the window of the next token are the null block, 0.
    """

    block_size: int
    windows: tuple[int | None, ...] = (None,)
    """Of each group: tokens that a token sees, itself included; None for all of them."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 or more")
        if not self.windows or any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows={self.windows} must name a group or more, each with None or 1 token and more")

    @cached_property
    def num_groups(self) -> int:
        return len(self.windows)

    @cached_property
    def windowed(self) -> tuple[tuple[int, int], ...]:
        """(group, its window) of the groups that have one."""
        return tuple((group, window) for group, window in enumerate(self.windows) if window is not None)

    @cached_property
    def num_full_groups(self) -> int:
        return self.num_groups - len(self.windowed)

    def num_columns(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def first_column(self, window: int, next_token: int) -> int:
        """The first column that the window of token `next_token`, or of a later one, reaches into."""
        return max(next_token - window + 1, 0) // self.block_size

    def most_columns(self, window: int | None, num_tokens: int, step_tokens: int) -> int:
        """Most columns that a group of this window keeps at once while `num_tokens` tokens are computed.

        Args:
            step_tokens: Most tokens of one step: it writes them, and reads the window of the first of them.
        """
        num_columns = self.num_columns(num_tokens)
        if window is None:
            return num_columns
        # the most columns that so many consecutive tokens touch
        return min(num_columns, (window - 1 + step_tokens + self.block_size - 2) // self.block_size + 1)

    def most_blocks(self, num_tokens: int, step_tokens: int, num_common: int = 0) -> int:
        """Most blocks a table holds at once while `num_tokens` tokens are computed, in steps of `step_tokens` at most.

        Args:
            num_common: Leading columns that are another table's in groups without a window, and not counted.
        """
        num_windowed = sum(self.most_columns(window, num_tokens, step_tokens) for _, window in self.windowed)
        return self.num_full_groups * (self.num_columns(num_tokens) - num_common) + num_windowed
