"""The command line, in this process and as users run it."""

import subprocess
import sys

import pytest

from jaxpaged.cli import main


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
    assert "linear layers in float32: " in info


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


def test_a_plan_that_does_not_fit_is_refused_like_the_model_itself(capsys):
    assert main(["plan", "demo", "--num-device-blocks", "2000000000"]) == 2
    error = capsys.readouterr().err
    assert "blocks fit" in error
    assert len(error.strip().splitlines()) == 1


def test_the_demo_model_can_be_converted_by_its_name(tmp_path, capsys):
    assert main(["convert", "demo", str(tmp_path / "native")]) == 0
    assert (tmp_path / "native" / "config.json").is_file()
    assert main(["convert", "demo", str(tmp_path / "native")]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_an_interrupt_swallowed_by_a_destructor_comes_again():
    code = """
import os, signal, time
from jaxpaged.cli import insistent_interrupts
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
