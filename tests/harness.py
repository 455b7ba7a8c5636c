"""Engines over tiny random models, and what the law tests compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxpaged.config import EngineConfig
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.outputs import RequestOutput
from jaxpaged.engine.stats import EngineStats
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.llm import DEMO_FOLDER
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parameters import fill, parameter_arrays
from jaxpaged.models.random_model import random_model
from jaxpaged.models.registry import build_abstract
from jaxpaged.runner.parallel import cut_over
from jaxpaged.runner.shapes import memory_plan, resolve_shapes
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.sharding import Placement, make_mesh

EOS = 1
"""Of the demo tokenizer."""
TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=199,
    model_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_embeddings=False,
    dtype="float32",
)


@dataclass(frozen=True)
class Run:
    """What an engine gave for some prompts, in their order."""

    outputs: tuple[RequestOutput, ...]
    stats: EngineStats

    @property
    def token_ids(self) -> list[list[tuple[int, ...]]]:
        return [[completion.token_ids for completion in output.outputs] for output in self.outputs]

    @property
    def logprobs(self) -> list[list[tuple[float, ...]]]:
        return [
            [tuple(entry.logprob for entry in completion.logprobs or ()) for completion in output.outputs]
            for output in self.outputs
        ]


def tiny_model(seed: int = 0, **changes: Any) -> tuple[Decoder, ModelConfig]:
    """A model of random weights, and its facts."""
    config = ModelConfig(**{**TINY.__dict__, **changes})
    return random_model(config, seed), config


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO_FOLDER)


def model_for(tokenizer: Tokenizer) -> tuple[Decoder, ModelConfig]:
    """A model of random weights that writes this tokenizer's tokens."""
    return tiny_model(seed=3, vocab_size=tokenizer.vocab_size, eos_token_ids=(EOS,))


def make_engine(
    model: tuple[Decoder, ModelConfig], tokenizer: Any = None, logits_processors: Any = None, **options: Any
) -> Engine:
    """An engine with small defaults; `options` are those of EngineConfig."""
    module, model_config = model
    chosen: dict[str, Any] = {
        "block_size": 8,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "num_device_blocks": 128,
        "host_memory_bytes": 2**22,
        "preemption": "swap",
    } | options
    config = EngineConfig(**chosen)
    shapes = resolve_shapes(config, model_config, model_config.dtype)
    plan = memory_plan(
        config, model_config, shapes, weight_bytes=0, dtype=model_config.dtype, logits_processors=logits_processors
    )
    mesh = make_mesh(config.tensor_parallel_size)
    if mesh is not None:
        module = on_mesh(module, mesh)
    return Engine(
        module, model_config, config, shapes, plan, tokenizer=tokenizer, mesh=mesh,
        logits_processors=logits_processors,
    )


def on_mesh(module: Decoder, mesh: Mesh) -> Decoder:
    """The model spread over a mesh, as loading spreads it."""
    put = Placement(mesh, cut_over(mesh.size, module)).put
    return fill(build_abstract(module.config), parameter_arrays(module), put=put)


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left; the pools must then balance."""
    finished: dict[str, RequestOutput] = {}
    num_idle = 0
    while engine.has_unfinished:
        outputs = [output for output in engine.step() if output.finished]
        for output in outputs:
            assert output.request_id not in finished, "a request ended twice"
            finished[output.request_id] = output
        num_idle = 0 if outputs else num_idle + 1
        assert num_idle < 3000, "no request ended in 3,000 steps"
    drain(engine)
    return finished


def drain(engine: Engine) -> None:
    """Read the step that may still be in flight, then audit the pools."""
    engine.step()
    engine.scheduler.check()
    stats = engine.stats()
    assert stats.num_used_blocks == 0
    assert stats.num_requests_accepted == stats.num_requests_finished


def run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | BeamSearchParams | Sequence[SamplingParams | BeamSearchParams],
) -> Run:
    """Run prompts through an engine, all added at once."""
    many = [params] * len(prompts) if isinstance(params, (SamplingParams, BeamSearchParams)) else params
    ids = [engine.add_request(list(prompt), one) for prompt, one in zip(prompts, many, strict=True)]
    finished = finish(engine)
    return Run(tuple(finished[request_id] for request_id in ids), engine.stats())


def random_prompts(seed: int, lengths: Sequence[int], vocab_size: int = TINY.vocab_size) -> list[list[int]]:
    """Prompts of random token ids with the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]
