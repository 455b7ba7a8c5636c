"""The command line, in this process and as users run it."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest

from bench import VERBS
from jaxpaged import LLM, BeamSearchParams
from jaxpaged.cli import main, make_parser
from jaxpaged.llm import DEMO_FOLDER
from pallas_kernels import KVLayout


def test_the_command_line_prints_the_published_story(stories260k, golden, capsys):
    entry = golden[0]
    tokens = str(len(entry["greedy_token_ids"]))
    code = main(["generate", entry["prompt"], "--model", str(stories260k), "--max-tokens", tokens, "--quiet",
                 "--max-num-seqs", "4"])
    assert code == 0
    assert capsys.readouterr().out.strip() == entry["text"].strip()


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
    assert "linear layers on CPU: " in info


def test_generate_of_the_command_line_takes_several_prompts_and_samples(capsys):
    code = main(["generate", "ROMEO:\n", "JULIET:\n", "--n", "2", "--temperature", "1", "--seed", "3",
                 "--max-tokens", "5", "--max-num-seqs", "4"])
    captured = capsys.readouterr()
    assert code == 0
    assert [line for line in captured.out.splitlines() if line.startswith("---")] == [
        f"--- prompt {prompt}, sample {sample}" for prompt in (1, 2) for sample in (1, 2)
    ]
    assert "tok/s" in captured.err


def test_generate_of_the_command_line_searches_with_beams(capsys):
    options = ["--beam-width", "3", "--length-penalty", "0", "--early-stopping", "--stop", "\n", "--max-tokens", "6"]
    assert main(["generate", "ROMEO:", "JULIET:", "--no-echo", "--quiet", "--max-num-seqs", "4", *options]) == 0
    printed = capsys.readouterr().out
    params = BeamSearchParams(beam_width=3, length_penalty=0.0, early_stopping=True, stop="\n", max_tokens=6)
    llm = LLM("demo", max_num_seqs=4, show_progress=False)
    found = llm.beam_search(["ROMEO:", "JULIET:"], params, use_tqdm=False)
    assert printed == "".join(
        f"--- prompt {number}, beam {hypothesis.index + 1}, score {hypothesis.score:.4f}\n{hypothesis.text}\n"
        for number, output in enumerate(found, 1)
        for hypothesis in output.outputs
    )
    assert printed.count("---") == 6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--beam-width", "2", "--temperature", "0.7"], "--temperature has no effect here, as a search with beams"),
        (["--beam-width", "2", "--n", "2"], "leave out --n or --beam-width"),
        (["--beam-width", "2", "--seed", "0"], "leave out --seed or --beam-width"),
        (["--length-penalty", "2"], "--length-penalty has no effect here, as it is of a search with beams"),
        (["--early-stopping"], "give --beam-width too, or leave it out"),
        (["--beam-width", "65"], "beam_width=65 is not allowed: it must be an integer from 1 to 64"),
        (["--beam-width", "2", "--length-penalty", "nan"], "length_penalty=nan is not allowed"),
    ],
)
def test_flags_that_a_search_or_a_draw_would_not_read_are_refused_by_name(options, told, monkeypatch, capsys):
    monkeypatch.setattr("jaxpaged.commands.generate.LLM", lambda *a, **k: pytest.fail("a model was loaded"))
    assert main(["generate", "x", *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert told in error


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_a_prompt_comes_from_stdin_where_none_is_given(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("KING:\nMy lord\n"))
    options = ["--quiet", "--max-tokens", "4", "--max-num-seqs", "1"]
    assert main(["generate", *arguments, *options]) == 0
    piped = capsys.readouterr().out
    assert piped.startswith("KING:\nMy lord")
    assert not piped.startswith("KING:\nMy lord\n")
    assert main(["generate", "KING:\nMy lord", *options]) == 0
    assert capsys.readouterr().out == piped


def test_stdin_is_one_prompt_among_others(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("KING:\n"))
    assert main(["generate", "ROMEO:", "-", "--quiet", "--max-tokens", "2", "--max-num-seqs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "ROMEO:" in printed
    assert "KING:" in printed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        ([], Terminal("typed"), "there is no prompt: give one"),
        ([], None, "there is no prompt: give one"),
        ([], io.StringIO(""), "there is no prompt, and stdin is empty: give one"),
        (["-", "-"], io.StringIO("x"), "- was given 2 times"),
        ([], io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"), "not text in utf-8"),
    ],
    ids=["terminal", "closed", "empty", "twice", "not text"],
)
def test_no_prompt_is_one_line_with_a_hint(arguments, stdin, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("jaxpaged.llm.LLM", lambda *a, **k: pytest.fail("a model was loaded"))
    assert main(["generate", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert told in error


def prompts_seen(monkeypatch):
    """The prompts that reach the engine from here on, as text."""
    seen, stream = [], LLM.stream

    def spied(llm, prompt, params):
        seen.append(llm.engine.tokenizer.decode(prompt["prompt_token_ids"]))
        return stream(llm, prompt, params)

    monkeypatch.setattr(LLM, "stream", spied)
    return seen


def test_a_chat_that_outgrows_the_context_forgets_its_oldest_turns_and_goes_on(monkeypatch, capsys):
    seen = prompts_seen(monkeypatch)
    said = [f"Good morrow, number {number}." for number in range(8)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(said)))
    code = main(["chat", "--quiet", "--system", "A room in the castle.", "--max-tokens", "16", "--max-model-len", "128",
                 "--max-num-seqs", "1"])
    captured = capsys.readouterr()
    assert code == 0
    assert "outgrown the model's context (max_model_len=128): its oldest turn is forgotten\n" in captured.err
    assert len(seen) == len(said)
    for line, prompt in zip(said, seen, strict=True):
        assert "A room in the castle." in prompt
        assert line in prompt
    assert said[0] not in seen[-1]
    assert said[6] in seen[-1]


def test_a_message_that_cannot_fit_is_one_line_and_the_chat_goes_on_with_its_memory(monkeypatch, capsys):
    seen = prompts_seen(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("First.\n" + "Too long. " * 200 + "\nLast.\n"))
    code = main(["chat", "--quiet", "--max-tokens", "8", "--max-model-len", "128", "--max-num-seqs", "1"])
    errors = capsys.readouterr().err.splitlines()
    assert code == 0
    assert len(errors) == 1
    assert "this message does not fit" in errors[0]
    assert "max_model_len is 128" in errors[0]
    assert len(seen) == 2
    assert "First." in seen[1]
    assert "Last." in seen[1]
    assert "Too long" not in seen[1]


def test_a_bad_value_on_the_command_line_is_one_line(capsys):
    assert main(["generate", "x", "--temperature", "nan"]) == 2
    error = capsys.readouterr().err
    assert "temperature=nan" in error
    assert len(error.strip().splitlines()) == 1


def test_what_help_shows_as_a_default_is_accepted(capsys):
    options = ["--max-model-len", "None", "--num-device-blocks", "none", "--attention-implementation", "None",
               "--host-memory-bytes", "auto", "--max-num-seqs", "4"]
    assert main(["plan", "demo", *options]) == 0
    assert "1,024 tokens" in capsys.readouterr().out
    parser = make_parser()
    assert parser.parse_args(["generate", "x", "--seed", "None"]).seed is None
    assert parser.parse_args(["generate", "x", "--seed", "-3"]).seed == -3


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--host-memory-bytes", "'some' is neither a whole number nor auto"),
        ("--max-model-len", "'some' is neither a whole number nor None"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_words(flag, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "demo", flag, "some"])
    assert ended.value.code == 2
    assert f"argument {flag}: {told}" in capsys.readouterr().err


def test_flags_of_vllm_are_understood(capsys):
    assert main(["plan", "demo", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.5", "--swap-space", "0"]) == 0
    assert "host blocks for swapping  0 " in capsys.readouterr().out
    assert main(["plan", "demo", "--swap-space", "1", "--host-memory-bytes", "5"]) == 2
    assert "host_memory_bytes was given twice" in capsys.readouterr().err


def test_flags_without_effect_are_refused(capsys):
    for arguments in (["chat", "--n", "2"], ["generate", "x", "--max-logprobs", "3"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("is_native", [False, True])
def test_a_plan_tells_of_a_weight_file_that_was_cut_short(is_native, tmp_path, capsys):
    folder = tmp_path / "model"
    if is_native:
        assert main(["convert", "demo", str(folder)]) == 0
    else:
        shutil.copytree(DEMO_FOLDER, folder)
    assert main(["plan", str(folder), "--max-num-seqs", "4"]) == 0
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    capsys.readouterr()
    assert main(["plan", str(folder), "--max-num-seqs", "4"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{folder / 'model.safetensors'}: not a readable safetensors file" in error
    assert "cut short" in error


def test_a_plan_and_a_start_warn_of_a_cache_of_bytes_that_saves_nothing(capsys, monkeypatch):
    assert main(["plan", "demo", "--max-num-seqs", "4", "--kv-cache-dtype", "int8"]) == 0
    assert "warning" not in capsys.readouterr().out, "here it saves"
    monkeypatch.setattr(KVLayout, "why_no_saving", "a token takes 1024 bytes")
    assert main(["plan", "demo", "--max-num-seqs", "4", "--kv-cache-dtype", "int8"]) == 0
    told = "a token takes 1024 bytes (kv_cache_dtype='bfloat16')"
    assert capsys.readouterr().out.splitlines()[-1] == f"warning: {told}"
    with pytest.warns(UserWarning, match=re.escape(told)):
        LLM("demo", max_num_seqs=4, kv_cache_dtype="int8", show_progress=False)


def test_a_plan_that_does_not_fit_is_refused_like_the_model_itself(capsys):
    assert main(["plan", "demo", "--num-device-blocks", "2000000000"]) == 2
    error = capsys.readouterr().err
    assert "blocks fit" in error
    assert len(error.strip().splitlines()) == 1


def test_a_model_goes_to_every_format_by_the_command_line(tmp_path, capsys):
    for to in ("native", "huggingface", "orbax"):
        code = main(["convert", "demo", str(tmp_path / to), "--to", to, "--dtype", "float32"])
        printed = capsys.readouterr()
        assert (code, f"({to})" in printed.out) == (0, True), printed.err
        assert "GB/s" in printed.out
    with pytest.raises(SystemExit):
        main(["convert", "demo", str(tmp_path / "other"), "--to", "gguf"])
    assert not (tmp_path / "other").exists()


def test_the_demo_model_can_be_converted_by_its_name(tmp_path, capsys):
    assert main(["convert", "demo", str(tmp_path / "native")]) == 0
    assert (tmp_path / "native" / "config.json").is_file()
    assert main(["convert", "demo", str(tmp_path / "native")]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_an_interrupt_swallowed_by_a_destructor_comes_again():
    code = """
