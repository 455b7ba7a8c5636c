"""Arrays as plain files of the Zarr format: what is written by hand, by its specification, is what is read."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import converters.plain_zarr as plain_zarr
from converters.plain_zarr import PlainReader, plain_array

FACTS = {
    "zarr_format": 2, "shape": [4, 6], "chunks": [2, 3], "dtype": "<f4", "order": "C", "compressor": None,
    "filters": None, "fill_value": None,
}  # fmt: skip
VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)
DTYPES = F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def write(folder: Path, **changes) -> Path:
    """A folder with these facts, and the four quarters of VALUES as its chunks."""
    folder.mkdir()
    facts = FACTS | changes
    (folder / ".zarray").write_text(json.dumps(facts))
    dtype = BF16 if facts["dtype"] == "bfloat16" else F32
    for row in range(2):
        for column in range(2):
            path = folder / facts.get("dimension_separator", ".").join(map(str, (row, column)))
            path.parent.mkdir(exist_ok=True)
            part = VALUES[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            path.write_bytes(part.astype(dtype).tobytes())
    return folder


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize(("code", "dtype"), [("<f4", F32), ("bfloat16", BF16)])
@pytest.mark.parametrize("piece_bytes", [1, 2**20])
def test_chunks_come_to_where_they_belong(tmp_path, monkeypatch, separator, code, dtype, piece_bytes):
    """One row at a time, or all rows of a chunk."""
    monkeypatch.setattr(plain_zarr, "SCATTERED_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(plain_zarr, "MOST_PIECE_BYTES", piece_bytes)
    array = plain_array(write(tmp_path / "a", dtype=code, dimension_separator=separator), DTYPES)
    assert array is not None
    array.check()
    with PlainReader() as reader:
        read = reader.begin(array)()
    assert (read.dtype, read.shape) == (dtype, (4, 6))
    np.testing.assert_array_equal(read.astype(np.float32), VALUES)


@pytest.mark.parametrize(
    "changes",
    [
        {"compressor": {"id": "zstd", "level": 1}}, {"filters": [{"id": "delta"}]}, {"order": "F"}, {"zarr_format": 3},
        {"shape": [4, 7]}, {"shape": [], "chunks": []}, {"dtype": ">f4"}, {"dtype": "<i4"}, {"chunks": [3, 3]},
        {"chunks": [2]}, {"chunks": [2, 0]}, {"chunks": None},
        {"chunks": [True, 3]}, {"dimension_separator": "../"},
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_who_wrote_it(tmp_path, changes):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".zarray").write_text(json.dumps(FACTS | changes))
    assert plain_array(tmp_path / "a", DTYPES) is None
    assert plain_array(tmp_path, DTYPES) is None, "no facts"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: path.write_bytes(bytes(23)), "has 23 bytes and must have 24"),
        (lambda path: path.write_bytes(bytes(25)), "has 25 bytes and must have 24"),
    ],
)
def test_a_chunk_of_another_length_is_refused_by_name(tmp_path, damage, said):
    array = plain_array(write(tmp_path / "a"), DTYPES)
    assert array is not None
    damage(tmp_path / "a" / "1.0")
    with pytest.raises(ValueError, match=f"a/1.0: {said}$"):
        array.check()


def test_a_chunk_that_becomes_shorter_meanwhile_is_refused_by_name(tmp_path):
    array = plain_array(write(tmp_path / "a"), DTYPES)
    assert array is not None
    (tmp_path / "a" / "0.1").write_bytes(bytes(8))
    with PlainReader() as reader, pytest.raises(ValueError, match=r"a/0.1: cannot be read \(it became shorter"):
        reader.begin(array)()
