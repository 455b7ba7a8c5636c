"""The block tables: the only writer of `Sequence.block_ids`."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from jaxpaged.core.block_pool import BlockPool
from jaxpaged.core.prefix_cache import PrefixCache, chain_key, root_key
from jaxpaged.core.request import Sequence, SequenceGroup, SequenceStatus
from jaxpaged.core.scheduler_output import BlockCopy, ScheduledSequence

_NO_COPIES: tuple[BlockCopy, ...] = ()


@dataclass(slots=True)
class _Chain:
    """The chain keys of a sequence's leading full blocks; they outlive its table, since tokens never change."""

    root: bytes
    keys: list[bytes]
    num_committed: int = 0
    """Leading blocks of the present device table that were offered to the prefix cache."""


class BlockManager:
    """Block tables over a device pool and a host pool.

    A table is in the host pool exactly while its sequence's status is SWAPPED. Blocks are taken for tokens that are
    scheduled, never ahead; every method that cannot fail says so, for the others ask first.
    """

    def __init__(
        self, *, num_device_blocks: int, num_host_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        if num_device_blocks < 2:
            raise ValueError(f"num_device_blocks={num_device_blocks} must be 2 or more: one is the null block")
        if num_host_blocks < 0 or block_size < 1:
            raise ValueError(f"{num_host_blocks=} must be 0 or more and {block_size=} 1 or more")
        self.block_size = block_size
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

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_distinct_blocks(self, group: SequenceGroup) -> int:
        """Blocks the group's tables hold, a shared one counted once."""
        sequences = group.unfinished
        if len(sequences) == 1:
            return len(sequences[0].block_ids)
        return len({block for sequence in sequences for block in sequence.block_ids})

    # -- the prefix cache

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """The sequence's chain keys, `num_blocks` of them at least; their tokens must be known."""
        chain = self._chain(sequence)
        keys, size, tokens = chain.keys, self.block_size, sequence.token_ids
        for index in range(len(keys), num_blocks):
            keys.append(chain_key(keys[-1] if keys else chain.root, tokens[index * size : (index + 1) * size]))
        return keys

    def _chain(self, sequence: Sequence) -> _Chain:
        chain = self._chains.get(sequence.sequence_id)
        if chain is None:
            chain = self._chains[sequence.sequence_id] = _Chain(root_key(sequence.request.cache_salt), [])
        return chain

    def match(self, sequence: Sequence) -> list[int]:
        """Device blocks that hold the sequence's first tokens: whole blocks, one token at least left to compute."""
        if not self.enable_prefix_caching:
            return []
        limit = (len(sequence.token_ids) - 1) // self.block_size
        blocks = []
        for key in self._keys(sequence, limit)[:limit]:
            block = self.prefix_cache.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def block_keys(self, sequence: Sequence, first: int, last: int) -> list[bytes]:
        """Chain keys of the known full blocks among [first, last); empty without a prefix cache."""
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
        keys, table = self._keys(sequence, num_full), sequence.block_ids
        for index in range(chain.num_committed, num_full):
            self.prefix_cache.insert(keys[index], table[index])
        chain.num_committed = num_full

    def discard(self, sequence: Sequence) -> None:
        """Nothing this sequence computed or read stays findable, wherever its table is now."""
        chain = self._chains.get(sequence.sequence_id)
        for key in chain.keys if chain else ():
            self.prefix_cache.forget_key(key)

    def reset_prefix_cache(self) -> None:
        self.prefix_cache.reset()

    # -- growing a table

    def can_allocate(self, match: ListLike[int], num_blocks: int, num_reserved: int = 0) -> bool:
        """Whether `num_blocks` blocks, those of `match` among them, can be held while `num_reserved` stay free."""
        counts = self.device.reference_counts
        num_held = sum(1 for block in match if counts[block])
        return num_blocks - num_held + num_reserved <= self.device.num_free

    def allocate(self, sequence: Sequence, match: ListLike[int]) -> None:
        """Put the matched blocks behind those the sequence has. Cannot fail: each is held already or free."""
        for block in match:
            self.device.share(block)
        sequence.block_ids.extend(match)
        self._num_table_entries += len(match)
        self._chain(sequence).num_committed = len(sequence.block_ids)

    def num_blocks_to_append(self, items: ListLike[ScheduledSequence]) -> int:
        """New blocks that writing the items' tokens takes, copy-on-write included (items of one group)."""
        size = self.block_size
        if len(items) == 1:
            sequence, start, num_new_tokens, _ = items[0]
            table = sequence.block_ids
            num_blocks = -(-(start + num_new_tokens) // size) - len(table)
            index = start // size
            if index < len(table) and self._pool(sequence).reference_counts[table[index]] > 1:
                num_blocks += 1
            return num_blocks
        num_blocks = 0
        copied: Counter[int] = Counter()
        for sequence, start, num_new_tokens, _ in items:
            table = sequence.block_ids
            num_blocks += -(-(start + num_new_tokens) // size) - len(table)
            index = start // size
            if index < len(table):
                block = table[index]
                if self._pool(sequence).reference_counts[block] - copied[block] > 1:
                    copied[block] += 1
                    num_blocks += 1
        return num_blocks

    def append(self, sequence: Sequence, start: int, num_new_tokens: int) -> ListLike[BlockCopy]:
        """Make [start, start + num_new_tokens) writable, `start` being what is computed; return copy-on-write copies.

        Only the block that `start` stands in can be there already, and be shared: full ones are never written again.
        """
        table, pool, size = sequence.block_ids, self.device, self.block_size
        num_held = len(table)
        index = start // size
        copies: ListLike[BlockCopy] = _NO_COPIES
        if index < num_held and pool.reference_counts[table[index]] > 1:
            source = table[index]
            target = self._take()
            pool.release(source)
            table[index] = target
            copies = [BlockCopy(source, target)]
            self.num_copied_blocks += 1
        num_new_blocks = -(-(start + num_new_tokens) // size) - num_held
        if num_new_blocks > 0:
            for _ in range(num_new_blocks):
                table.append(self._take())
            self._num_table_entries += num_new_blocks
        return copies

    def _take(self) -> int:
        """A device block to write anew: what it held is no longer findable."""
        block = self.device.allocate()
        self.prefix_cache.forget(block)
        return block

    # -- sharing

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child's table becomes the parent's, in the pool the parent is in. Cannot fail."""
        pool = self._pool(parent)
        for block in parent.block_ids:
            pool.share(block)
        child.block_ids = list(parent.block_ids)
        if pool is self.device:
            self._num_table_entries += len(child.block_ids)
        chain = self._chain(parent)
        self._chains[child.sequence_id] = _Chain(chain.root, list(chain.keys), chain.num_committed)

    def share_prefix(self, leader: Sequence, member: Sequence, num_blocks: int) -> None:
        """The member, without a table so far, takes the leader's first `num_blocks` device blocks. Cannot fail."""
        self.allocate(member, leader.block_ids[:num_blocks])

    # -- leaving

    def free(self, sequence: Sequence) -> None:
        """Drop the table, last block first, so that of a cached prefix the tail is reused before the head."""
        pool = self._pool(sequence)
        if pool is self.device:
            self._num_table_entries -= len(sequence.block_ids)
        for block in reversed(sequence.block_ids):
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
            table = []
            for block in sequence.block_ids:
                if block in targets:
                    self.host.share(targets[block])
                else:
                    targets[block] = self.host.allocate()
                table.append(targets[block])
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
            table = []
            for source in sequence.block_ids:
                if source in seen:
                    self.device.share(targets[source])
                seen.add(source)
                table.append(targets[source])
            self.free(sequence)  # from the host: its status is still SWAPPED
            sequence.block_ids = table
            self._num_table_entries += len(table)
        self.num_swapped_in_blocks += len(copies)
        return copies

    def _find_on_device(self, group: SequenceGroup) -> dict[int, int | None]:
        """Host block -> device block with the same content, if the prefix cache still knows one."""
        found: dict[int, int | None] = {}
        for sequence in group.unfinished:
            # keys may reach further than the computed tokens: a block that is still to be written must be its own
            num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
            keys = self.block_keys(sequence, 0, num_full)
            for index, source in enumerate(sequence.block_ids):
                if source not in found:
                    found[source] = self.prefix_cache.find(keys[index]) if index < len(keys) else None
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
                (on_host if sequence.status is SequenceStatus.SWAPPED else on_device).update(sequence.block_ids)
                if not sequence.is_finished:
                    sequence_ids.add(sequence.sequence_id)
                    if len(sequence.block_ids) != self.num_blocks_for(sequence.num_computed_tokens):
                        raise RuntimeError(
                            f"sequence {sequence.sequence_id} has {len(sequence.block_ids)} blocks "
                            f"for {sequence.num_computed_tokens} computed tokens"
                        )
        self.device.check(on_device)
        self.host.check(on_host)
        self.prefix_cache.check()
        if self._num_table_entries != on_device.total():
            raise RuntimeError(f"{self._num_table_entries} table entries counted, {on_device.total()} are there")
        if not self._chains.keys() <= sequence_ids:
            raise RuntimeError(f"keys of ended sequences were kept: {sorted(self._chains.keys() - sequence_ids)[:5]}")
