"""The block tables: the only writer of `Sequence.block_ids`."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from jaxpaged.core.block_pool import BlockPool
from jaxpaged.core.prefix_cache import PrefixCache, chain_key, group_key, longest_match, root_key
from jaxpaged.core.request import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.core.scheduler_output import BlockCopy, ScheduledSequence
from jaxpaged.core.table_layout import TableLayout

_NO_COPIES: tuple[BlockCopy, ...] = ()


@dataclass(slots=True)
class _Chain:
    """The chain keys of a sequence's leading full columns; they outlive its table, since tokens never change."""

    root: bytes
    keys: list[bytes]
    num_committed: int = 0
    """Leading columns of the present device table that were offered to the prefix cache."""


class BlockManager:
    """Block tables over a device pool and a host pool.

    A table is in the host pool exactly while its sequence's status is SWAPPED. Blocks are taken for tokens that are
    scheduled, never ahead; every method that cannot fail says so, for the others ask first.

    Args:
        windows: Of each layer group, as in `TableLayout`.
    """

    def __init__(
        self,
        *,
        num_device_blocks: int,
        num_host_blocks: int,
        block_size: int,
        windows: tuple[int | None, ...] = (None,),
        enable_prefix_caching: bool = True,
    ) -> None:
        if num_device_blocks < 2:
            raise ValueError(f"num_device_blocks={num_device_blocks} must be 2 or more: one is the null block")
        if num_host_blocks < 0:
            raise ValueError(f"{num_host_blocks=} must be 0 or more")
        self.layout = TableLayout(block_size, windows)
        self.block_size = block_size
        self.num_groups = self.layout.num_groups
        self.has_windows = bool(self.layout.windowed)
        self.enable_prefix_caching = enable_prefix_caching
        self.device = BlockPool(num_device_blocks)
        self.host = BlockPool(max(1, num_host_blocks))
        self.prefix_cache = PrefixCache()
        self.num_swapped_out_blocks = 0
        self.num_swapped_in_blocks = 0
        self.num_copied_blocks = 0
        self._chains: dict[int, _Chain] = {}
        self._num_table_entries = 0
        self._num_steps = 0
        self._sum_saved_fractions = 0.0

    # -- counts

    @property
    def num_free_blocks(self) -> int:
        """Free device blocks."""
        return self.device.num_free

    @property
    def num_saved_blocks(self) -> int:
        """Device blocks that would be held besides the present ones if nothing were shared."""
        return self._num_table_entries - self.device.num_referenced

    @property
    def blocks_saved_fraction(self) -> float:
        """1 - blocks held / blocks that would be held without sharing, averaged over the recorded steps."""
        return self._sum_saved_fractions / self._num_steps if self._num_steps else 0.0

    def record_step(self) -> None:
        """Add the present sharing to the average."""
        if self._num_table_entries:
            self._num_steps += 1
            self._sum_saved_fractions += 1 - self.device.num_referenced / self._num_table_entries

    def held(self, sequence: Sequence) -> ListLike[int]:
        """The blocks of the sequence's table, without the null blocks of what was let go."""
        table = sequence.block_ids
        return [block for block in table if block] if self.has_windows else table

    def num_distinct_blocks(self, group: SequenceGroup) -> int:
        """Blocks the group's tables hold, a shared one counted once."""
        sequences = group.unfinished
        if len(sequences) == 1:
            return len(self.held(sequences[0]))
        return len({block for sequence in sequences for block in self.held(sequence)})

    # -- the prefix cache

    def _keys(self, sequence: Sequence, num_columns: int) -> list[bytes]:
        """The sequence's chain keys, `num_columns` of them at least; their tokens must be known."""
        chain = self._chain(sequence)
        keys, size, tokens = chain.keys, self.block_size, sequence.token_ids
        for index in range(len(keys), num_columns):
            keys.append(chain_key(keys[-1] if keys else chain.root, tokens[index * size : (index + 1) * size]))
        return keys

    def _chain(self, sequence: Sequence) -> _Chain:
        chain = self._chains.get(sequence.sequence_id)
        if chain is None:
            chain = self._chains[sequence.sequence_id] = _Chain(root_key(sequence.request.cache_salt), [])
        return chain

    def match(self, sequence: Sequence, most_columns: int | None = None) -> list[int]:
        """The beginning of a table for the sequence's first tokens, of device blocks that hold them.

        Whole columns, one token at least left to compute; of groups with a window only what the next token sees of it,
        and null blocks before. The longest there is, of `most_columns` at most.
        """
        if not self.enable_prefix_caching:
            return []
        limit = (len(sequence.token_ids) - 1) // self.block_size
        limit = limit if most_columns is None else min(limit, most_columns)
        return longest_match(self.prefix_cache, self.layout, self._keys(sequence, limit)[:limit])

    def block_keys(self, sequence: Sequence, first: int, last: int) -> list[bytes]:
        """Chain keys of the known full columns among [first, last); empty without a prefix cache."""
        if not self.enable_prefix_caching:
            return []
        last = min(last, len(sequence.token_ids) // self.block_size)
        return self._keys(sequence, last)[first:last]

    def commit(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Make the full blocks of known tokens findable, of the first `num_computed_tokens` tokens (all dispatched)."""
        if not self.enable_prefix_caching or sequence.status is not SequenceStatus.RUNNING:
            return
        num_full = min(num_computed_tokens, len(sequence.token_ids)) // self.block_size
        chain = self._chain(sequence)
        if num_full <= chain.num_committed:
            return
        keys, table, num_groups = self._keys(sequence, num_full), sequence.block_ids, self.num_groups
        for column in range(chain.num_committed, num_full):
            for place in range(column * num_groups, (column + 1) * num_groups):
                if table[place]:
                    key = keys[column] if num_groups == 1 else group_key(keys[column], place % num_groups)
                    self.prefix_cache.insert(key, table[place])
        chain.num_committed = num_full

    def discard(self, sequence: Sequence) -> None:
        """Nothing this sequence computed or read stays findable, wherever its table is now."""
        chain = self._chains.get(sequence.sequence_id)
        for key in chain.keys if chain else ():
            for group in range(self.num_groups):
                self.prefix_cache.forget_key(group_key(key, group))

    def reset_prefix_cache(self) -> None:
        self.prefix_cache.reset()

    # -- growing a table

    def num_blocks_to_start(self, match: ListLike[int], num_tokens: int, step_tokens: int) -> int:
        """Free blocks that a table beginning with `match` takes at most until `num_tokens` tokens are computed.

        Args:
            step_tokens: Most tokens of one step.
        """
        counts, layout = self.device.reference_counts, self.layout
        num_columns, num_blocks = layout.num_columns(num_tokens), 0
        for group, window in enumerate(layout.windows):
            of_group = match[group :: self.num_groups] if self.num_groups > 1 else match
            # a block that was let go is not needed again, one that is held takes nothing
            num_missing = num_columns - sum(1 for block in of_group if not block or counts[block])
            num_blocks += min(num_missing, layout.most_columns(window, num_tokens, step_tokens))
        return num_blocks

    def allocate(self, sequence: Sequence, match: ListLike[int]) -> None:
        """Put the matched blocks behind those the sequence has. Cannot fail: each is held already or free."""
        held = [block for block in match if block]
        for block in held:
            self.device.share(block)
        sequence.block_ids.extend(match)
        self._num_table_entries += len(held)
        self._chain(sequence).num_committed = len(sequence.block_ids) // self.num_groups

    def num_blocks_to_append(self, items: ListLike[ScheduledSequence]) -> int:
        """New blocks that writing the items' tokens takes, copy-on-write included (items of one group)."""
        size, num_groups = self.block_size, self.num_groups
        if len(items) == 1:
            sequence, start, num_new_tokens, _ = items[0]
            table = sequence.block_ids
            num_blocks = -(-(start + num_new_tokens) // size) * num_groups - len(table)
            place = start // size * num_groups
            if place < len(table):
                pool = self.host if sequence.status is SequenceStatus.SWAPPED else self.device
                if pool.reference_counts[table[place]] > 1:
                    num_blocks += num_groups
            return num_blocks
        num_blocks = 0
        copied: Counter[int] = Counter()
        for sequence, start, num_new_tokens, _ in items:
            table = sequence.block_ids
            num_blocks += -(-(start + num_new_tokens) // size) * num_groups - len(table)
            place = start // size * num_groups
            if place < len(table):
                block = table[place]
                if self._pool(sequence).reference_counts[block] - copied[block] > 1:
                    copied[block] += 1
                    num_blocks += num_groups
        return num_blocks

    def append(self, sequence: Sequence, start: int, num_new_tokens: int) -> ListLike[BlockCopy]:
        """Make [start, start + num_new_tokens) writable, `start` being what is computed; return copy-on-write copies.

        Only the column that `start` stands in can be there already, and be shared: full ones are never written again.
        All its blocks are shared alike, for who writes or lets go does so in a column as a whole.
        """
        table, pool, size, num_groups = sequence.block_ids, self.device, self.block_size, self.num_groups
        num_held = len(table)
        place = start // size * num_groups
        copies: ListLike[BlockCopy] = _NO_COPIES
        if place < num_held and pool.reference_counts[table[place]] > 1:
            sources = table[place : place + num_groups]
            copies = [BlockCopy(source, self._take()) for source in sources]
            for source in sources:
                pool.release(source)
            table[place : place + num_groups] = [copy.target for copy in copies]
            self.num_copied_blocks += num_groups
        num_new_blocks = -(-(start + num_new_tokens) // size) * num_groups - num_held
        if num_new_blocks > 0:
            for _ in range(num_new_blocks):
                table.append(self._take())
            self._num_table_entries += num_new_blocks
        return copies

    def leave(self, sequence: Sequence, next_token: int) -> None:
        """Let go of the blocks that lie wholly before the windows of token `next_token` and all later ones.

        What the table has of the tokens before `next_token` must be dispatched. Steps of the past may still be reading
        the blocks: whoever gets them writes them in a later step. For a table on the device. Cannot fail.
        """
        table, size, num_groups = sequence.block_ids, self.block_size, self.num_groups
        for group, window in self.layout.windowed:
            column = min((next_token - window + 1) // size, len(table) // num_groups) - 1
            place = column * num_groups + group
            # below a null block are null blocks
            if place < 0 or not table[place]:
                continue
            self.commit(sequence, min(next_token, len(table) // num_groups * size))
            while place >= 0 and table[place]:
                self.device.release(table[place])
                table[place] = 0
                self._num_table_entries -= 1
                place -= num_groups

    def _take(self) -> int:
        """A device block to write anew: what it held is no longer findable."""
        block = self.device.allocate()
        self.prefix_cache.forget(block)
        return block

    # -- sharing

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child's table becomes the parent's, in the pool the parent is in. Cannot fail."""
        pool, held = self._pool(parent), self.held(parent)
        for block in held:
            pool.share(block)
        child.block_ids = list(parent.block_ids)
        if pool is self.device:
            self._num_table_entries += len(held)
        chain = self._chain(parent)
        self._chains[child.sequence_id] = _Chain(chain.root, list(chain.keys), chain.num_committed)

    def can_share_prefix(self, leader: Sequence, num_columns: int) -> bool:
        """Whether the leader's table has what a sequence needs that is to go on behind the first `num_columns`."""
        table, next_token = leader.block_ids, num_columns * self.block_size
        firsts = ((group, self.layout.first_column(window, next_token)) for group, window in self.layout.windowed)
        return all(first == num_columns or table[first * self.num_groups + group] for group, first in firsts)

    def share_prefix(self, leader: Sequence, member: Sequence, num_columns: int) -> None:
        """The member, without a table so far, takes the leader's first `num_columns` on the device. Cannot fail."""
        self.allocate(member, leader.block_ids[: num_columns * self.num_groups])

    # -- leaving

    def free(self, sequence: Sequence) -> None:
        """Drop the table, last block first, so that of a cached prefix the tail is reused before the head."""
        pool, held = self._pool(sequence), self.held(sequence)
        if pool is self.device:
            self._num_table_entries -= len(held)
        for block in reversed(held):
            pool.release(block)
        sequence.block_ids = []
        chain = self._chains.get(sequence.sequence_id)
        if chain is not None:
            chain.num_committed = 0

    def retire(self, sequence: Sequence) -> None:
        """Free a sequence that will not come back."""
        self.free(sequence)
        self._chains.pop(sequence.sequence_id, None)

    def _pool(self, sequence: Sequence) -> BlockPool:
        return self.host if sequence.status is SequenceStatus.SWAPPED else self.device

    # -- swapping

    def swap_out(self, group: SequenceGroup) -> list[BlockCopy] | None:
        """Move every block of the group to the host, a shared one once; None (and nothing done) where it has no room.

        The caller then sets the status of its sequences to SWAPPED.
        """
        if self.num_distinct_blocks(group) > self.host.num_free:
            return None
        targets: dict[int, int] = {}
        for sequence in group.unfinished:
            for block in self.held(sequence):
                if block in targets:
                    self.host.share(targets[block])
                else:
                    targets[block] = self.host.allocate()
            table = [targets[block] if block else 0 for block in sequence.block_ids]
            self.free(sequence)
            sequence.block_ids = table
        self.num_swapped_out_blocks += len(targets)
        return [BlockCopy(source, target) for source, target in targets.items()]

    def num_blocks_to_swap_in(self, group: SequenceGroup) -> int:
        """Free device blocks that `swap_in` takes."""
        found = self._find_on_device(group)
        counts = self.device.reference_counts
        num_copies = sum(block is None for block in found.values())
        return num_copies + len({block for block in found.values() if block is not None and not counts[block]})

    def swap_in(self, group: SequenceGroup) -> list[BlockCopy]:
        """Move the group's tables back to the device; return copies of the blocks that are not found there.

        Needs `num_blocks_to_swap_in` free blocks. The caller then sets the status of its sequences to RUNNING.
        """
        found = self._find_on_device(group)
        # hold all that was found before anything is taken, or a taken block could be one of them
        for block in found.values():
            if block is not None:
                self.device.share(block)
        copies = [BlockCopy(source, self._take()) for source, block in found.items() if block is None]
        targets = dict(copies) | {source: block for source, block in found.items() if block is not None}
        seen: set[int] = set()
        for sequence in group.unfinished:
            held = self.held(sequence)
            for source in held:
                if source in seen:
                    self.device.share(targets[source])
                seen.add(source)
            table = [targets[source] if source else 0 for source in sequence.block_ids]
            self.free(sequence)  # from the host: its status is still SWAPPED
            sequence.block_ids = table
            self._num_table_entries += len(held)
        self.num_swapped_in_blocks += len(copies)
        return copies

    def _find_on_device(self, group: SequenceGroup) -> dict[int, int | None]:
        """Host block -> device block with the same content, if the prefix cache still knows one."""
        found: dict[int, int | None] = {}
        for sequence in group.unfinished:
            # keys may reach further than the computed tokens: a block that is still to be written must be its own
            num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
            keys = self.block_keys(sequence, 0, num_full)
            for place, source in enumerate(sequence.block_ids):
                if source and source not in found:
                    column, of_group = divmod(place, self.num_groups)
                    key = group_key(keys[column], of_group) if column < len(keys) else None
                    found[source] = None if key is None else self.prefix_cache.find(key)
        return found

    # -- audit

    def check(self, groups: Iterable[SequenceGroup]) -> None:
        """Raise RuntimeError unless both pools hold exactly what the tables of `groups` (all live ones) say."""
        on_device: Counter[int] = Counter()
        on_host: Counter[int] = Counter()
        sequence_ids = set()
        for group in groups:
            for sequence in group.sequences:
                if sequence.status in (SequenceStatus.WAITING, SequenceStatus.FINISHED) and sequence.block_ids:
                    raise RuntimeError(f"sequence {sequence.sequence_id} is {sequence.status.value} and holds blocks")
                is_swapped = sequence.status is SequenceStatus.SWAPPED
                (on_host if is_swapped else on_device).update(self.held(sequence))
                if not sequence.is_finished:
                    sequence_ids.add(sequence.sequence_id)
                    self._check_table(sequence)
        self.device.check(on_device)
        self.host.check(on_host)
        self.prefix_cache.check()
        if self._num_table_entries != on_device.total():
            raise RuntimeError(f"{self._num_table_entries} table entries counted, {on_device.total()} are there")
        if not self._chains.keys() <= sequence_ids:
            raise RuntimeError(f"keys of ended sequences were kept: {sorted(self._chains.keys() - sequence_ids)[:5]}")

    def _check_table(self, sequence: Sequence) -> None:
        name, table, num_computed = f"sequence {sequence.sequence_id}", sequence.block_ids, sequence.num_computed_tokens
        num_columns, size, num_groups = self.layout.num_columns(num_computed), self.block_size, self.num_groups
        if len(table) != num_columns * num_groups:
            raise RuntimeError(f"{name} has {len(table)} blocks for {num_computed} computed tokens")
        for group, window in enumerate(self.layout.windows):
            is_held = [block > 0 for block in table[group::num_groups]]
            first = 0 if window is None else self.layout.first_column(window, num_computed)
            if is_held != sorted(is_held) or not all(is_held[first:]):
                raise RuntimeError(f"{name} lacks blocks of group {group} from column {first} on: {table}")
        counts = self._pool(sequence).reference_counts
        if num_computed % size and len({counts[block] for block in table[-num_groups:]}) > 1:
            raise RuntimeError(f"{name} shares some blocks of the column it writes, and not others: {table}")
