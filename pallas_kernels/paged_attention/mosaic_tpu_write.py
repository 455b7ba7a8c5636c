"""The Pallas kernel that puts a step's keys and values into their slots, before mosaic_tpu.py reads any of them.

Nothing is computed: it starts copies, many at a time, from the rows of the new tokens into the cache, which stays where
it is. A token's row is one sublane of each (8, 128) tile of its lanes, and a copy of several such rows would have to
begin at the first of a tile. So the cache is looked at as it lies in memory, where each sublane is a tile of its own.
That view has the same bytes in the same order, and XLA makes nothing of it but a name:

    cache   [blocks, (parts,) block_size, lanes]                      in tiles of (8, 128)
    view    [blocks, parts, row tiles, lane tiles, 8, 1, 128]         in tiles of (1, 128)

Every copy writes the slots of its own tokens and nothing beside them, so their order does not matter.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Shaped

from pallas_kernels.paged_attention.mosaic_tpu_layout import LANES, SUBLANES

PROGRAM_TOKENS = 128
"""Tokens of a program; its copies are waited for when the next program has started its own."""
SLOT_BYTES = 8
"""Scalar memory of a token: its slot and how many tokens from it on are copied with it."""


def run_lens(slot_mapping: Int[Array, "tokens"], block_size: int) -> Int[Array, "tokens"]:
    """For each token how many tokens from it on one copy can bring: neighbours of one tile of 8 slots, and one program.

    0 for tokens of the null block, which are not written.
    """
    num_tokens = slot_mapping.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    follows = slot_mapping == jnp.roll(slot_mapping, 1) + 1
    follows &= (slot_mapping % SUBLANES != 0) & (token % PROGRAM_TOKENS != 0)
    first_from_here = lax.cummin(jnp.where(follows, num_tokens, token), reverse=True)
    next_first = jnp.append(first_from_here[1:], num_tokens)
    return jnp.where(slot_mapping < block_size, 0, next_first - token)


def _write_kernel(
    block_size: int, slots: Any, lens: Any, num_tokens: Any, rows: Any, before: Any, kv: Any, left: Any
) -> None:
    del before  # the same memory as kv
    program, num_programs = pl.program_id(0), pl.num_programs(0)

    def copies(program: Array, *, is_wait: bool) -> None:
        def copy(token: Array) -> Array:
            count, slot = lens[token], slots[token]

            @pl.when(count > 0)
            def start_or_wait() -> None:
                block, row = lax.div(slot, block_size), lax.rem(slot, block_size)
                copied = pltpu.make_async_copy(
                    rows.at[:, :, pl.ds(token, count)],
                    kv.at[block, :, lax.div(row, SUBLANES), :, pl.ds(lax.rem(row, SUBLANES), count)],
                    left.at[lax.rem(program, 2)],
                )
                if is_wait:
                    copied.wait()
                else:
                    copied.start()

            return token + jnp.maximum(count, 1)

        begin = program * PROGRAM_TOKENS
        end = jnp.minimum(begin + PROGRAM_TOKENS, num_tokens[0])
        lax.while_loop(lambda token: token < end, copy, begin)

    copies(program, is_wait=False)

    @pl.when(program > 0)
    def wait_for_program_before() -> None:
        copies(program - 1, is_wait=True)

    @pl.when(program + 1 == num_programs)
    def wait_for_last_program() -> None:
        copies(program, is_wait=True)


def _in_memory_order(kv: Array, num_parts: int) -> Shaped[Array, "blocks parts row_tiles lane_tiles 8 1 128"]:
    """The view of a layer cache of `num_parts` arrays [block_size, lanes] a block."""
    num_blocks, (block_size, num_lanes) = kv.shape[0], kv.shape[-2:]
    tiles = kv.reshape(num_blocks, num_parts, block_size // SUBLANES, SUBLANES, num_lanes // LANES, LANES)
    return tiles.swapaxes(3, 4)[..., None, :]


# jitted, so that all layers of a step are lowered once
@jax.jit
def write_rows(
    kv: Any,
    rows: Shaped[Array, "tokens parts lanes"],
    slot_mapping: Int[Array, "tokens"],
    num_tokens: Int[Array, ""],
) -> Array:
    """The cache with the rows of the first `num_tokens` tokens in their slots; those of the null block are dropped.

    `kv` is [blocks, block_size, lanes], or [blocks, parts, block_size, lanes], and is updated in place.
    """
    num_parts, num_lanes = rows.shape[1:]
    rows = rows.reshape(-1, num_parts, num_lanes // LANES, LANES).transpose(1, 2, 0, 3)[..., None, :]
    view = pltpu.with_memory_space_constraint(_in_memory_order(kv, num_parts), pltpu.HBM)
    written = pl.pallas_call(
        partial(_write_kernel, kv.shape[-2]),
        out_shape=jax.ShapeDtypeStruct(view.shape, view.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(num_tokens, PROGRAM_TOKENS),),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[pltpu.SemaphoreType.DMA((2,))],
        ),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="paged_attention_write",
    )(slot_mapping, run_lens(slot_mapping, kv.shape[-2]), num_tokens[None], rows, view)
    return written[..., 0, :].swapaxes(3, 4).reshape(kv.shape)
