"""Where the runner keeps what it owns on the device."""

import jax
from harness import make_engine, random_prompts, run, tiny_model

from jaxpaged.runner.host_pool import PinnedPool, host_pool
from jaxpaged.sampling_params import SamplingParams
from pallas_kernels import KVLayout


def test_cache_and_sampler_state_are_committed_to_their_device():
    engine = make_engine(tiny_model())
    runner = engine.runner

    def are_committed():
        leaves = jax.tree.leaves((runner._kv, runner._state))
        return [leaf.committed and leaf.devices() == {jax.devices()[0]} for leaf in leaves]

    assert all(are_committed()), "from the start, or programs are compiled again once they are"
    # the way back from pinned memory is then a transfer between two memories of the device
    pool = host_pool(runner._kv, 2, is_pinned=True)
    assert isinstance(pool, PinnedPool)
    assert pool._is_committed
    run(engine, random_prompts(0, [5, 9]), SamplingParams(temperature=0.5, seed=1, max_tokens=4, ignore_eos=True))
    assert all(are_committed()), "after steps"
    runner.reset()
    assert all(are_committed()), "after a failure"


def test_to_commit_a_cache_copies_nothing(monkeypatch):
    init, made = KVLayout.init, []

    def recording(layout, num_blocks):
        made.append(init(layout, num_blocks))
        return made[-1]

    monkeypatch.setattr(KVLayout, "init", recording)
    engine = make_engine(tiny_model())
    assert len(made) == engine.model_config.num_layers

    def addresses(tree):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]

    assert addresses(engine.runner._kv) == addresses(made)
