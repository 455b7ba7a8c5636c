"""What is picked on a device is checked there, once; what fails is replaced, loudly."""

import dataclasses

import pytest
from harness import TINY

from jaxpaged.config import EngineConfig
from jaxpaged.runner import shapes
from jaxpaged.runner.shapes import costly_cache, resolve_shapes, with_checked_attention
from pallas_kernels import lowering_for
from pallas_kernels.paged_attention import api
from pallas_kernels.self_check import self_check

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32)
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, "dtype": "float32"}


def replace_row(monkeypatch, name, attend):
    rows = tuple(dataclasses.replace(row, attend=attend) if row.name == name else row for row in api.IMPLEMENTATIONS)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", rows)
    self_check.cache_clear()


@pytest.fixture(autouse=True)
def _checked_anew():
    yield
    self_check.cache_clear()


@pytest.mark.parametrize("name", ["native_cpu", "xla"])
def test_what_is_right_passes(name):
    assert self_check(name, **HEADS) is None


def test_what_is_wrong_is_told(monkeypatch):
    attend = api.find("xla").attend

    def wrong(*arrays, **options):
        output, kv = attend(*arrays, **options)
        return output * 1.01, kv

    replace_row(monkeypatch, "xla", wrong)
    reason = self_check("xla", **HEADS)
    assert reason is not None
    assert reason.startswith("its output differs from the reference's by 0.0")


def test_what_raises_is_told(monkeypatch):
    def broken(*arrays, **options):
        raise RuntimeError("no such instruction")

    replace_row(monkeypatch, "xla", broken)
    assert self_check("xla", **HEADS) == "RuntimeError: no such instruction"


def test_a_kernel_that_fails_on_a_device_is_replaced_by_xla_with_a_warning(monkeypatch):
    monkeypatch.setattr(shapes, "target_platform", lambda: "tpu")
    monkeypatch.setattr(shapes, "self_check", lambda name, **case: "it is wrong")
    with pytest.warns(UserWarning, match="failed its check on this device.*it is wrong.*plain XLA"):
        assert with_checked_attention(CONFIG, TINY, "float32").attention_implementation == "xla"
    monkeypatch.setattr(shapes, "self_check", lambda name, **case: None)
    picked = with_checked_attention(CONFIG, TINY, "float32").attention_implementation
    assert picked == shapes.resolve_shapes(CONFIG, TINY, "float32").layout.row.name


def test_what_was_asked_for_or_runs_here_is_not_checked(monkeypatch):
    monkeypatch.setattr(shapes, "self_check", lambda name, **case: pytest.fail("checked"))
    assert with_checked_attention(CONFIG, TINY, "float32") == CONFIG
    monkeypatch.setattr(shapes, "target_platform", lambda: "tpu")
    asked = dataclasses.replace(CONFIG, attention_implementation="xla")
    assert with_checked_attention(asked, TINY, "float32") == asked


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        ("auto", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"),
        ("fp8", "float8_e4m3fn"), ("fp8_e4m3", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e4m3fn"),
    ],
)  # fmt: skip
def test_the_cache_has_the_dtype_that_was_asked_for_by_any_of_its_names(asked, dtype):
    config = dataclasses.replace(CONFIG, kv_cache_dtype=asked)
    assert resolve_shapes(config, TINY, "bfloat16").layout.dtype == dtype


def test_a_cache_of_bytes_that_saves_nothing_has_a_reason_and_a_remedy():
    config, wide = dataclasses.replace(CONFIG, kv_cache_dtype="int8"), dataclasses.replace(TINY, head_dim=128)
    with lowering_for("tpu", "TPU v6 lite"):
        reason = costly_cache(resolve_shapes(config, wide, "bfloat16").layout)
        assert "saves nothing with 2 key-value heads of 128 in mosaic_tpu" in reason
        assert reason.endswith("(kv_cache_dtype='bfloat16')")
        assert costly_cache(resolve_shapes(CONFIG, wide, "bfloat16").layout) is None
    assert costly_cache(resolve_shapes(config, wide, "bfloat16").layout) is None, "on a CPU it saves"


def test_a_cache_dtype_that_nobody_keeps_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8_e5m2' is not known: choose one of auto, .*, int8"):
        EngineConfig(kv_cache_dtype="fp8_e5m2")
    config = dataclasses.replace(CONFIG, kv_cache_dtype="int8", attention_implementation="native_cpu")
    with pytest.raises(ValueError, match="native_cpu: keeps keys and values as float32 or bfloat16, not int8"):
        resolve_shapes(config, TINY, "float32")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_quantized_cache_is_checked_as_what_it_is(dtype):
    assert self_check("xla", **{**HEADS, "dtype": dtype}) is None