import os, signal, time
from jaxpaged.interrupts import insistent_interrupts
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
try:
    with insistent_interrupts():
        Swallows()
        print("went on", flush=True)
        time.sleep(30)
except KeyboardInterrupt:
    print("interrupted", flush=True)
time.sleep(1.2)  # and not once more, behind the block
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == ["went on", "interrupted", "end", ""]


@pytest.mark.parametrize("module", ["jaxpaged.cli", "jax", "jaxlib._jax", "jaxpaged.llm"])
def test_an_interrupt_during_the_imports_is_one_line_and_130(module):
    code = f"""
import os, signal, sys
class Interrupts:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts)
from jaxpaged.__main__ import main
sys.argv = ["jaxpaged", "plan", "demo"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "jaxpaged: interrupted\n")


def test_an_interrupt_in_a_callback_that_would_print_it_comes_a_little_later():
    code = """
import gc, os, signal, sys, time
from jaxpaged.interrupts import insistent_interrupts
def _xla_gc_callback(*args):
    os.kill(os.getpid(), signal.SIGINT)
gc.callbacks.append(_xla_gc_callback)
try:
    with insistent_interrupts():
        gc.collect()
        gc.callbacks.clear()
        time.sleep(30)
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.stderr == "interrupted\n"


@pytest.mark.parametrize(
    "arguments", [["plan", "demo"], ["generate", "hi", "--max-tokens", "2", "--quiet", "--max-num-seqs", "1"]]
)
@pytest.mark.parametrize("output", ["full", "closed pipe"])
def test_output_that_cannot_be_written_is_one_line_and_exit_code_1(arguments, output):
    if output == "full":
        if not os.path.exists("/dev/full"):
            pytest.skip("there is no /dev/full here")
        stdout, told = os.open("/dev/full", os.O_WRONLY), "the output cannot be written: No space left on device"
    else:
        reader, stdout = os.pipe()
        os.close(reader)
        told = "the reader of the output has gone"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jaxpaged", *arguments],
            stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120,
        )
    finally:
        os.close(stdout)
    assert (done.returncode, done.stderr) == (1, f"jaxpaged: error: {told}\n")


