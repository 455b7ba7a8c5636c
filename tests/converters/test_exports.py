"""The way back: what was converted is written again bit for bit, and transformers computes the same from it."""

import json
from pathlib import Path

import families
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from converters import convert, load, load_huggingface
from converters.__main__ import main
from converters.architectures import ARCHITECTURES
from converters.exports import make_exports
from converters.rules import TRANSPOSE, Ignore, Rule, Split, Stack, make_plan
from jaxpaged.layers.rope import LinearScaling
from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig

LLAMA = "LlamaForCausalLM"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_equal_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert tensor.tobytes() == right[name].tobytes(), name


def there_and_back(folder: Path, **options) -> Path:
    convert(folder / "hf", folder / "native", show_progress=False)
    convert(folder / "native", folder / "back", to="huggingface", show_progress=False, **options)
    return folder / "back"


@pytest.mark.parametrize("case", families.CASES)
def test_every_architecture_goes_to_native_and_back_bit_by_bit(tmp_path, case):
    source = families.write_family(tmp_path / "hf", case)
    back = there_and_back(tmp_path)
    assert_equal_bits(tensors_of(source), tensors_of(back))
    assert load_huggingface(back)[0] == load_huggingface(source)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["biases", "gqa_tied", "longrope_long"])
def test_element_types_shards_and_every_bit_survive(tmp_path, case, dtype):
    values = tiny_checkpoints.hf_config(case) | {"torch_dtype": dtype}
    source = tiny_checkpoints.write_folder(
        tmp_path / "hf", values, tiny_checkpoints.weights(values), num_shards=3, dtype=dtype
    )
    back = there_and_back(tmp_path, max_shard_bytes=8192)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    stored = tensors_of(back)
    assert set(index["weight_map"]) == set(stored)
    assert set(index["weight_map"].values()) == {path.name for path in back.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(getattr(ml_dtypes, dtype, dtype))}
    assert_equal_bits(tensors_of(source), stored)


def test_nan_and_signed_zero_come_back_as_they_were(tmp_path):
    values = tiny_checkpoints.hf_config("mha_untied")
    tensors = tiny_checkpoints.weights(values)
    odd = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    tensors["model.norm.weight"][:4] = odd
    tiny_checkpoints.write_folder(tmp_path / "hf", values, tensors)
    with pytest.warns(UserWarning, match="NaN, infinite or .* in tensors (model.)?norm."):
        back = there_and_back(tmp_path)
    assert tensors_of(back)["model.norm.weight"][:4].tobytes() == odd.tobytes()


def test_files_say_what_transformers_asks_for(tmp_path, stories260k):
    convert(stories260k, tmp_path / "native", show_progress=False)
    report = convert(tmp_path / "native", tmp_path / "back", to="huggingface", show_progress=False)
    with safe_open(tmp_path / "back" / "model.safetensors", framework="numpy") as stored:
        assert stored.metadata() == {"format": "pt"}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (stories260k / name).read_bytes()
        assert name in report.copied_files
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == ([LLAMA], "llama")
    assert "(huggingface)" in str(report)
    assert f"{report.num_source_tensors} renamed" in str(report)
    assert "GB/s" in str(report)


@pytest.mark.parametrize("case", tiny_checkpoints.CASES)
def test_facts_are_said_again_in_the_words_of_the_file(case):
    conversion = ARCHITECTURES[LLAMA]
    config = conversion.translate(tiny_checkpoints.hf_config(case), dtype=None, default_dtype="float32")
    written = json.loads(json.dumps(conversion.untranslate(config)))
    assert conversion.translate(written, dtype=None, default_dtype="float32") == config


