"""What one step reads: built in numpy from a plan, sent to the device as one array, unpacked inside the step.

Every field of a bucket has a fixed place in one int32 vector (`PackedLayout`); float fields travel as their bits.
Facts of a sequence that do not change from step to step (sampling columns, block table) are kept in rows of numpy
tables (`RowTables`), so that a step gathers rows instead of visiting every sequence's parameters again.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jaxpaged.core.request import Request, Sequence
from jaxpaged.core.scheduler_output import ScheduledSequence
from jaxpaged.core.step_plan import num_prompt_logprob_rows
from jaxpaged.models.layer_groups import GroupedMetadata, LayerGroups
from jaxpaged.runner.buckets import Bucket
from jaxpaged.runner.sampling_batch import SamplingBatch
from jaxpaged.sampling_params import SamplingParams
from pallas_kernels import AttentionMetadata

INT_COLUMNS = ("seed_low", "seed_high", "sample_index", "prompt_len", "top_k")
FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
FLAGS = (
    "any_random",
    "any_truncation",
    "any_penalty",
    "any_bias",
    "any_allowed",
    "any_bad_words",
    "any_ban",
    "any_logprobs",
)
ROW_FLAGS = 6  # the first six follow from a row's parameters alone
HAS_GRAMMAR = 1 << 30
"""Bit of a row's extras; the lower ones stand for the engine's logits processors."""


@dataclass(frozen=True)
class Attending:
    """How queries are cut for the attention kernel."""

    tile_size: int
    """Most query tokens in a tile of a chunk."""
    key_chunk_tokens: int
    """Keys read per turn of the kernel's inner loop."""
    has_decode_tiles: bool
    """False sends decodes through chunk tiles too, so that every query meets the same shapes (batch-invariant)."""


ONE_GROUP = LayerGroups((None,), 1)
"""For those who ask for no particular layers."""


def sampling_lengths(num_rows: int) -> dict[str, int]:
    """The fields that the sampler reads, and their lengths: they follow from the number of logit rows alone."""
    names = ("rows", "write_rows", "sample_positions", "ban_stops", "target_ids", "has_target")
    return {"flags": len(FLAGS)} | dict.fromkeys(names + INT_COLUMNS + FLOAT_COLUMNS, num_rows)


def _places(lengths: dict[str, int], start: int) -> dict[str, tuple[int, int]]:
    """Name -> (start, length) of fields that lie one behind the other."""
    found = {}
    for name, length in lengths.items():
        found[name] = (start, length)
        start += length
    return found


