"""Orbax folders: the same model by every road, restored onto its devices, every fault refused by name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoints
from flax import nnx
from safetensors.numpy import load_file

import converters.orbax as orbax
from converters import convert, from_state, load
from converters.__main__ import main
from converters.formats import read_config
from jaxpaged.models import checkpoint
from jaxpaged.models.new_folder import remove_dead_partials
from jaxpaged.models.parameters import parameter_arrays
from jaxpaged.models.random_model import random_model

CASE = "gqa_tied"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def native(tmp_path) -> Path:
    convert(tiny_checkpoints.write_case(tmp_path / "hf", CASE), tmp_path / "native", show_progress=False)
    shutil.rmtree(tmp_path / "hf")
    return tmp_path / "native"


@pytest.fixture
def folder(native) -> Path:
    convert(native, native.parent / "orb", to="orbax", show_progress=False)
    return native.parent / "orb"


def assert_equal_models(left, right):
    arrays = parameter_arrays(left)
    assert arrays.keys() == parameter_arrays(right).keys()
    for name, array in parameter_arrays(right).items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("road", ["huggingface", "native"])
def test_what_is_restored_is_what_was_converted(tmp_path, road, dtype):
    values = tiny_checkpoints.hf_config(CASE) | {"torch_dtype": dtype}
    source = tiny_checkpoints.write_folder(tmp_path / "hf", values, tiny_checkpoints.weights(values), dtype=dtype)
    if road == "native":
        convert(source, tmp_path / "native", show_progress=False)
        source = tmp_path / "native"
    report = convert(source, tmp_path / "orb", to="orbax", show_progress=False)
    config, model = load(source)
    restored_config, restored = load(tmp_path / "orb")
    assert restored_config == config
    assert_equal_models(restored, model)
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(restored)))
    assert "(orbax)" in str(report)


def test_what_has_to_change_on_its_way_is_changed(tmp_path):
    values = tiny_checkpoints.hf_config(CASE) | {"torch_dtype": "float16"}
    source = tiny_checkpoints.write_folder(tmp_path / "hf", values, tiny_checkpoints.weights(values), dtype="float16")
    convert(source, tmp_path / "orb", to="orbax", show_progress=False)
    assert_equal_models(load(tmp_path / "orb")[1], load(source)[1])
    assert {path.name for path in (tmp_path / "orb").iterdir()} == {"config.json", "orbax"}


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_orbax_goes_on_to_the_other_formats(native, folder, to):
    convert(folder, native.parent / "on", to=to, show_progress=False)
    assert_equal_models(load(native.parent / "on")[1], load(native)[1])


def test_weights_can_be_restored_in_another_type(native, folder):
    config, model = load(folder, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    assert_equal_models(model, load(native, dtype="bfloat16")[1])


def test_a_caller_may_place_each_parameter(native, folder):
    placed = []

    def put(path, array):
        placed.append(path)
        return jnp.asarray(array)

    assert_equal_models(load(folder, put=put)[1], load(native)[1])
    assert placed == list(parameter_arrays(load(native)[1]))
    with pytest.raises(ValueError, match="put and sharding"):
        orbax.load(folder, put=put, sharding=lambda path: None)


SHARDED = """
import sys
import jax
import numpy as np
import converters.orbax as orbax
from jaxpaged.models import checkpoint
from jaxpaged.models.parameters import parameter_arrays
mesh = jax.sharding.Mesh(jax.devices(), ("parts",))
def sharding(path):
    cut = ("parts",) if path.endswith("kernel") else ()
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*cut))
whole = parameter_arrays(checkpoint.load(sys.argv[1])[1])
for path, array in parameter_arrays(orbax.load(sys.argv[2], sharding=sharding)[1]).items():
    assert array.sharding == sharding(path), path
    np.testing.assert_array_equal(array, whole[path], err_msg=path)
