"""Hugging Face folders: the same model by every road, every fault refused by name, no half-written output."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
from families import write_family
from safetensors.numpy import save_file
from tiny_checkpoints import hf_config, weights, write_case, write_folder

from converters import convert, load_huggingface
from converters.__main__ import main
from jaxpaged.models import checkpoint
from jaxpaged.models.new_folder import remove_dead_partials
from jaxpaged.models.parameters import parameter_arrays

CASE = "gqa_tied"
INDEX = "model.safetensors.index.json"


def assert_equal_models(left, right):
    arrays = parameter_arrays(left)
    assert arrays.keys() == parameter_arrays(right).keys()
    for name, array in parameter_arrays(right).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("case", ["biases", "gqa_tied", "longrope_long"])
def test_converted_then_loaded_equals_loaded_in_memory(tmp_path, case):
    source = write_case(tmp_path / "hf", case)
    report = convert(source, tmp_path / "native", show_progress=False, max_shard_bytes=8192)
    assert len(report.weight_files) > 1
    config, model = load_huggingface(source)
    native_config, native = checkpoint.load(tmp_path / "native")
    assert native_config == config
    assert_equal_models(native, model)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_and_element_types_are_read_without_torch(tmp_path, num_shards, dtype):
    values = hf_config(CASE) | {"torch_dtype": dtype}
    tensors = weights(values)
    config, model = load_huggingface(
        write_folder(tmp_path / "hf", values, tensors, num_shards=num_shards, dtype=dtype)
    )
    # float16 is widened, the others are kept
    assert config.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    key = model.layers[1].attention.key.kernel[...]
    narrow = tensors["model.layers.1.self_attn.k_proj.weight"].astype(
        checkpoint.NUMPY_DTYPES["bfloat16"] if dtype == "bfloat16" else dtype
    )
    np.testing.assert_array_equal(np.asarray(key, np.float32), narrow.astype(np.float32))


def test_stop_tokens_come_from_the_generation_config(tmp_path):
    source = write_case(tmp_path / "hf", CASE)
    assert load_huggingface(source)[0].eos_token_ids == (2,)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.6}')
    convert(source, tmp_path / "native", show_progress=False)
    assert load_huggingface(source)[0].eos_token_ids == (2, 7)
    assert checkpoint.read_config(tmp_path / "native").eos_token_ids == (2, 7)
    assert checkpoint.read_generation_defaults(tmp_path / "native").temperature == 0.6


def test_recomputed_and_tied_tensors_are_ignored_with_a_reason(tmp_path):
    values = hf_config(CASE)
    tensors = weights(values)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    report = convert(write_folder(tmp_path / "hf", values, tensors | extra), tmp_path / "native", show_progress=False)
    assert dict(report.ignored) == {
        "lm_head.weight": "tied to the embedding",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "recomputed from rope_theta",
    }
    assert "tied to the embedding" in str(report)
    assert report.num_source_tensors == report.num_target_tensors + 2
    assert report.num_elements == sum(tensor.size for tensor in tensors.values())


def test_only_known_text_files_are_copied(tmp_path, stories260k):
    report = convert(stories260k, tmp_path / "native", show_progress=False)
    assert set(report.copied_files) == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "native").iterdir()} == {
        *report.copied_files, "config.json", "model.safetensors",
    }


# ---- faults: a folder, what is done to it, and what the refusal must name ----


def edit_config(**changes):
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = weights(hf_config(CASE))
        change(tensors)
        write_folder(folder, hf_config(CASE), tensors)

    return edit


def edit_index(change):
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write_folder(folder, hf_config(CASE), weights(hf_config(CASE)), num_shards=2)
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def overwrite_bytes(data: bytes):
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def oddly_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def tokenizer_code(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')


NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
FAULTS = {
    "pickle": (only_pickle, "pytorch_model.bin"),
    "no weights": (nothing, "model.safetensors"),
    "odd name": (oddly_named, "consolidated.safetensors"),
    "empty file": (overwrite_bytes(b""), "model.safetensors"),
    "header length": (overwrite_bytes(b"\xff" * 64), "model.safetensors"),
    "header text": (overwrite_bytes((8).to_bytes(8, "little") + b"{broken}"), "model.safetensors"),
    "truncated": (truncate, "model.safetensors"),
    "remote code": (edit_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "config.json: auto_map"),
    "tokenizer code": (tokenizer_code, "tokenizer_config.json: auto_map"),
    "attribute": (edit_config(moe_layers=3), "config.json: attribute 'moe_layers'"),
    "architecture": (edit_config(architectures=["BloomForCausalLM"]), "config.json: architectures="),
    "two architectures": (edit_config(architectures=["LlamaForCausalLM", "X"]), "config.json: architectures="),
    "model type": (edit_config(model_type="gemma"), "config.json: model_type='gemma'"),
    "huge layers": (edit_config(num_hidden_layers=10**12), "config.json: num_hidden_layers=1000000000000"),
    "fewer layers": (edit_config(num_hidden_layers=1), "model.layers.1."),
    "more layers": (edit_config(num_hidden_layers=3), "missing tensors: model.layers.2."),
    "config json": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config gone": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), NORM),
    "extra": (
        edit_tensors(lambda t: t.update(surprise=np.ones(2, np.float32))),
        "model.safetensors: tensors this architecture does not have: surprise",
    ),
    "shape": (
        edit_tensors(lambda t: t.update({NORM: np.ones(3, np.float32)})),
        f"model.safetensors: tensor {NORM!r} has shape [3]: config.json says [32]",
    ),
    "untied head": (edit_tensors(lambda t: t.update({"lm_head.weight": t[EMBED] + 1})), "lm_head.weight"),
    "traversal": (edit_index(lambda m: m.update({NORM: "../hf/model-00001-of-00002.safetensors"})), NORM),
    "absolute": (edit_index(lambda m: m.update({NORM: "/etc/passwd"})), "/etc/passwd"),
    "backslash": (edit_index(lambda m: m.update({NORM: "..\\x.safetensors"})), NORM),
    "null byte": (edit_index(lambda m: m.update({NORM: "x\0.safetensors"})), NORM),
    "not a name": (edit_index(lambda m: m.update({NORM: 7})), NORM),
    "shard gone": (edit_index(lambda m: m.update({NORM: "model-00009-of-00002.safetensors"})), "model-00009"),
    "wrong shard": (
        edit_index(lambda m: m.update({NORM: next(f for f in m.values() if f != m[NORM])})),
        NORM,
    ),
    "unlisted": (edit_index(lambda m: m.pop(NORM)), NORM),
    "empty index": (edit_index(lambda m: m.clear()), f"{INDEX}: has no weight_map"),
    "generation": (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 999}'), "999"),
    "generation default": (
        lambda folder: (folder / "generation_config.json").write_text('{"temperature": -5}'),
        "generation_config.json: temperature=-5",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name_and_leaves_nothing_behind(tmp_path, capsys, fault):
    damage, named = FAULTS[fault]
    source = write_case(tmp_path / "hf", CASE)
    damage(source)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  (the text is checked below)
        load_huggingface(source)
    assert named in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)

    assert main([str(source), str(tmp_path / "native"), "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_source_that_is_not_there_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "native")]) == 1
    assert "nowhere: not a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_native_folder_is_not_converted_again(tmp_path):
    source = write_case(tmp_path / "hf", CASE)
    convert(source, tmp_path / "native", show_progress=False)
    with pytest.raises(ValueError, match="native checkpoint already"):
        load_huggingface(tmp_path / "native")


@pytest.mark.parametrize("fault", [ValueError("bad"), OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch, capsys, fault):
    source = write_case(tmp_path / "hf", CASE)
    real_read = checkpoint.TensorFolder.read

    def read(self, name):
        if name == NORM:
            raise fault
        return real_read(self, name)

    monkeypatch.setattr(checkpoint.TensorFolder, "read", read)
    assert main([str(source), str(tmp_path / "native"), "--quiet"]) != 0
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


KILLED_HALF_WAY = """
import os, signal, sys
from converters import convert
from jaxpaged.models.tensor_files import TensorFolder
read, names = TensorFolder.read, []
def read_three(self, name):
    names.append(name)
    if len(names) > 3:
        {then}
    return read(self, name)
