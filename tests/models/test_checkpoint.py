"""The native format: bit-exact, complete or absent, each parameter filled exactly once."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.parameters import fill, parameter_arrays, parameter_specs
from jaxpaged.models.random_model import random_model
from jaxpaged.models.registry import build_abstract
from jaxpaged.models.tensor_files import is_unusable

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=40, model_dim=16, mlp_dim=24, num_layers=2, num_q_heads=4,
    num_kv_heads=2, head_dim=4, max_position_embeddings=32, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=False,
    attention_bias=True, dtype="float32",
)


@pytest.fixture
def model():
    return random_model(CONFIG, 0)


def assert_equal_models(left, right):
    arrays = parameter_arrays(left)
    assert arrays.keys() == parameter_arrays(right).keys()
    for name, array in parameter_arrays(right).items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 4096])
def test_a_model_loads_as_it_was_saved_bit_by_bit(tmp_path, dtype, max_shard_bytes):
    config = checkpoint.config_with_dtype(CONFIG, dtype)
    model = random_model(config, 0)
    checkpoint.save(tmp_path / "native", config, model, max_shard_bytes=max_shard_bytes)
    num_files = len(list((tmp_path / "native").glob("*.safetensors")))
    assert (num_files > 1) == (max_shard_bytes == 4096)
    loaded_config, loaded = checkpoint.load(tmp_path / "native")
    assert loaded_config == config
    assert_equal_models(loaded, model)
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(loaded)))


def test_files_are_plain_safetensors_by_our_paths(tmp_path, model):
    checkpoint.save(tmp_path / "native", CONFIG, model)
    tensors = load_file(tmp_path / "native" / "model.safetensors")
    assert set(tensors) == set(parameter_specs(model))
    np.testing.assert_array_equal(
        tensors["layers.1.attention.query.kernel"], model.layers[1].attention.query.kernel[...]
    )


def test_weights_can_be_loaded_in_another_type(tmp_path, model):
    checkpoint.save(tmp_path / "native", CONFIG, model)
    config, loaded = checkpoint.load(tmp_path / "native", dtype="bfloat16")
    assert config.dtype == "bfloat16"
    np.testing.assert_array_equal(loaded.norm.scale[...], model.norm.scale[...].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="dtype='float16'"):
        checkpoint.load(tmp_path / "native", dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_tensor_that_no_weight_can_be_is_written_as_it_is_and_named(tmp_path, dtype, value):
    config = checkpoint.config_with_dtype(CONFIG, dtype)
    model = random_model(config, 0)
    kernel = model.layers[1].attention.query.kernel
    kernel[...] = kernel[...].at[0, 1].set(value)
    with pytest.warns(UserWarning, match=r"NaN, infinite or .* in tensors layers\.1\.attention\.query\.kernel"):
        checkpoint.save(tmp_path / "native", config, model)
    written = checkpoint.load(tmp_path / "native")[1].layers[1].attention.query.kernel
    assert np.asarray(written[...]).tobytes() == np.asarray(kernel[...]).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", checkpoint.NUMPY_DTYPES["bfloat16"]])
def test_large_numbers_are_usable_and_what_is_beyond_is_found_wherever_it_is(dtype):
    array = np.full((3, 700_001), np.finfo(np.float16).max, dtype)  # two chunks
    array[0, 0] = 0
    assert not is_unusable(array)
    assert not is_unusable(array[:, :0])
    if dtype != "float16":
        array[0, 0] = -(2.0**63)
    assert not is_unusable(array)
    beyond = () if dtype == "float16" else (2.0**64, -1e30)
    for value in (np.nan, np.inf, -np.inf, *beyond):
        for at in (0, -1):
            broken = array.copy()
            broken[at, at] = value
            assert is_unusable(broken)


def test_tokenizer_files_travel_along(tmp_path, model):
    (tmp_path / "t.json").write_text("{}")
    (tmp_path / "g.json").write_text('{"temperature": 0.5}')
    companions = {"tokenizer.json": tmp_path / "t.json", "generation_config.json": tmp_path / "g.json"}
    checkpoint.save(tmp_path / "native", CONFIG, model, companions=companions)
    assert (tmp_path / "native" / "tokenizer.json").read_text() == "{}"
    assert checkpoint.read_generation_defaults(tmp_path / "native").temperature == 0.5
    assert checkpoint.is_native(tmp_path / "native")
    assert not checkpoint.is_native(tmp_path)


def test_the_stop_tokens_of_the_generation_config_win_in_a_native_folder_too(tmp_path, model):
    checkpoint.save(tmp_path, CONFIG, model)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert checkpoint.load(tmp_path)[0].eos_token_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text("{}")
    assert checkpoint.load(tmp_path)[0].eos_token_ids == CONFIG.eos_token_ids


@pytest.mark.parametrize("token_id", ["x", 99999, -1, True, 1.5, [1, "x"]])
def test_a_stop_token_that_is_none_is_refused_by_file_field_and_value(tmp_path, model, token_id):
    checkpoint.save(tmp_path, CONFIG, model)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": token_id}))
    bad = token_id[1] if isinstance(token_id, list) else token_id
    told = f"{path}: eos_token_id={bad!r} must be a token id from 0 to {CONFIG.vocab_size - 1}"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}.*take the field out"):
        checkpoint.read_config(tmp_path)


def broken(folder, change):
    """Rewrite the weights of a native checkpoint by `change`, which edits the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_extra_and_misshapen_parameters_are_refused_by_name(tmp_path, model):
    def case(name, change, said):
        folder = tmp_path / name
        checkpoint.save(folder, CONFIG, model)
        broken(folder, change)
        with pytest.raises(ValueError, match=said):
            checkpoint.load(folder)

    case("missing", lambda t: t.pop("norm.scale"), "missing parameters: norm.scale")
    case("extra", lambda t: t.update({"layers.2.mlp.up.kernel": np.ones(3, np.float32)}), "layers.2.mlp.up.kernel")
    case("shape", lambda t: t.update({"norm.scale": np.ones(3, np.float32)}), r"'norm.scale' has shape \[3\]")
    case("type", lambda t: t.update({"norm.scale": np.ones(16, np.int8)}), "'norm.scale' has element type I8")


