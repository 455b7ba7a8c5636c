import pytest

from jaxpaged.core.table_layout import TableLayout


def test_a_window_begins_where_the_next_token_sees_first():
    layout = TableLayout(4, (5, None))
    # token 12 sees 8 to 12, token 11 sees 7 to 11; blocks of 4
    assert [layout.first_column(5, token) for token in (0, 4, 7, 8, 11, 12)] == [0, 0, 0, 1, 1, 2]
    assert layout.first_column(1, 12) == 3  # it sees itself alone, and stands in a column to come
    assert (layout.num_groups, layout.num_full_groups, layout.windowed) == (2, 1, ((0, 5),))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("step", [1, 3, 4, 10])
def test_the_bound_of_a_window_is_what_some_step_holds(window, step):
    layout = TableLayout(4)
    held = [-(-(start + step) // 4) - layout.first_column(window, start) for start in range(200)]
    assert layout.most_columns(window, 1000, step) == max(held)


def test_tables_are_counted_by_group():
    layout = TableLayout(4, (5, None, 5))
    # 40 tokens are 10 columns; a window of 5 and a step of 3 touch 7 tokens, so 3 columns at most
    assert layout.most_blocks(40, 3) == 3 + 10 + 3
    assert layout.most_blocks(40, 3, 4) == 3 + 6 + 3  # columns that another table has count where all are kept
    assert layout.most_blocks(8, 3) == 2 + 2 + 2
    assert layout.most_blocks(40, 100) == 30


@pytest.mark.parametrize(("block_size", "windows"), [(0, (None,)), (4, ()), (4, (None, 0))])
def test_impossible_layouts_are_refused(block_size, windows):
    with pytest.raises(ValueError, match="must"):
        TableLayout(block_size, windows)
