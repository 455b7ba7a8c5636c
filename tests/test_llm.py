"""The doors: LLM and the command line, on the demo model and on a real trained checkpoint."""

import json
import subprocess
import sys

import pytest

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.cli import main
from jaxpaged.llm import engine_config_from

GREEDY = SamplingParams(temperature=0, max_tokens=300)


@pytest.fixture(scope="module")
def golden(stories260k):
    return json.loads((stories260k / "golden.json").read_text())["greedy"]


@pytest.fixture(scope="module")
def demo():
    return LLM("demo", max_num_seqs=8, max_num_batched_tokens=64, show_progress=False)


@pytest.mark.parametrize("options", [{}, {"num_device_blocks": 60, "block_size": 8}], ids=["ample", "tight"])
def test_the_published_story_comes_out_token_for_token(stories260k, golden, options):
    llm = LLM(stories260k, max_num_seqs=8, max_num_batched_tokens=64, show_progress=False, **options)
    prompts = [{"prompt_token_ids": entry["prompt_token_ids"]} for entry in golden]
    outputs = llm.generate([*prompts, *(entry["prompt"] for entry in golden)], GREEDY, use_tqdm=False)
    for output, entry in zip(outputs, golden + golden, strict=True):
        (completion,) = output.outputs
        expected = entry["greedy_token_ids"]
        assert output.prompt_token_ids == tuple(entry["prompt_token_ids"])
        assert list(completion.token_ids)[: len(expected)] == expected
        assert completion.finish_reason in ("stop", "length")
    assert len(golden[0]["greedy_token_ids"]) >= 250
    if options:
        assert llm.stats().num_preemptions > 0


def test_the_command_line_prints_the_published_story(stories260k, golden, capsys):
    entry = golden[0]
    tokens = str(len(entry["greedy_token_ids"]))
    code = main(["generate", entry["prompt"], "--model", str(stories260k), "--max-tokens", tokens, "--quiet",
                 "--max-num-seqs", "4"])
    assert code == 0
    assert capsys.readouterr().out.strip() == entry["text"].strip()


def test_the_story_comes_out_of_the_converter_script_too(stories260k, golden, tmp_path):
    target = tmp_path / "native"
    done = subprocess.run(
        [sys.executable, "-m", "converters", str(stories260k), str(target), "--quiet"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    llm = LLM(target, max_num_seqs=4, show_progress=False)
    (output,) = llm.generate(golden[0]["prompt"], GREEDY, use_tqdm=False)
    expected = golden[0]["greedy_token_ids"]
    assert list(output.outputs[0].token_ids)[: len(expected)] == expected


def test_outputs_come_in_the_order_of_the_prompts(demo):
    prompts = ["ROMEO:\n", {"prompt": "JULIET:\n"}, {"prompt_token_ids": [1, 20, 30]}, "First Citizen:\nWe"]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (30, 3, 12, 1)]
    outputs = demo.generate(prompts, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [30, 3, 12, 1]
    assert outputs[0].prompt == "ROMEO:\n"
    assert outputs[2].prompt is None
    alone = demo.generate(prompts[3], params[3], use_tqdm=False)
    assert alone[0].outputs[0].text == outputs[3].outputs[0].text


def test_a_seed_gives_the_same_text_again(demo):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=20, n=2)
    first = demo.generate("KING:\n", params, use_tqdm=False)[0]
    again = demo.generate("KING:\n", params, use_tqdm=False)[0]
    assert [c.text for c in first.outputs] == [c.text for c in again.outputs]
    assert first.outputs[0].text != first.outputs[1].text
    assert again.num_cached_tokens == 0 or again.num_cached_tokens % 16 == 0


def test_a_stop_string_ends_the_text_before_itself(demo):
    whole = demo.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)[0].outputs[0].text
    stop = whole[20:24]
    cut = demo.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=60, stop=stop), use_tqdm=False)[0]
    (completion,) = cut.outputs
    assert completion.text == whole[: whole.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    kept = demo.generate(
        "ROMEO:\n",
        SamplingParams(temperature=0, max_tokens=60, stop=stop, include_stop_str_in_output=True),
        use_tqdm=False,
    )[0]
    assert kept.outputs[0].text == whole[: whole.index(stop) + len(stop)]


def test_streamed_text_only_grows_and_ends_as_generated(demo):
    params = SamplingParams(temperature=0, max_tokens=40)
    texts = [output.outputs[0].text for output in demo.stream("ROMEO:\n", params)]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert texts[-1] == demo.generate("ROMEO:\n", params, use_tqdm=False)[0].outputs[0].text


def test_a_second_request_finds_the_prefix_of_the_first(demo):
    demo.reset_prefix_cache()
    prompt = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 2
    params = SamplingParams(temperature=0, max_tokens=10)
    first = demo.generate(prompt, params, use_tqdm=False)[0]
    second = demo.generate(prompt, params, use_tqdm=False)[0]
    salted = demo.generate({"prompt": prompt, "cache_salt": "mine"}, params, use_tqdm=False)[0]
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 16
    assert salted.num_cached_tokens == 0
    assert first.outputs[0].text == second.outputs[0].text == salted.outputs[0].text
    assert demo.stats().prefix_cache_hit_rate > 0


def test_one_bad_prompt_refuses_the_call_and_leaves_nothing_behind(demo):
    before = demo.stats().num_requests_running
    with pytest.raises(ValueError, match="prompt 1"):
        demo.generate(["fine", {"prompt_token_ids": [10**9]}], GREEDY, use_tqdm=False)
    assert not demo.engine.has_unfinished
    assert demo.stats().num_used_blocks == 0
    assert demo.stats().num_requests_running == before


@pytest.mark.parametrize(
    ("prompts", "params", "match"),
    [
        ([], None, "empty"),
        ([""], "keep", None),
        (["a"], [GREEDY, GREEDY], "2 entries for 1"),
        ([{"text": "a"}], GREEDY, "text"),
        ([3.5], GREEDY, "float"),
        (["a"], BeamSearchParams(beam_width=2, max_tokens=3), "BeamSearchParams"),
        (["a"], "hot", "SamplingParams"),
    ],
)
def test_calls_that_make_no_sense_are_refused(demo, prompts, params, match):
    if params == "keep":  # an empty text is one token, the begin-of-sequence token
        assert demo.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids
        return
    with pytest.raises(ValueError, match=match):
        demo.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"trust_remote_code": True}, "no remote code"),
        ({"enforce_eager": True}, "enforce_eager"),
        ({"max_length": 3}, "max_model_len"),
        ({"swap_space": -1}, "swap_space"),
    ],
)
def test_names_we_do_not_have_are_refused_with_what_to_use(options, match):
    with pytest.raises(ValueError, match=match):
        engine_config_from(options)


