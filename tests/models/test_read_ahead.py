"""Tensors are begun before their turn, in their order, and no more of them than memory allows."""

import numpy as np
import pytest

from jaxpaged.models.read_ahead import ReadAhead

SIZES = {"largest": 2400, "a": 480, "b": 480, "c": 480, "d": 960, "e": 1920}


class Files:
    """Tells what was begun and not asked for yet."""

    def __init__(self):
        self.waiting: list[str] = []

    def begin(self, name):
        self.waiting.append(name)

        def finish():
            self.waiting.remove(name)
            return np.full(1, SIZES[name])

        return finish


@pytest.fixture
def files():
    return Files()


def test_no_more_is_begun_ahead_than_half_of_the_largest(files):
    """1200 bytes: two of 480 fit, then one of 480 and none of 960, and never one of 1920."""
    ahead = ReadAhead(files.begin, SIZES.__getitem__)
    ahead.expect(SIZES, are_kept=False)
    seen = []
    for name in SIZES:
        assert ahead.read(name) == SIZES[name]
        seen.append(list(files.waiting))
    assert seen == [["a", "b"], ["b", "c"], ["c"], ["d"], [], []]


def test_more_is_begun_where_what_is_read_is_kept(files):
    ahead = ReadAhead(files.begin, SIZES.__getitem__)
    ahead.expect(SIZES, are_kept=True)
    ahead.read("largest")
    assert files.waiting == ["a", "b", "c", "d", "e"]


def test_a_tensor_out_of_its_turn_is_read_at_once_and_the_others_stay_begun(files):
    ahead = ReadAhead(files.begin, SIZES.__getitem__)
    ahead.expect(["largest", "a", "b"], are_kept=False)
    ahead.read("largest")
    assert ahead.read("e") == 1920
    assert files.waiting == ["a", "b"]
    assert [int(ahead.read(name)[0]) for name in ("b", "a")] == [480, 480]
