"""One step of model and sampler as pure functions, jitted for a runner, or as shapes to be compiled elsewhere."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxpaged.config import EngineConfig, LogprobsMode
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.registry import build_abstract
from jaxpaged.runner.beam_candidates import beam_candidates
from jaxpaged.runner.buckets import Bucket
from jaxpaged.runner.input_batch import PackedLayout, unpack, unpack_sampling
from jaxpaged.runner.logit_edits import Edits, edit
from jaxpaged.runner.logits import first_argmax, maximum
from jaxpaged.runner.logits_processors import LogitsProcessor
from jaxpaged.runner.parallel import Parallel, cache_shapes, parallel_over, parallel_step, parameter_shapes
from jaxpaged.runner.sampler import FINE, NOT_FINITE, SamplerState, init_state, sample
from jaxpaged.runner.shapes import RunnerShapes
from jaxpaged.sharding import whole
from pallas_kernels import paged_attention


@functools.lru_cache(maxsize=16)
def jitted(graph: Any, tree: Any, implementation: str | None, block_size: int, parallel: Parallel | None) -> Any:
    """The jitted step; engines of equal graphs share it, and with it every trace and compile."""
    attention = partial(paged_attention, implementation=implementation)
    one_device = partial(step, graph, tree, attention, block_size)
    function = one_device if parallel is None else partial(parallel_step, parallel, one_device)
    return jax.jit(function, static_argnums=4, donate_argnums=(1, 2))


@functools.lru_cache(maxsize=16)
def jitted_sampler(max_logprobs: int, mode: LogprobsMode, processors: tuple[LogitsProcessor, ...]) -> Any:
    """The jitted `sample_rows`, shared likewise."""
    return jax.jit(partial(sample_rows, max_logprobs, mode, processors), donate_argnums=1)


@functools.lru_cache(maxsize=16)
def jitted_candidates(num_candidates: int, mode: LogprobsMode, processors: tuple[LogitsProcessor, ...]) -> Any:
    """The jitted choice of that many continuations of every row: a program of its own, for steps with beams."""
    return jax.jit(partial(candidates_of_rows, num_candidates, mode, processors))


def step(
    graph: Any,
    tree: Any,
    attention: Any,
    block_size: int,
    leaves: tuple[jax.Array, ...],
    kv: Any,
    state: SamplerState,
    packed: jax.Array,
    layout: PackedLayout,
) -> tuple[Any, SamplerState, jax.Array, jax.Array, jax.Array]:
    """One step as a pure function; `kv` and `state` are donated.

    Returns cache, state, greedy tokens and their status, and what `sample_rows` needs where rows ask for more.
    """
    model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    batch = unpack(packed, state.history, layout, block_size)
    hidden, kv = model(batch.token_ids, batch.positions, kv, batch.attention, attention, batch.logit_tokens)
    # both readers must see the same bits: without the barrier XLA may compute the logits anew for each
    logits = jax.lax.optimization_barrier(model.logits(hidden))
    best, finite = maximum(logits)
    tokens = first_argmax(logits, best)
    packed_sampling = packed[layout.sampling_start :]
    sampling = unpack_sampling(packed_sampling, layout.bucket.num_logits)
    # the token before too: a beam's was chosen by the host, and a forked sample's row began as another's
    written = jnp.stack([batch.token_ids[batch.logit_tokens], tokens], axis=1)
    places = jnp.stack([sampling.position - 1, sampling.position], axis=1)
    history = state.history.at[sampling.write_rows[:, None], places].set(written, mode="drop")
    state = replace(state, history=history)
    return kv, state, jnp.stack([tokens, jnp.where(finite, FINE, NOT_FINITE)]), logits, packed_sampling


def sample_rows(
    max_logprobs: int,
    mode: LogprobsMode,
    processors: tuple[LogitsProcessor, ...],
    logits: jax.Array,
    state: SamplerState,
    packed_sampling: jax.Array,
    edits: Edits | None = None,
) -> tuple[SamplerState, jax.Array, tuple[jax.Array, ...]]:
    """The sampler as a program of its own, compiled once per number of logit rows; `state` is donated.

    Returns the state, tokens and their status as one array, and what is reported of them.
    """
    batch = unpack_sampling(packed_sampling, logits.shape[0])
    edited = None if edits is None else edit(processors, logits, state, batch, edits)
    output, state = sample(logits, state, batch, max_logprobs, mode, edited)
    tokens_and_status = jnp.stack([output.tokens, output.status])
    return state, tokens_and_status, (output.logprob, output.rank, output.top_ids, output.top_logprobs)


def candidates_of_rows(
    num_candidates: int,
    mode: LogprobsMode,
    processors: tuple[LogitsProcessor, ...],
    logits: jax.Array,
    state: SamplerState,
    packed_sampling: jax.Array,
    edits: Edits | None = None,
) -> tuple[jax.Array, ...]:
    """`beam_candidates` of a step's logits; nothing is donated.

    Whether a row's candidates are of any use, its status in the same step's `sample_rows` says.
    """
    batch = unpack_sampling(packed_sampling, logits.shape[0])
    edited = None if edits is None else edit(processors, logits, state, batch, edits)[0]
    return beam_candidates(num_candidates, mode, logits, state, batch, edited)


@dataclass(frozen=True)
class AbstractStep:
    """A step of one bucket without weights or a device: `function(*arguments)`, and what to donate."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Weights, KV cache, sampler state and packed inputs, as jax.ShapeDtypeStruct."""
    donate: tuple[int, ...] = (1, 2)


