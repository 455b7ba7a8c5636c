"""jaxpaged: a pure JAX/XLA inference engine with paged attention on TPU, CUDA GPU and CPU.

May import: everything below (this is the door).
Must never come in: torch.
Read first: `LLM` in llm.py, then the README's page that follows one request through the rooms.
"""

import importlib
from typing import Any

_HOMES = {
    "LLM": "jaxpaged.llm",
    "BeamSearchParams": "jaxpaged.sampling_params",
    "EngineConfig": "jaxpaged.config",
    "FailedRequestWarning": "jaxpaged.engine.outputs",
    "RequestOutput": "jaxpaged.engine.outputs",
    "SamplingParams": "jaxpaged.sampling_params",
    "StructuredOutputsParams": "jaxpaged.structured_outputs",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "EngineConfig",
    "FailedRequestWarning",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `jaxpaged --help` does not wait for jax."""
    if name not in _HOMES:
        raise AttributeError(f"jaxpaged has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
