"""llama.cpp as a worker process, by llama-cpp-python: continuous batching over its own batches and KV cache.

Each step holds a token of every slot that decodes, and prompts as far as the batch has room, as its server does.
"""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from bench.peers.gguf_file import write_gguf
from bench.worker import peak_memory_bytes, serve

STEP_TOKENS = 512
KV_TYPES = {"f32": llama_cpp.GGML_TYPE_F32, "bf16": llama_cpp.GGML_TYPE_F16, "f16": llama_cpp.GGML_TYPE_F16,
            "q8_0": llama_cpp.GGML_TYPE_F16}  # fmt: skip
"""Keys and values by weights: 16 bits where they are 16 or fewer, its default."""


class Slot:
    """A request that runs."""

    def __init__(self, index: int, sequence: int, prompt: list[int]) -> None:
        self.index = index
        self.sequence = sequence
        self.todo = prompt
        """Tokens whose keys and values are still to be computed."""
        self.position = 0


class LlamaCppPeer:
    """Holds the loaded model between calls, and a context for each number of slots."""

    def __init__(self) -> None:
        self._model: Any = None
        self._weights = ""
        self._max_len = 0
        self._context: Any = None
        self._context_key: tuple[int, bool] | None = None

    def load(self, folder: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
        """Write the folder's model as GGUF and load it; the option `weights` is f32, bf16, f16 or q8_0."""
        del dtype  # said by `weights`
        self._weights, self._max_len = options["weights"], options["max_model_len"]
        path = Path(folder) / f"{self._weights}.gguf"
        write_gguf(Path(folder), path, self._weights)
        start = time.perf_counter()
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}: its reason stands above, in the worker's log")
        return {"load_s": time.perf_counter() - start, "device": f"cpu {self._num_threads} threads"}

    @property
    def _num_threads(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def _use_context(self, num_slots: int, is_unified: bool) -> Any:
        if self._context_key == (num_slots, is_unified):
            return self._context
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_slots * self._max_len
        params.n_batch = params.n_ubatch = STEP_TOKENS
        params.n_seq_max = num_slots
        params.n_threads = params.n_threads_batch = self._num_threads
        params.type_k = params.type_v = KV_TYPES[self._weights]
        params.kv_unified = is_unified
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {num_slots} slots of {self._max_len} tokens")
        self._context_key = (num_slots, is_unified)
        return self._context

    def generate(
        self, prompts: list[list[int]], max_tokens: list[int], num_slots: int, is_unified: bool
    ) -> dict[str, Any]:
        """All requests at time 0, greedily, `num_slots` at once; making the context is not timed."""
        context = self._use_context(num_slots, is_unified)
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, True)
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        batch = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)
        token_ids: list[list[int]] = [[] for _ in prompts]
        waiting = list(enumerate(prompts))[::-1]
        free = list(range(num_slots))[::-1]
        running: list[Slot] = []
        start = time.perf_counter()
        while waiting or running:
            while waiting and free:
                index, prompt = waiting.pop()
                running.append(Slot(index, free.pop(), prompt))
            sampled = self._fill(batch, running)
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed: its reason stands above, in the worker's log")
            for place, slot in sampled:
                row = llama_cpp.llama_get_logits_ith(context, place)
                token = int(np.ctypeslib.as_array(row, (vocab_size,)).argmax())
                token_ids[slot.index].append(token)
                slot.todo = [token]
                if len(token_ids[slot.index]) == max_tokens[slot.index]:
                    llama_cpp.llama_memory_seq_rm(memory, slot.sequence, -1, -1)
                    free.append(slot.sequence)
                    running.remove(slot)
        elapsed_s = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        return {"elapsed_s": elapsed_s, "token_ids": token_ids}

    def _fill(self, batch: Any, running: list[Slot]) -> list[tuple[int, Slot]]:
        """Put the step's tokens into the batch, decodes first; return the places whose logits give a token."""
        sampled: list[tuple[int, Slot]] = []
        place = 0
        for slot in sorted(running, key=lambda slot: len(slot.todo) > 1):
            taken, slot.todo = slot.todo[: STEP_TOKENS - place], slot.todo[STEP_TOKENS - place :]
            for token in taken:
                batch.token[place] = token
                batch.pos[place] = slot.position
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = slot.sequence
                batch.logits[place] = False
                slot.position += 1
                place += 1
            if taken and not slot.todo:
                batch.logits[place - 1] = True
                sampled.append((place - 1, slot))
        batch.n_tokens = place
        return sampled

    def finish(self) -> dict[str, Any]:
        """What is known at the end only."""
        return {"peak_memory_bytes": peak_memory_bytes()}


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Only warnings and errors, to the worker's log."""
    if level in (llama_cpp.GGML_LOG_LEVEL_WARN, llama_cpp.GGML_LOG_LEVEL_ERROR):
        os.write(2, text)


def main() -> None:
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
    peer = LlamaCppPeer()
    serve(
        {"load": peer.load, "generate": peer.generate, "finish": peer.finish},
        {"llama_cpp": llama_cpp.__version__, "gguf": getattr(gguf, "__version__", "unknown")},
    )


if __name__ == "__main__":
    main()
