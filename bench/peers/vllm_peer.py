"""vLLM as a worker process, through its public `LLM`: continuous batching over a paged KV cache."""

import time
from typing import Any

import vllm
from vllm import LLM, SamplingParams

from bench.worker import peak_memory_bytes, serve


class VllmPeer:
    """Holds the loaded engine between calls."""

    def __init__(self) -> None:
        self._llm: Any = None

    def load(self, folder: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load the model on the device that this installation of vLLM is for; `options` are further arguments."""
        start = time.perf_counter()
        # no two prompts share a prefix here, and looking for one is not its work
        self._llm = LLM(
            model=folder, dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, seed=0, **options
        )
        return {"load_s": time.perf_counter() - start, "device": f"vllm {vllm.__version__}"}

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> dict[str, Any]:
        """All requests at once, at time 0, greedily, to exactly their `max_tokens`."""
        params = [
            SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True, detokenize=False) for num in max_tokens
        ]
        start = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        elapsed_s = time.perf_counter() - start
        return {"elapsed_s": elapsed_s, "token_ids": [list(output.outputs[0].token_ids) for output in outputs]}

    def finish(self) -> dict[str, Any]:
        """What is known at the end only; its worker processes are not counted."""
        return {"peak_memory_bytes": peak_memory_bytes()}


def main() -> None:
    peer = VllmPeer()
    serve({"load": peer.load, "generate": peer.generate, "finish": peer.finish}, {"vllm": vllm.__version__})


if __name__ == "__main__":
    main()
