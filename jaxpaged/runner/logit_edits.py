"""What grammars and logits processors do to logits, in steps in which a row has one.

Samplers take `Edits` or None, and jit makes a program for each: steps without such rows never meet the other, so that
they cost and compile what they did. In it, too, a row that asks for neither keeps its bits. Logits processors come
first, on the model's own logits, and the grammar's mask behind them, so that no processor can let through what a
grammar, or any later ban, forbids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jaxpaged.runner.input_batch import HAS_GRAMMAR
from jaxpaged.runner.logits import keep_set_bits
from jaxpaged.runner.logits_processors import LogitsProcessor, Tables, apply_processors
from jaxpaged.runner.sampler_state import SamplerState
from jaxpaged.runner.sampling_batch import SamplingBatch


class Edits(NamedTuple):
    """What the rows of a step ask for."""

    extras: Int32[Array, "rows"]
    """Bit i: the row uses processor i; bit HAS_GRAMMAR: only tokens of its mask may be drawn."""
    masks: UInt32[Array, "rows words"]
    """Bit v % 32 of word v // 32 is set where the grammar allows token v; read where a row has a grammar."""
    tables: Tables
    """The processors' arguments."""


def edit(
    processors: tuple[LogitsProcessor, ...],
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    batch: SamplingBatch,
    edits: Edits,
) -> tuple[Float32[Array, "rows vocab"], Int32[Array, "rows"]]:
    """The logits after logits processors and grammars, and each row's trouble with the former (0 for none)."""
    edited, trouble = apply_processors(processors, edits.tables, logits, edits.extras, state, batch)
    has_grammar = edits.extras & jnp.int32(HAS_GRAMMAR) != 0

    def mask(edited: Array) -> Array:
        return jnp.where(has_grammar[:, None], keep_set_bits(edited, edits.masks), edited)

    return jax.lax.cond(jnp.any(has_grammar), mask, lambda same: same, edited), trouble