TensorFolder.read = read_three
convert(sys.argv[1], sys.argv[2], show_progress=False)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
WAIT = "print('waits', flush=True); sys.stdin.readline()"


def test_what_a_killed_conversion_left_is_removed_by_the_next_one_and_told(tmp_path):
    source, target = write_case(tmp_path / "hf", CASE), tmp_path / "native"
    command = [sys.executable, "-c", KILLED_HALF_WAY.format(then=KILL), source, target]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -9
    (left,) = tmp_path.glob(".native.partial-*")
    other = tmp_path / ".native2.partial-0123456789ab"
    other.mkdir()
    report = convert(source, target, show_progress=False)
    assert report.removed_folders == (left,)
    assert f"{left}: left by a conversion that was killed" in str(report)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native", other.name}
    checkpoint.load(target)


def test_a_conversion_that_still_runs_keeps_its_partial_folder(tmp_path):
    source, target = write_case(tmp_path / "hf", CASE), tmp_path / "native"
    command = [sys.executable, "-c", KILLED_HALF_WAY.format(then=WAIT), source, target]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "waits\n"
        (partial,) = tmp_path.glob(".native.partial-*")
        assert remove_dead_partials(target) == ()
        assert partial.is_dir()
        running.communicate("\n" * 100, timeout=60)
    assert running.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native"}


