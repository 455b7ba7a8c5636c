"""Any mixture of requests over a tiny pool gives each what it gets alone in an ample one, to the bit.

Greedy, sampled, n > 1, beams, grammars, logits processors, stop strings, bans and faults; arrivals, priorities and
aborts at any step; engines that swap, recompute, run ahead or not, and one whose host pool holds next to nothing. Block
tables, rows and requests are audited after every step, and everything must be free at the end.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import pytest
from harness import demo_tokenizer, drain, make_engine, model_for, random_prompts
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from processors import late_nan

from jaxpaged.engine.engine import Engine
from jaxpaged.engine.outputs import RequestOutput
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.structured_outputs import StructuredOutputsParams

SIZES = {"block_size": 4, "max_num_seqs": 16, "max_num_batched_tokens": 24, "batch_invariant": True}
LONGEST_PROMPT, LONGEST_OUTPUT, LAST_ARRIVAL = 14, 13, 6
TIGHT = 21
"""Device blocks, the null block included: any one request fits, and little more."""
ENGINES: dict[str, dict[str, Any]] = {
    "swap": {"preemption": "swap"},
    "recompute": {"preemption": "recompute", "scheduling_policy": "priority"},
    "swap, synchronous, by priority": {"preemption": "swap", "run_ahead": False, "scheduling_policy": "priority"},
    "hardly a host pool, no prefix cache": {
        "preemption": "swap", "host_memory_bytes": 2**13, "enable_prefix_caching": False,
    },
}  # fmt: skip
PROMPTS = random_prompts(7, [LONGEST_PROMPT] * 3, 1024)
FORMS = (
    StructuredOutputsParams(regex="[a-c]{2,9}x?"),
    StructuredOutputsParams(choice=["to be", "to bear", "not"]),
    StructuredOutputsParams(json={"type": "array", "items": {"enum": [1, 23]}, "maxItems": 3}),
)


def push(logits, context, *, bonus=2.0):
    """Every token that its sequence holds already is likelier by `bonus`: reads the device's memory of it."""
    positions = jnp.arange(context.token_ids.shape[0])
    ids = jnp.where(positions < context.num_tokens, context.token_ids, logits.shape[0])
    return logits.at[ids].add(bonus, mode="drop")


PROCESSORS = {"push": push, "late_nan": late_nan}


@dataclass(frozen=True)
class Asked:
    """One request of a mixture."""

    prompt: int
    num_prompt_tokens: int
    params: SamplingParams | BeamSearchParams
    arrival: int
    """Steps before it comes; at most LAST_ARRIVAL."""
    priority: int
    abort: int | None
    """Steps before it is aborted, if it still lives then."""

    @property
    def tokens(self) -> list[int]:
        return PROMPTS[self.prompt][: self.num_prompt_tokens]


@st.composite
def any_params(draw) -> SamplingParams | BeamSearchParams:
    pick = st.sampled_from
    shared: dict[str, Any] = {
        "max_tokens": draw(pick([1, 6, *[LONGEST_OUTPUT] * 3])),
        "logprobs": draw(pick([None, None, 2])),
        "structured_outputs": draw(pick([None, None, None, *FORMS])),
        "logits_processors": draw(pick([None] * 4 + [{"push": {}}, {"push": {"bonus": -3.0}}, {"late_nan": {}}])),
    } | draw(
        pick(
            [{}, {}, {}, {"stop": ["e"]}, {"stop_token_ids": [300]}, {"bad_words": ["a", "the"]},
             {"logit_bias": {66: 3.0}}, {"allowed_token_ids": list(range(60, 120))}, {"ignore_eos": True}]
        )
    )  # fmt: skip
    kind = draw(pick(["greedy", "sampled", "beams"]))
    if kind == "beams":
        return BeamSearchParams(
            **shared, beam_width=draw(pick([1, 2, 4])), length_penalty=draw(pick([0.0, 1.0, 2.0])),
            early_stopping=draw(st.booleans()),
        )  # fmt: skip
    shared["prompt_logprobs"] = draw(pick([None, None, None, 1]))
    if kind == "greedy":
        return SamplingParams(**shared, temperature=0)
    return SamplingParams(
        **shared, temperature=0.9, seed=draw(pick([1, 2])), n=draw(pick([1, 2, 3])), top_k=draw(pick([0, 40])),
        repetition_penalty=draw(pick([1.0, 1.0, 1.3])),
    )  # fmt: skip


any_request = st.builds(
    Asked,
    prompt=st.integers(0, 2),
    num_prompt_tokens=st.sampled_from([1, 7, 12, LONGEST_PROMPT]),
    params=any_params(),
    arrival=st.integers(0, LAST_ARRIVAL),
    priority=st.integers(-1, 1),
    abort=st.one_of(st.none(), st.none(), st.integers(0, 20)),
)


