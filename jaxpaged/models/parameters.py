"""The parameters of a model by path, and the law that each is filled exactly once."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpaged.sharding import LogicalAxes

Model = TypeVar("Model", bound=nnx.Module)

MOST_NAMES_SHOWN = 8


def shown_names(names: Iterable[str]) -> str:
    """Return the first names, sorted, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - MOST_NAMES_SHOWN
    return ", ".join(ordered[:MOST_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def parameter_specs(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter by path, for example `layers.0.attention.query.kernel`."""
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def parameter_arrays(model: nnx.Module) -> dict[str, jax.Array]:
    """Return every parameter by path."""
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def parameter_axes(model: nnx.Module) -> dict[str, LogicalAxes]:
    """Return the logical axes of every parameter by path, as `sharding` reads them."""
    return {".".join(map(str, path)): variable.axes for path, variable in nnx.to_flat_state(nnx.state(model))}


def check_names(given: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Raise ValueError, naming them, if parameters are missing from `given` or are there without being wanted."""
    given, wanted = set(given), set(wanted)
    if wanted - given:
        raise ValueError(
            f"{where}: missing parameters: {shown_names(wanted - given)}: it is incomplete, or config.json is of "
            "another model"
        )
    if given - wanted:
        raise ValueError(
            f"{where}: parameters the model does not have: {shown_names(given - wanted)}: take them out, or "
            "config.json is of another model"
        )


def place(path: str, array: jax.Array | np.ndarray) -> jax.Array:
    """Return the array on the default device, once it is there.

    A CPU device takes an aligned numpy array as it is, without a copy: nobody may write to it any more.
    """
    return jax.block_until_ready(jax.device_put(array))


def is_used_in_place() -> bool:
    """Say whether `place` makes parameters of aligned numpy arrays without a copy."""
    return jax.default_backend() == "cpu"


def fill(
    model: Model,
    arrays: Mapping[str, jax.Array | np.ndarray] | Iterable[tuple[str, jax.Array | np.ndarray]],
    *,
    put: Callable[[str, jax.Array | np.ndarray], jax.Array] | None = None,
) -> Model:
    """Return the abstract `model` with each parameter filled from `arrays`, exactly once.

    `arrays` may be a generator: each array is placed on the device by `put(path, array)` before the next one is
    drawn. A path that is unknown, comes twice or never, or an array of the wrong shape or dtype, raises ValueError by
    name.
    """
    graph, state = nnx.split(model)
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    filled: dict[str, tuple] = {}
    for name, array in arrays.items() if isinstance(arrays, Mapping) else arrays:
        if name not in variables:
            raise ValueError(f"parameter {name!r} is not in the model")
        if name in filled:
            raise ValueError(f"parameter {name!r} is given twice")
        path, variable = variables[name]
        if tuple(array.shape) != tuple(variable.shape) or array.dtype != variable.dtype:
            raise ValueError(
                f"parameter {name!r} is {array.dtype}{list(array.shape)}: the model needs "
                f"{variable.dtype}{list(variable.shape)}"
            )
        filled[name] = (path, variable.replace(jnp.asarray(array) if put is None else put(name, array)))
    check_names(filled, variables, "model")
    return nnx.merge(graph, nnx.from_flat_state(list(filled.values())))
