"""What a request does to its logits before a token is drawn: one pure function per option, in vLLM's order."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxpaged.runner.sampler_state import MAX_BAD_WORD_TOKENS, SamplerState
from jaxpaged.runner.sampling_batch import SamplingBatch

HISTORY_CHUNK = 512
"""Tokens of the history counted per turn of the penalties' loop; any value gives the same counts."""


def process(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> Float32[Array, "rows vocab"]:
    """Logits after allowed tokens, bad words, the ban of stop tokens, bias and penalties; banned tokens are -inf."""
    stages = (
        (batch.any_allowed, keep_allowed),
        (batch.any_bad_words, ban_bad_words),
        (batch.any_ban, ban_stops),
        (batch.any_bias, add_bias),
        (batch.any_penalty, penalise),
    )
    for is_needed, stage in stages:
        logits = lax.cond(is_needed, stage, lambda logits, state, batch: logits, logits, state, batch)
    return logits


def keep_allowed(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> Float32[Array, "rows vocab"]:
    """Only the request's `allowed_token_ids` keep their logits."""
    return keep_set_bits(logits, state.allowed[batch.rows])


def keep_set_bits(
    logits: Float32[Array, "rows vocab"], masks: UInt32[Array, "rows words"]
) -> Float32[Array, "rows vocab"]:
    """Only token v whose bit v % 32 of word v // 32 is set keeps its logit."""
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    is_kept = bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]] != 0
    return jnp.where(is_kept, logits, -jnp.inf)


