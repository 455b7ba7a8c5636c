"""The packed step: fields worked out by hand, and nothing of a former owner in a row."""

from array import array

import jax.numpy as jnp
import numpy as np

from jaxpaged.core.request import TOKEN_TYPE, Request, RowOrigin, Sequence
from jaxpaged.core.scheduler_output import ScheduledSequence
from jaxpaged.runner.buckets import Bucket
from jaxpaged.runner.input_batch import (
    Attending,
    PackedLayout,
    RowTables,
    build,
    needs_sampler,
    unpack,
    unpack_sampling,
)
from jaxpaged.sampling_params import SamplingParams

LAYOUT = PackedLayout(Bucket(16, 8, 4), 4, Attending(tile_size=4, key_chunk_tokens=64, has_decode_tiles=True))
GREEDY = SamplingParams(temperature=0)


def sequence(tables, row, tokens, blocks, params=GREEDY, num_prompt=None, **facts):
    prompt = tuple(tokens[:num_prompt])
    request = Request(request_id=str(row), prompt_token_ids=prompt, params=params, max_tokens=9, **facts)
    made = Sequence(row, request, 0, array(TOKEN_TYPE, tokens))
    made.row, made.block_ids = row, blocks
    tables.claim(row, made)
    return made


def test_a_mixed_step_worked_by_hand():
    tables = RowTables(4, 4)
    chunk = sequence(tables, 2, list(range(50, 60)), [3, 1, 2])  # tokens 3..8 of a prompt of 10, blocks of 4
    known = sequence(tables, 0, [7, 8, 9], [5], num_prompt=2)  # decodes its token 2, known to the host
    pending = sequence(tables, 1, [4, 5], [6], num_prompt=1)  # decodes its token 2, which only the device knows
    plan = [
        ScheduledSequence(chunk, 3, 6, 0),
        ScheduledSequence(known, 2, 1, 1),
        ScheduledSequence(pending, 2, 1, 1),
    ]
    built = build(plan, tables, LAYOUT, 4)
    assert built.is_plain
    assert not built.has_logprobs
    assert built.spans == ((2, 0, 0), (0, 0, 1), (1, 0, 1))  # plan order -> logit rows; decodes stand first
    field = LAYOUT.slices(built.packed)
    assert field["token_ids"][:8].tolist() == [9, 0, 53, 54, 55, 56, 57, 58]
    assert field["is_on_device"][:8].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert field["positions"][:8].tolist() == [2, 2, 3, 4, 5, 6, 7, 8]
    assert field["query_starts"].tolist() == [0, 1, 2, 8, 8]
    assert field["context_lens"].tolist() == [3, 3, 9, 0]
    assert field["num_decodes"][0] == 2
    assert field["num_tiles"][0] == 2
    assert field["tile_starts"][:2].tolist() == [2, 6]
    assert field["tile_lens"][:2].tolist() == [4, 2]
    assert field["logit_tokens"][:2].tolist() == [0, 1]
    assert field["sample_positions"][:2].tolist() == [3, 3]
    assert field["write_rows"].tolist() == [0, 1, 4, 4, 4, 4, 4, 4]

    history = np.zeros((5, 16), np.int32)
    history[1, 2] = 77  # what the step before sampled for the second sequence
    batch = unpack(jnp.asarray(built.packed), jnp.asarray(history), LAYOUT, 4)
    assert batch.token_ids[:8].tolist() == [9, 77, 53, 54, 55, 56, 57, 58]
    slots = batch.attention.groups[0].slot_mapping.tolist()
    assert slots[:8] == [5 * 4 + 2, 6 * 4 + 2, 3 * 4 + 3, 1 * 4, 1 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3, 2 * 4]
    assert slots[8:] == [0] * 8  # padding goes to the null block


def test_the_invariant_mode_cuts_decodes_into_tiles_too():
    tables = RowTables(4, 4)
    layout = PackedLayout(LAYOUT.bucket, 4, Attending(tile_size=4, key_chunk_tokens=64, has_decode_tiles=False))
    built = build([ScheduledSequence(sequence(tables, 0, [7, 8], [5]), 1, 1, 1)], tables, layout, 4)
    field = layout.slices(built.packed)
    assert (field["num_decodes"][0], field["num_tiles"][0], field["tile_lens"][0]) == (0, 1, 1)


