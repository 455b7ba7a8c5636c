"""What the offline bench reports, worked by hand on a shape and runs small enough for it."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from bench.contest import as_arguments, checked, decode_rate, transformers_configs
from bench.offline import parse
from bench.report import agreement, batch_1_result, throughput_result
from bench.shapes import SHAPES, LlamaShape, write_model
from bench.workloads import BenchRequest, sharegpt_like

SMALL = LlamaShape(name="small", model_dim=4, mlp_dim=8, num_layers=1, num_q_heads=2, num_kv_heads=1, vocab_size=16)
CEILINGS = {"read_bytes_per_s": 1e6, "matmul_flops_per_s": 1e6}


def run(elapsed_s: float, token_ids: list[list[int]], **more: object) -> dict[str, object]:
    num_tokens = sum(len(ids) for ids in token_ids)
    return {"elapsed_s": elapsed_s, "token_ids": token_ids, "tokens_per_s": num_tokens / elapsed_s, **more}


def test_work_of_a_shape_is_counted_by_hand():
    # q and o 4x4, k and v 4x2, three of 4x8: 16 + 16 + 8 + 8 + 96; embedding 16x4; three norms of 4
    assert SMALL.num_layer_matmul_params == 144
    assert SMALL.num_params == 144 + 64 + 12
    # keys and values of 10 tokens: 2 x 1 layer x 1 head x 2 x 10
    assert SMALL.decode_bytes(10, "bfloat16") == (220 + 40) * 2
    # 2 prompt tokens and one of the two outputs go through the model: attention over 1 + 2 + 3 keys, two rows of logits
    request = BenchRequest(prompt_token_ids=(3, 4), max_tokens=2)
    assert SMALL.flops([request]) == 2 * 144 * 3 + 4 * 1 * 2 * 2 * 6 + 2 * 4 * 16 * 2


def test_the_written_folder_holds_every_parameter_and_its_facts(tmp_path: Path):
    folder = write_model(SMALL, tmp_path / "model", seed=1)
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) == SMALL.num_params
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 1
    again = load_file(write_model(SMALL, tmp_path / "again", seed=1) / "model.safetensors")
    assert all((tensors[name] == again[name]).all() for name in tensors)


def test_ratios_are_to_the_best_peer_of_each_kind():
    requests = [BenchRequest(prompt_token_ids=(3,), max_tokens=2)]
    host = {"host_s": 0.004, "num_steps": 2}
    ours = [run(elapsed_s, [[5, 6]], host=host) for elapsed_s in (0.1, 0.2, 0.4)]
    peers = {
        "static-8-arrival": [run(2.0, [[5, 6]])],
        "static-8-sorted": [run(1.0, [[5, 7]])],
        "continuous-256": [run(0.5, [[5, 6]])],
    }
    result = throughput_result(SMALL, requests, ours, peers, "cpu", CEILINGS)
    assert result["engine_tokens_per_s"] == {"median": 10.0, "min": 5.0, "max": 20.0, "num_runs": 3}
    assert result["best"]["static"] == {"name": "static-8-sorted", "ratio": 5.0}
    assert result["best"]["continuous"]["ratio"] == pytest.approx(2.5)
    assert result["host_ms_per_step"] == pytest.approx(2.0)
    assert result["fraction_of_matmul_rate"] == pytest.approx(SMALL.flops(requests) / 0.2 / 1e6)
    assert throughput_result(SMALL, requests, ours, {}, "gpu", CEILINGS)["fraction_of_matmul_rate"] is None


def test_batch_1_is_a_fraction_of_the_measured_bandwidth():
    result = batch_1_result(SMALL, "float32", 8, 4, [100.0], [50.0], "cpu", [5e5, 3e6, 1e6])
    # 8 prompt tokens and, on average, 2 of the 4 outputs are read back: 260 numbers of 4 bytes, 100 times a second
    assert result["fraction_of_bandwidth"] == pytest.approx(260 * 4 * 100 / 1e6)  # the median of the three
    assert result["ratio"] == 2.0


def test_agreement_counts_requests_and_tokens_before_the_first_difference():
    assert agreement([[1, 2, 3], [1, 2]], [[1, 2, 3], [2, 2]]) == {
        "equal_requests": 0.5,
        "tokens_before_first_difference": 0.6,
    }


def test_a_run_that_gave_fewer_tokens_than_asked_is_refused():
    requests = [BenchRequest(prompt_token_ids=(3,), max_tokens=3)]
    assert checked(requests, run(0.5, [[1, 2, 3]]))["tokens_per_s"] == 6
    with pytest.raises(ValueError, match="2 tokens instead of 3"):
        checked(requests, run(0.5, [[1, 2]]))


def test_decode_rate_takes_the_prefill_out():
    def one_second_of_prefill_and_a_tenth_a_token(requests: list[BenchRequest]) -> dict[str, float]:
        return {"elapsed_s": 1.0 + 0.1 * (requests[0].max_tokens - 1)}

    assert decode_rate(one_second_of_prefill_and_a_tenth_a_token, (3, 4)) == pytest.approx(10)


def test_every_static_batch_size_is_played_in_both_orders():
    requests = sharegpt_like(vocab_size=SHAPES["tiny"].vocab_size)
    assert [config.name for config in transformers_configs(requests)] == [
        "static-8-arrival", "static-8-sorted", "static-16-arrival", "static-16-sorted",
        "static-32-arrival", "static-32-sorted", "static-64-arrival", "continuous-256", "continuous-1024",
    ]
    assert as_arguments(requests)["max_tokens"][0] == requests[0].max_tokens
    assert parse(["--quick"]).num_requests == 16


def test_a_configuration_that_is_not_known_is_refused(capsys):
    assert parse(["--configs", "static-16-sorted"]).configs == ["static-16-sorted"]
    with pytest.raises(SystemExit):
        parse(["--configs", "static-16"])
    assert "static-16 is not known: choose among static-8-arrival" in capsys.readouterr().err
