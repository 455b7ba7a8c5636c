from array import array

from core.fake_runner import make_request

from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.preemption import PreemptionCosts, is_to_swap
from jaxpaged.core.request import TOKEN_TYPE, Sequence, SequenceGroup, SequenceStatus


def test_auto_weighs_two_copies_of_each_distinct_block_against_each_distinct_token():
    manager = BlockManager(num_device_blocks=9, num_host_blocks=9, block_size=4)
    request = make_request("r", range(5), n=2)
    tokens = array(TOKEN_TYPE, range(6))
    parent, child = (Sequence(i, request, i, tokens[:], status=SequenceStatus.RUNNING) for i in range(2))
    manager.append(parent, 0, 5)
    manager.fork(parent, child)
    parent.num_computed_tokens = child.num_computed_tokens = 5
    group = SequenceGroup(request, [parent, child], is_forked=True)
    # 2 blocks: 4 copies; 5 tokens, and 1 of the child behind the common block: 6
    for seconds_per_copy, is_cheaper in ((1.5, True), (1.6, False)):
        costs = PreemptionCosts(seconds_per_block_copy=seconds_per_copy, seconds_per_prefill_token=1.0)
        assert is_to_swap(group, "auto", costs, manager) == is_cheaper
    assert is_to_swap(group, "auto", PreemptionCosts(), manager)  # nothing measured yet
    assert is_to_swap(group, "swap", costs, manager)
    assert not is_to_swap(group, "recompute", PreemptionCosts(), manager)