def test_a_folder_that_is_not_native_says_how_to_convert_it(stories260k):
    with pytest.raises(ValueError, match="python -m converters"):
        checkpoint.load(stories260k)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": "jaxpaged", "format_version": 1}', "format_version=1"),
        ('{"format": "jaxpaged", "format_version": 2}', "missing fields"),
    ],
)
def test_a_broken_config_is_refused_by_file(tmp_path, model, text, said):
    checkpoint.save(tmp_path / "native", CONFIG, model)
    (tmp_path / "native" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"config.json: .*{said}"):
        checkpoint.load(tmp_path / "native")


def test_nothing_is_left_of_a_save_that_fails_half_way(tmp_path, model):
    arrays = parameter_arrays(model)

    def read(name):
        if name == "norm.scale":
            raise OSError("disk on fire")
        return np.asarray(arrays[name])

    with pytest.raises(OSError, match="fire"):
        checkpoint.write(tmp_path / "native", CONFIG, read)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_checkpoint_whole(tmp_path, model):
    checkpoint.save(tmp_path / "native", CONFIG, model)

    def read(name):
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="fire"):
        checkpoint.write(tmp_path / "native", CONFIG, read, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    assert_equal_models(checkpoint.load(tmp_path / "native")[1], model)


def test_only_a_native_checkpoint_is_overwritten_and_only_when_asked(tmp_path, model):
    folder = tmp_path / "native"
    checkpoint.save(folder, CONFIG, model)
    with pytest.raises(ValueError, match="exists"):
        checkpoint.save(folder, CONFIG, model)
    other = random_model(CONFIG, 1)
    checkpoint.save(folder, CONFIG, other, overwrite=True)
    assert_equal_models(checkpoint.load(folder)[1], other)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a native checkpoint"):
        checkpoint.save(folder, CONFIG, model, overwrite=True)
    assert (folder / "thesis.txt").exists()


def test_an_empty_folder_is_a_fine_target(tmp_path, model):
    (tmp_path / "native").mkdir()
    checkpoint.save(tmp_path / "native", CONFIG, model)
    assert checkpoint.is_native(tmp_path / "native")


def test_a_checkpoint_too_large_for_the_disk_is_refused_before_writing(tmp_path, model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ValueError, match="its disk has 10 free: make room"):
        checkpoint.save(tmp_path / "native", CONFIG, model)
    assert list(tmp_path.iterdir()) == []


def test_each_parameter_is_filled_exactly_once(model):
    arrays = list(parameter_arrays(model).items())
    abstract = build_abstract(CONFIG)
    assert_equal_models(fill(abstract, arrays), model)
    with pytest.raises(ValueError, match="is given twice"):
        fill(abstract, [*arrays, arrays[0]])
    with pytest.raises(ValueError, match=f"missing parameters: {arrays[-1][0]}"):
        fill(abstract, arrays[:-1])
    with pytest.raises(ValueError, match="'weird' is not in the model"):
        fill(abstract, [("weird", arrays[0][1]), *arrays])
    with pytest.raises(ValueError, match=r"the model needs float32\["):
        fill(abstract, [(arrays[0][0], arrays[0][1].astype(jnp.bfloat16)), *arrays[1:]])


def test_arrays_are_placed_one_by_one(model):
    events = []

    def draw():
        for name, array in parameter_arrays(model).items():
            events.append(("drawn", name))
            yield name, array

    def put(name, array):
        events.append(("placed", name))
        return jnp.asarray(array)

    fill(build_abstract(CONFIG), draw(), put=put)
    assert [kind for kind, _ in events] == ["drawn", "placed"] * len(parameter_specs(model))


def test_an_unknown_architecture_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="architecture='Gpt' is not known: it must be one of .*'LlamaForCausalLM'"):
        build_abstract(ModelConfig.from_json(CONFIG.as_json() | {"architecture": "Gpt"}))


def test_a_model_of_eight_billion_parameters_is_built_abstractly():
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128256, model_dim=4096, mlp_dim=14336, num_layers=32,
        num_q_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=131072, norm_eps=1e-5, rope_theta=5e5,
        tie_embeddings=False, dtype="bfloat16",
    )
    specs = parameter_specs(build_abstract(config))
    assert sum(int(np.prod(spec.shape)) for spec in specs.values()) == 8_030_261_248  # as published
    assert {spec.dtype.name for spec in specs.values()} == {"bfloat16"}
    assert json.dumps(config.as_json())
