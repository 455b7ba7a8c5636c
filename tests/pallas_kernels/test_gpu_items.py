"""How decodes are cut into items for GPUs."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.gpu_items import cut_into_items


@pytest.mark.parametrize(
    ("window", "num_chunks", "most"),
    # chunks of 64 keys: 16, 1, 2, 1 and 79; with a window those from key 900, 0, 0, 0 and 4900 on
    [(None, [16, 1, 2, 1, 79], 9), (100, [2, 1, 2, 1, 3], 2)],
)
def test_items_cover_the_chunks_of_every_decode_once_and_are_about_equal(
    window: int | None, num_chunks: list[int], most: int
) -> None:
    lens = np.array([1000, 0, 64, 65, 1, 5000, 0], np.int32)
    items = cut_into_items(jnp.asarray(lens), 64, window, num_items=12, min_chunks=2)
    sizes = []
    for sequence, length in enumerate(lens):
        mine = range(int(items.first_items[sequence]), int(items.first_items[sequence + 1]))
        assert all(int(items.sequences[item]) == sequence for item in mine)
        chunks = [i for item in mine for i in range(int(items.first_chunks[item]), int(items.end_chunks[item]))]
        first = 0 if window is None else max(length - window, 0) // 64
        assert chunks == list(range(first, -(-length // 64)))
        sizes += [int(items.end_chunks[item] - items.first_chunks[item]) for item in mine]
    assert len(sizes) == int(items.first_items[-1]) <= items.sequences.shape[0]
    assert sum(sizes) == sum(num_chunks)
    # 99 chunks by 12 items, rounded up; with a window no item has more than the least that is worth one
    assert max(sizes) == most
    assert min(sizes) >= 1


def test_a_decode_is_cut_alike_in_any_company_of_so_many_chunks_and_no_more() -> None:
    """The bits of a decode follow from its own length up to there: 12 items of 2 chunks, 24 in all."""

    def cut(row: int, lens: list[int]) -> list[tuple[int, int]]:
        items = cut_into_items(jnp.asarray(lens), 64, None, num_items=12, min_chunks=2)
        mine = slice(int(items.first_items[row]), int(items.first_items[row + 1]))
        return list(zip(items.first_chunks[mine].tolist(), items.end_chunks[mine].tolist(), strict=True))

    alone = cut(0, [300, 0, 0])
    assert alone == [(0, 1), (1, 3), (3, 5)]
    assert cut(2, [1, 18 * 64, 300]) == alone
    assert cut(0, [300, 19 * 64, 0]) == alone
    assert cut(0, [300, 19 * 64, 1]) == [(0, 2), (2, 5)], "25 chunks: items of 3"
