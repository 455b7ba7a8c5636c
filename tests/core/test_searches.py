from core.fake_runner import make_request
from core.test_scheduler import make_scheduler, plan_of

from jaxpaged.core.request import BeamSettings, FinishReason, RowOrigin
from jaxpaged.core.scheduler_output import Candidate, RunnerOutput, SequenceOutput

TWO_BEAMS = BeamSettings(width=2, length_penalty=1.0, early_stopping=False, num_candidates=4)


def results(output, *candidates):
    """For each sequence of the plan its (token, score) candidates."""
    return RunnerOutput(
        tuple(
            SequenceOutput((), (), (), True, None, tuple(Candidate(token, score, None) for token, score in of_one))
            for of_one in candidates
        )
    )


def scheduler_of_two_beams(**options):
    """A scheduler whose beams [1, 2, 3, 4] and [1, 2, 3, 5] have been computed, each with a full block of its own."""
    scheduler = make_scheduler()
    group = scheduler.add(make_request("search", [1, 2, 3], beams=TWO_BEAMS, **options))
    first = scheduler.schedule()
    scheduler.update(first, results(first, [(4, -1.0), (5, -2.0), (6, -9.0)]))
    second = scheduler.schedule()
    assert plan_of(second) == [("search", 3, 1, 1), ("search", 3, 1, 1)]
    return scheduler, group, second


def test_blocks_of_a_dropped_beam_can_be_found():
    scheduler, group, second = scheduler_of_two_beams()
    scheduler.update(second, results(second, [(7, -0.1), (8, -0.2)], [(9, -5.0)]))
    assert [list(sequence.token_ids) for sequence in group.sequences] == [[1, 2, 3, 4, 7], [1, 2, 3, 4, 8]]
    newcomer = scheduler.add(make_request("r", [1, 2, 3, 5, 9]))
    scheduler.schedule()
    assert newcomer.num_cached_tokens == 4
    scheduler.check()


def test_a_fork_names_the_row_of_its_parent():
    """Beams A and B live; B goes on twice, so that A is dropped and the fork takes its row."""
    scheduler, group, second = scheduler_of_two_beams()
    first, parent = group.sequences
    assert parent.row_origin == RowOrigin(0, first.sequence_id, 0)
    scheduler.update(second, results(second, [(7, -8.0)], [(9, -0.5), (6, -0.6)]))
    kept, fork = group.sequences
    assert (kept, kept.row, fork.row) == (parent, 1, 0)
    assert fork.row_origin == RowOrigin(1, parent.sequence_id, 0)


def test_a_beam_without_a_continuation_dies_alone():
    """Every token may be banned for one beam while others go on."""
    scheduler, group, second = scheduler_of_two_beams()
    scheduler.update(second, results(second, [(7, -float("inf")), (8, -float("inf"))], [(9, -5.0), (6, -5.5)]))
    assert [list(sequence.token_ids) for sequence in group.sequences] == [[1, 2, 3, 5, 9], [1, 2, 3, 5, 6]]
    scheduler.check()


def test_trouble_with_the_end_of_a_text_ends_its_search_alone():
    scheduler, group, second = scheduler_of_two_beams(stop="x")

    def find_end(parent, token_id):
        raise KeyError("no such thing")

    scheduler.searches.find_end = find_end
    events = scheduler.update(second, results(second, [(7, -0.1)], [(9, -5.0)]))
    assert events.finished == group.sequences
    for sequence in group.sequences:
        assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.ERROR, "KeyError: 'no such thing'")
    scheduler.check()
    assert not scheduler.has_unfinished
    assert not scheduler.block_manager.device.num_referenced
