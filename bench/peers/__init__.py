"""Lives here: one module per peer, each the main program of a worker process under the peer's interpreter.
May import: the peer's own libraries, `bench.worker`, the standard library.
Must never come in: jaxpaged, jax or another peer (a peer's environment need not have them).
Read first: `bench.worker.serve`.
"""