def abstract_step(
    engine_config: EngineConfig,
    model_config: ModelConfig,
    shapes: RunnerShapes,
    bucket: Bucket,
    num_blocks: int,
    mesh: Mesh | None = None,
) -> AbstractStep:
    """The step that the runner would jit for `bucket`, to be lowered for any platform; nothing is allocated.

    With a mesh, of devices that need not be here, it is spread over them, and its arguments have their shardings.
    """
    model = build_abstract(model_config, max_model_len=shapes.max_model_len)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    layout = shapes.packed_layout(bucket)
    attention = partial(paged_attention, implementation=engine_config.attention_implementation)
    everywhere = None
    weights: Sequence[jax.ShapeDtypeStruct] = leaves
    kv: Any = tuple(shapes.layout.shapes(num_blocks) for _ in range(shapes.groups.size))
    parallel = None
    if mesh is not None:
        everywhere = whole(mesh)
        weights = tuple(parameter_shapes(mesh, model).values())
        parallel = parallel_over(mesh, model, shapes.layout, shapes.groups.size)
        kv = cache_shapes(parallel, shapes.layout, num_blocks)

    # the state goes as its leaves: its annotations want arrays, and here there are shapes only
    trees: list[Any] = []

    def state_leaves() -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(init_state(shapes.num_rows, shapes.max_model_len, model_config.vocab_size))
        trees.append(tree)
        return leaves

    def one_device(leaves: Any, kv: Any, state: Any, packed: jax.Array, layout: PackedLayout) -> Any:
        state = jax.tree.unflatten(trees[0], state)
        kv, state, *rest = step(
            graph, tree, attention, engine_config.block_size, leaves, kv, state, packed, layout
        )
        return kv, jax.tree.leaves(state), *rest

    def function(leaves: Any, kv: Any, state: Any, packed: jax.Array) -> Any:
        if parallel is None:
            return one_device(leaves, kv, state, packed, layout)
        return parallel_step(parallel, one_device, leaves, kv, state, packed, layout)

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    arguments = (
        tuple(weights) if parallel is not None else tuple(map(shape, weights)),
        kv,
        list(map(shape, jax.eval_shape(state_leaves))),
        jax.ShapeDtypeStruct((layout.size,), jnp.int32, sharding=everywhere),
    )
    return AbstractStep(function, arguments)