class Bench:
    """Engines that are made once, and what requests get alone in an ample pool."""

    def __init__(self) -> None:
        self.tokenizer = demo_tokenizer()
        self.model = model_for(self.tokenizer)
        self.tight = {name: self.engine(num_device_blocks=TIGHT, **options) for name, options in ENGINES.items()}
        self.ample = self.engine(num_device_blocks=96, enable_prefix_caching=False)
        self.known: dict[Any, RequestOutput] = {}

    def engine(self, **options) -> Engine:
        return make_engine(self.model, self.tokenizer, PROCESSORS, **SIZES, **options)

    def alone(self, asked: Asked) -> RequestOutput:
        key = (asked.prompt, asked.num_prompt_tokens, asked.params)
        if key not in self.known:
            self.ample.add_request(asked.tokens, asked.params)
            while self.ample.has_unfinished:
                for output in self.ample.step():
                    self.known[key] = output
            drain(self.ample)
        return self.known[key]

    def together(self, name: str, mixture: list[Asked]) -> dict[int, RequestOutput]:
        """What each request got, by its place; audited after every step."""
        engine = self.tight[name]
        engine.reset_prefix_cache()
        has_priorities = engine.config.scheduling_policy == "priority"
        ids: dict[str, int] = {}
        ended: dict[int, RequestOutput] = {}
        step = 0
        while step <= LAST_ARRIVAL or engine.has_unfinished:
            for place, asked in enumerate(mixture):
                if asked.arrival == step:
                    priority = asked.priority if has_priorities else 0
                    ids[engine.add_request(asked.tokens, asked.params, priority=priority)] = place
                if asked.abort == step:
                    for request_id in [one for one, of in ids.items() if of == place]:
                        engine.abort(request_id)
            for output in engine.step():
                assert output.finished
                assert ids[output.request_id] not in ended, "a request ended twice"
                ended[ids[output.request_id]] = output
            engine.scheduler.check()
            step += 1
            assert step < 3000, "no progress"
        drain(engine)
        assert engine.stats().num_free_blocks == TIGHT - 1
        assert not engine._grammars._of_request
        assert not engine._grammars._beams
        assert not engine.scheduler.searches._of_request
        return ended


@pytest.fixture(scope="module")
def bench() -> Bench:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: structured)")
    return Bench()


def told(output: RequestOutput) -> list[Any]:
    return [output.prompt_logprobs] + [
        (one.index, one.token_ids, one.text, one.logprobs, one.cumulative_logprob, one.score, one.finish_reason,
         one.stop_reason)
        for one in output.outputs
    ]  # fmt: skip


def assert_as_alone(asked: Asked, got: RequestOutput, alone: RequestOutput) -> None:
    reasons = {one.finish_reason for one in got.outputs}
    if "abort" in reasons:
        assert asked.abort is not None
        if isinstance(asked.params, BeamSearchParams):
            scores = [one.score for one in got.outputs]
            assert scores == sorted(scores, reverse=True)
            return
        for one, whole in zip(got.outputs, alone.outputs, strict=True):
            assert one.token_ids == whole.token_ids[: len(one.token_ids)]
            if one.logprobs is not None:
                assert one.logprobs == whole.logprobs[: len(one.logprobs)]
        return
    is_wrong = any(one.finish_reason == "error" for one in alone.outputs)
    assert ("error" in reasons) == is_wrong or asked.abort is not None
    if not is_wrong:  # how far its samples come before one meets a fault is not fixed
        assert told(got) == told(alone)


def check(bench: Bench, name: str, mixture: list[Asked]) -> None:
    before = bench.tight[name].stats()
    got = bench.together(name, mixture)
    assert sorted(got) == list(range(len(mixture))), "every request ends"
    after = bench.tight[name].stats()
    event(f"preempted: {after.num_preemptions > before.num_preemptions}")
    event(f"swapped: {after.num_swapped_out_blocks > before.num_swapped_out_blocks}")
    for place, asked in enumerate(mixture):
        assert_as_alone(asked, got[place], bench.alone(asked))


quietly = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck], print_blob=False
)


@settings(quietly, max_examples=24)
@given(name=st.sampled_from(sorted(ENGINES)), mixture=st.lists(any_request, min_size=5, max_size=8))
def test_each_request_gets_what_it_gets_alone(bench, name, mixture) -> None:
    check(bench, name, mixture)


def test_those_mixtures_met_what_they_test(bench) -> None:
    """Runs behind the test above, on its engines."""
    stats = [engine.stats() for engine in bench.tight.values()]
    if not any(one.num_requests_finished for one in stats):
        pytest.skip("the mixtures did not run")
    assert sum(one.num_preemptions for one in stats) > 5
    assert sum(one.num_swapped_in_blocks for one in stats) > 0
    assert sum(one.num_copied_blocks for one in stats) > 20
    assert sum(one.prefix_cache_hit_rate for one in stats) > 0


@pytest.mark.slow
@settings(quietly, max_examples=400)
@given(name=st.sampled_from(sorted(ENGINES)), mixture=st.lists(any_request, min_size=4, max_size=12))
def test_each_of_many_requests_gets_what_it_gets_alone(bench, name, mixture) -> None:
    check(bench, name, mixture)
