"""Lives here: seeded measurements of the engine against its peers and against the machine's ceilings.
May import: everything of the project, the standard library, numpy; a peer's libraries in `peers/` only.
Must never come in: what other rooms import; a module of `peers/` in the process that measures (each peer has its own).
Read first: `bench.workloads.BenchRequest`, then `bench.offline`.
"""

VERBS = {
    "latency": ("bench.latency", "seconds of one batch, of any model"),
    "throughput": ("bench.throughput", "tokens a second of many requests that lie ready, of any model"),
    "serve": ("bench.serve", "a server with OpenAI's API under load, ours or any other"),
    "startup": ("bench.startup", "seconds until the first token, cold and warm, and where they go"),
    "compare": ("bench.compare", "two results of one bench: what is better, what worse, and by how much"),
    "offline": ("bench.offline", "tokens a second of many requests, and of one, beside transformers"),
    "peers": ("bench.side_by_side", "tokens a second beside transformers, llama.cpp, vLLM and any OpenAI server"),
    "steps": ("bench.steps", "milliseconds of decode and prefill steps"),
    "kernels": ("bench.kernels", "paged attention against its reference, its peers and the machine's ceilings"),
    "llama8b": ("bench.llama8b", "tokens a second of an 8B Llama on one accelerator"),
    "beams": ("bench.beams", "beam search beside transformers'"),
    "structured": ("bench.structured", "what JSON-schema output costs a step"),
    "moe": ("bench.moe", "a mixture of experts against its dense twin"),
    "load": ("bench.load", "loading a checkpoint against reading its files"),
    "swap": ("bench.swap", "swapping KV blocks to host memory and back"),
    "serving": ("bench.serving", "tokens a second over HTTP beside the offline engine, and how soon it is ready"),
    "host-scale": ("bench.host_scale", "the host's step and memory as pool, queue and crowd grow, without a device"),
    "host-time": ("bench.host_time", "what the host does in a step, without a device"),
    "paper-batching": ("bench.paper.batching", "requests at once in equal memory: paging against reservations"),
    "paper-sharing": ("bench.paper.sharing", "KV blocks saved by samples and beams"),
    "paper-prefix": ("bench.paper.prefix", "what a shared prefix is worth"),
    "paper-rate": ("bench.paper.rate", "request rates at equal latency: paging against reservations"),
    "paper-kernel": ("bench.paper.kernel", "attention over blocks against contiguous memory"),
    "paper-block-size": ("bench.paper.block_size", "tokens a second by block size"),
    "paper-preemption": ("bench.paper.preemption", "swapping against recomputing"),
    "report": ("bench.paper.report", "the paper's experiments as one HTML file"),
}
"""`jaxpaged bench NAME`: its module, whose `main(arguments)` runs it, and what it measures."""
