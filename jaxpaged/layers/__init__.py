"""The layers that decoder models are made of: each a small nnx.Module, or a pure function of arrays.

May import: jax, flax, numpy and one another; attention.py alone may name types of pallas_kernels.
Must never come in: core, runner, engine, models, any loading, any global; the attention kernel is an argument.
Read first: `attention.Attention`.
"""
