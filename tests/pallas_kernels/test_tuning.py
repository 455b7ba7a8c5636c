"""Tuned sizes: who is looked up for whom, what a broken file costs, and that an entry reaches the kernels."""

import json
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.config import EngineConfig
from jaxpaged.models.config import ModelConfig
from jaxpaged.runner.shapes import resolve_shapes
from pallas_kernels import KVLayout, lowering_for, make_metadata, paged_attention
from pallas_kernels.paged_attention import mosaic_gpu, mosaic_tpu, triton_gpu, tuning
from pallas_kernels.paged_attention.tuning import (
    LAUNCHES,
    TILES,
    Entry,
    ShapeClass,
    Sizes,
    nearest,
    path_of,
    read_entries,
    tuned_sizes,
    write_entries,
)

ROOT = Path(__file__).resolve().parents[2]
H200, V6E = "NVIDIA H200", "TPU v6 lite"
SHAPE = {"implementation": "mosaic_gpu", "dtype": "bfloat16", "head_dim": 128, "block_size": 16}
HEADS = {"num_kv_heads": 8, "group": 4}


def shape_class(**changes: Any) -> ShapeClass:
    return ShapeClass(**{**SHAPE, **HEADS, **changes})


def entry(launch: dict[str, int] | None = None, tiles: dict[str, int] | None = None, **changes: Any) -> Entry:
    return Entry(shape_class(**changes), Sizes(launch=launch or {}, tiles=tiles or {}), {})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tuned files of a test's own; what was read before is forgotten, before and after."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._entries_or_warning.cache_clear()
    yield tmp_path
    tuning._entries_or_warning.cache_clear()


def tune(kind: str, *entries: Entry) -> None:
    write_entries(path_of(kind), kind, entries)


# LOOKING UP


def test_the_nearest_heads_count_and_all_else_must_be_equal() -> None:
    entries = (
        entry({"decode_programs": 1}, num_kv_heads=8, group=4),
        entry({"decode_programs": 2}, num_kv_heads=8, group=8),
        entry({"decode_programs": 3}, num_kv_heads=1, group=1),
        entry({"decode_programs": 4}, num_kv_heads=8, group=4, block_size=64),
    )

    def found(**changes: Any) -> Any:
        return nearest(entries, shape_class(**changes)).launch.get("decode_programs")

    assert found() == 1
    assert found(group=8) == 2
    assert found(group=7) == 2, "0.2 octaves from 8, 0.8 from 4"
    assert found(num_kv_heads=2, group=1) == 3, "one octave from 1 x 1, four from 8 x 4"
    assert found(num_kv_heads=4, group=4) == 1
    assert found(block_size=64, num_kv_heads=64) == 4, "the only one of its block size"
    for name, other in (("dtype", "float32"), ("head_dim", 64), ("block_size", 32), ("implementation", "triton_gpu")):
        assert nearest(entries, shape_class(**{name: other})) == Sizes(), name


def test_it_is_looked_up_for_the_device_that_is_traced_for() -> None:
    tune(H200, entry({"decode_programs": 7}))
    assert tuned_sizes(shape_class()) == Sizes(), "of this machine nothing is known"
    with lowering_for("cuda", H200):
        assert tuned_sizes(shape_class()).launch == {"decode_programs": 7}
    with lowering_for("cuda", "NVIDIA H100 80GB HBM3"):
        assert tuned_sizes(shape_class()) == Sizes()


def test_what_is_written_is_read_and_other_shapes_stay(folder: Path) -> None:
    tune(H200, entry({"decode_programs": 7}), entry({"decode_programs": 8}, group=1))
    tune(H200, entry({"min_item_chunks": 2}, {"tile_size": 128}))
    path = path_of(H200)
    assert path == folder / "NVIDIA-H200.json"
    assert json.loads(path.read_text())["device"] == H200
    assert read_entries(path) == (
        entry({"min_item_chunks": 2}, {"tile_size": 128}), entry({"decode_programs": 8}, group=1),
    )  # fmt: skip
    assert read_entries(folder / "none.json") == ()


# BROKEN FILES

