"""The bench of an 8B Llama: all of it on a tiny model, and what its ceilings count."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.llama8b import FULL_SCALE, LLAMA_8B, PUBLISHED, SMALL_SCALE, main, step_bytes
from jaxpaged.runner.shapes import memory_plan, resolve_shapes
from pallas_kernels import lowering_for


def test_the_small_run_measures_every_part_and_saves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "llama8b.json"
    assert main(["--small", "--output", str(output)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(output.read_text()) == result
    assert result["is_small"] is True
    assert {"device", "jax", "date", "command", "commit"} <= set(result)
    assert [(row["num_seqs"], row["context_len"]) for row in result["decode"]] == list(SMALL_SCALE.decodes)
    assert all(math.isfinite(row["fraction_of_bandwidth"]) for row in result["decode"])
    # 39 blocks of 16 tokens hold more than the 4 sequences that may run
    assert [(row["workload"], row["num_requests"]) for row in result["workloads"]] == [
        ("16/16", 4), ("8/8", 8), ("8/32", 4), ("32/8", 4),
    ]  # fmt: skip
    for row in result["workloads"]:
        prompt_len, output_len = map(int, row["workload"].split("/"))
        assert row["output_tokens_per_s"] == pytest.approx(row["num_requests"] * output_len / row["elapsed_s"])
        assert row["total_tokens_per_s"] == pytest.approx(
            row["num_requests"] * (prompt_len + output_len) / row["elapsed_s"]
        )
        assert row["num_steps"] >= output_len
        # both are parts of the step, and what is in neither is small beside them
        assert 0 < row["host_ms"] + row["wait_ms"] <= row["step_ms"]
        assert row["num_preemptions"] == 0
    assert result["left_out"] == []
    assert result["num_compiles_after_warmup"] == 0
    assert sum("output tok/s" in line for line in table) == 4


def test_what_comes_too_late_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--small", "--time-limit-s", "1e-6"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["decode"] == result["workloads"] == []
    assert len(result["left_out"]) == len(SMALL_SCALE.decodes) + len(SMALL_SCALE.workloads)
    assert all("left out" in line for line in table)
    with pytest.raises(SystemExit):
        main(["--time-limit-s", "0"])


def test_a_decode_step_reads_the_weights_of_llama_8b_once() -> None:
    # 8.03 thousand million parameters, of which the embedding has 0.53; two bytes each
    assert step_bytes(LLAMA_8B, 0, 0) == pytest.approx((8.03e9 - 0.525e9) * 2, rel=1e-3)
    # 128 KiB of keys and values a token
    assert step_bytes(LLAMA_8B, 3, 10) - step_bytes(LLAMA_8B, 0, 0) == 3 * 10 * 128 * 2**10


def test_another_run_goes_on_with_what_a_result_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "llama8b.json"
    assert main(["--small", "--time-limit-s", "1e-6", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    decode = [{"num_seqs": num_seqs, "context_len": context_len} for num_seqs, context_len in SMALL_SCALE.decodes]
    workloads = [{"workload": workload.name} for workload in SMALL_SCALE.workloads if workload.name != "8/8"]
    output.write_text(json.dumps(result | {"decode": decode, "workloads": workloads}))
    capsys.readouterr()
    assert main(["--small", "--resume", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["decode"] == decode
    assert found["workloads"][:-1] == workloads
    assert found["workloads"][-1]["output_tokens_per_s"] > 0
    assert found["left_out"] == []

    output.write_text(json.dumps(result | {"device": "NVIDIA H200"}))
    with pytest.raises(SystemExit):
        main(["--small", "--resume", str(output)])
    assert "it was made with device 'NVIDIA H200', not 'cpu'" in capsys.readouterr().err


def test_published_figures_name_their_source() -> None:
    assert all(figure > 1000 and ("H200" in by or "H100" in by) for _, figure, by in PUBLISHED)
    assert {name for name, _, _ in PUBLISHED} == {"128/128", "1000/1000", "128/2048", "2048/128", "ShareGPT"}


def test_the_full_run_fits_an_h200_and_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # what jax takes of the memory unless told otherwise
    stats = {"bytes_limit": int(0.75 * 151_397_597_184)}
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", memory_stats=lambda: stats)
    config, model = FULL_SCALE.engine_config, FULL_SCALE.model
    with lowering_for("gpu", "NVIDIA H200", 132):
        shapes = resolve_shapes(config, model, model.dtype)
        assert shapes.layout.row.name == "mosaic_gpu"
        monkeypatch.setattr("jaxpaged.runner.shapes.jax.devices", lambda: [device])
        plan = memory_plan(config, model, shapes, weight_bytes=int(16.06e9), dtype=model.dtype)
    engine = SimpleNamespace(config=config, memory_plan=plan)
    num_requests = {workload.name: workload.num_requests(engine) for workload in FULL_SCALE.workloads}
    assert set(num_requests) == {name for name, _, _ in PUBLISHED} - {"ShareGPT"}
    assert min(num_requests.values()) > 200
    assert num_requests["128/128"] == 4 * config.max_num_seqs
    for num_seqs, context_len in FULL_SCALE.decodes:
        tokens = context_len + FULL_SCALE.num_decode_steps + 1
        assert tokens <= shapes.max_model_len
        assert num_seqs * (tokens + plan.block_size) < plan.num_device_blocks * plan.block_size
