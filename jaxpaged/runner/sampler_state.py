"""What the sampler remembers of each running sequence on the device: its tokens, and the lists its request gave."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, PyTree, Shaped, UInt32

from jaxpaged.sampling_params import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams

MAX_BAD_WORD_TOKENS = 16
"""Most tokens of one bad word."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """One row per running sequence; row N (the last) is neutral and takes the writes of padding."""

    history: Int32[Array, "state_rows max_len"]
    """Prompt and output tokens, by position."""
    bias_ids: Int32[Array, "state_rows biases"]
    """Unused entries hold the vocabulary's size, which no scatter writes."""
    bias_values: Float32[Array, "state_rows biases"]
    allowed: UInt32[Array, "state_rows words"]
    """Bit v % 32 of word v // 32 is set where token v is allowed."""
    bad_words: Int32[Array, "state_rows bad_words word_len"]
    """Token sequences, right-aligned: the token to be banned is the last."""
    bad_word_lens: Int32[Array, "state_rows bad_words"]
    """0 for an unused entry."""
    stop_ids: Int32[Array, "state_rows stop_tokens"]
    """Unused entries hold the vocabulary's size."""


def _row_shapes(max_model_len: int, vocab_size: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of one row of each field, in the order of the fields."""
    int32, float32, uint32 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)
    return {
        "history": ((max_model_len,), int32),
        "bias_ids": ((MAX_LOGIT_BIAS,), int32),
        "bias_values": ((MAX_LOGIT_BIAS,), float32),
        "allowed": ((-(-vocab_size // 32),), uint32),
        "bad_words": ((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), int32),
        "bad_word_lens": ((MAX_BAD_WORDS,), int32),
        "stop_ids": ((MAX_STOP_TOKENS,), int32),
    }


def init_state(num_rows: int, max_model_len: int, vocab_size: int) -> SamplerState:
    """A state of `num_rows` neutral rows and the dummy row."""
    fill: dict[str, int] = {"bias_ids": vocab_size, "stop_ids": vocab_size, "allowed": 0xFFFFFFFF}
    shapes = _row_shapes(max_model_len, vocab_size)
    return SamplerState(
        **{
            name: jnp.full((num_rows + 1, *shape), np.array(fill.get(name, 0), dtype), dtype)
            for name, (shape, dtype) in shapes.items()
        }
    )


def state_bytes(num_rows: int, max_model_len: int, vocab_size: int) -> int:
    """Device memory of `init_state` with the same arguments."""
    shapes = _row_shapes(max_model_len, vocab_size).values()
    return (num_rows + 1) * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes)


def pack_row(
    *,
    row: int,
    token_ids: Sequence[int],
    params: SamplingParams,
    stop_token_ids: Iterable[int],
    bad_words_token_ids: Sequence[Sequence[int]],
    vocab_size: int,
    max_model_len: int,
) -> np.ndarray:
    """One sequence's state row as a single int32 vector for `load_row` (other types travel as their bits).

    Raises ValueError for a token id outside the vocabulary, and for more entries than a row holds.
    """
    shapes = _row_shapes(max_model_len, vocab_size)
    packed = np.zeros(1 + sum(int(np.prod(shape)) for shape, _ in shapes.values()), np.int32)
    packed[0] = row
    views, start = {}, 1
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape))
        views[name] = packed[start : start + size].reshape(shape).view(dtype)
        start += size

    def fill(name: str, values: Sequence[int], what: str) -> None:
        view = views[name]
        if len(values) > len(view):
            raise ValueError(f"{len(values)} {what}; a row of the sampler holds at most {len(view)}")
        view[: len(values)] = _ids(values, vocab_size, what)

    fill("history", token_ids, "tokens")
    views["bias_ids"][:] = vocab_size
    bias = params.logit_bias or ()
    fill("bias_ids", [token_id for token_id, _ in bias], "logit_bias entries")
    views["bias_values"][: len(bias)] = [value for _, value in bias]
    if params.allowed_token_ids is None:
        views["allowed"][:] = 0xFFFFFFFF
    else:
        allowed = np.unique(_ids(params.allowed_token_ids, vocab_size, "allowed_token_ids"))
        np.bitwise_or.at(views["allowed"], allowed // 32, np.uint32(1) << (allowed % 32).astype(np.uint32))
    if len(bad_words_token_ids) > MAX_BAD_WORDS:
        raise ValueError(f"{len(bad_words_token_ids)} bad words; a row of the sampler holds at most {MAX_BAD_WORDS}")
    for i, word in enumerate(bad_words_token_ids):
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
            raise ValueError(f"a bad word of {len(word)} tokens: give one of 1 to {MAX_BAD_WORD_TOKENS}")
        views["bad_words"][i, -len(word) :] = _ids(word, vocab_size, "bad word tokens")
        views["bad_word_lens"][i] = len(word)
    views["stop_ids"][:] = vocab_size
    fill("stop_ids", sorted(stop_token_ids), "stop tokens")
    return packed


def _ids(values: Sequence[int], vocab_size: int, what: str) -> np.ndarray:
    ids = np.asarray(values, np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(f"token id {wrong} among the {what}: ids go from 0 to {vocab_size - 1}")
    return ids


def pack_row_copies(copies: Sequence[tuple[int, int]], num_rows: int) -> np.ndarray:
    """(source, target) pairs for `copy_rows` as one int32 vector: how many, all sources, all targets."""
    packed = np.zeros((1 + 2 * num_rows), np.int32)
    packed[0] = len(copies)
    packed[1:].reshape(2, num_rows)[:, : len(copies)] = np.array(copies, np.int32).reshape(-1, 2).T
    return packed


def copy_rows(tables: PyTree[Shaped[Array, "state_rows ..."]], packed: Int32[Array, "size"]) -> PyTree:
    """Every table with rows copied as a vector of `pack_row_copies` says, one after the other; jit it and donate them.

    A program for any number of copies, at the price of those that are made.
    """
    sources, targets = packed[1:].reshape(2, -1)

    def copy(i: Array, tables: PyTree) -> PyTree:
        def in_table(table: Array) -> Array:
            row = lax.dynamic_index_in_dim(table, sources[i], 0)
            return lax.dynamic_update_slice_in_dim(table, row, targets[i], 0)

        return jax.tree.map(in_table, tables)

    return lax.fori_loop(jnp.int32(0), packed[0], copy, tables)


def load_row(state: SamplerState, packed: Int32[Array, "size"]) -> SamplerState:
    """`state` with one row replaced by a vector of `pack_row`; jit it and donate `state`."""
    row, start = packed[0], 1
    loaded = {}
    for field in fields(SamplerState):
        table = getattr(state, field.name)
        size = int(np.prod(table.shape[1:]))
        bits = packed[start : start + size].reshape(table.shape[1:])
        values = bits if table.dtype == jnp.int32 else lax.bitcast_convert_type(bits, table.dtype)
        loaded[field.name] = lax.dynamic_update_index_in_dim(table, values, row, 0)
        start += size
    return SamplerState(**loaded)