def test_sampling_columns_survive_the_trip_as_bits():
    tables = RowTables(4, 4)
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.3,
                            presence_penalty=-0.5, frequency_penalty=0.25, logprobs=1)
    one = sequence(tables, 3, [1, 2, 3], [9], params, seed=(5 << 32) | 0xFFFFFFFF)
    built = build([ScheduledSequence(one, 0, 3, 1)], tables, LAYOUT, 4)
    assert not built.is_plain
    assert built.has_logprobs
    sampling = unpack_sampling(jnp.asarray(built.packed[LAYOUT.sampling_start :]), LAYOUT.bucket.num_logits)
    assert sampling.seeds[0].tolist() == [0xFFFFFFFF, 5]
    assert np.allclose(sampling.temperature[:2], [0.7, 0.0])
    assert np.allclose(sampling.top_p[:2], [0.9, 1.0])
    assert np.allclose(sampling.repetition[:2], [1.3, 1.0])
    assert sampling.top_k[:2].tolist() == [5, 0]
    assert sampling.rows.tolist() == [3] + [4] * 7
    assert bool(sampling.any_random)
    assert bool(sampling.any_truncation)
    assert bool(sampling.any_penalty)
    assert not bool(sampling.any_bias)


def test_samples_of_one_prompt_share_its_logits_and_differ_in_their_index():
    tables = RowTables(4, 4)
    one = sequence(tables, 2, [1, 2, 3], [9], SamplingParams(temperature=1.0, n=3))
    built = build([ScheduledSequence(one, 0, 3, 3)], tables, LAYOUT, 4)
    field = LAYOUT.slices(built.packed)
    assert built.spans == ((0, 0, 3),)
    assert field["logit_tokens"][:3].tolist() == [2, 2, 2]
    assert field["sample_index"][:3].tolist() == [0, 1, 2]
    assert field["write_rows"][:4].tolist() == [2, 4, 4, 4]


def test_prompt_logprobs_take_a_row_per_next_prompt_token():
    tables = RowTables(4, 4)
    one = sequence(tables, 2, [11, 12, 13], [9], SamplingParams(temperature=0, prompt_logprobs=0))
    built = build([ScheduledSequence(one, 0, 3, 1)], tables, LAYOUT, 4)
    field = LAYOUT.slices(built.packed)
    assert built.spans == ((0, 2, 1),)
    assert field["target_ids"][:3].tolist() == [12, 13, 0]
    assert field["has_target"][:3].tolist() == [1, 1, 0]


def test_a_row_is_loaded_for_lists_and_cleared_of_a_former_owners():
    tables = RowTables(2, 4)

    def claimed(params, epoch=0):
        request = Request(request_id="", prompt_token_ids=(1,), params=params, max_tokens=9)
        made = Sequence(0, request, 0, array(TOKEN_TYPE, [1]), epoch=epoch)
        return made, tables.claim(0, made)

    assert not claimed(GREEDY)[1]
    biased = SamplingParams(temperature=0, logit_bias={3: 1.0})
    owner, must_load = claimed(biased)
    assert must_load
    assert tables.is_owned_by(0, owner)
    owner.epoch += 1
    assert not tables.is_owned_by(0, owner)
    assert claimed(GREEDY)[1]  # the bias must go
    assert not claimed(GREEDY)[1]


def test_a_row_may_begin_as_its_origin_while_that_is_what_it_was():
    tables = RowTables(3, 4)
    parent = sequence(tables, 0, [7, 8], [5])
    fork = Sequence(8, parent.request, 1, array(TOKEN_TYPE, [7, 8, 9]), row_origin=RowOrigin(0, parent.sequence_id, 0))
    assert tables.origin_of(fork) == 0
    assert tables.origin_of(parent) is None
    fork.epoch = 1  # it was preempted before it ever ran
    assert tables.origin_of(fork) is None
    fork.epoch = 0
    parent.epoch = 1
    tables.claim(0, parent)  # filled afresh, perhaps with more tokens
    assert tables.origin_of(fork) is None
    parent.epoch = 0
    tables.claim(0, parent)
    tables.claim(0, fork)  # the parent has ended, and its row is another's
    assert tables.origin_of(fork) is None


def test_which_requests_need_the_sampler():
    def asks(params, **facts):
        return needs_sampler(Request(request_id="", prompt_token_ids=(1,), params=params, max_tokens=9, **facts))

    assert not asks(GREEDY)
    assert not asks(SamplingParams(temperature=0, top_p=0.5, min_tokens=3))  # nothing to cut or to ban
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0, presence_penalty=1.0),
        SamplingParams(temperature=0, allowed_token_ids=[1]),
    ):
        assert asks(params)
    assert asks(SamplingParams(temperature=0, min_tokens=3), stop_token_ids=frozenset({2}))
