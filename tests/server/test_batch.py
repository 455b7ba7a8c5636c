"""Batch files: one answer for each line, written as it comes; a run cut short goes on with exactly the rest."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import pytest

from jaxpaged import SamplingParams
from jaxpaged.cli import main
from jaxpaged.server.batch import AnswerFile, Ledger, lines_of, run_batch


def line_of(custom_id, **body):
    body = {"prompt": "ROMEO:\n", "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write(path, lines, end="\n"):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + end for line in lines))


def answers_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(llm, tmp_path, **options):
    return run_batch(
        tmp_path / "in.jsonl", tmp_path / "out.jsonl", load=lambda: llm, model_name="demo", is_quiet=True, **options
    )


def test_answers_are_those_of_offline_generation(llm, tmp_path):
    prompts = [f"{name} {number}:\n" for number in range(6) for name in ("ROMEO", "KING")]
    chat = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}}
    write(tmp_path / "in.jsonl", [*(line_of(prompt, prompt=prompt) for prompt in prompts), chat])
    assert run(llm, tmp_path) == 0
    answers = {answer["custom_id"]: answer for answer in answers_in(tmp_path / "out.jsonl")}
    assert set(answers) == {*prompts, "chat"}
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False):
        answer = answers[output.prompt]
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["choices"][0]["text"] == output.outputs[0].text
    assert answers["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"


def test_lines_that_are_wrong_get_an_error_each_and_others_are_answered(llm, tmp_path):
    lines = [
        "\ufeff" + json.dumps(line_of("first")),
        "",
        "{",
        "[1]",
        json.dumps(line_of("nan")).replace('"max_tokens": 4', '"max_tokens": NaN'),
        {"method": "POST", "url": "/v1/completions", "body": {}},
        {**line_of("get"), "method": "GET"},
        {**line_of("url"), "url": "/v1/embeddings"},
        {**line_of("body"), "body": "x"},
        line_of("first"),
        line_of("range", temperature=-1),
        line_of("model", model="../../etc/passwd"),
        line_of("stream", stream=True),
        line_of("last"),
    ]
    write(tmp_path / "in.jsonl", lines, end="\r\n")
    assert run(llm, tmp_path) == 0
    found = {}
    for answer in answers_in(tmp_path / "out.jsonl"):
        number = int(answer["id"].removeprefix("batch_req_"))
        assert number not in found
        assert (answer["response"] is None) != (answer["error"] is None)
        found[number] = answer["error"]["code"] if answer["error"] else answer["response"]["status_code"]
    assert found == {
        1: 200, 3: "invalid_json_line", 4: "invalid_request", 5: "invalid_json_line", 6: "invalid_custom_id",
        7: "invalid_method", 8: "invalid_url", 9: "invalid_request", 10: "duplicate_custom_id", 11: 400, 12: 404,
        13: 400, 14: 200,
    }  # fmt: skip
    # again: every line has its answer, the wrong ones too
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(llm, tmp_path, is_resumed=True) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", ["between lines", "within a line"])
def test_a_run_cut_short_goes_on_with_exactly_the_rest(llm, tmp_path, cut):
    ids = [f"id {number}" for number in range(10)]
    write(tmp_path / "in.jsonl", [line_of(name, prompt=name) for name in ids])
    assert run(llm, tmp_path) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    kept = whole.splitlines(keepends=True)[:4]
    rest = b"" if cut == "between lines" else whole.splitlines()[4][:-20]
    (tmp_path / "out.jsonl").write_bytes(b"".join(kept) + rest)
    num_before = llm.stats().num_requests_accepted
    assert run(llm, tmp_path, is_resumed=True) == 0
    assert llm.stats().num_requests_accepted - num_before == 6
    answers = answers_in(tmp_path / "out.jsonl")
    assert sorted(answer["custom_id"] for answer in answers) == ids
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b"".join(kept))
    texts = {a["custom_id"]: a["response"]["body"]["choices"] for a in map(json.loads, whole.splitlines())}
    assert {a["custom_id"]: a["response"]["body"]["choices"] for a in answers} == texts


def test_files_that_cannot_be_used_are_refused_before_a_model_is_loaded(tmp_path):
    def run_without_model(**options):
        return run_batch(
            tmp_path / "in.jsonl", tmp_path / "out.jsonl", load=lambda: pytest.fail("loaded"), model_name="demo",
            is_quiet=True, **options,
        )

    with pytest.raises(ValueError, match=r"in\.jsonl is not a file"):
        run_without_model()
    write(tmp_path / "in.jsonl", [line_of("a")])
    write(tmp_path / "out.jsonl", [{"id": "batch_req_1", "custom_id": "a"}])
    with pytest.raises(ValueError, match="--resume to go on with it"):
        run_without_model()
    for wrong in ("hello", "{}", '{"id": "x", "custom_id": "a"}', '{"id": "batch_req_0", "custom_id": "a"}'):
        write(tmp_path / "out.jsonl", [wrong])
        with pytest.raises(ValueError, match="no answer of this command"):
            run_without_model(is_resumed=True)
        assert (tmp_path / "out.jsonl").read_text() == wrong + "\n"
    (tmp_path / "out.jsonl").unlink()
    os.link(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="named as the answers too"):
        run_without_model(is_overwriting=True)


def test_answers_of_another_file_are_not_gone_on_with(llm, tmp_path):
    write(tmp_path / "in.jsonl", [line_of("a"), line_of("b")])
    assert run(llm, tmp_path) == 0
    write(tmp_path / "in.jsonl", [line_of("b"), line_of("a")])
    with pytest.raises(ValueError, match="belong to another file"):
        run(llm, tmp_path, is_resumed=True)


def test_a_full_disk_leaves_whole_answers_and_the_next_run_goes_on(llm, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", [line_of(f"id {number}") for number in range(8)])
    pwrite, calls = os.pwrite, iter(range(100))

    def full_after_three(file, content, offset):
        if next(calls) < 3:
            return pwrite(file, content, offset)
        pwrite(file, content[: len(content) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full_after_three)
    with pytest.raises(OSError, match="No space left") as caught:
        run(llm, tmp_path)
    assert caught.value.filename == str(tmp_path / "out.jsonl")
    monkeypatch.undo()
    assert len(answers_in(tmp_path / "out.jsonl")) == 3
    assert llm.stats().num_used_blocks == 0
    assert run(llm, tmp_path, is_resumed=True) == 0
    assert len(answers_in(tmp_path / "out.jsonl")) == 8


def test_a_line_that_is_too_long_is_passed_over(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a\n" + b"x" * 1000 + b"\n\nb\n" + b"y" * 1000)
    with path.open("rb") as file:
        assert list(lines_of(file, 100)) == [(1, b"a"), (2, None), (4, b"b"), (5, None)]


def test_memory_does_not_grow_with_the_number_of_lines(tmp_path):
    def peak(count):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(1, count + 1):
                file.write(json.dumps({"id": f"batch_req_{number}", "custom_id": f"id {number}"}) + "\n")
        tracemalloc.start()
        ledger = Ledger()
        answers = AnswerFile(path, ledger, is_resumed=True, is_overwriting=False)
        for number in range(1, count + 1):
            assert ledger.first_line(f"id {number}", number) == number
            assert ledger.is_answered(number, f"id {number}")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        answers.close()
        ledger.close()
        return found

    assert peak(20_000) < peak(2_000) + 100_000  # bytes; SQLite's own cache is bounded, and not traced


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path):
    ids = [f"id {number}" for number in range(60)]
    write(tmp_path / "in.jsonl", [line_of(name, prompt=name, max_tokens=80, ignore_eos=True) for name in ids])
    arguments = [
        "batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--quiet", "--max-num-seqs", "4",
        "--max-num-batched-tokens", "32", "--max-model-len", "128", "--num-device-blocks", "13", "--host-memory-bytes",
        str(2**22), "--preemption", "swap",
    ]
    # the cache of these tests, which has compiled all of this
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    process = subprocess.Popen([sys.executable, "-m", "jaxpaged", *arguments], env=environment)
    out = tmp_path / "out.jsonl"
    deadline = time.monotonic() + 300
    while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = out.read_bytes()
    num_kept = first.count(b"\n")
    assert num_kept < 60
    assert main([*arguments, "--resume"]) == 0
    whole = b"".join(first.splitlines(keepends=True)[:num_kept])
    assert out.read_bytes().startswith(whole)
    assert sorted(answer["custom_id"] for answer in answers_in(out)) == sorted(ids)
    assert main([*arguments, "--resume"]) == 0
    assert len(answers_in(out)) == 60
