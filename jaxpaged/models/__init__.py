"""Architectures as nnx.Modules, the facts stored with their weights, and our own checkpoint format.

May import: layers, sampling_params (for its ranges), jax, flax, numpy, safetensors, the standard library.
Must never come in: core, runner, engine, converters, any other checkpoint format, any choice of the operator.
Read first: `config.ModelConfig`, then `decoder.Decoder`.
"""
