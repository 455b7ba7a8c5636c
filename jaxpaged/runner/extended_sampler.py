"""The samplers for steps in which a row has a grammar or a logits processor: programs of their own.

Steps without such rows never meet it, so that they cost and compile what they did. In it, too, a row that asks for
neither keeps its bits. Logits processors come first, on the model's own logits, and the grammar's mask behind them, so
that no processor can let through what a grammar, or any later ban, forbids.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jaxpaged.config import LogprobsMode
from jaxpaged.runner.beam_candidates import beam_candidates
from jaxpaged.runner.input_batch import HAS_GRAMMAR, unpack_sampling
from jaxpaged.runner.logits import keep_set_bits
from jaxpaged.runner.logits_processors import LogitsProcessor, Tables, apply_processors
from jaxpaged.runner.sampler import SamplerOutput, SamplerState, sample
from jaxpaged.runner.sampling_batch import SamplingBatch


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
    edited = _edit(processors, logits, state, batch, extras, masks, tables)
    output, state = sample(logits, state, batch, max_logprobs, mode, edited)
    return state, output


def extended_candidates(
    num_candidates: int,
    mode: LogprobsMode,
    processors: tuple[LogitsProcessor, ...],
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    packed_sampling: Int32[Array, "size"],
    extras: Int32[Array, "rows"],
    masks: UInt32[Array, "rows words"],
    tables: Tables,
) -> tuple[Array, ...]:
    """What `beam_candidates` gives; the other arguments are those of `sample_extended`, and nothing is donated.

    Whether a row's candidates are of any use, its status in the same step's `sample_extended` says.
    """
    batch = unpack_sampling(packed_sampling, logits.shape[0])
    edited, _ = _edit(processors, logits, state, batch, extras, masks, tables)
    return beam_candidates(num_candidates, mode, logits, state, batch, edited)


def _edit(
    processors: tuple[LogitsProcessor, ...],
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    batch: SamplingBatch,
    extras: Int32[Array, "rows"],
    masks: UInt32[Array, "rows words"],
    tables: Tables,
) -> tuple[Float32[Array, "rows vocab"], Int32[Array, "rows"]]:
    """The logits after logits processors and grammars, and each row's trouble with the former (0 for none)."""
    edited, trouble = apply_processors(processors, tables, logits, extras, state, batch)
    has_grammar = extras & jnp.int32(HAS_GRAMMAR) != 0

    def mask(edited: Array) -> Array:
        return jnp.where(has_grammar[:, None], keep_set_bits(edited, masks), edited)

    return jax.lax.cond(jnp.any(has_grammar), mask, lambda same: same, edited), trouble
