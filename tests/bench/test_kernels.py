"""Who is timed on which device."""

import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import deadline
from bench.device_cases import DEVICE_CASES, DeviceCase
from bench.device_kernels import TOLERANCE, attention_case
from bench.device_layers import our_caches
from bench.kernels import main, reasons_to_skip
from bench.tune import is_as_before
from bench.tune_classes import PLANS, SEARCHED, Size, with_size
from pallas_kernels import KVLayout, lowering_for, misfits
from pallas_kernels.cases import BENCH_CASES, BatchCase, HeadShape, with_options
from pallas_kernels.paged_attention import tuning
from pallas_kernels.paged_attention.api import find
from pallas_kernels.paged_attention.tuning import LAUNCHES, Sizes, check_sizes, read_entries


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


def test_the_bench_of_an_accelerator_runs_small_and_interpreted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "kernels.json"
    assert main(["--device", "--cases", "decode 3 x 40", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    *table, last = printed.out.splitlines()
    result = json.loads(last)
    assert json.loads(output.read_text()) == result
    assert result["is_interpreted"] is True
    assert "these times say nothing about hardware" in printed.err
    assert {row["implementation"] for row in result["rows"]} == {"mosaic_tpu", "xla", "jax_paged", "contiguous_xla"}
    assert all(row["ms"] > 0 and row["ceiling_ms"] > 0 for row in result["rows"])
    assert all(0 < row["error"] <= TOLERANCE for row in result["checks"])
    assert {row["implementation"] for row in result["checks"]} == {"mosaic_tpu", "xla"}
    assert table[-1] == "goals of mosaic_tpu on cpu: 1 reached, 0 missed, 0 not measured; 0 failed"

    # nothing is missing: another run measures the ceilings, and nothing else
    assert main(["--device", "--cases", "decode 3 x 40", "--resume", str(output)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [again[name] for name in ("checks", "rows", "goals")] == [
        result[name] for name in ("checks", "rows", "goals")
    ]
    assert len(again["runs"]) == 2


def test_every_case_of_the_bench_is_served_by_the_kernels_of_its_device() -> None:
    for platform, kind, name in (("gpu", "NVIDIA H200", "mosaic_gpu"), ("tpu", "TPU v6 lite", "mosaic_tpu")):
        row = find(name)
        with lowering_for(platform, kind):
            for case in DEVICE_CASES:
                if case.dtype in row.dtypes:
                    case_seen = attention_case(case.heads, case.block_size, case.dtype)
                    assert misfits(row, case_seen) == [], (name, case.name)
    assert {case.dtype for case in DEVICE_CASES} == {"bfloat16", "int8", "float8_e4m3fn"}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["xla", "triton_gpu"])
def test_random_caches_of_bytes_are_as_they_are_stored_and_finite(name: str, dtype: str) -> None:
    case = DeviceCase(name="", heads=HeadShape(4, 2, 64), batch=2, context=40, dtype=dtype)
    with lowering_for(*(("gpu", "NVIDIA H200") if name == "triton_gpu" else ("cpu", "cpu"))):
        (kv,) = our_caches(name, case, 1)
        layout = KVLayout(num_kv_heads=2, head_dim=64, block_size=16, dtype=dtype, implementation=name)
        keys, values = layout.unpack(kv)
    assert np.isfinite(keys).all()
    assert np.isfinite(values).all()
    assert np.abs(keys).max() > 1


def test_what_a_case_costs() -> None:
    case = DeviceCase(name="", heads=HeadShape(32, 8, 128), batch=2, context=100)
    assert case.num_bytes == 2 * 100 * 8 * 128 * 2 * 2
    assert replace(case, dtype="int8").num_bytes == 2 * 100 * 8 * (128 + 4) * 2
    assert case.flops == 2 * 100 * 32 * 128 * 4
    whole = DeviceCase(name="", heads=HeadShape(1, 1, 1), batch=1, context=4, num_new=4)
    assert whole.flops == 4 * (1 + 2 + 3 + 4)


def test_tuning_runs_small_and_writes_what_it_found_only_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "package")
    monkeypatch.setattr("bench.tune.MIN_GAIN", -1e9)  # whatever is fastest wins: it must be one that was tried
    output = tmp_path / "tuned.json"
    assert main(["tune", "--device", "--output", str(output)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    tried = [row["value"] for row in result["rows"]]
    assert tried == [None, 16], "1024 is the default"
    assert [row["is_chosen"] for row in result["rows"]].count(True) == 1
    assert all(ms > 0 for row in result["rows"] for ms in row["ms"].values())
    (entry,) = read_entries(output)
    assert entry.shape.implementation == "mosaic_tpu"
    assert entry.sizes.launch.get("max_decode_chunk_tokens") in tried
    assert {"date", "commit", "jax"} <= set(entry.measured)
    assert entry.measured["searched"] == ["max_decode_chunk_tokens"]
    assert str(output) in table[-1]

    # all was searched: to go on is to do nothing
    assert main(["tune", "--device", "--resume", "--output", str(output)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["rows"] == result["unfinished"] == []
    assert read_entries(output)[0].sizes == entry.sizes

    assert main(["tune", "--device", "--classes", "heads of 64"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "package").exists()


def test_a_candidate_that_is_wrong_or_does_not_compile_is_out_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(case: BatchCase, name: str, sizes: Sizes) -> float:
        if sizes.launch.get("max_decode_chunk_tokens") == 512:
            raise RuntimeError("ptxas has no registers left\nand more")
        return 0.5

    monkeypatch.setattr("bench.tune.largest_error", error)
    monkeypatch.setattr("bench.tune.SMALL_SEARCH", (Size("launch", "max_decode_chunk_tokens", (16, 512)),))
    assert main(["tune", "--device"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["value"], row.get("because")) for row in rows] == [
        (16, "wrong by 0.5"), (512, "ptxas has no registers left"),
    ]  # fmt: skip


SIZES = (
    Size("launch", "max_decode_chunk_tokens", (16, 512)),
    Size("launch", "decode_chunk_bytes", (2**19, 2**20)),
)


def tune_small(output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The result of tuning with stubs for all that takes time."""
    assert main(["tune", "--device", "--output", str(output), *more]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every candidate is right, and the later it stands the faster."""

    def times(name: str, case: DeviceCase, candidates: list[Sizes], **options: int) -> list[list[float]]:
        return [[1.0 / (1 + index)] for index in range(len(candidates))]

    monkeypatch.setattr("bench.tune.SMALL_SEARCH", SIZES)
    monkeypatch.setattr("bench.tune.largest_error", lambda *_: 0.0)
    monkeypatch.setattr("bench.tune.times_in_turn", times)
    return monkeypatch


def test_tuning_goes_on_where_its_minutes_were_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stubbed: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "tuned.json", tmp_path / "whole.json"
    now = itertools.count(step=10.0)
    stubbed.setattr("bench.tune.time.perf_counter", lambda: next(now))
    # the clock is read before the first size, and before each
    found = tune_small(output, capsys, "--minutes", "0.25")
    assert found["unfinished"][0]["sizes"] == ["decode_chunk_bytes"]
    (entry,) = read_entries(output)
    assert entry.sizes.launch == {"max_decode_chunk_tokens": 512}
    found = tune_small(output, capsys, "--resume")
    assert {row["size"] for row in found["rows"]} == {"decode_chunk_bytes"}
    assert found["unfinished"] == []
    tune_small(whole, capsys)
    assert read_entries(output)[0].sizes == read_entries(whole)[0].sizes
    assert len(read_entries(output)[0].sizes.launch) == 2

    stubbed.setattr("bench.tune.sources_digest", lambda _: "others")
    found = tune_small(output, capsys, "--resume")
    assert {row["size"] for row in found["rows"]} == {size.name for size in SIZES}, "other kernels begin anew"


def test_a_candidate_that_never_ends_ends_the_run_and_is_left_out_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stubbed: pytest.MonkeyPatch
) -> None:
    left = threading.Event()

    def hang(case: BatchCase, name: str, sizes: Sizes) -> float:
        if sizes.launch.get("max_decode_chunk_tokens") == 512:
            assert left.wait(30)
            raise KeyboardInterrupt  # what ends the process, here
        return 0.0

    output = tmp_path / "tuned.json"
    stubbed.setattr("bench.tune.largest_error", hang)
    stubbed.setattr(deadline, "JOB_LIMIT_S", 0.05)
    stubbed.setattr(deadline, "leave", lambda status: left.set())
    with pytest.raises(KeyboardInterrupt):
        main(["tune", "--device", "--output", str(output)])
    assert "did not end well, and ends the run" in capsys.readouterr().out
    stubbed.setattr(deadline, "JOB_LIMIT_S", 60.0)
    found = tune_small(output, capsys, "--resume")
    assert (512, "did not end well in the run before") in [(row["value"], row.get("because")) for row in found["rows"]]
    assert found["unfinished"] == []
    assert read_entries(output)[0].sizes.launch["max_decode_chunk_tokens"] == 16


def test_a_candidate_after_which_the_device_is_lost_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stubbed: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tuned.json"
    stubbed.setattr("bench.tune.largest_error", lambda case, name, sizes: 1 / 0)
    stubbed.setattr("bench.tune.does_device_answer", lambda: False)
    with pytest.raises(SystemExit, match="division by zero: after it, the device answers no more"):
        main(["tune", "--device", "--output", str(output)])
    (entry,) = read_entries(output)
    assert entry.measured["searched"] == []
    assert len(entry.measured["endless"]) == 1


def test_a_size_that_cannot_be_timed_stays_and_the_next_run_goes_on_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stubbed: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tuned.json"
    with stubbed.context() as broken:
        broken.setattr("bench.tune.times_in_turn", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["tune", "--device", "--output", str(output)])
    assert "timing max_decode_chunk_tokens did not end well, and ends the run: it stays" in capsys.readouterr().out
    found = tune_small(output, capsys, "--resume")
    assert {row["size"] for row in found["rows"]} == {"decode_chunk_bytes"}


def test_a_size_that_changes_nothing_is_not_tried() -> None:
    size = SIZES[0]
    assert is_as_before("mosaic_tpu", Sizes(), with_size(Sizes(), size, 1024))
    assert not is_as_before("mosaic_tpu", Sizes(), with_size(Sizes(), size, 512))
    best = Sizes(launch={size.name: 512}, tiles={"tile_size": 128})
    assert is_as_before("mosaic_tpu", best, with_size(best, size, 512))
    assert not is_as_before("mosaic_tpu", best, with_size(best, Size("tiles", "tile_size", ()), 64))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tune"], "nothing to be tuned on a CPU"),
        (["tune", "--device", "--classes", "group 99"], "--classes must fit one of"),
        (["tune", "--device", "--repeats", "0"], "counts must be 1 or more"),
        (["tune", "--device", "--minutes", "nan"], "--minutes above 0"),
    ],
)
def test_tuning_refuses_what_it_cannot_do(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in capsys.readouterr().err


def test_tuning_does_not_begin_where_its_file_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tuned.json"
    output.write_text("{")
    with pytest.raises(SystemExit):
        main(["tune", "--device", "--output", str(output)])
    assert "mend or delete it" in capsys.readouterr().err
    assert output.read_text() == "{"


def test_every_size_that_is_searched_may_be_tuned_and_some_candidate_is_allowed_in_every_class() -> None:
    assert set(SEARCHED) == set(LAUNCHES)
    for name, sizes in SEARCHED.items():
        assert {size.name for size in sizes} >= set(LAUNCHES[name])
        for size in sizes:
            for plan in PLANS:
                is_allowed = []
                for value in size.candidates(name):
                    try:
                        check_sizes(plan.shape(name), with_size(Sizes(), size, value))
                        is_allowed.append(True)
                    except ValueError:
                        is_allowed.append(False)
                assert sum(is_allowed) >= 2, (name, size.name, plan.name)


def test_the_default_number_of_programs_is_among_its_candidates() -> None:
    size = SEARCHED["mosaic_gpu"][0]
    with lowering_for("gpu", "NVIDIA H20", 78):
        assert size.candidates("mosaic_gpu") == [156, 312, 624, 1248, 2496]
