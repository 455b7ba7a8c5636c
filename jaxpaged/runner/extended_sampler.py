"""The sampler for steps in which a row has a grammar or a logits processor: a program of its own.

Steps without such rows never meet it, so that they cost and compile what they did. In it, too, a row that asks for
neither keeps its bits. Logits processors come first, on the model's own logits, and the grammar's mask behind them, so
that no processor can let through what a grammar, or any later ban, forbids.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jaxpaged.config import LogprobsMode
from jaxpaged.runner.input_batch import HAS_GRAMMAR, unpack_sampling
from jaxpaged.runner.logits import keep_set_bits
from jaxpaged.runner.logits_processors import LogitsProcessor, Tables, apply_processors
from jaxpaged.runner.sampler import SamplerOutput, SamplerState, sample


def sample_extended(
    max_logprobs: int,
    mode: LogprobsMode,
    processors: tuple[LogitsProcessor, ...],
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    packed_sampling: Int32[Array, "size"],
    extras: Int32[Array, "rows"],
    masks: UInt32[Array, "rows words"],
    tables: Tables,
) -> tuple[SamplerState, SamplerOutput]:
    """The state (donated) and the samples.

    Args:
        extras: Bit i: the row uses processor i; bit HAS_GRAMMAR: only tokens of its mask may be drawn.
        masks: Bit v % 32 of word v // 32 is set where the grammar allows token v; read where a row has a grammar.
    """
    batch = unpack_sampling(packed_sampling, logits.shape[0])
    edited, trouble = apply_processors(processors, tables, logits, extras, state, batch)
    has_grammar = extras & jnp.int32(HAS_GRAMMAR) != 0

    def mask(edited: Array) -> Array:
        return jnp.where(has_grammar[:, None], keep_set_bits(edited, masks), edited)

    edited = jax.lax.cond(jnp.any(has_grammar), mask, lambda same: same, edited)
    output, state = sample(logits, state, batch, max_logprobs, mode, (edited, trouble))
    return state, output
