"""Beam search stated anew, one hypothesis at a time over a dense forward: what the engine's searches are held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tiny_checkpoints import empty_kv, run_dense

from jaxpaged.sampling_params import BeamSearchParams


class Form(Protocol):
    """What output tokens a form allows."""

    def allowed(self, outputs: list[int]) -> Sequence[int]:
        """Those that may follow."""

    def is_end(self, outputs: list[int]) -> bool:
        """Whether nothing may."""


@dataclass
class Reference:
    """A model whose full forwards are remembered by their tokens."""

    model: Any
    eos: int = 1
    max_len: int = 128

    def __post_init__(self) -> None:
        self._logits: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, tokens: tuple[int, ...]) -> np.ndarray:
        """float64 [vocab], of the token that follows."""
        if tokens not in self._logits:
            module, config = self.model
            padded = np.zeros(self.max_len, np.int32)
            padded[: len(tokens)] = tokens
            found = run_dense(module, padded, 0, empty_kv(config, self.max_len))[0]
            self._logits[tokens] = found[len(tokens) - 1].astype(np.float64)
        return self._logits[tokens]

    def search(
        self,
        prompt: Sequence[int],
        params: BeamSearchParams,
        *,
        form: Form | None = None,
        edit: Callable[[np.ndarray, list[int], list[int]], np.ndarray] = lambda logits, prompt, outputs: logits,
    ) -> list[tuple[tuple[int, ...], float, str]]:
        """(output tokens, score, finish reason) of the best hypotheses, best first.

        Args:
            edit: What a logits processor does to the logits, given prompt and output tokens.
        """
        width = params.beam_width
        stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (self.eos,))}
        num_looked_at = max(2, 1 + len(stops)) * width
        live: list[tuple[float, list[int]]] = [(0.0, [])]
        done: list[tuple[float, list[int], str]] = []
        can_improve = True
        while True:
            every = []
            for total, outputs in live:
                raw = self.logits((*prompt, *outputs))
                log_total = raw.max() + np.log(np.exp(raw - raw.max()).sum())
                scores = edit(raw, list(prompt), outputs) - log_total
                for token in self.allowed(params, form, outputs):
                    if np.isfinite(scores[token]):
                        every.append((total + scores[token], [*outputs, token]))
            every.sort(key=lambda entry: -entry[0])
            going_on, ended = [], []
            for rank, (total, outputs) in enumerate(every[:num_looked_at]):
                reason = self.end(params, stops, form, outputs)
                if reason is None:
                    going_on.append((total, outputs))
                elif rank < width and can_improve:
                    ended.append((total / len(outputs) ** params.length_penalty, outputs, reason))
            done = sorted([*done, *ended], key=lambda entry: -entry[0])[:width]
            live = going_on[:width]
            is_full = len(done) == width
            if live and is_full:
                can_improve &= live[0][0] / len(live[0][1]) ** params.length_penalty > done[-1][0]
            if not live or not can_improve or (params.early_stopping and is_full):
                return [(tuple(outputs), score, reason) for score, outputs, reason in done]

    def allowed(self, params: BeamSearchParams, form: Form | None, outputs: list[int]) -> list[int]:
        """The tokens that the form and `allowed_token_ids` leave."""
        tokens = set(range(self.model[1].vocab_size) if form is None else form.allowed(outputs))
        return sorted(tokens if params.allowed_token_ids is None else tokens & set(params.allowed_token_ids))

    def end(self, params: BeamSearchParams, stops: set[int], form: Form | None, outputs: list[int]) -> str | None:
        """Why a hypothesis is finished, if it is."""
        if outputs[-1] in stops or (form is not None and form.is_end(outputs)):
            return "stop"
        return "length" if len(outputs) >= params.max_tokens else None
