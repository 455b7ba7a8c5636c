"""Logits processors that a user wrote: JAX functions of one row, traced once, run for the rows that ask for them.

A function is traced when the engine is made and never called again: what it does cannot change between steps, and it
cannot raise in one. It sees one row at a time (`jax.vmap` makes it many), so no row can reach another.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float32, Int32

from jaxpaged.runner.logits import maximum
from jaxpaged.runner.sampler_state import SamplerState
from jaxpaged.runner.sampling_batch import SamplingBatch
from jaxpaged.sampling_params import MAX_ARGUMENT_NUMBERS, MAX_LOGITS_PROCESSORS, SamplingParams

MAX_TABLE_BYTES = 256 * 2**20
"""Most device memory for the arguments of all rows together."""
DTYPES = {"b": np.dtype(np.bool_), "i": np.dtype(np.int32), "u": np.dtype(np.int32), "f": np.dtype(np.float32)}
"""What an argument becomes, by the kind of its default."""
PROCESSOR_TROUBLE = -2
"""Status of a row whose first processor gave no usable logits; that of the second is one less, and so on."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitsContext:
    """What a logits processor may know of its sequence."""

    token_ids: Int32[Array, "max_len"]
    """Prompt and output, by position; entries from `num_tokens` on hold the vocabulary's size, which scatters drop."""
    num_tokens: Int32[Array, ""]
    num_prompt_tokens: Int32[Array, ""]


@dataclass(frozen=True, eq=False)
class LogitsProcessor:
    """A function that was traced, and the defaults of its arguments, which tell their shapes and types."""

    name: str
    jaxpr: ClosedJaxpr
    defaults: tuple[tuple[str, np.ndarray], ...]
    """In the order of the function's parameters."""


Tables = tuple[tuple[Array, ...], ...]
"""The arguments of every state row on the device: one array [state rows, ...] per processor and argument."""


def trace_processors(
    functions: Any, vocab_size: int, max_model_len: int
) -> tuple[LogitsProcessor, ...]:
    """The functions of a mapping from their names, ready to run. ValueError with the name for one of another form.

    A function takes the logits of one row (float32 [vocab]) and a `LogitsContext`, and returns the new logits. Its
    keyword-only parameters are its arguments; the default of each tells its shape and type. It must be pure JAX: no
    side effect, no call back to the host.
    """
    return tuple(
        _trace(name, functions[name], defaults, vocab_size, max_model_len)
        for name, defaults in _declared(functions).items()
    )


def _declared(functions: Any) -> dict[str, tuple[tuple[str, np.ndarray], ...]]:
    """The names of the functions, and the arguments that they declare by their defaults; see `trace_processors`."""
    if not isinstance(functions, Mapping):
        raise ValueError(f"logits_processors must be a mapping of names to functions, not {type(functions).__name__}")
    if len(functions) > MAX_LOGITS_PROCESSORS:
        raise ValueError(f"{len(functions)} logits_processors; at most {MAX_LOGITS_PROCESSORS} are allowed")
    declared = {}
    for name, function in functions.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"logits_processors has the name {name!r}: it must be a non-empty string")
        what = f"logits_processors[{name!r}]"
        if not callable(function):
            kind = type(function).__name__
            raise ValueError(f"{what} is a {kind}, not a function of (logits, context, *, arguments)")
        declared[name] = _defaults(what, function)
    return declared


def table_bytes(functions: Any, num_rows: int) -> int:
    """Device memory of the arguments of `num_rows` sequences and the dummy row, before anything is traced.

    Raises ValueError as `trace_processors` does, and where they take too much.
    """
    defaults = _declared(functions).values()
    num_bytes = (num_rows + 1) * sum(default.nbytes for of_one in defaults for _, default in of_one)
    if num_bytes > MAX_TABLE_BYTES:
        raise ValueError(
            f"the arguments of logits_processors take {num_bytes:,} bytes for {num_rows} sequences; at most "
            f"{MAX_TABLE_BYTES:,} are allowed: make the arguments smaller, or lower max_num_seqs"
        )
    return num_bytes