@dataclass(frozen=True)
class PackedLayout:
    """Where each field of one bucket lies in the packed vector."""

    bucket: Bucket
    blocks_per_seq: int
    """Columns of a block table."""
    attending: Attending
    groups: LayerGroups = ONE_GROUP

    @property
    def num_groups(self) -> int:
        return len(self.groups.windows)

    @property
    def num_tile_slots(self) -> int:
        """Tiles that the bucket's tokens can be cut into at most."""
        bucket = self.bucket
        least_tokens = 2 if self.attending.has_decode_tiles else 1  # of a sequence that is cut into tiles
        return bucket.num_tokens // self.attending.tile_size + min(bucket.num_seqs, bucket.num_tokens // least_tokens)

    @cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Name -> (start, length)."""
        tokens, seqs = self.bucket.num_tokens, self.bucket.num_seqs
        lengths = {
            "token_ids": tokens,
            "token_seqs": tokens,
            "positions": tokens,
            "is_on_device": tokens,
            "context_lens": seqs,
            "seq_rows": seqs,
            "query_starts": seqs + 1,
            "block_tables": seqs * self.blocks_per_seq * self.num_groups,
            "tile_sequences": self.num_tile_slots,
            "tile_starts": self.num_tile_slots,
            "tile_lens": self.num_tile_slots,
            "num_decodes": 1,
            "num_tiles": 1,
            "logit_tokens": self.bucket.num_logits,
            **sampling_lengths(self.bucket.num_logits),
        }
        return _places(lengths, 0)

    @property
    def sampling_start(self) -> int:
        """Where the sampler's part begins; it ends with the vector."""
        return self.fields["flags"][0]

    @property
    def size(self) -> int:
        start, length = self.fields[FLOAT_COLUMNS[-1]]
        return start + length

    def slices(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Views of the fields of a packed int32 vector [size]."""
        return {name: packed[start : start + length] for name, (start, length) in self.fields.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputBatch:
    """One step's inputs on the device."""

    token_ids: Int32[Array, "tokens"]
    positions: Int32[Array, "tokens"]
    attention: GroupedMetadata
    """An AttentionMetadata for each layer group."""
    logit_tokens: Int32[Array, "rows"]
    """Which token's hidden state each logit row is made of."""


def _row_flags(request: Request) -> tuple[bool, ...]:
    """The first ROW_FLAGS of FLAGS, as far as one request needs them."""
    params = request.params
    is_random = params.temperature > 0
    return (
        is_random,
        is_random and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
        params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1,
        bool(params.logit_bias),
        params.allowed_token_ids is not None,
        bool(request.bad_words_token_ids),
    )


def _banned_until(request: Request) -> int:
    """Output tokens before which stop tokens are banned; 0 where there are none to ban."""
    return request.params.min_tokens if request.stop_token_ids else 0


def needs_sampler(request: Request) -> bool:
    """Whether a step with this request is not plain."""
    params = request.params
    has_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    return any(_row_flags(request)) or _banned_until(request) > 0 or has_logprobs


def has_lists(request: Request) -> bool:
    """Whether the sampler needs the request's tokens or lists in its device state."""
    has_processors = bool(request.params.logits_processors)
    return any(_row_flags(request)[2:]) or _banned_until(request) > 0 or has_processors


def needs_extended_sampler(request: Request) -> bool:
    """Whether a step with this request needs the sampler of grammars and logits processors."""
    return request.params.structured_outputs is not None or bool(request.params.logits_processors)


ProcessorBits = Callable[[SamplingParams], int]
"""The bits of a row's extras that stand for the logits processors its parameters name."""


class RowTables:
    """Per-row facts on the host; row N (the last) is a dummy for padding.

    What a sequence has let go of stays in its row of `block_tables`: attention does not care what stands there.
    """

    def __init__(
        self, num_rows: int, blocks_per_seq: int, num_groups: int = 1, processor_bits: ProcessorBits = lambda params: 0
    ) -> None:
        self.num_rows = num_rows
        self.block_tables = np.zeros((num_rows + 1, blocks_per_seq * num_groups), np.int32)
        self.ints = np.zeros((num_rows + 1, len(INT_COLUMNS)), np.int32)
        self.floats = np.zeros((num_rows + 1, len(FLOAT_COLUMNS)), np.float32)
        self.floats[:, 1] = 1.0
        self.floats[:, 5] = 1.0
        self.flags = np.zeros((num_rows + 1, ROW_FLAGS), np.int32)
        self.min_tokens = np.zeros(num_rows + 1, np.int32)
        self.wants_logprobs = np.zeros(num_rows + 1, np.int32)
        self.extras = np.zeros(num_rows + 1, np.int32)
        self._processor_bits = processor_bits
        self._has_lists = [False] * (num_rows + 1)
        """Whether the sampler's device state of a row holds lists, this sequence's or a former one's."""
        self._owners: list[tuple[Sequence, int] | None] = [None] * (num_rows + 1)

    def is_owned_by(self, row: int, sequence: Sequence) -> bool:
        owner = self._owners[row]
        return owner is not None and owner[0] is sequence and owner[1] == sequence.epoch

    def claim(self, row: int, sequence: Sequence) -> bool:
        """Fill a row afresh for a sequence; True if the sampler's device state of the row must be loaded too.

        It must where the sampler needs the sequence's tokens or lists, and where a former owner's lists would stay.
        """
        self._owners[row] = (sequence, sequence.epoch)
        request = sequence.request
        params = request.params
        flags = _row_flags(request)
        seed = np.array([request.seed & 0xFFFFFFFF, (request.seed >> 32) & 0xFFFFFFFF], np.uint32).view(np.int32)
        self.ints[row] = (seed[0], seed[1], sequence.sample_index, request.num_prompt_tokens,
                          min(params.top_k, 2**31 - 1))
        self.floats[row] = (params.temperature, params.top_p, params.min_p, params.presence_penalty,
                            params.frequency_penalty, params.repetition_penalty)
        self.flags[row] = flags
        self.min_tokens[row] = _banned_until(request)
        self.wants_logprobs[row] = params.logprobs is not None
        uses = self._processor_bits(params) if params.logits_processors else 0
        self.extras[row] = uses | (HAS_GRAMMAR if params.structured_outputs is not None else 0)
        self.block_tables[row] = 0
        table = sequence.block_ids
        self.block_tables[row, : len(table)] = table
        has_own_lists = has_lists(request)
        must_load = has_own_lists or self._has_lists[row]
        self._has_lists[row] = has_own_lists
        return must_load

    def origin_of(self, sequence: Sequence) -> int | None:
        """The row that a sequence's may be copied from in place of being loaded, as long as it is what it was.

        Copies are to be made in the order of the claims, before any row is loaded.
        """
        origin = sequence.row_origin
        owner = None if origin is None or sequence.epoch else self._owners[origin.row]
        if origin is None or owner is None:
            return None
        is_as_it_was = owner[0].sequence_id == origin.sequence_id and owner[1] == origin.epoch
        return origin.row if is_as_it_was else None


@dataclass(frozen=True)
class BuiltBatch:
    """A packed step and how its logit rows map back to the plan."""

    packed: np.ndarray
    layout: PackedLayout
    spans: tuple[tuple[int, int, int], ...]
    """Per scheduled sequence, in plan order: (first logit row, prompt-logprob rows, sampled rows)."""
    is_plain: bool
    """Whether every row is greedy, without lists, penalties or log-probabilities: then the step needs no sampler."""
    has_logprobs: bool
    num_candidates: int
    """Continuations that some beam wants of its row; 0 in a step without beams."""
    extras: np.ndarray | None = None
    """int32 [logit rows], where a row has a grammar or logits processors: which (HAS_GRAMMAR, and a bit for each)."""


def build(
    scheduled: List[ScheduledSequence], tables: RowTables, layout: PackedLayout, block_size: int
) -> BuiltBatch:
    """Fill the packed vector of a bucket from a plan. Rows must have been claimed; nothing here touches a device."""
    packed = np.zeros(layout.size, np.int32)
    fields = layout.slices(packed)
    dummy = tables.num_rows
    has_decode_tiles = layout.attending.has_decode_tiles
    order = sorted(range(len(scheduled)), key=lambda i: scheduled[i].num_new_tokens > 1)
    block_tables, num_groups = tables.block_tables, layout.num_groups
    has_one_group = num_groups == 1
    token_ids, is_on_device = fields["token_ids"], fields["is_on_device"]

    seq_rows: list[int] = []
    starts: list[int] = []
    counts: list[int] = []
    singles: list[int] = []  # token ids of the query-length-1 sequences, in order
    pending: list[int] = []  # their packed tokens whose id only the device knows
    cursor = 0
    for i in order:
        sequence, start, count, _ = scheduled[i]
        row = sequence.row
        assert row is not None
        seq_rows.append(row)
        starts.append(start)
        counts.append(count)
        first = start // block_size
        ids = sequence.block_ids
        last = (start + count - 1) // block_size
        if has_one_group and first == last:
            block_tables[row, first] = ids[first]
        else:
            columns = slice(first * num_groups, (last + 1) * num_groups)
            block_tables[row, columns] = ids[columns]
        known = sequence.token_ids
        if count == 1:
            if start < len(known):
                singles.append(known[start])
            else:
                singles.append(0)
                pending.append(cursor)
        else:
            token_ids[cursor : cursor + count] = known[start : start + count]
        cursor += count

    num_seqs = len(order)
    num_singles = len(singles)
    start_array = np.array(starts, np.int32)
    count_array = np.array(counts, np.int32)
    row_array = np.array(seq_rows, np.int32)
    token_ids[:num_singles] = singles
    is_on_device[pending] = 1
    query_starts = fields["query_starts"]
    np.cumsum(count_array, out=query_starts[1 : num_seqs + 1])
    query_starts[num_seqs + 1 :] = cursor
    seq_index = np.repeat(np.arange(num_seqs, dtype=np.int32), count_array)
    fields["token_seqs"][:cursor] = seq_index
    fields["positions"][:cursor] = (
        np.arange(cursor, dtype=np.int32) - query_starts[:num_seqs][seq_index] + start_array[seq_index]
    )
    # a padding token belongs to no sequence: its slot is cut to the null block on the device
    fields["token_seqs"][cursor:] = layout.bucket.num_seqs
    fields["context_lens"][:num_seqs] = start_array + count_array
    fields["seq_rows"][:] = dummy
    fields["seq_rows"][:num_seqs] = row_array
    fields["block_tables"].reshape(layout.bucket.num_seqs, -1)[:num_seqs] = block_tables[row_array]

    num_decodes = num_singles if has_decode_tiles else 0
    fields["num_decodes"][0] = num_decodes
    _cut_tiles(fields, query_starts, counts, num_decodes, layout.attending.tile_size)
    spans = _fill_logit_rows(fields, scheduled, order, query_starts, tables)
    flags = fields["flags"]
    beams = [item.sequence.request.beams for item in scheduled if item.num_samples]
    extras = tables.extras[fields["rows"]]
    has_extras = bool(extras.any())
    return BuiltBatch(
        packed,
        layout,
        spans,
        is_plain=not (has_extras or flags.any()),
        has_logprobs=bool(flags[-1]),
        num_candidates=max((one.num_candidates for one in beams if one is not None), default=0),
        extras=extras if has_extras else None,
    )


def _cut_tiles(
    fields: dict[str, np.ndarray], query_starts: np.ndarray, counts: list[int], num_decodes: int, tile_size: int
) -> None:
    tiles = [
        (i, int(query_starts[i]) + offset, min(tile_size, counts[i] - offset))
        for i in range(num_decodes, len(counts))
        for offset in range(0, counts[i], tile_size)
    ]
    fields["num_tiles"][0] = len(tiles)
    if tiles:
        columns = np.array(tiles, np.int32)
        for column, name in enumerate(("tile_sequences", "tile_starts", "tile_lens")):
            fields[name][: len(tiles)] = columns[:, column]


def _fill_logit_rows(
    fields: dict[str, np.ndarray],
    scheduled: List[ScheduledSequence],
    order: list[int],
    query_starts: np.ndarray,
    tables: RowTables,
) -> tuple[tuple[int, int, int], ...]:
    """Fill the fields of the logit rows; returns `BuiltBatch.spans`."""
    dummy = tables.num_rows
    tokens: list[int] = []
    rows: list[int] = []
    write_rows: list[int] = []
    positions: list[int] = []
    forks: list[tuple[int, int]] = []  # (logit row, sample index) of samples that have no row of their own yet
    targets: list[tuple[int, int]] = []  # (logit row, token id)
    spans: list[tuple[int, int, int]] = [(0, 0, 0)] * len(scheduled)
    ends = query_starts[1 : len(order) + 1].tolist()
    for place, i in enumerate(order):
        item = scheduled[i]
        sequence, start, count, num_samples = item
        row = sequence.row
        assert row is not None
        prompt_rows = num_prompt_logprob_rows(item)
        spans[i] = (len(tokens), prompt_rows, num_samples)
        first_token = ends[place] - count
        for k in range(prompt_rows):
            targets.append((len(tokens), sequence.request.prompt_token_ids[start + k + 1]))
            tokens.append(first_token + k)
            rows.append(dummy)
            write_rows.append(dummy)
            positions.append(start + k + 1)
        if num_samples:
            is_fork = num_samples > 1
            for k in range(num_samples):
                if is_fork:
                    forks.append((len(tokens), k))
                tokens.append(ends[place] - 1)
                rows.append(row)
                write_rows.append(row if k == 0 else dummy)
                positions.append(start + count)
    num_rows = len(tokens)
    row_array = np.array(rows, np.int32)
    fields["logit_tokens"][:num_rows] = tokens
    for name in ("rows", "write_rows"):
        fields[name][:] = dummy
    fields["rows"][:num_rows] = row_array
    fields["write_rows"][:num_rows] = write_rows
    fields["sample_positions"][:num_rows] = positions
    # every row beyond num_rows takes the dummy row's neutral columns
    all_rows = fields["rows"]
    ints, floats = tables.ints[all_rows], tables.floats[all_rows]
    for column, name in enumerate(INT_COLUMNS):
        fields[name][:] = ints[:, column]
    for column, name in enumerate(FLOAT_COLUMNS):
        fields[name][:] = floats[:, column].view(np.int32)
    for logit_row, sample_index in forks:
        fields["sample_index"][logit_row] = sample_index
    for logit_row, target in targets:
        fields["target_ids"][logit_row] = target
        fields["has_target"][logit_row] = 1
    bans = (fields["sample_positions"][:num_rows] - fields["prompt_len"][:num_rows]) < tables.min_tokens[row_array]
    fields["ban_stops"][:num_rows] = bans
    flags = fields["flags"]
    if num_rows:
        flags[:ROW_FLAGS] = tables.flags[row_array].any(axis=0)
        flags[6] = bans.any()
        flags[7] = bool(targets) or tables.wants_logprobs[row_array].any()
    return tuple(spans)


def unpack(
    packed: Int32[Array, "size"], history: Int32[Array, "state_rows max_len"], layout: PackedLayout, block_size: int
) -> InputBatch:
    """What the model reads of a packed vector; ids sampled by the step before come from `history`."""
    field = _sliced(packed, layout.fields)
    bucket = layout.bucket
    positions, token_seqs = field["positions"], field["token_seqs"]
    is_padding = token_seqs >= bucket.num_seqs
    seqs = jnp.where(is_padding, 0, token_seqs)
    block_tables = field["block_tables"].reshape(bucket.num_seqs, layout.blocks_per_seq, layout.num_groups)
    sampled = history[field["seq_rows"][seqs], positions]
    token_ids = jnp.where(field["is_on_device"] != 0, sampled, field["token_ids"])

    def attention_of(group: int) -> AttentionMetadata:
        blocks = block_tables[seqs, positions // block_size, group]
        return AttentionMetadata(
            block_tables=block_tables[:, :, group],
            context_lens=field["context_lens"],
            query_starts=field["query_starts"],
            slot_mapping=jnp.where(is_padding, 0, blocks * block_size + positions % block_size),
            num_decodes=field["num_decodes"][0],
            tile_sequences=field["tile_sequences"],
            tile_starts=field["tile_starts"],
            tile_lens=field["tile_lens"],
            num_tiles=field["num_tiles"][0],
            tile_size=layout.attending.tile_size,
            key_chunk_tokens=layout.attending.key_chunk_tokens,
        )

    attention = GroupedMetadata(tuple(map(attention_of, range(layout.num_groups))), layout.groups.places)
    return InputBatch(token_ids, positions, attention, field["logit_tokens"])


def _sliced(packed: Int32[Array, "size"], places: dict[str, tuple[int, int]]) -> dict[str, Int32[Array, "length"]]:
    return {name: jax.lax.slice(packed, (start,), (start + length,)) for name, (start, length) in places.items()}


def unpack_sampling(packed: Int32[Array, "size"], num_rows: int) -> SamplingBatch:
    """What the sampler reads: the part of a packed vector from `PackedLayout.sampling_start` on."""
    field = _sliced(packed, _places(sampling_lengths(num_rows), 0))

    def as_float(name: str) -> Array:
        return jax.lax.bitcast_convert_type(field[name], jnp.float32)

    flags = {name: field["flags"][i] != 0 for i, name in enumerate(FLAGS)}
    seeds = jax.lax.bitcast_convert_type(jnp.stack([field["seed_low"], field["seed_high"]], axis=1), jnp.uint32)
    return SamplingBatch(
        rows=field["rows"],
        seeds=seeds,
        sample_index=field["sample_index"],
        position=field["sample_positions"],
        prompt_lens=field["prompt_len"],
        write_rows=field["write_rows"],
        temperature=as_float("temperature"),
        top_p=as_float("top_p"),
        min_p=as_float("min_p"),
        presence=as_float("presence_penalty"),
        frequency=as_float("frequency_penalty"),
        repetition=as_float("repetition_penalty"),
        top_k=field["top_k"],
        ban_stops=field["ban_stops"] != 0,
        target_ids=field["target_ids"],
        has_target=field["has_target"] != 0,
        **flags,
    )
