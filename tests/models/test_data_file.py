"""Bytes of weight files: the right ones, in memory a device can take as it is, by any number of threads."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpaged.models import data_file
from jaxpaged.models.data_file import ALIGNMENT, DataFile, aligned_copy, aligned_empty, cast
from jaxpaged.models.parameters import place
from jaxpaged.models.tensor_files import TensorFolder


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(100_003)


@pytest.fixture
def file(tmp_path, content, monkeypatch):
    monkeypatch.setattr(data_file, "LEAST_PIECE_BYTES", 1000)  # many pieces, the last one short
    monkeypatch.setattr(data_file, "MOST_PIECE_BYTES", 4096)
    (tmp_path / "data").write_bytes(content)
    with ThreadPoolExecutor(3) as readers:
        opened = DataFile(tmp_path / "data", readers, 3)
        yield opened
        opened.close()


def test_spans_come_one_after_another(file, content):
    assert file.read([(0, len(content))]).tobytes() == content
    spans = [(7, 5000), (90_000, 100_003), (0, 1), (3, 3)]
    assert file.read(spans).tobytes() == b"".join(content[start:stop] for start, stop in spans)
    assert file.mapped().tobytes() == content


def test_reading_may_begin_before_it_is_waited_for(file, content):
    first, second = file.begin([(0, 50_000)]), file.begin([(50_000, 100_003)])
    assert second().tobytes() == content[50_000:]
    assert first().tobytes() == content[:50_000]


def test_a_file_that_ends_too_soon_is_noticed_where_it_ends(file, content, tmp_path):
    os.truncate(tmp_path / "data", 60_000)
    assert file.read([(0, 60_000)]).tobytes() == content[:60_000]
    with pytest.raises(EOFError, match="the file ends at byte 60000"):
        file.read([(50_000, 70_000)])


def test_the_file_that_was_opened_is_read_whatever_takes_its_name(file, content, tmp_path):
    (tmp_path / "other").write_bytes(b"x" * len(content))
    (tmp_path / "other").rename(tmp_path / "data")
    assert file.read([(10, 20)]).tobytes() == content[10:20]


@pytest.mark.parametrize("size", [1, 4096, data_file.HUGE_PAGE_BYTES // 4, data_file.HUGE_PAGE_BYTES + 1])
def test_memory_is_aligned(size):
    array = aligned_empty((size,), np.dtype(np.float32))
    assert array.shape == (size,)
    assert array.ctypes.data % ALIGNMENT == 0


def test_a_cast_copies_only_if_it_must():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert cast(array, np.dtype(np.float32)) is array
    bfloat16 = np.dtype(jnp.bfloat16)
    np.testing.assert_array_equal(cast(array, bfloat16), array.astype(bfloat16))
    turned = aligned_copy(array.T, array.dtype)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, array.T)


def test_a_cpu_device_takes_such_memory_as_it_is():
    if jax.default_backend() != "cpu":
        pytest.skip("an accelerator has memory of its own")
    array = aligned_empty((1000,), np.dtype(np.float32))
    array[:] = 1
    assert place("x", array).unsafe_buffer_pointer() == array.ctypes.data


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {f"t{i}": rng.standard_normal((4, 10 * i, 3)).astype(np.float32) for i in range(6)}
    tensors["same"] = tensors["t3"].copy()
    tensors["nearly"] = tensors["t3"].copy()
    tensors["nearly"][-1, -1, -1] = np.nextafter(tensors["nearly"][-1, -1, -1], 9)
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorFolder(tmp_path) as opened:
        yield opened, tensors


@pytest.mark.parametrize("order", [["t0", "t1", "t2", "t3", "t4", "t5"], ["t5", "t0", "t3"], []])
def test_tensors_are_the_same_in_the_expected_order_and_in_any_other(folder, order):
    opened, tensors = folder
    opened.expect(order)
    for name in ["t2", "t5", "t0", "t0", "t1", "t3", "t4"] if order == [] else [*order, *reversed(order)]:
        np.testing.assert_array_equal(opened.read(name), tensors[name], err_msg=name)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_ranges_are_cut_along_any_axis(folder, axis):
    opened, tensors = folder
    ranges = [(2, 3), (0, 2)]
    expected = np.concatenate([np.take(tensors["t4"], range(*part), axis=axis) for part in ranges], axis=axis)
    np.testing.assert_array_equal(opened.read_ranges("t4", axis, ranges), expected)
    np.testing.assert_array_equal(opened.mapped("t4"), tensors["t4"])
    np.testing.assert_array_equal(opened.mapped("t0"), tensors["t0"])


def test_equal_tensors_are_told_from_those_that_differ_in_one_bit(folder, monkeypatch):
    monkeypatch.setattr("jaxpaged.models.tensor_files.COMPARED_BYTES", 64)
    opened, _ = folder
    assert opened.has_same_data("t3", "same")
    assert not opened.has_same_data("t3", "nearly")
    assert not opened.has_same_data("t3", "t4")


def test_a_file_cut_short_after_it_was_opened_is_refused_by_file_and_tensor(folder):
    opened, _ = folder
    path = opened.folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    names = list(opened.specs)
    last = max(names, key=lambda name: opened._spans[name][1])
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor '{last}' cannot be read \(the file ends"):
        opened.read(last)
    opened.expect(names)
    for name in names:
        if name != last:
            opened.read(name)
    with pytest.raises(ValueError, match=f"tensor '{last}' cannot be read"):
        opened.read(last)
