"""Converters: checkpoints of others become ours and back, each tensor used once, nothing guessed and no code run.

May import: jaxpaged.models, jax and flax (arrays in memory), orbax where it is used, numpy, tqdm, the standard library.
Must never come in: torch, pickle, remote code, the network, the engine; nothing below floor 6 imports this.
Read first: `rules.Rule`, then the table in llama.py.
"""

from converters.formats import convert, from_state, load
from converters.huggingface import load_huggingface

__all__ = ["convert", "from_state", "load", "load_huggingface"]