def _trace(
    name: str, function: Any, defaults: tuple[tuple[str, np.ndarray], ...], vocab_size: int, max_model_len: int
) -> LogitsProcessor:
    what = f"logits_processors[{name!r}]"
    row = jax.ShapeDtypeStruct((vocab_size,), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct((max_model_len,), jnp.int32)

    def positional(logits: Any, token_ids: Any, num_tokens: Any, num_prompt_tokens: Any, *arguments: Any) -> Any:
        names = (argument for argument, _ in defaults)
        context = LogitsContext(token_ids, num_tokens, num_prompt_tokens)
        return function(logits, context, **dict(zip(names, arguments, strict=True)))

    shapes = [jax.ShapeDtypeStruct(default.shape, default.dtype) for _, default in defaults]
    try:
        jaxpr, result = jax.make_jaxpr(positional, return_shape=True)(row, tokens, scalar, scalar, *shapes)
    except Exception as error:  # whatever a user's function raises
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{what} cannot be traced: {type(error).__name__}: {first_line}") from error
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    if shape != row.shape or dtype != row.dtype:
        shown = type(result).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise ValueError(f"{what} returns {shown}: it must return float32[{vocab_size}], as it is given")
    if jaxpr.effects or any("callback" in primitive for primitive in _primitives(jaxpr.jaxpr)):
        raise ValueError(f"{what} calls back to the host or has another side effect: it must be pure JAX")
    return LogitsProcessor(name, jaxpr, defaults)


def _defaults(what: str, function: Callable[..., Any]) -> tuple[tuple[str, np.ndarray], ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} has no signature to read: wrap it in a function") from error
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(positional) != 2 or len(positional) + len(named) != len(parameters):
        raise ValueError(f"{what} must take (logits, context, *, ...): two parameters, then keyword-only arguments")
    defaults = []
    for parameter in named:
        if parameter.default is parameter.empty:
            raise ValueError(f"{what}: argument {parameter.name} needs a default, which tells its shape and type")
        try:
            default = np.asarray(parameter.default)
        except ValueError as error:
            raise ValueError(f"{what}: the default of {parameter.name} is no array of numbers") from error
        if default.dtype.kind not in DTYPES:
            raise ValueError(f"{what}: the default of {parameter.name} must be a number or an array of numbers")
        if default.size > MAX_ARGUMENT_NUMBERS:
            raise ValueError(f"{what}: {parameter.name} has {default.size} numbers; at most {MAX_ARGUMENT_NUMBERS}")
        defaults.append((parameter.name, default.astype(DTYPES[default.dtype.kind])))
    return tuple(defaults)


def _primitives(jaxpr: Any) -> list[str]:
    """Names of the primitives in a jaxpr and in every one inside it."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found.extend(_primitives(inner))
    return found


def init_tables(processors: tuple[LogitsProcessor, ...], num_rows: int) -> Tables:
    """Tables of `num_rows` rows and the dummy row, all at their defaults."""
    return tuple(
        tuple(jnp.asarray(np.broadcast_to(default, (num_rows + 1, *default.shape))) for _, default in p.defaults)
        for p in processors
    )


def used_bits(processors: tuple[LogitsProcessor, ...], params: SamplingParams) -> int:
    """Bit i is set where the request asks for processor i."""
    asked = dict(params.logits_processors or ())
    return sum(1 << i for i, processor in enumerate(processors) if processor.name in asked)


def check_arguments(processors: tuple[LogitsProcessor, ...], params: SamplingParams) -> None:
    """Raise ValueError with the name where a request asks for what the engine's processors do not have."""
    names = [processor.name for processor in processors]
    for name, _ in params.logits_processors or ():
        if name not in names:
            known = f"choose among {', '.join(names)}" if names else "load with logits_processors={name: function}"
            raise ValueError(f"logits_processors names {name!r}, which the engine does not have: {known}")
    for processor in processors:
        _arguments(processor, params)


def _arguments(processor: LogitsProcessor, params: SamplingParams) -> list[np.ndarray]:
    """A request's arguments for a processor, defaults filled in."""
    given = dict(dict(params.logits_processors or ()).get(processor.name, ()))
    arguments = []
    for name, default in processor.defaults:
        what = f"logits_processors[{processor.name!r}][{name!r}]"
        if name not in given:
            arguments.append(default)
            continue
        try:
            value = np.asarray(given.pop(name))
        except ValueError as error:
            raise ValueError(f"{what} is ragged: it must have the shape {list(default.shape)}") from error
        if value.shape != default.shape:
            raise ValueError(f"{what} has the shape {list(value.shape)}: it must have {list(default.shape)}")
        with np.errstate(over="ignore", invalid="ignore"):
            cast = value.astype(default.dtype)
        if default.dtype.kind != "f" and (cast != value).any() or not np.isfinite(cast).all():
            raise ValueError(f"{what} does not fit {default.dtype}: give other values, or another default")
        arguments.append(cast)
    if given:
        known = ", ".join(name for name, _ in processor.defaults) or "it has none"
        raise ValueError(
            f"logits_processors[{processor.name!r}] has no argument {next(iter(given))!r}: its arguments are {known}"
        )
    return arguments


def pack_arguments(processors: tuple[LogitsProcessor, ...], row: int, params: SamplingParams) -> np.ndarray:
    """One row of every table as an int32 vector for `load_arguments`; floats travel as their bits."""
    parts = [np.array([row], np.int32)]
    for processor in processors:
        for value in _arguments(processor, params):
            flat = value.ravel()
            parts.append(flat.view(np.int32) if flat.dtype == np.float32 else flat.astype(np.int32))
    return np.concatenate(parts)


def load_arguments(tables: Tables, packed: Int32[Array, "size"]) -> Tables:
    """The tables with one row replaced by a vector of `pack_arguments`; jit it and donate `tables`."""
    row, start = packed[0], 1
    loaded = []
    for of_processor in tables:
        arrays = []
        for table in of_processor:
            shape = table.shape[1:]
            size = int(np.prod(shape))
            bits = packed[start : start + size].reshape(shape)
            start += size
            if table.dtype == jnp.float32:
                bits = lax.bitcast_convert_type(bits, jnp.float32)
            arrays.append(lax.dynamic_update_index_in_dim(table, bits.astype(table.dtype), row, 0))
        loaded.append(tuple(arrays))
    return tuple(loaded)


def apply_processors(
    processors: tuple[LogitsProcessor, ...],
    tables: Tables,
    logits: Float32[Array, "rows vocab"],
    uses: Int32[Array, "rows"],
    state: SamplerState,
    batch: SamplingBatch,
) -> tuple[Float32[Array, "rows vocab"], Int32[Array, "rows"]]:
    """The logits after the processors, in their order, and each row's status.

    A row keeps its bits where bit i of its `uses` is not set. Status: 0, or `PROCESSOR_TROUBLE` - i for the first
    processor that gave the row a NaN, or no finite maximum; the row keeps what it had then.
    """
    trouble = jnp.zeros(logits.shape[0], jnp.int32)
    for i, (processor, arguments) in enumerate(zip(processors, tables, strict=True)):
        is_used = (uses >> i) & 1 != 0

        def run(
            logits: Array, trouble: Array, processor: LogitsProcessor = processor, arguments: Any = arguments,
            is_used: Array = is_used, i: int = i,
        ) -> tuple[Array, Array]:
            positions = jnp.arange(state.history.shape[1], dtype=jnp.int32)
            is_known = positions < batch.position[:, None]
            tokens = jnp.where(is_known, state.history[batch.rows], logits.shape[1])
            own = [table[batch.rows] for table in arguments]
            of_row = jax.vmap(jaxpr_as_fun(processor.jaxpr))
            (changed,) = of_row(logits, tokens, batch.position, batch.prompt_lens, *own)
            changed = lax.optimization_barrier(changed)
            is_sound = maximum(changed)[1]
            is_taken = is_used & is_sound & (trouble == 0)
            is_trouble = is_used & ~is_sound & (trouble == 0)
            return jnp.where(is_taken[:, None], changed, logits), jnp.where(is_trouble, PROCESSOR_TROUBLE - i, trouble)

        logits, trouble = lax.cond(jnp.any(is_used), run, lambda *same: same, logits, trouble)
    return logits, trouble
