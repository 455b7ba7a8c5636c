"""Live, in equal memory: paging runs more requests at once than any reservation, and gives the same work."""

import pytest

from bench.paper import batching
from bench.paper.batching import main, parse


@pytest.mark.slow
def test_paging_batches_more_requests_than_reservations():
    arguments = ["--num-requests", "120", "--num-slots", "4096", "--prompt-mean", "40", "--output-mean", "60"]
    rows = {(row["policy"], row["has_buddies"]): row for row in batching.measure(parse(arguments))}
    running = {key: row["mean_running"] for key, row in rows.items()}
    paging = running["paging", None]
    assert 1.9 < running["max", True] <= 2  # 4096 slots are two of 2048; the next begins a step after one has ended
    assert running["max", True] < running["pow2", True] <= running["oracle", True] < paging
    assert running["oracle", True] < running["oracle", False] < paging
    assert rows["paging", None]["num_steps"] < rows["oracle", False]["num_steps"] < rows["max", True]["num_steps"]
    assert all(0 < row["percent_of_memory_with_tokens"] <= 100 for row in rows.values())


def test_a_memory_that_holds_no_request_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--num-slots", "100"])
    assert "--num-slots 2048 or more" in capsys.readouterr().err