GOOD = {**SHAPE, **HEADS, "launch": {"decode_programs": 7}, "tiles": {"tile_size": 64}, "measured": {"jax": "0"}}
BROKEN = {
    "cut short": ('{"entries": [', "cannot be read as JSON"),
    "no object": ("[]", "it must be"),
    "no list of entries": ('{"entries": {}}', "it must be"),
    "an entry that is none": ([3], "entry 0 must be an object with implementation"),
    "a field too few": ([{key: GOOD[key] for key in GOOD if key != "group"}], "entry 0 must be an object"),
    "a field too many": ([GOOD | {"speed": 3}], "entry 0 must be an object"),
    "a name for a number": ([GOOD | {"group": "4"}], "group='4' must be a whole number"),
    "a number for a name": ([GOOD | {"dtype": 4}], "dtype=4 must be a name"),
    "no heads": ([GOOD | {"num_kv_heads": 0}], "num_kv_heads=0 must be"),
    "an unknown implementation": ([GOOD | {"implementation": "xla"}], "'xla' has no sizes: use one of mosaic_gpu"),
    "a size of another's": ([GOOD | {"launch": {"decode_warps": 4}}], "'decode_warps' is unknown: mosaic_gpu has"),
    "no size": ([GOOD | {"launch": {"decode_programs": 0}}], "decode_programs=0 must be a whole number from 1"),
    "half a size": ([GOOD | {"launch": {"decode_programs": 1.5}}], "decode_programs=1.5 must be"),
    "truth for a size": ([GOOD | {"launch": {"decode_programs": True}}], "decode_programs=True must be"),
    "a list of sizes": ([GOOD | {"launch": []}], r"launch must be an object, not \[\]"),
    "no power of two": ([GOOD | {"tiles": {"tile_size": 48}}], "tile_size=48 must be a power of two"),
    "chunks of half a block": ([GOOD | {"tiles": {"key_chunk_tokens": 8}}], "must be a multiple of the block size 16"),
    "chunks too short": ([GOOD | {"launch": {"decode_chunk_tokens": 32}}], "must be 64 or 128"),
    "chunks that cut blocks": ([GOOD | {"block_size": 48, "launch": {"decode_chunk_tokens": 64}}], "of the block size"),
    "a shape twice": ([GOOD, GOOD | {"launch": {}}], "entry 1 is of the same shape as an earlier one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_warning_and_costs_speed_only(name: str) -> None:
    content, reason = BROKEN[name]
    path = path_of(H200)
    path.write_text(content if isinstance(content, str) else json.dumps({"device": H200, "entries": content}))
    with pytest.raises(ValueError, match=reason):
        read_entries(path)
    with pytest.raises(ValueError, match=reason):
        tune(H200, entry(group=2))
    with lowering_for("cuda", H200):
        with pytest.warns(UserWarning, match=f"(?s)NVIDIA-H200.json are not used.*{reason}.*bench.kernels tune"):
            assert tuned_sizes(shape_class()) == Sizes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuned_sizes(shape_class()) == Sizes(), "it is said once"


def test_a_good_file_has_none_of_these_faults() -> None:
    path_of(H200).write_text(json.dumps({"device": H200, "entries": [GOOD]}))
    (found,) = read_entries(path_of(H200))
    assert found.as_json() == GOOD


def test_the_package_brings_its_files_along() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pallas_kernels"]
    shipped = Path("paged_attention", "tuned", "NVIDIA-H200.json")
    assert any(shipped.match(pattern.removeprefix("**/")) for pattern in patterns if pattern.startswith("**/"))
    for path in sorted((ROOT / "pallas_kernels" / "paged_attention" / "tuned").glob("*.json")):
        assert read_entries(path), path.name
        assert path.name == path_of(json.loads(path.read_text())["device"]).name


# WHAT AN ENTRY DOES

LAUNCH_CLASSES = {"mosaic_gpu": mosaic_gpu.Launch, "triton_gpu": triton_gpu.Launch, "mosaic_tpu": mosaic_tpu.Launch}


def test_every_launch_size_is_a_field_of_its_implementation_s_launch() -> None:
    assert set(LAUNCHES) == set(LAUNCH_CLASSES)
    for name, sizes in LAUNCHES.items():
        assert set(sizes) <= set(LAUNCH_CLASSES[name].__dataclass_fields__)
        assert not set(sizes) & set(TILES)


def lowered(platform: str, kind: str, implementation: str) -> str:
    """The text of a step of decodes and tiles, lowered for a device that is not here."""
    with lowering_for(platform, kind), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        layout = KVLayout(
            num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16", implementation=implementation
        )
        metadata = make_metadata(
            block_tables=np.zeros((0, 64), np.int32), context_lens=[], query_lens=[], block_size=16, num_tokens=64,
            num_seqs=4,
        )  # fmt: skip
        query, key = (jax.ShapeDtypeStruct((64, count, 128), jnp.bfloat16) for count in (32, 8))
        # a function of its own for each call, or jit gives what it traced before
        program = jax.jit(lambda *arrays: paged_attention(*arrays, scale=0.1, implementation=implementation))
        traced = program.trace(query, key, key, layout.shapes(32), metadata)
        return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()


def test_an_entry_changes_the_program_that_is_made_for_an_h200() -> None:
    before = lowered("cuda", H200, "mosaic_gpu")
    # items of 4 sequences and of 1056 / 8 or 64 / 8 programs a head: outputs of 8 heads, 8 rows of 128
    assert "tensor<136x8x8x128xf32>" in before
    tune(H200, entry({"decode_programs": 64}))
    tuning._entries_or_warning.cache_clear()
    after = lowered("cuda", H200, "mosaic_gpu")
    assert "tensor<12x8x8x128xf32>" in after
    assert "tensor<136x8x8x128xf32>" not in after


class Received(Exception):
    """A kernel was reached, with its launch."""


@pytest.mark.parametrize(
    ("implementation", "platform", "kind", "launch"),
    [
        ("mosaic_gpu", "gpu", H200, {"decode_chunk_tokens": 128, "programs_per_multiprocessor": 1}),
        ("triton_gpu", "gpu", H200, {"decode_programs": 9, "decode_turn_tokens": 32, "decode_warps": 8}),
    ],
)
def test_an_entry_is_the_launch_that_kernels_get(
    implementation: str, platform: str, kind: str, launch: dict[str, int]
) -> None:
    tune(kind, entry(launch, implementation=implementation))
    module = {"mosaic_gpu": mosaic_gpu, "triton_gpu": triton_gpu}[implementation]
    reached = "_attend_decodes" if implementation == "mosaic_gpu" else "attend_decodes"
    with mock.patch.object(module, reached, side_effect=Received) as kernel, pytest.raises(Received):
        lowered(platform, kind, implementation)
    shape, given = kernel.call_args.args[:2]
    assert {name: getattr(given, name) for name in launch} == launch
    if implementation == "mosaic_gpu":
        # 64 KiB of keys and values a stage, of the 227 KiB of a whole multiprocessor
        assert (shape.chunk, shape.stages) == (128, 3)
    else:
        assert shape.chunk == 32


def test_an_entry_is_the_chunk_of_a_tpu_s_decodes() -> None:
    tune(V6E, entry({"max_decode_chunk_tokens": 64}, implementation="mosaic_tpu"))
    for kind, expected in (("TPU v5 lite", 512), (V6E, 64)):  # 2 MiB are 512 tokens of 8 heads of 128
        with mock.patch.object(mosaic_tpu, "_attend_decodes", side_effect=Received) as kernel, pytest.raises(Received):
            lowered("tpu", kind, "mosaic_tpu")
        assert kernel.call_args.args[3].chunk_tokens == expected


def test_no_more_stages_of_a_decode_than_an_entry_says() -> None:
    tune(H200, entry({"programs_per_multiprocessor": 1, "max_decode_stages": 6}))
    with mock.patch.object(mosaic_gpu, "_attend_decodes", side_effect=Received) as kernel, pytest.raises(Received):
        lowered("gpu", H200, "mosaic_gpu")
    assert kernel.call_args.args[0].stages == 6, "32 KiB each; 4 are the default"


def test_decodes_are_cut_for_the_multiprocessors_of_the_device() -> None:
    with lowering_for("cuda", "NVIDIA H20", 78):
        assert mosaic_gpu.launch_for(shape_class()) == mosaic_gpu.Launch(num_multiprocessors=78, decode_programs=624)
    with lowering_for("cuda", H200):
        assert mosaic_gpu.launch_for(shape_class()) == mosaic_gpu.Launch(), "not told: those of an H200"


def test_an_entry_sets_the_tiles_of_a_runner_but_not_of_batch_invariant_mode() -> None:
    tune(H200, entry(tiles={"tile_size": 128, "key_chunk_tokens": 256}))
    model = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128, model_dim=4096, mlp_dim=64, num_layers=1, num_q_heads=32,
        num_kv_heads=8, head_dim=128, max_position_embeddings=512, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=False,
        dtype="bfloat16",
    )  # fmt: skip

    def tiles(**options: Any) -> tuple[int, int]:
        attending = resolve_shapes(EngineConfig(**options), model, "bfloat16").attending
        return attending.tile_size, attending.key_chunk_tokens

    here = tiles()
    with lowering_for("gpu", H200):
        assert tiles() == (128, 256)
        assert tiles(block_size=32) == here, "nothing is known for such blocks"
        assert tiles(batch_invariant=True) == (8, 128)
