"""Lives here: the op `paged_attention`, its reference, its implementations and the rule that picks one.
May import: jax, numpy, jaxtyping, this folder, and what this package has for platforms and C++ kernels.
Must never come in: anything that knows a model, a request or a scheduler.
Read first: AttentionMetadata (metadata.py), then reference.py, which is the op in a page of plain jnp.
"""
