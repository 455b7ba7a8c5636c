"""Converters: checkpoints of others become ours, each tensor used once, nothing guessed and no code run.

May import: jaxpaged.models, jax (arrays in memory), numpy, tqdm, the standard library.
Must never come in: torch, pickle, remote code, the network, the engine; nothing below floor 6 imports this.
Read first: `rules.Rule`, then the table in llama.py.
"""

from converters.huggingface import convert, load_huggingface

__all__ = ["convert", "load_huggingface"]
