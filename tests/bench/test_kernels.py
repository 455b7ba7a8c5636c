"""Who is timed on which device."""

import json

import pytest

from bench.device_kernels import DEVICE_CASES, TOLERANCE, DeviceCase, attention_case, check
from bench.kernels import main, reasons_to_skip
from pallas_kernels import lowering_for, misfits
from pallas_kernels.cases import BENCH_CASES, CASES, HeadShape, with_options
from pallas_kernels.paged_attention.api import find


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [("cuda", "NVIDIA H200", "mosaic_gpu"), ("tpu", "TPU v6 lite", "mosaic_tpu")],
)
def test_a_device_times_the_kernel_that_was_made_for_it(platform: str, kind: str, name: str) -> None:
    case = with_options(BENCH_CASES[0], dtype="bfloat16")
    assert "not on cpu" in reasons_to_skip(case)[name]
    with lowering_for(platform, kind):
        skipped = reasons_to_skip(case)
    assert name not in skipped
    assert "not on" in skipped["native_cpu"]


def test_the_bench_of_an_accelerator_runs_small_and_interpreted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "--cases", "decode"]) == 0
    printed = capsys.readouterr()
    *table, last = printed.out.splitlines()
    result = json.loads(last)
    assert result["is_interpreted"] is True
    assert "these times say nothing about hardware" in printed.err
    assert {row["implementation"] for row in result["rows"]} == {"mosaic_tpu", "xla", "jax_paged", "contiguous"}
    assert all(row["ms"] > 0 and row["ceiling_ms"] > 0 for row in result["rows"])
    assert 0 < result["largest_errors"]["mosaic_tpu"] <= TOLERANCE
    assert any("mosaic_tpu" in line for line in table)


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.device_kernels.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="xla is wrong by .* on the case .*: its times mean nothing"):
        check(["xla"], CASES[:1])


def test_every_case_of_the_bench_is_served_by_the_kernels_of_its_device() -> None:
    for platform, kind, name in (("gpu", "NVIDIA H200", "mosaic_gpu"), ("tpu", "TPU v6 lite", "mosaic_tpu")):
        row = find(name)
        with lowering_for(platform, kind):
            for case in DEVICE_CASES:
                assert misfits(row, attention_case(case.heads, case.block_size)) == [], (name, case.name)


def test_what_a_case_costs() -> None:
    case = DeviceCase(name="", heads=HeadShape(32, 8, 128), batch=2, context=100)
    assert case.num_bytes == 2 * 100 * 8 * 128 * 2 * 2
    assert case.flops == 2 * 100 * 32 * 128 * 4
    whole = DeviceCase(name="", heads=HeadShape(1, 1, 1), batch=1, context=4, num_new=4)
    assert whole.flops == 4 * (1 + 2 + 3 + 4)