def ban_bad_words(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> Float32[Array, "rows vocab"]:
    """The last token of a bad word is banned where the output ends in the tokens before it (the prompt is not read)."""
    num_before = MAX_BAD_WORD_TOKENS - 1
    positions = batch.position[:, None] - num_before + jnp.arange(num_before)
    tail = state.history[batch.rows[:, None], jnp.clip(positions, 0)]
    is_output = positions >= batch.prompt_lens[:, None]
    words, lens = state.bad_words[batch.rows], state.bad_word_lens[batch.rows]
    is_padding = jnp.arange(num_before) < MAX_BAD_WORD_TOKENS - lens[:, :, None]
    agrees = (words[:, :, :-1] == tail[:, None]) & is_output[:, None]
    is_match = jnp.all(is_padding | agrees, axis=-1) & (lens > 0)
    return _ban(logits, words[:, :, -1], is_match)


def ban_stops(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> Float32[Array, "rows vocab"]:
    """No stop token in the rows that have not reached their `min_tokens`."""
    ids = state.stop_ids[batch.rows]
    return _ban(logits, ids, jnp.broadcast_to(batch.ban_stops[:, None], ids.shape))


def _ban(
    logits: Float32[Array, "rows vocab"], ids: Int32[Array, "rows entries"], is_banned: Bool[Array, "rows entries"]
) -> Float32[Array, "rows vocab"]:
    rows, vocab_size = logits.shape
    return logits.at[jnp.arange(rows)[:, None], jnp.where(is_banned, ids, vocab_size)].set(-jnp.inf, mode="drop")


def add_bias(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> Float32[Array, "rows vocab"]:
    """Logits plus the request's `logit_bias`."""
    row = jnp.arange(logits.shape[0])[:, None]
    return logits.at[row, state.bias_ids[batch.rows]].add(state.bias_values[batch.rows], mode="drop")


def penalise(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> Float32[Array, "rows vocab"]:
    """Repetition over prompt and output tokens, then frequency and presence over output tokens."""
    prompt_counts, output_counts = count_tokens(state, batch, logits.shape[1])
    factor = batch.repetition[:, None]
    is_seen = (prompt_counts > 0) | (output_counts > 0)
    logits = jnp.where(is_seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits = logits - batch.frequency[:, None] * output_counts.astype(jnp.float32)
    return logits - batch.presence[:, None] * (output_counts > 0).astype(jnp.float32)


def count_tokens(
    state: SamplerState, batch: SamplingBatch, vocab_size: int
) -> tuple[Int32[Array, "rows vocab"], Int32[Array, "rows vocab"]]:
    """How often each token stands in the prompt and in the output, before `position`; 0 for rows without penalties.

    Costs what the longest penalised history costs, not what max_model_len would.
    """
    is_penalised = (batch.presence != 0) | (batch.frequency != 0) | (batch.repetition != 1)
    lens = jnp.where(is_penalised, batch.position, 0)
    num_rows = batch.rows.shape[0]
    row = jnp.arange(num_rows)[:, None]

    def count_chunk(
        chunk: Int32[Array, ""], counts: Int32[Array, "rows both_vocabs"]
    ) -> Int32[Array, "rows both_vocabs"]:
        positions = chunk * HISTORY_CHUNK + jnp.arange(HISTORY_CHUNK)[None]
        tokens = state.history.at[batch.rows[:, None], positions].get(mode="clip")
        index = jnp.where(positions < batch.prompt_lens[:, None], tokens, tokens + vocab_size)
        index = jnp.where(positions < lens[:, None], index, 2 * vocab_size)
        return counts.at[row, index].add(1, mode="drop")

    num_chunks = (jnp.max(lens) + HISTORY_CHUNK - 1) // HISTORY_CHUNK
    counts = lax.fori_loop(
        jnp.int32(0), num_chunks, count_chunk, jnp.zeros((num_rows, 2 * vocab_size), jnp.int32)
    )
    return counts[:, :vocab_size], counts[:, vocab_size:]


def maximum(scores: Float32[Array, "rows entries"]) -> tuple[Float32[Array, "rows"], Bool[Array, "rows"]]:
    """Each row's maximum, and whether the row is free of NaN and that maximum is finite.

    The maximum alone does not tell: XLA's CPU reduction loses a NaN where it is vectorised (jaxlib 0.10.2).

    Here and below two results are reduced together for speed, too: XLA's CPU compiler runs a reduction of several
    operands in one pass, but writes the operand of a lone long one to memory first.
    """
    best, has_nan = lax.reduce(
        (scores, jnp.isnan(scores)),
        (jnp.float32(-jnp.inf), jnp.bool_(False)),
        lambda a, b: (jnp.maximum(a[0], b[0]), a[1] | b[1]),
        (1,),
    )
    return best, jnp.isfinite(best) & ~has_nan


def first_argmax(
    scores: Float32[Array, "rows entries"], best: Float32[Array, "rows"]
) -> Int32[Array, "rows"]:
    """Index of the first entry that equals its row's `maximum`; 0 where none does, as may be in a row with a NaN.

    `scores` that are computed in the same program need an optimization barrier before both: a compiler that computes
    them anew for each may round them differently.
    """
    is_best = scores == best[:, None]
    column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    index, is_found = lax.reduce(
        (jnp.where(is_best, column, scores.shape[1]), is_best),
        (jnp.int32(scores.shape[1]), jnp.bool_(False)),
        lambda a, b: (jnp.minimum(a[0], b[0]), a[1] | b[1]),
        (1,),
    )
    return jnp.where(is_found, index, 0)


def count(is_counted: Bool[Array, "rows entries"]) -> Int32[Array, "rows"]:
    """How many entries of each row are true."""
    number, is_any = lax.reduce(
        (is_counted.astype(jnp.int32), is_counted),
        (jnp.int32(0), jnp.bool_(False)),
        lambda a, b: (a[0] + b[0], a[1] | b[1]),
        (1,),
    )
    return jnp.where(is_any, number, 0)


def log_sum_exp(
    logits: Float32[Array, "rows vocab"],
) -> tuple[Float32[Array, "rows"], Float32[Array, "rows"]]:
    """(maximum, log of the sum of exp(logit - maximum)), the same bits in any batch shape.

    A float sum depends on the order in which a compiler adds, and so on the number of rows. Here each weight
    (at most 1) is cut into three integers, which add up alike in any order.
    """
    best, _ = maximum(logits)
    rest = jnp.exp(logits - best[:, None])
    bits = limb_bits(logits.shape[1]) - 1
    scale = jnp.float32(2**bits)
    limbs = []
    for _ in range(3):
        rest = rest * scale
        limb = jnp.floor(rest)
        rest = rest - limb
        limbs.append(limb.astype(jnp.uint32))
    sums = lax.reduce(
        tuple(limbs), (jnp.uint32(0),) * 3, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (1,)
    )
    total = jnp.zeros_like(best)
    for limb_sum in reversed(sums):
        total = (total + limb_sum.astype(jnp.float32)) / scale
    return best, jnp.log(total)


def limb_bits(vocab_size: int) -> int:
    """Bits of an integer of which `vocab_size` add up to less than 2**32."""
    return min(16, 32 - (vocab_size - 1).bit_length())


def token_logprobs(
    logits: Float32[Array, "rows vocab"], token_ids: Int32[Array, "rows"], num_top: int, *, are_logits: bool = False
) -> tuple[
    Float32[Array, "rows"], Int32[Array, "rows"], Int32[Array, "rows top"], Float32[Array, "rows top"]
]:
    """Log-probability and rank (1 = no token is likelier) of the given tokens, and the likeliest ids with theirs.

    Args:
        are_logits: Report the logits as they are in place of log-probabilities.
    """
    value = jnp.take_along_axis(logits, token_ids[:, None], axis=1)
    rank = 1 + count(logits > value)
    top, top_ids = lax.top_k(logits, num_top)
    if are_logits:
        return value[:, 0], rank, top_ids, top
    best, log_total = log_sum_exp(logits)
    shift = best[:, None]
    return (
        (value - shift)[:, 0] - log_total,
        rank,
        top_ids,
        (top - shift) - log_total[:, None],
    )