print(len(jax.devices()))
"""


def test_parameters_are_restored_straight_onto_the_devices_of_a_mesh(native, folder):
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, native, folder],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
             "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"


def test_a_state_that_a_trainer_saved_itself_is_read_too(native, folder):
    config, model = checkpoint.load(native)
    shutil.rmtree(folder / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", nnx.state(model))
    assert_equal_models(load(folder)[1], model)


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}, {"use_compression": False}])
def test_a_tree_that_a_trainer_saved_in_any_of_orbax_ways_is_read(native, folder, options):
    config, model = checkpoint.load(native)
    shutil.rmtree(folder / "orbax")
    ocp.PyTreeCheckpointer(**options).save(folder / "orbax", nnx.to_pure_dict(nnx.state(model)))
    with orbax.open_folder(folder, None) as opened:
        assert opened.plain is None
    assert_equal_models(load(folder)[1], model)


def test_a_trainers_plain_files_are_read_without_orbax(native, folder):
    """Chunks that are columns, and keys that end in `value`."""
    _, model = checkpoint.load(native)
    shutil.rmtree(folder / "orbax")
    tree = jax.tree.map(lambda leaf: leaf, nnx.state(model))
    options = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=leaf.nbytes // 2), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)) as checkpointer:
        checkpointer.save(folder / "orbax", ocp.args.PyTreeSave(tree, save_args=options))
    with orbax.open_folder(folder, None) as opened:
        assert opened.plain is not None
        assert len(list((folder / "orbax").glob("layers.0.mlp.down.kernel.value/0.?"))) == 2
    assert_equal_models(load(folder)[1], model)


def test_orbax_reads_our_folder_as_a_tree_of_arrays(native, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder / "orbax")
    assert set(tree) == {"embedding", "layers", "norm"}
    kernel = tree["layers"]["1"]["attention"]["key"]["kernel"]
    stored = load_file(native / "model.safetensors")
    np.testing.assert_array_equal(kernel, stored["layers.1.attention.key.kernel"])


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
def test_a_tensor_that_no_weight_can_be_is_written_and_named(tmp_path, native, value):
    """From a model in memory, and from a folder."""
    config, model = checkpoint.load(native)
    norm = model.norm.scale
    norm[...] = norm[...].at[1].set(value)
    with pytest.warns(UserWarning, match=r"in tensors norm\.scale, written"):
        from_state(model, config, tmp_path / "one", to="orbax", show_progress=False)
    with pytest.warns(UserWarning, match=r"in tensors norm\.scale, written"):
        convert(tmp_path / "one", tmp_path / "other", show_progress=False)
    with pytest.warns(UserWarning, match=r"in tensors norm\.scale, written"):
        convert(tmp_path / "other", tmp_path / "third", to="orbax", show_progress=False)
    assert_equal_models(load(tmp_path / "third")[1], model)


# ---- a live model ----


@pytest.mark.parametrize("to", ["native", "huggingface", "orbax"])
def test_a_live_state_becomes_a_checkpoint_of_each_format(tmp_path, native, stories260k, to):
    config = checkpoint.read_config(native)
    model = random_model(config, 3)
    report = from_state(
        nnx.state(model), config, tmp_path / "out", to=to, tokenizer=stories260k, show_progress=False
    )
    loaded_config, loaded = load(tmp_path / "out")
    # the stop tokens of the tokenizer's generation_config.json win
    assert loaded_config == checkpoint.with_stop_tokens(stories260k, config)
    assert_equal_models(loaded, model)
    assert set(report.copied_files) == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "a model in memory" in str(report)


def test_a_module_its_state_and_dictionaries_are_one(tmp_path, native):
    config, model = checkpoint.load(native)
    for index, state in enumerate((model, nnx.state(model), nnx.to_pure_dict(nnx.state(model)))):
        from_state(state, config, tmp_path / str(index), show_progress=False)
        assert_equal_models(load(tmp_path / str(index))[1], model)


def test_a_live_state_that_is_not_the_model_is_refused_by_name(tmp_path, native):
    config, model = checkpoint.load(native)

    def case(change, said):
        state = nnx.to_pure_dict(nnx.state(model))
        change(state)
        with pytest.raises(ValueError, match=said):
            from_state(state, config, tmp_path / "out", to="huggingface", show_progress=False)
        assert not (tmp_path / "out").exists()

    case(lambda s: s.pop("norm"), "state: missing parameters: norm.scale")
    case(lambda s: s.update(moments={"mu": jnp.ones(3)}), "does not have: moments.mu")
    case(lambda s: s["norm"].update(scale=jnp.ones(3)), r"state: parameter 'norm.scale' has shape \[3\]")
    case(lambda s: s["norm"].update(scale=jnp.ones(32, jnp.int32)), "'norm.scale' has element type int32")
    case(lambda s: s["norm"].update(scale=1.0), "state: 'norm.scale' is a float")
    with pytest.raises(ValueError, match="state of type list is not understood: give nnx.state"):
        from_state([1], config, tmp_path / "out", show_progress=False)
    with pytest.raises(ValueError, match="has no tokenizer files"):
        from_state(model, config, tmp_path / "out", tokenizer=tmp_path, show_progress=False)
    assert not (tmp_path / "out").exists()


# ---- faults ----


def rebuild(change):
    """Save another tree in place of the checkpoint."""

    def edit(folder: Path) -> None:
        stored = load_file(folder.parent / "native" / "model.safetensors")
        tree = {tuple(name.split(".")): array for name, array in stored.items()}
        change(tree)
        nested: dict = {}
        for keys, value in tree.items():
            node = nested
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = value
        shutil.rmtree(folder / "orbax")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "orbax", nested)

    return edit


def data_files(folder: Path) -> list[Path]:
    """The files of weights, in order of size: chunks, or those of orbax's database."""
    found = [path for path in (folder / "orbax").rglob("*") if path.name[0].isdigit() or path.parent.name == "d"]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    path = data_files(folder)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_data(folder: Path) -> None:
    for path in data_files(folder):
        path.unlink()


