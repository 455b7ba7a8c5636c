"""Which device block already holds the keys and values of which tokens."""

import hashlib
from array import array
from collections.abc import Sequence as TokenSequence

from jaxpaged.core.request import TOKEN_TYPE
from jaxpaged.core.table_layout import TableLayout


def root_key(cache_salt: str) -> bytes:
    """The key before a sequence's first block; prompts of different salts share nothing."""
    return hashlib.blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"prefix root").digest()


def chain_key(parent: bytes, tokens: TokenSequence[int]) -> bytes:
    """The key of a full block: of its tokens and, through `parent`, of everything before them."""
    return hashlib.blake2b(parent + array(TOKEN_TYPE, tokens).tobytes(), digest_size=32).digest()


def group_key(key: bytes, group: int) -> bytes:
    """The key of a full block in one layer group; that of group 0 is the chain key itself, others are longer."""
    return key + group.to_bytes(2) if group else key


class PrefixCache:
    """Key of tokens and layer group -> device block.

    It holds no references: an entry lives until its block is given new content.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self.num_queries = 0
        """Tokens that were looked up by requests at their first admission."""
        self.num_hits = 0
        """Those of them that were found."""

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, key: bytes) -> int | None:
        return self._blocks.get(key)

    def insert(self, key: bytes, block: int) -> None:
        """Make `block` findable; the first block of a key stays, a twin of it is not entered."""
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> None:
        """The block's content is no longer to be found."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]

    def forget_key(self, key: bytes) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            del self._keys[block]

    def count(self, num_queries: int, num_hits: int) -> None:
        self.num_queries += num_queries
        self.num_hits += num_hits

    def reset(self) -> None:
        """Forget every entry; the counters go on."""
        self._blocks.clear()
        self._keys.clear()

    def check(self) -> None:
        """Raise RuntimeError unless both directions agree."""
        if self._blocks != {key: block for block, key in self._keys.items()}:
            raise RuntimeError("the prefix cache's keys and blocks do not mirror each other")


def longest_match(cache: PrefixCache, layout: TableLayout, keys: TokenSequence[bytes]) -> list[int]:
    """The beginning of a table (`TableLayout`) whose columns have these chain keys, of known blocks: the longest.

    Groups with a window need only what the next token sees of it; before that they have null blocks.
    """
    if layout.windows == (None,):  # the same as below, in a seventh of its time
        blocks: list[int] = []
        for key in keys:
            block = cache.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks
    num_columns = len(keys)
    full_groups = [group for group, window in enumerate(layout.windows) if window is None]
    for column, key in enumerate(keys if full_groups else ()):
        if any(cache.find(group_key(key, group)) is None for group in full_groups):
            num_columns = column
            break
    for column in range(num_columns - 1, -1, -1):
        # a gap that the windows of a match reach into is a gap for every match that is longer than it
        next_token = num_columns * layout.block_size
        seen = [group for group, window in layout.windowed if layout.first_column(window, next_token) <= column]
        if not seen:
            break
        if any(cache.find(group_key(keys[column], group)) is None for group in seen):
            num_columns = column
    next_token = num_columns * layout.block_size
    firsts = [0 if window is None else layout.first_column(window, next_token) for window in layout.windows]
    return [
        (cache.find(group_key(key, group)) or 0) if column >= first else 0
        for column, key in enumerate(keys[:num_columns])
        for group, first in enumerate(firsts)
    ]
