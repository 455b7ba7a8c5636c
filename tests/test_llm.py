"""LLM, on the demo model and on a real trained checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from flax import nnx

from converters import convert, load
from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.outputs import FailedRequestWarning
from jaxpaged.llm import DEMO_FOLDER, engine_config_from
from jaxpaged.models.registry import build_abstract

GREEDY = SamplingParams(temperature=0, max_tokens=300)


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
        (["a"], BeamSearchParams(beam_width=16, max_tokens=3), "beam_width=16 is above max_num_seqs=8"),
        (["a"], "hot", "SamplingParams"),
        (["a", "b"], [GREEDY, None], "params of prompt 1: None is not"),
        ([["a"]], GREEDY, "id 'a' is not an integer; texts"),
        (["a"], SamplingParams(n=9), "n=9 is above max_num_seqs=8.*larger max_num_seqs"),
        ([[1024]], GREEDY, "not from 0 to 1023: use the tokenizer of this model"),
        (b"a", GREEDY, "bytes"),
        (None, GREEDY, "NoneType"),
        (["a"], SamplingParams(max_tokens=None, min_tokens=1024), "min_tokens=1024"),
    ],
)
def test_calls_that_make_no_sense_are_refused(demo, prompts, params, match):
    if params == "keep":  # an empty text is one token, the begin-of-sequence token
        assert demo.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids
        return
    with pytest.raises(ValueError, match=match):
        demo.generate(prompts, params, use_tqdm=False)


def test_the_name_of_vllm_for_params_is_understood_and_others_are_refused(demo):
    one = demo.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    same = demo.generate("ROMEO:\n", sampling_params=SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert one[0].outputs[0].token_ids == same[0].outputs[0].token_ids
    with pytest.raises(ValueError, match="two names of the same"):
        demo.generate("ROMEO:\n", GREEDY, sampling_params=GREEDY)
    with pytest.raises(ValueError, match=r"max_tokens is not accepted: give it as SamplingParams\(max_tokens=...\)"):
        demo.generate("ROMEO:\n", max_tokens=3)
    with pytest.raises(ValueError, match="lora_request is not accepted"):
        demo.generate("ROMEO:\n", GREEDY, lora_request=1)
    with pytest.raises(ValueError, match="continue_final_message is not accepted"):
        demo.chat([{"role": "user", "content": "Hello"}], GREEDY, continue_final_message=True)


def test_a_priority_without_the_policy_is_refused(demo):
    params = SamplingParams(temperature=0, max_tokens=1)
    assert len(demo.generate(["a", "b"], params, priority=[0, 0], use_tqdm=False)) == 2
    with pytest.raises(ValueError, match="prompt 1: priority=3 .*scheduling_policy"):
        demo.generate(["a", "b"], params, priority=[0, 3])
    with pytest.raises(ValueError, match="one integer for each of 2 prompts"):
        demo.generate(["a", "b"], params, priority=3)


def test_a_text_given_beside_ids_comes_back(demo):
    prompt = {"prompt": "as the caller wrote it", "prompt_token_ids": [5, 6]}
    (output,) = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert output.prompt == "as the caller wrote it"
    assert output.prompt_token_ids == (5, 6)


def test_a_bad_word_does_not_appear_however_the_tokenizer_cuts_it(demo):
    prompt = "DUKE VINCENTIO:\nI pray you,"
    free = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)[0].outputs[0].text
    words = {word for word in re.findall(r"[a-z]+", free) if len(word) > 2}
    tokenizer = demo.engine.tokenizer
    cut_otherwise = {word for word in words if len({len(ids) for ids in tokenizer.bad_words_token_ids([word])}) > 1}
    assert cut_otherwise, "the test needs a word with another number of tokens behind a space"
    for word in sorted(cut_otherwise)[:3]:
        params = SamplingParams(temperature=0, max_tokens=60, bad_words=[word])
        text = demo.generate(prompt, params, use_tqdm=False)[0].outputs[0].text
        assert f" {word} " in f" {' '.join(re.findall(r'[a-z]+', free))} "
        assert f" {word} " not in text


def test_a_cache_that_cannot_be_had_is_one_clear_error(monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(Engine, "__init__", fail)
    with pytest.raises(ValueError, match="bytes for the KV cache .* could not be had.*num_device_blocks"):
        LLM("demo", max_num_seqs=4, show_progress=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_device_blocks": 2**31 - 1}, "blocks fit"),
        ({"swap_space": 900_000}, "host memory are available"),
        ({"preemption": "swap", "swap_space": 0}, "recompute"),
        ({"max_model_len": 4096}, "above the model's 1024 positions"),
        ({"attention_implementation": "flash"}, "use one of"),
        ({"tokenizer": 5}, "tokenizer=5"),
        ({"tokenizer": ""}, "tokenizer='' is not a path"),
        ({"host_memory_bytes": 1}, "holds no block: one takes .* give 0"),
        ({"attention_implementation": "mosaic_tpu"}, "'mosaic_tpu' does not serve .*use .*xla.*leave it out"),
        ({"tokenizer": "no/such"}, "not a folder"),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_weight_is_read(monkeypatch, options, match):
    monkeypatch.setattr("jaxpaged.llm.load", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=match):
        LLM("demo", show_progress=False, **options)


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize(("field", "value"), [("temperature", -5), ("eos_token_id", 99999), ("eos_token_id", "x")])
def test_a_bad_generation_config_is_refused_at_load_by_file_field_and_value(tmp_path, field, value, is_native):
    folder = tmp_path / "model"
    if is_native:
        convert(DEMO_FOLDER, folder, show_progress=False)
    else:
        shutil.copytree(DEMO_FOLDER, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({field: value}))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {field}={value!r}')} .*correct it there"):
        LLM(folder, show_progress=False)


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


def test_a_tokenizer_with_ids_beyond_the_model_s_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxpaged.llm.load", lambda *a, **k: pytest.fail("weights were read"))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    content = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    added = {"id": 1024, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    content["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not fit the model: it has ids up to 1024, and the model knows 1024 tok"):
        LLM("demo", tokenizer=folder, show_progress=False)


def test_where_there_is_no_compiler_the_load_says_once_what_to_install(tmp_path):
    code = "from jaxpaged import LLM\nfor shown in (True, False):\n    LLM('demo', max_num_seqs=1, show_progress=shown)"
    environment = {**os.environ, "PATH": str(tmp_path), "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("jaxpaged: ")]
    assert told == [
        "jaxpaged: the compiled CPU kernel needs a C++ compiler (g++, clang++, c++), and none is installed: plain XLA "
        "runs instead, slower; install one, as with `apt install g++`"
    ]


def test_names_of_vllm_are_understood():
    config = engine_config_from({"gpu_memory_utilization": 0.5, "swap_space": 2, "trust_remote_code": False})
    assert (config.device_memory_fraction, config.host_memory_bytes) == (0.5, 2 * 2**30)


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


def test_a_request_that_ends_in_an_error_is_named_in_one_warning_and_the_others_are_whole(demo, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=5)
    prompts = ["ROMEO:\n", "JULIET:\n", "KING:\n"]
    whole = demo.generate(prompts, params, use_tqdm=False)
    append = Engine._append

    def failing(engine, live, event, now):
        if live.prompt == "JULIET:\n":
            raise RuntimeError("injected")
        append(engine, live, event, now)

    monkeypatch.setattr(Engine, "_append", failing)
    told = r"1 of 3 requests ended in an error .*: prompt 1 \(request-\d+\): RuntimeError: injected"
    with pytest.warns(FailedRequestWarning, match=told) as record:
        outputs = demo.generate(prompts, params, use_tqdm=False)
    assert len(record) == 1
    assert record[0].filename == __file__
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[0].outputs[0].text == whole[0].outputs[0].text
    with pytest.warns(FailedRequestWarning, match="1 of 1 requests"):
        assert list(demo.stream("JULIET:\n", params))[-1].outputs[0].finish_reason == "error"


def tokens_of(llm):
    params = SamplingParams(temperature=0, max_tokens=12)
    return llm.generate({"prompt_token_ids": [5, 6, 7, 8]}, params, use_tqdm=False)[0].outputs[0].token_ids


def test_an_orbax_folder_and_what_went_back_to_hugging_face_are_served_like_the_folder_they_came_from(tmp_path, demo):
    convert(DEMO_FOLDER, tmp_path / "native", show_progress=False)
    for to in ("orbax", "huggingface"):
        convert(tmp_path / "native", tmp_path / to, to=to, show_progress=False)
        llm = LLM(tmp_path / to, max_num_seqs=8, max_num_batched_tokens=64, show_progress=False)
        assert tokens_of(llm) == tokens_of(demo)
        # the tokenizer came along
        assert llm.generate("ROMEO:", SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text


def test_a_live_model_is_served_from_the_arrays_it_has(demo):
    _, module = load(DEMO_FOLDER)
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "show_progress": False}
    llm = LLM(module, tokenizer=DEMO_FOLDER, **options)
    assert tokens_of(llm) == tokens_of(demo)
    assert llm.generate("ROMEO:", SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text
    # as it is now: a training step between two engines shows
    module.norm.scale[...] = -module.norm.scale[...]
    assert tokens_of(LLM(module, **options)) != tokens_of(demo)
    assert tokens_of(LLM(module, dtype="float32", **options))


def test_a_live_model_without_a_tokenizer_takes_token_ids_only():
    llm = LLM(load(DEMO_FOLDER)[1], max_num_seqs=8, max_num_batched_tokens=64, show_progress=False)
    assert llm.get_default_sampling_params() == SamplingParams()
    for call in (
        lambda: llm.generate("text", use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": "Hi"}], use_tqdm=False),
        llm.get_tokenizer,
    ):
        with pytest.raises(ValueError, match="loaded without a tokenizer"):
            call()


def test_a_live_model_of_another_kind_or_with_weights_missing_is_refused():
    with pytest.raises(ValueError, match=r"model=\(a Linear\) is not a path: .* or a Decoder"):
        LLM(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), show_progress=False)
    with pytest.raises(ValueError, match=r"\(a State\) is not a path: .*converters\.from_state"):
        LLM(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), show_progress=False)
    _, module = load(DEMO_FOLDER)
    with pytest.raises(ValueError, match="state: 'embedding.table' is a ShapeDtypeStruct: only arrays"):
        LLM(build_abstract(module.config), show_progress=False)


def test_a_bare_orbax_checkpoint_is_told_what_it_lacks(tmp_path):
    convert(DEMO_FOLDER, tmp_path / "orb", to="orbax", show_progress=False)
    with pytest.raises(ValueError, match="an Orbax checkpoint, but no config.json beside it says what model it is"):
        LLM(tmp_path / "orb" / "orbax", show_progress=False)