def edit_facts(**values):
    """Let the facts of one array say something else."""

    def edit(folder: Path) -> None:
        path = folder / "orbax" / "norm.scale" / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


NORM = ("norm", "scale")
FAULTS = {
    "checkpoint gone": (lambda folder: shutil.rmtree(folder / "orbax"), "orb/orbax: not there"),
    "tree gone": (lambda folder: (folder / "orbax" / "_METADATA").unlink(), "orb/orbax/_METADATA: not there, and"),
    "tree broken": (lambda folder: (folder / "orbax" / "_METADATA").write_text("{"), "orbax/_METADATA: not valid JSON"),
    "tree of something else": (
        lambda folder: (folder / "orbax" / "_METADATA").write_text('{"tree_metadata": {"x": 3}}'),
        "orb/orbax/_METADATA: does not describe a tree of arrays",
    ),
    "array outside": (
        lambda folder: (folder / "orbax" / "_METADATA").write_text(
            (folder / "orbax" / "_METADATA").read_text().replace('"key": "scale"', '"key": "../../native"', 1)
        ),
        "is no name of a parameter: only files of the folder itself are read",
    ),
    "branch": (
        rebuild(lambda tree: tree.update({("model", *keys): tree.pop(keys) for keys in list(tree)})),
        "the parameters are in 'model' of the tree",
    ),
    "config broken": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config gone": (lambda folder: (folder / "config.json").unlink(), "no config.json beside it"),
    "missing": (rebuild(lambda tree: tree.pop(NORM)), "missing parameters: norm.scale"),
    "extra": (rebuild(lambda tree: tree.update({("surprise",): np.ones(2, np.float32)})), "does not have: surprise"),
    "shape": (rebuild(lambda tree: tree.update({NORM: np.ones(3, np.float32)})), "'norm.scale' has shape [3]"),
    "type": (rebuild(lambda tree: tree.update({NORM: np.ones(32, np.int32)})), "'norm.scale' has element type int32"),
    "array gone": (
        lambda folder: shutil.rmtree(folder / "orbax" / "norm.scale"), "parameter 'norm.scale' is not there: copy"
    ),
    "facts broken": (
        lambda folder: (folder / "orbax" / "norm.scale" / ".zarray").write_text("{"), ".zarray: not valid JSON"
    ),
    "other shape": (edit_facts(shape=[10**12], chunks=[10**12]), "'norm.scale' has shape [1000000000000]"),
    "endless chunks": (edit_facts(chunks=[10**12]), "'norm.scale' is in chunks of [1000000000000], far larger"),
    "twice": (
        rebuild(lambda tree: tree.update({NORM: {"value": tree[NORM]}, ("norm.scale",): tree[NORM]})),
        "'norm.scale' is there twice",
    ),
    "scalar": (rebuild(lambda tree: tree.update({NORM: 1.5})), "norm.scale"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name_and_leaves_nothing_behind(folder, capsys, fault):
    damage, named = FAULTS[fault]
    damage(folder)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  (the text is checked below)
        load(folder)
    assert named in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert main([str(folder), str(folder.parent / "out"), "--quiet"]) == 1
    printed = capsys.readouterr()
    assert named in printed.err
    assert {path.name for path in folder.parent.iterdir()} == {"native", "orb"}


@pytest.mark.parametrize("damage", [no_data, truncate])
def test_a_chunk_that_is_not_whole_is_refused_by_name_before_any_is_read(folder, damage):
    size = data_files(folder)[-1].stat().st_size
    damage(folder)
    said = "is not there" if damage is no_data else f"has {size // 2} bytes and must have {size}"
    with pytest.raises(ValueError, match=f"parameter 'embedding.table' .*embedding.table/0.0: {said}.: copy or"):
        read_config(folder, None)


@pytest.mark.parametrize("damage", [no_data, truncate])
def test_a_trainers_damaged_data_is_refused_by_name_and_leaves_nothing_behind(native, folder, damage):
    rebuild(lambda tree: None)(folder)
    damage(folder)
    # in a process of its own: where reading fails, orbax leaves coroutines that complain when they are collected
    done = subprocess.run(
        [sys.executable, "-m", "converters", folder, folder.parent / "out", "--quiet"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    # one line, without complaints of threads whose event loop was closed under them
    said = f"error: {re.escape(str(folder / 'orbax'))}: .*cannot be restored.*\n"
    assert re.fullmatch(said, done.stderr), done.stderr
    assert done.stdout == ""
    assert {path.name for path in folder.parent.iterdir()} == {"native", "orb"}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["native", "orb"])
def test_code_of_a_checkpoint_is_refused_in_our_own_formats_too(native, folder, capsys, kind, file):
    path = native.parent / kind / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    said = f"{kind}/{file}: auto_map asks for code of the checkpoint"
    with pytest.raises(ValueError, match=said):
        load(path.parent)
    assert main([str(path.parent), str(native.parent / "out"), "--to", "huggingface", "--quiet"]) == 1
    assert said in capsys.readouterr().err
    assert {entry.name for entry in native.parent.iterdir()} == {"native", "orb"}


INTERRUPTED = """
import os, signal, sys, threading
from converters import orbax
from converters.__main__ import main
library, interrupted = orbax.library, []
class Interrupting:
    # Ctrl-C in the middle of what orbax.save does
    def __init__(self, ocp):
        self._ocp = ocp
    def __getattr__(self, name):
        if name == "args" and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return getattr(self._ocp, name)
orbax.library = lambda: Interrupting(library())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main([sys.argv[1], sys.argv[2], "--to", "orbax", "--quiet"]))
"""


def test_an_interrupt_while_orbax_saves_waits_for_its_threads_and_leaves_nothing(native):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, native, native.parent / "out"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    told, said = done.stderr.strip().split("\n")
    assert told.startswith("interrupted: Orbax ends what it writes"), done.stderr
    assert said == "error: interrupted, nothing was written"
    assert [path.name for path in native.parent.iterdir()] == ["native"]


FULL_DISK = """
import resource, signal, sys
from converters.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # no file may be longer
sys.exit(main([sys.argv[1], sys.argv[2], "--to", "orbax", "--quiet"]))
"""


def test_a_disk_that_takes_no_more_while_orbax_saves_is_told_in_a_line_and_leaves_nothing(native):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, native, native.parent / "out"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    out = re.escape(str(native.parent / "out"))
    said = f"error: {out}: cannot be written \\(Orbax says: .*\\), and nothing was: .*\n"
    assert re.fullmatch(said, done.stderr), done.stderr
    assert [path.name for path in native.parent.iterdir()] == ["native"]


def test_a_save_that_fails_names_the_target_and_what_orbax_says(native, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [tensorstore_spec='{}']")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    assert main([str(native), str(native.parent / "out"), "--to", "orbax", "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {native.parent / 'out'}: cannot be written (Orbax says: RESOURCE_EXHAUSTED")
    assert "tensorstore_spec" not in said
    assert [path.name for path in native.parent.iterdir()] == ["native"]


def test_a_bare_orbax_checkpoint_is_told_what_it_lacks(folder):
    with pytest.raises(ValueError, match="an Orbax checkpoint, but no config.json beside it"):
        load(folder / "orbax")


def test_only_a_folder_of_ours_is_overwritten(native, folder):
    with pytest.raises(ValueError, match="exists"):
        convert(native, folder, to="orbax", show_progress=False)
    convert(native, folder, to="orbax", overwrite=True, show_progress=False)
    assert_equal_models(load(folder)[1], load(native)[1])
    (folder / "thesis").mkdir()
    with pytest.raises(ValueError, match="not an Orbax folder of ours"):
        convert(native, folder, to="orbax", overwrite=True, show_progress=False)
    assert (folder / "thesis").is_dir()
    assert {path.name for path in folder.parent.iterdir()} == {"native", "orb"}


KILLED = """
import os, signal, sys
import converters.orbax as orbax
from converters import convert
from jaxpaged.models import checkpoint
checkpoint.write_facts = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], to="orbax", show_progress=False)
"""


def test_what_a_killed_conversion_left_is_removed_by_the_next_one(native):
    target = native.parent / "orb"
    killed = subprocess.run([sys.executable, "-c", KILLED, native, target], cwd=ROOT, check=False)
    assert killed.returncode == -9
    (left,) = native.parent.glob(".orb.partial-*")
    assert (left / "orbax").is_dir()
    report = convert(native, target, to="orbax", show_progress=False)
    assert report.removed_folders == (left,)
    assert {path.name for path in native.parent.iterdir()} == {"native", "orb"}
    assert remove_dead_partials(target) == ()


def test_the_facts_stand_in_config_json(native, folder):
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("format") == "jaxpaged-orbax"
    ours = json.loads((native / "config.json").read_text())
    assert ours.pop("format") == "jaxpaged"
    assert values == ours
