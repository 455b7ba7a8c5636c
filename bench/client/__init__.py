"""Lives here: a load generator for any server with OpenAI's API, which sends requests and notes when tokens come back.
May import: `bench`'s records and workloads, the standard library, numpy, tqdm.
Must never come in: jax (it may hold the memory of the device that the server under test needs), an HTTP library.
Read first: `bench.client.stream.TokenStream`, then `bench.client.load`.
"""