def run_in_shell(redirection):
    """`jaxpaged generate` with its streams redirected by a shell."""
    command = f"{sys.executable} -m jaxpaged generate ROMEO: --max-tokens 2 --max-num-seqs 1 {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_the_text_comes_where_stderr_cannot_be_written(redirection):
    if redirection.endswith("full") and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    done = run_in_shell(redirection)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ROMEO:")


def test_a_closed_stdout_is_one_line_and_exit_code_1_before_anything_is_loaded():
    done = run_in_shell(">&-")
    assert (done.returncode, done.stderr) == (1, "jaxpaged: error: the output cannot be written: it is closed\n")


def refusal(arguments, capsys):
    """The one line that a bad command line gives."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "x", "--n", "1.5"], "argument --n: invalid int value: '1.5'; see jaxpaged generate --help"),
        (["plan", "demo", "--host-memory-bytes", "1e9"], "'1e9' is neither a whole number nor auto; see jaxpaged "),
        (["generate", "x", "--dtype", "float16"], "use float32, which holds it exactly, or bfloat16"),
        (["generate", "x", "--max-token", "5"], "--max-token 5 (did you mean --max-tokens?); see jaxpaged gen"),
        (["generate", "x", "--num-beams", "4"], "--num-beams 4 (did you mean --beam-width?); see jaxpaged generate"),
        (["chat", "--presence-penalty=1"], "(presence_penalty has no flag: use it from Python, as SamplingParams(pres"),
        (["generates"], "invalid choice: 'generates'"),
    ],
)
def test_a_mistyped_command_line_is_one_line_that_points_to_the_help_of_its_verb(arguments, told, capsys):
    assert told in refusal(arguments, capsys)


def test_sampling_without_a_seed_draws_one_that_gives_the_same_text_again(capsys):
    options = ["generate", "ROMEO:", "--max-tokens", "12", "--temperature", "1", "--max-num-seqs", "1"]
    seeds, texts = [], []
    for _ in range(2):
        assert main(options) == 0
        captured = capsys.readouterr()
        seeds.append(captured.err.split("seed ")[1].split("]")[0])
        texts.append(captured.out)
    assert seeds[0] != seeds[1]
    assert texts[0] != texts[1]
    assert main([*options, "--seed", seeds[0]]) == 0
    assert capsys.readouterr().out == texts[0]


def test_a_text_that_the_context_ends_before_max_tokens_is_said(capsys):
    options = ["--max-model-len", "16", "--max-num-seqs", "1"]
    assert main(["generate", "ROMEO:", "--max-tokens", "100", *options]) == 0
    assert "max_model_len=16 tokens, which leaves less than --max-tokens 100" in capsys.readouterr().err
    assert main(["generate", "ROMEO:", "--max-tokens", "3", *options]) == 0
    assert "ended by the length" not in capsys.readouterr().err


def test_a_quiet_conversion_prints_nothing(tmp_path, capfd):
    assert main(["convert", "demo", str(tmp_path / "native"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_a_chat_of_blank_lines_says_that_there_was_no_message(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n  \n"))
    assert main(["chat", "--quiet", "--max-num-seqs", "1"]) == 0
    assert capsys.readouterr().err == "jaxpaged: there was no message: a line of text is one\n"


def test_warnings_are_one_line_each_and_those_of_other_packages_not_said_with_quiet(monkeypatch, capsys):
    def run(options, started):
        warnings.warn_explicit("the cache\ncannot be written", UserWarning, "/lib/jax/cache.py", 1)
        warnings.warn_explicit("of ours", UserWarning, f"/lib{os.sep}jaxpaged{os.sep}llm.py", 1)
        return 0

    monkeypatch.setattr("jaxpaged.commands.generate.run", run)
    for flags, told in (([], ["the cache cannot be written", "of ours"]), (["--quiet"], ["of ours"])):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["generate", "x", *flags]) == 0
        assert capsys.readouterr().err.splitlines() == [f"jaxpaged: warning: {text}" for text in told]


def test_bench_runs_one_by_name_with_its_own_flags(capsys):
    assert main(["bench", "host-time", "--num-seqs", "2", "--num-steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["num_seqs"] == 2


@pytest.mark.parametrize("arguments", [[], ["speed"]])
def test_bench_tells_which_there_are(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert ("'speed' is no bench; choose" if arguments else "which bench? choose") in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(VERBS)


@pytest.mark.parametrize("name", list(VERBS))
def test_every_bench_has_a_main(name):
    module, text = VERBS[name]
    assert callable(importlib.import_module(module).main)
    assert text