def test_names_of_vllm_are_understood():
    config = engine_config_from({"gpu_memory_utilization": 0.5, "swap_space": 2, "trust_remote_code": False})
    assert (config.device_memory_fraction, config.host_memory_bytes) == (0.5, 2 * 2**30)


@pytest.mark.parametrize("model", ["no/such/folder", "../../etc/passwd", "https://example.com/model", "gpt2"])
def test_a_model_that_is_no_folder_is_refused_without_asking_a_network(model, capsys):
    assert main(["generate", "x", "--model", model]) == 2
    error = capsys.readouterr().err
    assert "is not a folder" in error
    assert len(error.strip().splitlines()) == 1


def test_plan_and_info_answer_before_anything_is_loaded(capsys):
    assert main(["plan", "demo", "--max-num-seqs", "4"]) == 0
    plan = capsys.readouterr().out
    assert "weights" in plan
    assert "blocks of 16 tokens" in plan
    assert main(["info"]) == 0
    info = capsys.readouterr().out
    assert "xla" in info
    assert "jax" in info


def test_generate_of_the_command_line_takes_several_prompts_and_samples(capsys):
    code = main(["generate", "ROMEO:\n", "JULIET:\n", "--n", "2", "--temperature", "1", "--seed", "3",
                 "--max-tokens", "5", "--max-num-seqs", "4"])
    captured = capsys.readouterr()
    assert code == 0
    assert captured.out.count("---") == 4
    assert "tok/s" in captured.err


def test_a_bad_value_on_the_command_line_is_one_line(capsys):
    assert main(["generate", "x", "--temperature", "nan"]) == 2
    error = capsys.readouterr().err
    assert "temperature=nan" in error
    assert len(error.strip().splitlines()) == 1


def test_a_model_without_a_chat_template_says_so(demo):
    tokenizer = demo.engine.tokenizer
    if tokenizer.has_chat_template:
        output = demo.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=4), use_tqdm=False)
        assert output[0].outputs[0].token_ids
    else:
        with pytest.raises(ValueError, match="chat template"):
            demo.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=4))


def test_metrics_have_names_and_numbers(demo):
    metrics = demo.get_metrics()
    assert metrics["jaxpaged:num_blocks"] > 1
    assert all(isinstance(value, float) for value in metrics.values())
