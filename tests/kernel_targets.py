"""How each attention implementation is run on this machine: as it is, or in an interpreter of its own device.

`TARGETS` is what tests of the op loop over. TPU kernels run natively on a TPU; elsewhere jax's TPU interpreter runs
them, with its memory poisoned by NaN, its bounds checked and its races detected.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import IMPLEMENTATIONS, lowering_for


@contextlib.contextmanager
def tpu_interpreter(dma_execution_mode: str = "on_wait") -> Iterator[None]:
    """A context in which programs are made for a TPU and its kernels are interpreted; a race raises AssertionError.

    What was started in it must be ready before it ends. "on_wait" copies when somebody waits for the copy, "eager"
    when it is started.
    """
    printed = io.StringIO()
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode)
    pltpu.reset_tpu_interpret_mode_state()
    with (
        contextlib.redirect_stdout(printed),  # jax 0.10.2 tells of a race here and goes on; jax 0.12 raises
        lowering_for("tpu", "TPU v5 lite"),
        pltpu.force_tpu_interpret_mode(params),
    ):
        yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()


@dataclass(frozen=True)
class Target:
    """An implementation and the context to run it in."""

    name: str
    """Of its row in IMPLEMENTATIONS."""
    running: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    block_multiple: int = 1
    """Its block sizes are multiples of this."""

    def __str__(self) -> str:
        return self.name


INTERPRETED = {} if jax.default_backend() == "tpu" else {"mosaic_tpu": tpu_interpreter}
BLOCK_MULTIPLES = {"mosaic_tpu": 8}
TARGETS = tuple(
    Target(row.name, INTERPRETED.get(row.name, contextlib.nullcontext), BLOCK_MULTIPLES.get(row.name, 1))
    for row in IMPLEMENTATIONS
)
