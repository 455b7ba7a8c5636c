"""transformers as a worker process: `generate` on static left-padded batches, and its continuous batching."""

import os
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from bench.worker import peak_memory_bytes, serve

PAGE_SIZE = 32
"""Tokens a block of continuous batching; its default of 256 would waste much of a chat's last block."""


class TransformersPeer:
    """Holds the loaded model between calls."""

    def __init__(self) -> None:
        self._model: Any = None

    def load(self, folder: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load the model onto CUDA if there is one, else onto all the cores this process may use."""
        if options:
            raise ValueError(f"options {options} are not known to this peer: give none")
        start = time.perf_counter()
        if hasattr(os, "sched_getaffinity"):
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self._model = model.to(device).eval()
        # lengths are forced: nothing ends early, on either path
        self._model.config.eos_token_id = None
        self._model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        return {"load_s": time.perf_counter() - start, "device": f"{device} {name}"}

    @torch.no_grad()
    def static(self, prompts: list[list[int]], max_tokens: list[int], batches: list[list[int]]) -> dict[str, Any]:
        """One `generate` per batch of indices, each until its longest output is done; the rest is cut off."""
        token_ids: list[list[int]] = [[] for _ in prompts]
        start = time.perf_counter()
        for batch in batches:
            rows = self._generate([prompts[index] for index in batch], max(max_tokens[index] for index in batch))
            for index, row in zip(batch, rows, strict=True):
                token_ids[index] = row[: max_tokens[index]]
        return {"elapsed_s": time.perf_counter() - start, "token_ids": token_ids}

    @torch.no_grad()
    def beam_search(
        self, prompts: list[list[int]], width: int, num_new_tokens: int, batch_size: int
    ) -> dict[str, Any]:
        """Beam searches, `batch_size` at a time; of each the best hypothesis."""
        token_ids: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            token_ids += self._generate(batch, num_new_tokens, num_beams=width, num_return_sequences=1)
        return {"elapsed_s": time.perf_counter() - start, "token_ids": token_ids}

    def _generate(self, prompts: list[list[int]], num_new_tokens: int, **options: Any) -> list[list[int]]:
        """New tokens of one left-padded batch, exactly as many as asked for."""
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        input_ids = [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        output = self._model.generate(
            input_ids=torch.tensor(input_ids, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            max_new_tokens=num_new_tokens,
            **options,
        )
        if output.shape[1] != longest + num_new_tokens:
            raise ValueError(f"generate gave {output.shape[1] - longest} tokens instead of {num_new_tokens}")
        return output[:, longest:].tolist()

    @torch.no_grad()
    def continuous(self, prompts: list[list[int]], max_tokens: list[int], max_batch_tokens: int) -> dict[str, Any]:
        """All requests at once; the manager's set-up, warm-up and end are not timed. Its pool holds every request."""
        lens = [len(prompt) + num for prompt, num in zip(prompts, max_tokens, strict=True)]
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=sum(-(-length // PAGE_SIZE) + 1 for length in lens),
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=len(prompts),
        )
        finished: dict[str, list[int]] = {}
        # its answer to "no end of sequence" is -1
        generation_config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self._model.continuous_batching_context_manager(
            generation_config=generation_config, continuous_batching_config=config
        ) as manager:
            start = time.perf_counter()
            names = [
                manager.add_request(prompt, request_id=f"request_{index}", max_new_tokens=num)
                for index, (prompt, num) in enumerate(zip(prompts, max_tokens, strict=True))
            ]
            while len(finished) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread ended before its requests did")
                    continue
                if result.error is not None:
                    raise RuntimeError(f"continuous batching failed on {result.request_id}: {result.error}")
                if result.is_finished():
                    finished[result.request_id] = list(result.generated_tokens)
            elapsed_s = time.perf_counter() - start
        return {"elapsed_s": elapsed_s, "token_ids": [finished[name] for name in names]}

    def finish(self) -> dict[str, Any]:
        """What is known at the end only."""
        return {"peak_memory_bytes": peak_memory_bytes()}


def main() -> None:
    transformers.logging.set_verbosity_error()
    peer = TransformersPeer()
    serve(
        {
            "load": peer.load, "static": peer.static, "continuous": peer.continuous,
            "beam_search": peer.beam_search, "finish": peer.finish,
        },
        {"torch": torch.__version__, "transformers": transformers.__version__},
    )


if __name__ == "__main__":
    main()
