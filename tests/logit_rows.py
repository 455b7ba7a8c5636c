"""Makes sampling batches for tests from one small description per logit row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.runner.sampler import SamplerState, SamplingBatch, init_state, load_row, pack_row, sample
from jaxpaged.sampling_params import SamplingParams

MAX_MODEL_LEN = 48

jitted_sample = jax.jit(sample, static_argnums=3)
jitted_load_row = jax.jit(load_row)


@dataclass(frozen=True)
class LogitRow:
    """One sequence that is about to get a token, and the logits it met."""

    logits: np.ndarray
    params: SamplingParams
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    stop_ids: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    seed: int = 0
    sample_index: int = 0
    target: int | None = None


def load_state(rows: Sequence[LogitRow], num_state_rows: int) -> SamplerState:
    """Row i of the state belongs to row i of the batch."""
    vocab_size = len(rows[0].logits)
    state = init_state(num_state_rows, MAX_MODEL_LEN, vocab_size)
    for i, row in enumerate(rows):
        packed = pack_row(
            row=i,
            token_ids=[*row.prompt, *row.output],
            params=row.params,
            stop_token_ids=row.stop_ids,
            bad_words_token_ids=row.bad_words,
            vocab_size=vocab_size,
            max_model_len=MAX_MODEL_LEN,
        )
        state = jitted_load_row(state, packed)
    return state


def make_batch(
    rows: Sequence[LogitRow], num_logit_rows: int, num_state_rows: int, **flags: bool
) -> tuple[np.ndarray, SamplingBatch]:
    """Logits and columns, padded to `num_logit_rows`; `flags` overrides what the rows' own parameters imply."""
    pad = num_logit_rows - len(rows)
    logits = np.stack([row.logits for row in rows] + [np.zeros_like(rows[0].logits)] * pad).astype(np.float32)

    def column(values: Sequence[float], fill: float, dtype: type) -> jax.Array:
        return jnp.array([*values, *[fill] * pad], dtype)

    params = [row.params for row in rows]
    bans = [len(row.output) < row.params.min_tokens for row in rows]
    is_random = [p.temperature > 0 for p in params]
    implied = {
        "any_random": any(is_random),
        "any_truncation": any(p.temperature > 0 and (p.top_k or p.top_p < 1 or p.min_p) for p in params),
        "any_penalty": any(
            p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1 for p in params
        ),
        "any_bias": any(p.logit_bias for p in params),
        "any_allowed": any(p.allowed_token_ids for p in params),
        "any_bad_words": any(row.bad_words for row in rows),
        "any_ban": any(bans),
        "any_logprobs": any(p.logprobs is not None for p in params),
    }
    seeds = [[row.seed & 0xFFFFFFFF, (row.seed >> 32) & 0xFFFFFFFF] for row in rows] + [[0, 0]] * pad
    batch = SamplingBatch(
        rows=column(range(len(rows)), num_state_rows, np.int32),
        seeds=jnp.array(seeds, np.uint32),
        sample_index=column([row.sample_index for row in rows], 0, np.int32),
        position=column([len(row.prompt) + len(row.output) for row in rows], 0, np.int32),
        prompt_lens=column([len(row.prompt) for row in rows], 0, np.int32),
        write_rows=column(range(len(rows)), num_state_rows, np.int32),
        temperature=column([p.temperature for p in params], 0, np.float32),
        top_p=column([p.top_p for p in params], 1, np.float32),
        min_p=column([p.min_p for p in params], 0, np.float32),
        presence=column([p.presence_penalty for p in params], 0, np.float32),
        frequency=column([p.frequency_penalty for p in params], 0, np.float32),
        repetition=column([p.repetition_penalty for p in params], 1, np.float32),
        top_k=column([p.top_k for p in params], 0, np.int32),
        ban_stops=column(bans, False, np.bool_),
        target_ids=column([row.target or 0 for row in rows], 0, np.int32),
        has_target=column([row.target is not None for row in rows], False, np.bool_),
        **{name: jnp.bool_(value) for name, value in (implied | flags).items()},
    )
    return logits, batch


def draw(
    rows: Sequence[LogitRow], num_logit_rows: int | None = None, max_logprobs: int = 3, **flags: bool
) -> tuple[SimpleNamespace, SamplerState]:
    """Sample one token for each row; the fields of the output are cut to the rows and lie in numpy."""
    # few shapes, because each costs a compilation
    num_logit_rows = num_logit_rows or (16 if len(rows) <= 16 else 32)
    num_state_rows = num_logit_rows
    logits, batch = make_batch(rows, num_logit_rows, num_state_rows, **flags)
    output, state = jitted_sample(logits, load_state(rows, num_state_rows), batch, max_logprobs)
    return SimpleNamespace(**{name: np.asarray(array)[: len(rows)] for name, array in vars(output).items()}), state


def draw_many(row: LogitRow, num_draws: int = 4096) -> np.ndarray:
    """Tokens of `num_draws` seeds for one row, in one batch."""
    logits, batch = make_batch([row] * num_draws, num_draws, 1)
    seeds = jnp.zeros((num_draws, 2), jnp.uint32).at[:, 0].set(jnp.arange(num_draws, dtype=jnp.uint32))
    zeros = jnp.zeros(num_draws, jnp.int32)
    batch = replace(batch, rows=zeros, write_rows=zeros + 1, seeds=seeds)
    output, _ = jitted_sample(logits, load_state([row], 1), batch, 0)
    return np.asarray(output.tokens)
