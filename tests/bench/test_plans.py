"""Lengths fit the model and have their means; files of prompts and traces are read as they are published."""

import json
from datetime import datetime

import numpy as np
import pytest

from bench.plans import RequestPlan, cut_to_fit, draw_plans
from bench.request_files import read_dataset, read_trace


def draw(kind, *, num=400, max_model_len=None, input_len=None, output_len=None, seed=0):
    rng = np.random.default_rng(seed)
    return draw_plans(
        kind, num, input_len=input_len, output_len=output_len, max_model_len=max_model_len, rng=rng
    )


@pytest.mark.parametrize(("kind", "means"), [("sharegpt-like", (161, 338)), ("alpaca-like", (19, 58))])
@pytest.mark.parametrize("max_model_len", [None, 1024])
def test_lengths_like_a_data_set_have_its_means_and_fit(kind, means, max_model_len):
    plans = draw(kind, max_model_len=max_model_len)
    assert np.mean([plan.input_len for plan in plans]) == pytest.approx(means[0], abs=1)
    assert np.mean([plan.output_len for plan in plans]) == pytest.approx(means[1], abs=1)
    assert max(plan.input_len + plan.output_len for plan in plans) <= (max_model_len or 2048)
    assert draw(kind) == draw(kind) != draw(kind, seed=1)


def test_lengths_that_do_not_fit_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="161 and 338 tokens on average do not fit 256.*give other means"):
        draw("sharegpt-like", max_model_len=256)
    with pytest.raises(ValueError, match="256 prompt and 128 output tokens do not fit a model of 300"):
        draw("fixed", max_model_len=300)
    assert draw("fixed", num=2, input_len=3, output_len=4) == [RequestPlan(input_len=3, output_len=4)] * 2


def test_plans_are_cut_to_fit_and_texts_are_left_out():
    plans = [
        RequestPlan(input_len=50, output_len=50),
        RequestPlan(input_len=500, output_len=10, arrival_s=3.0),
        RequestPlan(input_len=10, output_len=500),
        RequestPlan(input_len=500, output_len=500),
        RequestPlan(input_len=500, output_len=1, text="long"),
    ]
    fitting, num_cut, num_dropped = cut_to_fit(plans, 100)
    assert [(plan.input_len, plan.output_len) for plan in fitting] == [(50, 50), (90, 10), (10, 90), (50, 50)]
    assert (num_cut, num_dropped, fitting[1].arrival_s) == (3, 1, 3.0)
    assert cut_to_fit(plans, None) == (plans, 0, 0)
    # a quarter longer and eight more: 68 + 8 + 24 fit, 69 + 8 + 24 do not
    lens = [(54, 24), (55, 24)]
    fitting, num_cut, _ = cut_to_fit([RequestPlan(input_len=a, output_len=b) for a, b in lens], 100, slack=0.25)
    assert ([(plan.input_len, plan.output_len) for plan in fitting], num_cut) == ([(54, 24), (54, 24)], 1)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_trace_is_read_by_its_columns_and_begins_at_zero(tmp_path):
    csv = write(
        tmp_path / "a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:48.6805900,374,44",
        "2023-11-16 18:15:46.6805900,9,0",
    )  # fmt: skip
    assert read_trace(csv, speed=4) == [
        RequestPlan(input_len=9, output_len=1), RequestPlan(input_len=374, output_len=44, arrival_s=0.5)
    ]  # fmt: skip
    lines = write(
        tmp_path / "b.jsonl", {"timestamp": 500, "input_length": 5, "output_length": 6, "hash_ids": [0, 1]},
        {"timestamp": 2500, "input_length": 7, "output_length": 8},
    )  # fmt: skip
    assert read_trace(lines, unit_s=1e-3) == [
        RequestPlan(input_len=5, output_len=6, prefix_ids=(0, 1)),
        RequestPlan(input_len=7, output_len=8, arrival_s=2.0),
    ]
    assert len(read_trace(lines, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"timestamp": 1, "input_length": 5}', "line 2: it has none of the columns generatedtokens"),
        ('{"timestamp": "soon", "input_length": 5, "output_length": 1}', "line 2"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1}', "line 2: its time is nan"),
        ("{", "line 2 is no JSON"),
    ],
)
def test_a_line_that_is_none_is_named(line, told, tmp_path):
    path = write(tmp_path / "t.jsonl", {"timestamp": 0, "input_length": 1, "output_length": 1}, line)
    with pytest.raises(ValueError, match=told):
        read_trace(path)


def test_data_sets_are_read_in_all_their_forms(tmp_path):
    def count(text):
        return 10 * len(text.split())

    turns = [{"from": "human", "value": "two words"}, {"from": "gpt", "value": "three more words"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    assert read_dataset(tmp_path / "s.json", count) == [RequestPlan(input_len=20, output_len=30, text="two words")]
    path = write(
        tmp_path / "p.jsonl", {"prompt": "a b"}, {"prompt": "a", "output_len": 7}, {"turns": ["first", "second"]}, {},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "so"}]},
    )  # fmt: skip
    plans = read_dataset(path, count)
    assert [(plan.text, plan.input_len, plan.output_len) for plan in plans] == [
        ("a b", 20, 128), ("a", 10, 7), ("first", 10, 128), ("be\nso", 20, 128)
    ]  # fmt: skip
    assert plans[3].messages == (("system", "be"), ("user", "so"))
    assert {plan.output_len for plan in read_dataset(path, count, output_len=3)} == {3}
    with pytest.raises(ValueError, match="holds no prompt"):
        read_dataset(write(tmp_path / "e.jsonl", {"text": 5}), count)


def test_the_public_traces_are_read_whole(shared_data):
    azure = read_trace(shared_data / "traces" / "azure_conv_2023.csv")
    assert len(azure) == 19_366
    assert (azure[0], azure[1].input_len) == (RequestPlan(input_len=374, output_len=44), 396)
    gap = datetime(2023, 11, 16, 18, 15, 50, 995169) - datetime(2023, 11, 16, 18, 15, 46, 680590)
    assert azure[1].arrival_s == pytest.approx(gap.total_seconds(), abs=1e-5)
    mooncake = read_trace(shared_data / "traces" / "mooncake_synthetic.jsonl", unit_s=1e-3, limit=100)
    assert (mooncake[0].input_len, len(mooncake[0].prefix_ids), mooncake[2].arrival_s) == (40_160, 79, 0.04)
    assert len(read_dataset(shared_data / "text" / "spec_bench.jsonl", lambda text: len(text.split()))) == 480