def test_a_folder_that_is_not_ours_is_never_taken_for_a_dead_partial(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".native.partial-0123456789ab").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".native.partial-notes").mkdir()
    (tmp_path / ".native.partial-0123456789ac" / "folder").mkdir(parents=True)
    (tmp_path / ".native.partial-0123456789ad").write_text("a file")
    before = sorted(tmp_path.iterdir())
    assert remove_dead_partials(tmp_path / "native") == ()
    assert sorted(tmp_path.iterdir()) == before
    assert remove_dead_partials(tmp_path / "no" / "native") == ()


def test_an_empty_source_or_target_is_named(tmp_path, capsys, monkeypatch):
    source = write_case(tmp_path / "hf", CASE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the target is empty: give the path"):
        convert(source, "", show_progress=False)
    assert main(["", "native"]) == 1
    assert "the source is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_pickle_beside_safetensors_is_never_opened(tmp_path):
    source = write_case(tmp_path / "hf", CASE)
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_huggingface(source)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    source = write_folder(tmp_path / "hf", hf_config(CASE), weights(hf_config(CASE)), num_shards=2)
    first = source / "model-00001-of-00002.safetensors"
    save_file(weights(hf_config(CASE)), first)
    with pytest.raises(ValueError, match="does not place there"):
        load_huggingface(source)


def test_the_script_converts_and_says_what_it_did(tmp_path):
    source = write_case(tmp_path / "hf", "llama3")
    done = subprocess.run(
        [sys.executable, "-m", "converters", source, tmp_path / "native"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "converting: 100%" in done.stderr
    assert "LlamaForCausalLM" in done.stdout
    config, model = checkpoint.load(tmp_path / "native")
    assert_equal_models(model, load_huggingface(source)[1])
    # no torch on the way: it is not a dependency
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, converters.__main__; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )
    assert loaded.stdout.strip() == "False"
    assert config.rope_scaling is not None
    assert tiny_checkpoints.CASES["llama3"]


def test_a_target_that_cannot_be_written_is_named_with_the_reason(tmp_path, capsys):
    source = write_case(tmp_path / "hf", CASE)
    (tmp_path / "file").write_text("")
    assert main([str(source), str(tmp_path / "file" / "out"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'file' / 'out'}: cannot be written (")
    assert "choose another target" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf"]


def test_a_number_of_thousands_of_digits_is_refused_with_the_file_named(tmp_path):
    source = write_case(tmp_path / "hf", CASE)
    (source / "config.json").write_text('{"vocab_size": ' + "9" * 6000 + "}")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_huggingface(source)


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    source = write_case(tmp_path / "hf", CASE)
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    with pytest.raises(ValueError, match="config.json: is no file"):
        load_huggingface(source)


def test_a_part_of_a_head_that_cannot_be_rotated_is_refused_in_the_words_of_the_file(tmp_path):
    source = write_family(tmp_path / "hf", "gpt_neox", rotary_pct=0.125 * 3)  # of heads of 8
    with pytest.raises(ValueError, match="rotary_pct=0.375 of head_dim=8 rotates 3 dimensions"):
        load_huggingface(source)
