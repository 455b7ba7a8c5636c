"""jaxpaged as a worker process: the same calls as a peer, through the public `LLM` only."""

import time
from typing import Any

import jax

from bench.worker import peak_memory_bytes, serve
from jaxpaged import LLM, BeamSearchParams, SamplingParams


class EngineWorker:
    """Holds the loaded engine between calls."""

    def __init__(self) -> None:
        self._llm: LLM | None = None

    def load(
        self, folder: str, dtype: str, options: dict[str, Any], show_progress: bool = False
    ) -> dict[str, Any]:
        """Load the model; `options` are further arguments of LLM. Returns what is known then."""
        start = time.perf_counter()
        self._llm = llm = LLM(folder, dtype=dtype, show_progress=show_progress, **options)
        device = jax.devices()[0]
        return {
            "load_s": time.perf_counter() - start,
            "device": f"{device.platform} {device.device_kind}",
            "dtype": str(llm.engine.model_config.dtype),
            "vocab_size": llm.engine.model_config.vocab_size,
            "max_model_len": llm.engine.max_model_len,
        }

    def generate(
        self, prompts: list[list[int]], max_tokens: list[int], detokenize: bool = False
    ) -> dict[str, Any]:
        """All requests at once, at time 0, greedy, to exactly their `max_tokens`; the prefix cache starts empty."""
        params = [
            SamplingParams(temperature=0, max_tokens=num, ignore_eos=True, detokenize=detokenize) for num in max_tokens
        ]
        return self._run(prompts, params)

    def beam_search(self, prompts: list[list[int]], width: int, num_new_tokens: int) -> dict[str, Any]:
        """All searches at once; of each the best hypothesis. The prefix cache starts empty."""
        return self._run(prompts, BeamSearchParams(beam_width=width, max_tokens=num_new_tokens, ignore_eos=True))

    def _run(self, prompts: list[list[int]], params: Any) -> dict[str, Any]:
        """Seconds, CPU seconds and host times of one call, and what came first of each prompt."""
        llm = self._llm
        assert llm is not None
        llm.reset_prefix_cache()
        before = host_stats(llm)
        cpu_before = time.process_time()
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        elapsed_s = time.perf_counter() - start
        cpu_s = time.process_time() - cpu_before
        after = host_stats(llm)
        return {
            "elapsed_s": elapsed_s,
            "cpu_s": cpu_s,
            "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
            "texts": [output.outputs[0].text for output in outputs],
            "first_token_s": [output.metrics.time_to_first_token_s for output in outputs],
            "warm_up_s": llm.last_warm_up_s,
            "host": {name: after[name] - before[name] for name in after},
        }

    def finish(self) -> dict[str, Any]:
        """What is known at the end only."""
        assert self._llm is not None
        stats = self._llm.stats()
        return {
            "peak_memory_bytes": peak_memory_bytes(),
            "num_compiles_after_warmup": stats.num_compiles_after_warmup,
            "num_preemptions": stats.num_preemptions,
        }


def host_stats(llm: LLM) -> dict[str, float]:
    """Seconds the host spent so far, by part, and the steps it spent them on: the one place that reads these times.

    Wall time: with the host one step ahead, the device's threads compete for the cores (`bench.host_time` has none).
    """
    times = llm.engine.host_times
    parts = {"schedule_s": times.schedule_s, "build_s": times.build_s, "update_s": times.update_s}
    return {**parts, "host_s": sum(parts.values()), "num_steps": times.num_steps}


def main() -> None:
    worker = EngineWorker()
    serve(
        {
            "load": worker.load, "generate": worker.generate, "beam_search": worker.beam_search,
            "finish": worker.finish,
        },
        {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
    )


if __name__ == "__main__":
    main()