def test_facts_that_the_file_has_no_words_for_are_refused_by_name(tmp_path):
    conversion = ARCHITECTURES[LLAMA]
    config = conversion.translate(tiny_checkpoints.BASE, dtype=None, default_dtype="float32")
    windowed = ModelConfig.from_json(config.as_json() | {"windows": [4, None]})
    with pytest.raises(ValueError, match="sliding_window|windows"):
        conversion.untranslate(windowed)
    checkpoint.write(
        tmp_path / "native", windowed,
        lambda path: np.zeros(checkpoint.parameter_files(windowed)[path].shape, np.float32),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{tmp_path / 'native'}: .*window"):
        convert(tmp_path / "native", tmp_path / "back", to="huggingface", show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


ROWS = (
    Rule("w.{i}.t", "layers.{i}.kernel", TRANSPOSE),
    Rule("w.{i}.old", "layers.{i}.kernel", TRANSPOSE),
    Split("qkv.{i}", ("q.{i}", "k.{i}"), num_groups=2),
    Stack("expert.{i}.{e}", "experts.{i}", TRANSPOSE),
    Ignore("inv_freq", because="recomputed"),
)
PARAMETERS = {
    "layers.7.kernel": np.arange(6.0).reshape(2, 3),
    "q.7": np.arange(8.0).reshape(4, 2),
    "k.7": 10 + np.arange(4.0).reshape(2, 2),
    "experts.7": np.arange(12.0).reshape(2, 2, 3),
}


def test_rows_are_walked_backwards_each_parameter_once():
    shapes = {name: array.shape for name, array in PARAMETERS.items()}
    exports = make_exports(ROWS, shapes, "here")
    written = {export.name: export.build(PARAMETERS.__getitem__) for export in exports}
    assert [export.shape for export in exports] == [tensor.shape for tensor in written.values()]
    # the first of two names; two heads of q, one of k, in turn; each expert transposed
    assert {name: tensor.tolist() for name, tensor in written.items()} == {
        "w.7.t": [[0, 3], [1, 4], [2, 5]],
        "qkv.7": [[0, 1], [2, 3], [10, 11], [4, 5], [6, 7], [12, 13]],
        "expert.7.0": [[0, 3], [1, 4], [2, 5]],
        "expert.7.1": [[6, 9], [7, 10], [8, 11]],
    }
    plan = make_plan(ROWS, {name: tensor.shape for name, tensor in written.items()}, shapes, "here")

    def read(name, part):
        if part is None:
            return written[name]
        return np.concatenate([written[name][start:stop] for start, stop in part.ranges])

    for assignment in plan.assignments:
        np.testing.assert_array_equal(assignment.read(read, np.dtype(float)), PARAMETERS[assignment.target])


def test_a_parameter_without_a_row_or_without_its_fellow_is_named():
    with pytest.raises(ValueError, match="here: parameter 'strange' has no tensor"):
        make_exports(ROWS, {"strange": (2,)}, "here")
    with pytest.raises(ValueError, match="'q.7' is written together with .'k.7'."):
        make_exports(ROWS, {"q.7": (4, 2)}, "here")


# ---- doors: formats, targets, the script ----


def test_an_unknown_format_and_a_conversion_to_the_same_are_refused(tmp_path, stories260k):
    with pytest.raises(ValueError, match="to='gguf' is not a format: it must be one of native, huggingface, orbax"):
        convert(stories260k, tmp_path / "out", to="gguf", show_progress=False)
    with pytest.raises(ValueError, match="is a huggingface checkpoint already"):
        convert(stories260k, tmp_path / "out", to="huggingface", show_progress=False)
    with pytest.raises(ValueError, match="is the source"):
        convert(stories260k, stories260k, to="huggingface", overwrite=True, show_progress=False)
    assert not list(tmp_path.iterdir())


def test_the_same_format_in_another_element_type_is_a_conversion(tmp_path):
    source = tiny_checkpoints.write_case(tmp_path / "hf", "mha_untied")
    report = convert(source, tmp_path / "half", to="huggingface", dtype="bfloat16", show_progress=False)
    stored = tensors_of(tmp_path / "half")
    for name, tensor in tensors_of(source).items():
        np.testing.assert_array_equal(stored[name], tensor.astype(ml_dtypes.bfloat16), err_msg=name)
    assert report.changes["cast"] == len(stored)
    assert load(tmp_path / "half")[0].dtype == "bfloat16"


def test_only_a_folder_of_the_same_format_with_nothing_else_in_it_is_overwritten(tmp_path):
    source = tiny_checkpoints.write_case(tmp_path / "hf", "mha_untied")
    convert(source, tmp_path / "native", show_progress=False)
    target = tmp_path / "back"
    convert(tmp_path / "native", target, to="huggingface", show_progress=False)
    with pytest.raises(ValueError, match="exists"):
        convert(tmp_path / "native", target, to="huggingface", show_progress=False)
    convert(tmp_path / "native", target, to="huggingface", overwrite=True, show_progress=False)
    (target / "thesis.txt").write_text("years of work")
    for wanted in ("native", "huggingface", "orbax"):
        with pytest.raises(ValueError, match="so it is not overwritten|already"):
            convert(tmp_path / "native", target, to=wanted, overwrite=True, show_progress=False)
    assert (target / "thesis.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native", "back"}


def test_a_folder_of_an_unknown_format_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"format": "gguf"}')
    with pytest.raises(ValueError, match=r"config.json: format='gguf' is not known"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"config.json: format='gguf' is not known"):
        convert(tmp_path, tmp_path / "out", show_progress=False)


NATIVE_FAULTS = {
    "missing": (lambda tensors: tensors.pop("norm.scale"), "missing parameters: norm.scale"),
    "extra": (lambda tensors: tensors.update(surprise=np.ones(2, np.float32)), "surprise"),
    "shape": (lambda tensors: tensors.update({"norm.scale": np.ones(3, np.float32)}), "'norm.scale' has shape [3]"),
    "type": (lambda tensors: tensors.update({"norm.scale": np.ones(32, np.int8)}), "'norm.scale' has element type I8"),
}


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
@pytest.mark.parametrize("fault", [*NATIVE_FAULTS, "truncated", "generation"])
def test_a_faulty_native_folder_is_refused_by_name_and_nothing_is_written(tmp_path, capsys, fault, to):
    convert(tiny_checkpoints.write_case(tmp_path / "hf", "mha_untied"), tmp_path / "native", show_progress=False)
    weights = tmp_path / "native" / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        named = "model.safetensors: not a readable safetensors file"
    elif fault == "generation":
        (tmp_path / "native" / "generation_config.json").write_text('{"temperature": -5}')
        named = "generation_config.json: temperature=-5"
    else:
        change, named = NATIVE_FAULTS[fault]
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)
    assert main([str(tmp_path / "native"), str(tmp_path / "out"), "--to", to, "--quiet"]) == 1
    printed = capsys.readouterr()
    assert named in printed.err
    assert printed.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native"}


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_a_failure_half_way_back_leaves_nothing_behind(tmp_path, monkeypatch, to):
    convert(tiny_checkpoints.write_case(tmp_path / "hf", "mha_untied"), tmp_path / "native", show_progress=False)
    real_facts = checkpoint.write_facts

    def write_facts(*arguments):
        real_facts(*arguments)
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "write_facts", write_facts)
    with pytest.raises(OSError, match="disk full"):
        convert(tmp_path / "native", tmp_path / "out", to=to, show_progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native"}


def test_a_rope_scaling_without_name_in_the_file_would_be_noticed(monkeypatch):
    """The check that what is written reads as the same facts, by a converter that forgets one."""
    conversion = ARCHITECTURES[LLAMA]
    config = conversion.translate(
        tiny_checkpoints.BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}}, dtype=None, default_dtype="float32"
    )
    assert config.rope_scaling == LinearScaling(factor=2.0)
    monkeypatch.setitem(vars(conversion), "values", lambda config: {"rope_scaling": None})
    with pytest.raises(ValueError, match="rope_scaling: no config.json of a LlamaForCausalLM can say that"):
        conversion.untranslate(config)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch and transformers warn of their own affairs
@pytest.mark.parametrize("case", [*tiny_checkpoints.CASES, *families.CASES])
def test_transformers_computes_the_same_from_what_comes_back(tmp_path, case):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    transformers = pytest.importorskip("transformers")
    write = families.write_family if case in families.CASES else tiny_checkpoints.write_case
    write(tmp_path / "hf", case)
    back = there_and_back(tmp_path, max_shard_bytes=16_384)
    token_ids = torch.arange(3, 27)[None]
    logits, activations = [], []
    for folder in (tmp_path / "hf", back):
        # the grouped product that it prefers for mixtures takes sizes that are multiples of 4 alone
        options = {"experts_implementation": "eager"} if "moe" in case or "mixtral" in case else {}
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
        )
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits.append(model(token_ids, use_cache=False).logits.numpy())
        names = ("hidden_act", "hidden_activation", "activation_function")
        activations.append([getattr(model.config, name, None) for name in names])
    # where gelu_new came back as gelu_pytorch_tanh, another order of the same float32 operations
    tolerance = 0 if activations[0] == activations[1] else 1e-5
    np.testing.assert_allclose(*logits, rtol=0, atol=tolerance)
