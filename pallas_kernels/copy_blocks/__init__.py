"""Lives here: whole-block copies inside a cache, and between a cache and staging arrays (copy-on-write, swap).
May import: jax, jaxtyping.
Must never come in: anything that knows what a block holds; a block is an opaque row of the leading axis.
Read first: copy_blocks.
"""
