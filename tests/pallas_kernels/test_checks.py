"""A wrong block id is one clear error that says whose it is, and the engine's own steps have none."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make_engine, random_prompts, run, tiny_model

from jaxpaged.runner.input_batch import unpack
from jaxpaged.sampling_params import SamplingParams
from pallas_kernels import AttentionMetadata, check_copies, check_metadata, make_metadata

NUM_BLOCKS, BLOCK_SIZE = 10, 4
check = partial(check_metadata, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def batch(tables: list[list[int]] | None = None, **changes: Any) -> AttentionMetadata:
    """Two decodes at contexts 5 and 4, a chunk of 6 of 9 tokens, two padding rows and padding tokens.

    Tokens 0 and 1 are the decodes, 2 to 7 the chunk, in tiles of 4 and 2. Slots are 12, 7, and 23 to 28.
    """
    metadata = make_metadata(
        block_tables=np.array(tables or [[2, 3, 0], [1, 0, 0], [5, 6, 7]], np.int32),
        context_lens=[5, 4, 9], query_lens=[1, 1, 6], block_size=BLOCK_SIZE, num_tokens=12, num_seqs=5,
        tile_size=4, key_chunk_tokens=8,
    )  # fmt: skip
    return replace(metadata, **{name: jnp.asarray(value) for name, value in changes.items()})


def changed(name: str, place: Any, value: int) -> AttentionMetadata:
    metadata = batch()
    array = np.asarray(getattr(metadata, name)).copy()
    array[place] = value
    return replace(metadata, **{name: jnp.asarray(array)})


def test_a_right_batch_passes() -> None:
    check(batch())
    # what nobody reads may be anything: table entries behind the last block, and rows of padding
    check(changed("block_tables", (1, 2), 999))
    check(changed("block_tables", (4, 0), -7))


def test_blocks_before_the_window_may_be_anybodys() -> None:
    # the chunk's first token stands at 3, the decode of sequence 0 at 4: with a window of 1 it sees block 1 alone
    check(batch([[0, 3, 0], [1, 0, 0], [5, 6, 7]]), window=1)
    check(batch([[7, 3, 0], [1, 0, 0], [5, 6, 7]]), window=1)
    with pytest.raises(ValueError, match="sequence 0, column 0 .*: block 0 of"):
        check(batch([[0, 3, 0], [1, 0, 0], [5, 6, 7]]), window=2)
    with pytest.raises(ValueError, match="sequence 2, column 0 .*: block 0 of"):
        check(batch([[2, 3, 0], [1, 0, 0], [0, 6, 7]], slot_mapping=[12, 7, 3, 24, 25, 26, 27, 28, *[0] * 4]), window=1)
    with pytest.raises(ValueError, match="sequence 0, column 0 .*: block 10 of"):
        check(batch([[10, 3, 0], [1, 0, 0], [5, 6, 7]]), window=1)


WRONG = {
    "id too large": (lambda: batch([[2, 3, 0], [1, 0, 0], [5, 6, 10]]),
                     r"sequence 2, column 2 of its block table: block 10 of a cache of 10 blocks; there is no such"),
    "negative id": (lambda: batch([[2, -1, 0], [1, 0, 0], [5, 6, 7]]), r"sequence 0, column 1 .*: block -1 of"),
    "null block": (lambda: batch([[2, 3, 0], [0, 0, 0], [5, 6, 7]]), r"sequence 1, column 0 .*block 0 is the null"),
    "two writers": (lambda: batch([[2, 3, 0], [5, 0, 0], [5, 6, 7]]),
                    r"token 2 of sequence 2 and token 1 of sequence 1 are both written to slot 23: copy block 5"),
    "slot out of range": (lambda: changed("slot_mapping", 3, 40),
                          r"token 3, at position 4 of sequence 2, has slot 40 of a cache of 40 slots, but .* says 24"),
    "negative slot": (lambda: changed("slot_mapping", 0, -1), r"token 0, at position 4 of sequence 0, has slot -1"),
    "slot of padding": (lambda: changed("slot_mapping", 9, 8), r"token 9 is padding and has slot 8"),
    "context beyond the table": (lambda: changed("context_lens", 2, 13), r"sequence 2 has 6 new of 13 .* holds 12"),
    "context below the query": (lambda: changed("context_lens", 2, 5), r"sequence 2 has 6 new of 5 tokens"),
    "starts fall": (lambda: changed("query_starts", 1, 3), r"query_starts=\[0, 3, 2, 8, 8, 8\] must begin with 0"),
    "too many tokens": (lambda: changed("query_starts", 5, 13), r"end at 12 tokens at most"),
    "a chunk among the decodes": (lambda: batch(num_decodes=3), r"num_decodes=3, but .* have \[1, 1, 6\] new"),
    "negative count": (lambda: batch(num_decodes=-1), r"num_decodes=-1"),
    "too few tiles": (lambda: batch(num_tiles=1), r"1 tiles end at token 6 of 8"),
    "too many tiles": (lambda: batch(num_tiles=99), r"num_tiles=99 of"),
    "tile of another": (lambda: changed("tile_sequences", 1, 3), r"tile 1 has tokens 6 to 7, but sequence 3 has"),
    "tile of a decode": (lambda: changed("tile_sequences", 0, 1), r"tile 0 has 4 tokens from token 2 of sequence 1"),
    "gap between tiles": (lambda: changed("tile_starts", 1, 7), r"tile 1 .* the next is token 6"),
    "tile too long": (lambda: changed("tile_lens", 0, 5), r"tile 0 has 5 tokens .* 1 to 4 each"),
    "rows missing": (lambda: batch(context_lens=[5, 4, 9]), r"3 context_lens, 5 rows of block_tables and 6 query_"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        check(make())


def test_chunks_of_keys_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match=r"key_chunk_tokens=8 is no multiple of block_size=16"):
        check_metadata(batch(), num_blocks=NUM_BLOCKS, block_size=16)


def test_a_traced_batch_is_checked_through_a_callback() -> None:
    @jax.jit
    def step(metadata: AttentionMetadata) -> jax.Array:
        jax.debug.callback(check, metadata)
        return metadata.context_lens + 1

    def finish(metadata: AttentionMetadata) -> None:
        jax.block_until_ready(step(metadata))
        jax.effects_barrier()

    finish(batch())
    with pytest.raises(jax.errors.JaxRuntimeError, match="sequence 2, column 2 of its block table: block 10"):
        finish(batch([[2, 3, 0], [1, 0, 0], [5, 6, 10]]))
    with pytest.raises(ValueError, match=r"block_tables has no values .* jax\.debug\.callback"):
        jax.jit(lambda metadata: check(metadata))(batch())


def test_copies_with_wrong_ids_are_named() -> None:
    check_copies(6, sources=[1, 1, 5, 0, 0], targets=jnp.array([2, 3, 4, 0, 0]))
    check_copies(6, targets=np.array([2, 0, 0]))
    with pytest.raises(ValueError, match=r"copy 1 has source block 6, but the cache has blocks 0 to 5"):
        check_copies(6, sources=[1, 6])
    with pytest.raises(ValueError, match=r"copy 0 has target block -1"):
        check_copies(6, sources=[1], targets=[-1])
    with pytest.raises(ValueError, match=r"copy 2 has target block 3, as an earlier one"):
        check_copies(6, targets=[3, 2, 3])
    with pytest.raises(ValueError, match=r"copy 0 goes from block 0 to 3"):
        check_copies(6, sources=[0], targets=[3])
    with pytest.raises(ValueError, match=r"2 sources for 1 targets"):
        check_copies(6, sources=[1, 2], targets=[3])


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}], ids=["default", "invariant"])
def test_every_step_of_a_tight_engine_passes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_model(), num_device_blocks=17, **options)
    runner, block_size = engine.runner, engine.config.block_size
    begin, seen = runner.begin, []

    def checked(plan: Any, built: Any) -> Any:
        check_copies(17, sources=[c.source for c in plan.copies], targets=[c.target for c in plan.copies])
        check_copies(17, sources=[c.source for c in plan.swap_out])
        check_copies(17, targets=[c.target for c in plan.swap_in])
        if built is not None:
            history = runner._state.history
            attention = unpack(jnp.asarray(built.packed), history, built.layout, block_size).attention.groups[0]
            check_metadata(attention, num_blocks=17, block_size=block_size)
            seen.append((len(plan.copies), len(plan.swap_in)))
        return begin(plan, built)

    monkeypatch.setattr(runner, "begin", checked)
    params = SamplingParams(temperature=0.8, seed=1, n=2, max_tokens=24)
    result = run(engine, random_prompts(5, (5, 17, 8, 30, 1, 16, 9, 40)), params)
    assert len(result.outputs) == 8
    assert [sum(column) > 0 for column in zip(*seen, strict=True)] == [True, True], "it copied and swapped"


def test_ids_that_are_no_whole_numbers_in_one_row_are_refused() -> None:
    with pytest.raises(ValueError, match="sources is float64.*whole numbers"):
        check_copies(8, sources=[1.0], targets=[2])
    with pytest.raises(ValueError, match=r"sources have the shape \(1, 1\)"):
        check_copies(8, sources=[[1]], targets=[[2]])
    with pytest.raises(ValueError, match="num_blocks=0 must be a whole number"):
        check_copies(0, sources=[], targets=[])
