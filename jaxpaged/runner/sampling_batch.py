"""What the sampler reads in one step: one entry per logit row, and which of its stages any row needs."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float32, Int32, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingBatch:
    """The sampling columns of one step's logit rows (padding rows: state row N, temperature 0, everything else off).

    The flags let a step skip what no row needs. A row is computed alike whichever of them are set, because its own
    columns are neutral where it asks for nothing. Lists (bias, allowed, bad words) have no column: a step that sets one
    of their flags reads the lists of every row, so `rows` must point at state loaded for this sequence, or at the
    neutral row N.
    """

    rows: Int32[Array, "rows"]
    """Row of `SamplerState` that holds the sequence's tokens and lists; N for padding."""
    seeds: UInt32[Array, "rows 2"]
    """The request's seed: low word, high word."""
    sample_index: Int32[Array, "rows"]
    position: Int32[Array, "rows"]
    """Index in the sequence of the token to be sampled: the number of tokens before it."""
    prompt_lens: Int32[Array, "rows"]
    write_rows: Int32[Array, "rows"]
    """State row whose history receives the sampled token at `position`; N for none."""
    temperature: Float32[Array, "rows"]
    top_p: Float32[Array, "rows"]
    min_p: Float32[Array, "rows"]
    presence: Float32[Array, "rows"]
    frequency: Float32[Array, "rows"]
    repetition: Float32[Array, "rows"]
    top_k: Int32[Array, "rows"]
    ban_stops: Bool[Array, "rows"]
    """Whether `min_tokens` is not reached yet."""
    target_ids: Int32[Array, "rows"]
    has_target: Bool[Array, "rows"]
    """Report the log-probability of `target_ids` instead of the sampled token's (prompt logprobs)."""
    any_random: Bool[Array, ""]
    any_truncation: Bool[Array, ""]
    """A random row has top_k, top_p or min_p."""
    any_penalty: Bool[Array, ""]
    any_bias: Bool[Array, ""]
    any_allowed: Bool[Array, ""]
    any_bad_words: Bool[Array, ""]
    any_ban: Bool[Array, ""]
    any_logprobs: Bool[Array, ""]
