"""Lives here: seeded measurements of the engine against its peers and against the machine's ceilings.
May import: everything of the project, the standard library, numpy; a peer's libraries in `peers/` only.
Must never come in: what other rooms import; a module of `peers/` in the process that measures (each peer has its own).
Read first: `bench.workloads.BenchRequest`, then `bench.offline`.
"""
