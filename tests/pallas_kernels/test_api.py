"""The doors of the op: what does not fit is refused with the value and the remedy."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TARGETS, Target

import pallas_kernels
from pallas_kernels import (
    IMPLEMENTATIONS,
    AttentionCase,
    KVLayout,
    explain,
    lowering_for,
    make_metadata,
    paged_attention,
    pick,
    target_compute_capability,
    target_platform,
)
from pallas_kernels.paged_attention import native_cpu
from pallas_kernels.paged_attention.api import find

LAYOUT = KVLayout(num_kv_heads=2, head_dim=4, block_size=8, dtype="float32")
CASE = AttentionCase(platform="cpu", num_kv_heads=2, head_dim=4, block_size=8, dtype="float32")
METADATA = make_metadata(
    block_tables=np.array([[1]], np.int32), context_lens=[3], query_lens=[3], block_size=8, key_chunk_tokens=8
)
GOOD = {
    "query": jnp.zeros((3, 4, 4)),
    "key": jnp.zeros((3, 2, 4)),
    "value": jnp.zeros((3, 2, 4)),
    "metadata": METADATA,
    "scale": 0.5,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": jnp.zeros((3, 4))}, "query is float32\\(3, 4\\): it must be \\[tokens q_heads head_dim\\]"),
        ({"query": [[1.0]]}, "query is a list: it must be an array"),
        ({"query": jnp.zeros((3, 4, 4), jnp.int32)}, "query is int32.*of floating-point numbers"),
        ({"query": jnp.zeros((3, 0, 4))}, "a number of query heads that is a multiple"),
        ({"key": jnp.zeros((3, 2, 4), jnp.int8)}, "key is int8"),
        ({"value": jnp.zeros((3, 2, 4), bool)}, "value is bool"),
        ({"query": jnp.zeros((3, 3, 4))}, "multiple of the number of key-value heads"),
        ({"query": jnp.zeros((4, 4, 4))}, "equal tokens"),
        ({"value": jnp.zeros((3, 1, 4))}, "key \\(3, 2, 4\\) and value \\(3, 1, 4\\) must have equal shapes"),
        ({"sinks": jnp.zeros(2)}, "one entry per query head"),
        ({"sinks": [0.0] * 4}, "sinks is a list"),
        ({"sinks": jnp.zeros(4, jnp.int32)}, "sinks is int32"),
        ({"window": 2.5}, "window=2.5 must be a whole number"),
        ({"window": "4"}, "window='4' must be a whole number"),
        ({"soft_cap": "30"}, "soft_cap='30' must be a finite number above 0"),
        ({"soft_cap": float("inf")}, "soft_cap=inf must be a finite number above 0"),
        ({"scale": None}, "scale=None must be a finite number"),
        ({"scale": True}, "scale=True must be a finite number"),
        ({"metadata": {}}, "metadata is a dict: make_metadata makes an AttentionMetadata"),
        ({"metadata": replace(METADATA, num_decodes=0)}, "metadata.num_decodes is int: it must be int32\\(\\)"),
        ({"metadata": replace(METADATA, context_lens=[3])}, "metadata.context_lens is list: it must be int32"),
        ({"kv": "cache"}, "kv 'cache' is no layer cache of"),
        ({"window": 0}, "window=0 must be .* 1 or more"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be a finite number above 0"),
        ({"scale": float("nan")}, "scale=nan must be a finite number"),
        ({"kv": jnp.zeros((2, 8, 4))}, "make it with KVLayout"),
        ({"kv": KVLayout(num_kv_heads=2, head_dim=2, block_size=8, dtype="float32").init(2)}, "make it with KVLayout"),
        (
            {"implementation": "cuda"},
            "'cuda' is unknown: use one of 'mosaic_tpu', 'mosaic_gpu', 'triton_gpu', 'native_cpu', 'xla', 'reference'",
        ),
        ({"implementation": "reference"}, "is no layer cache of reference"),
        ({"implementation": "mosaic_gpu"}, "implementation='mosaic_gpu'.*; mosaic_gpu runs on gpu, cuda, not on cpu"),
        ({"metadata": replace(METADATA, key_chunk_tokens=12)}, "multiple of the block size 8"),
        ({"metadata": replace(METADATA, tile_size=0)}, "metadata.tile_size=0 must be"),
        ({"metadata": replace(METADATA, slot_mapping=jnp.zeros(4, jnp.int32))}, "slot_mapping is int32\\(4,\\)"),
        ({"metadata": replace(METADATA, context_lens=jnp.zeros(1))}, "context_lens is float32"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(change: dict, message: str) -> None:
    arguments = {**GOOD, "kv": LAYOUT.init(2), **change}
    query, key, value, kv, metadata = (arguments.pop(name) for name in ("query", "key", "value", "kv", "metadata"))
    with pytest.raises(ValueError, match=message):
        paged_attention(query, key, value, kv, metadata, **arguments)


def test_who_names_no_implementation_is_sent_to_none_of_another_platform() -> None:
    with pytest.raises(ValueError, match=r"KVLayout\(num_kv_heads=2, head_dim=4, ...\)\.init") as error:
        paged_attention(*(GOOD[name] for name in ("query", "key", "value")), (), METADATA, scale=0.5)
    assert "implementation=" not in str(error.value)


@pytest.mark.parametrize("make", [KVLayout, AttentionCase])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be a whole number, 1 or more"),
        ({"num_kv_heads": "2"}, "num_kv_heads='2' must be a whole number"),
        ({"head_dim": 64.5}, "head_dim=64.5 must be a whole number"),
        ({"block_size": True}, "block_size=True must be a whole number"),
        ({"block_size": -8}, "block_size=-8 must be a whole number"),
        ({"dtype": "bf16"}, "dtype='bf16' is no dtype: float32, bfloat16"),
        ({"dtype": None}, "dtype=None is no dtype"),
    ],
)
def test_shapes_that_are_none_are_refused_by_name(make: type, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"num_kv_heads": 2, "head_dim": 4, "block_size": 8, "dtype": "float32", **change})


@pytest.mark.parametrize("num_blocks", [0, -1, 2.5, "8", True])
def test_a_cache_has_one_block_or_more(num_blocks: object) -> None:
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks!r} must be a whole number, 1 or more"):
        LAYOUT.init(num_blocks)


def test_a_case_has_whole_groups_of_query_heads() -> None:
    with pytest.raises(ValueError, match="num_q_heads=7 must be a multiple of num_kv_heads=2"):
        replace(CASE, num_q_heads=7)


BATCH = {"block_tables": np.array([[3, 5], [1, 0]]), "context_lens": [18, 5], "query_lens": [1, 5], "block_size": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_tables": np.array([3, 5])}, r"block_tables is int64\(2,\): it must be whole numbers \[seqs"),
        ({"block_tables": np.array([[3.0, 5.0], [1.0, 0.0]])}, "block_tables is float64"),
        ({"block_tables": np.array([[3, 5]])}, "2 sequences and 1 rows of block_tables do not fit"),
        ({"block_tables": np.zeros((5, 2), int)}, "5 rows of block_tables do not fit a bucket of 6 tokens and 2"),
        ({"context_lens": [18]}, "1 context_lens and 2 query_lens"),
        ({"context_lens": [18.5, 5]}, r"context_lens\[0\]=18.5 must be a whole number"),
        ({"context_lens": [18, -5]}, r"context_lens\[1\]=-5 must be a whole number, 1 or more"),
        ({"context_lens": [40, 5]}, "sequence 0 has 1 new of 40 tokens: .* <= 32"),
        ({"query_lens": [1, 0]}, r"query_lens\[1\]=0 must be"),
        ({"query_lens": [1, 6]}, "sequence 1 has 6 new of 5 tokens"),
        ({"block_size": 0}, "block_size=0 must be"),
        ({"block_size": 16.0}, "block_size=16.0 must be"),
        ({"num_tokens": 3}, "6 tokens of 2 sequences and 2 rows .* a bucket of 3 tokens"),
        ({"num_tokens": 6.5}, "num_tokens=6.5 must be"),
        ({"num_seqs": 1}, "do not fit a bucket of 6 tokens and 1 sequences"),
        ({"tile_size": 0}, "tile_size=0 must be"),
        ({"tile_size": -4}, "tile_size=-4 must be"),
        ({"key_chunk_tokens": 24}, "key_chunk_tokens=24 must be a multiple of block_size=16"),
    ],
)
def test_a_batch_that_is_none_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_metadata(**{**BATCH, **change})


def test_lengths_and_tables_may_be_numpy_s_jax_s_or_lists() -> None:
    expected = make_metadata(**BATCH)
    for kind in (jnp.asarray, lambda array: np.asarray(array).tolist(), np.int16):
        lens = {name: np.asarray(BATCH[name]) for name in ("context_lens", "query_lens")}
        made = make_metadata(**{**BATCH, **lens, "block_tables": kind(BATCH["block_tables"])})
        np.testing.assert_array_equal(made.slot_mapping, expected.slot_mapping)
        np.testing.assert_array_equal(made.block_tables, expected.block_tables)


def test_the_first_row_that_serves_a_case_is_picked_and_a_row_can_be_asked_for() -> None:
    assert pick(CASE).name == ("xla" if native_cpu.LIBRARY.why_unavailable() else "native_cpu")
    assert pick(CASE, "reference").name == "reference"
    kept = "float32, bfloat16, float8_e4m3fn or int8"
    with pytest.raises(ValueError, match=f"xla: keeps keys and values as {kept}, not float16; reference:"):
        pick(replace(CASE, dtype="float16"))


def test_an_error_tells_the_case_in_words() -> None:
    case = replace(CASE, num_q_heads=6, dtype="float16", window=8, soft_cap=30.0)
    words = "6 query heads on 2 key-value heads of 4 in float16, blocks of 8 tokens, window 8, soft cap 30.0, on cpu"
    with pytest.raises(ValueError, match=f"serves {words}: mosaic_tpu: "):
        pick(case)


def test_on_a_tpu_its_kernel_is_picked_where_it_fits() -> None:
    case = replace(CASE, platform="tpu", dtype="bfloat16")
    assert pick(case).name == "mosaic_tpu"
    assert pick(replace(case, block_size=12)).name == "xla"
    with pytest.raises(ValueError, match="mosaic_tpu: needs a block size that is a multiple of 8, not 12"):
        pick(replace(case, block_size=12), "mosaic_tpu")
    with pytest.raises(ValueError, match="blocks of at most 8388608 bytes, not 16777216"):
        pick(replace(case, block_size=1024, num_kv_heads=32, head_dim=128), "mosaic_tpu")
    with pytest.raises(ValueError, match="mosaic_tpu: runs on tpu, not on cpu"):
        pick(CASE, "mosaic_tpu")


def test_on_a_hopper_gpu_its_kernel_is_picked_where_it_fits() -> None:
    case = replace(CASE, platform="gpu", compute_capability="9.0", dtype="bfloat16")
    assert pick(case).name == "mosaic_gpu"
    assert pick(replace(case, platform="cuda", num_q_heads=128)).name == "mosaic_gpu"
    for dtype in ("int8", "float8_e4m3fn"):
        assert pick(replace(case, dtype=dtype, block_size=192)).name == "mosaic_gpu"
    for change, reason in (
        ({"compute_capability": "10.0"}, "needs compute capability 9.0 .*, not 10.0"),
        ({"compute_capability": None}, "needs compute capability 9.0 .*, not an unknown one"),
        ({"dtype": "float32"}, "keeps keys and values as bfloat16, float8_e4m3fn or int8, not float32"),
        ({"head_dim": 288}, "needs a head dim of at most 256, not 288"),
        ({"num_q_heads": 130}, "needs at most 64 query heads for each key-value head, not 130 for 2"),
        ({"block_size": 24}, "needs a block size of 8, 16, 32, 64 or a multiple of 128, not 24"),
        ({"block_size": 192}, "needs a block size of 8, 16, 32, 64 or a multiple of 128, not 192"),
        ({"block_size": 4}, "not 4, as keys are read 64 and 128 at a time"),
        ({"block_size": 24, "dtype": "int8"}, "a block size of 8, 16, 32 or a multiple of 64, not 24, .* 64 at a time"),
        ({"platform": "cpu"}, "mosaic_gpu: runs on gpu, cuda, not on cpu$"),
    ):
        assert pick(replace(case, **change)).name in ("triton_gpu", "xla", "native_cpu")
        with pytest.raises(ValueError, match=reason):
            pick(replace(case, **change), "mosaic_gpu")


def test_on_other_cuda_gpus_and_for_float32_the_triton_kernels_are_picked_where_they_fit() -> None:
    case = replace(CASE, platform="gpu", compute_capability="8.0", block_size=24)
    assert "deprecated" in find("triton_gpu").summary
    for capability in ("8.0", "8.9", "9.0", "10.0", "12.1"):
        for dtype in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
            assert pick(replace(case, compute_capability=capability, dtype=dtype, num_q_heads=142)).name == "triton_gpu"
    for change, reason in (
        ({"compute_capability": "7.5"}, "triton_gpu: needs compute capability 8.0 or above, not 7.5"),
        ({"compute_capability": None}, "needs compute capability 8.0 or above, not an unknown one"),
        ({"compute_capability": "gfx942"}, "needs an NVIDIA GPU of compute capability 8.0 or above, not gfx942"),
        ({"platform": "rocm"}, "triton_gpu: runs on gpu, cuda, not on rocm$"),
        ({"head_dim": 288}, "needs a head dim of at most 256, not 288"),
    ):
        assert pick(replace(case, **change)).name == "xla"
        with pytest.raises(ValueError, match=reason):
            pick(replace(case, **change), "triton_gpu")


def test_explain_has_a_line_for_each_row_with_every_reason() -> None:
    lines = explain(replace(CASE, platform="abacus", dtype="float16", block_size=12)).splitlines()
    assert len(lines) == len(IMPLEMENTATIONS)
    assert all("not on abacus" in line and "not float16" in line for line in lines)
    assert "multiple of 8, not 12" in lines[0]
    assert states_of(CASE)["mosaic_tpu"] == "no:"
    assert states_of(CASE)["reference"] == "usable"
    others = {"mosaic_gpu": "no:", "triton_gpu": "no:", "native_cpu": "no:", "xla": "usable", "reference": "usable"}
    assert states_of(replace(CASE, platform="tpu")) == {"mosaic_tpu": "picked", **others}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("kind", "heads", "told"),
    [
        # words of 4 bytes: 128 lanes in bfloat16; in bytes as many, as half a group is none, and 128 of scales
        ("TPU v6 lite", (1, 128), "1 key-value heads of 128 in mosaic_tpu: a token takes 1024 .* bfloat16 512;"),
        ("TPU v6 lite", (2, 64), "a token takes 1024 bytes a layer, in bfloat16 512; use bfloat16"),
        ("TPU v6 lite", (2, 128), "a token takes 1024 bytes a layer, in bfloat16 1024;"),
        ("TPU v6 lite", (3, 128), "a token takes 1536 bytes a layer, in bfloat16 1536;"),
        ("TPU v6 lite", (4, 128), None),
        ("TPU v6 lite", (8, 128), None),
        # two sides of 32 bytes and a scale, where 16 lanes of bfloat16 are 32 bytes
        ("NVIDIA H200", (2, 8), "a token takes 144 bytes a layer, in bfloat16 128;"),
        ("NVIDIA H200", (1, 128), None),
    ],
)
def test_a_cache_of_bytes_that_saves_nothing_says_so(
    kind: str, heads: tuple[int, int], told: str | None, dtype: str
) -> None:
    with lowering_for("tpu" if "TPU" in kind else "gpu", kind):
        sizes = {"num_kv_heads": heads[0], "head_dim": heads[1], "block_size": 16}
        reason = KVLayout(**sizes, dtype=dtype).why_no_saving
        explained = explain(AttentionCase(**sizes, dtype=dtype))
        assert KVLayout(**sizes, dtype="bfloat16").why_no_saving is None
    if told is None:
        assert reason is None
        assert "saves nothing" not in explained
    else:
        assert re.search(told, reason or ""), reason
        assert f"\n{'':<12} {reason}\n" in explained


def states_of(case: AttentionCase) -> dict[str, str]:
    """What `explain` says of each row: picked, usable or no."""
    return {line.split()[0]: line.split()[1] for line in explain(case).splitlines()}


def test_programs_can_be_made_for_a_platform_that_is_not_here() -> None:
    assert target_platform() == jax.default_backend()
    with lowering_for("tpu", "TPU v6 lite"):
        assert target_platform() == "tpu"
        layout = KVLayout(num_kv_heads=2, head_dim=4, block_size=8, dtype="bfloat16")
        assert layout.row.name == "mosaic_tpu"
        assert explain().startswith("mosaic_tpu   picked")
    for kind, capability in (("NVIDIA H200", "9.0"), ("NVIDIA GH200 480GB", "9.0"), ("NVIDIA B200", None)):
        with lowering_for("cuda", kind):
            assert (target_platform(), target_compute_capability()) == ("cuda", capability)
            hopper = KVLayout(num_kv_heads=2, head_dim=4, block_size=8, dtype="bfloat16")
            assert hopper.row.name == ("mosaic_gpu" if capability else "xla")
    assert target_platform() == jax.default_backend()
    assert layout.row.name != "mosaic_tpu" or jax.default_backend() == "tpu"


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "lanes"), [(2, 4, 128), (3, 64, 256), (40, 8, 384), (1, 96, 128), (2, 160, 512)]
)
def test_a_layout_packs_and_unpacks_with_the_block_as_leading_axis(
    num_kv_heads: int, head_dim: int, lanes: int, dtype: str, target: Target
) -> None:
    with target.running():
        if dtype not in target.dtypes:
            with pytest.raises(ValueError, match=f"not {dtype}"):
                KVLayout(num_kv_heads=2, head_dim=4, block_size=8, dtype=dtype, implementation=target.name)
            return
        layout = KVLayout(
            num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=8, dtype=dtype, implementation=target.name
        )
        shape = (2, 5, 8, num_kv_heads, head_dim)
        key, value = np.random.default_rng(0).standard_normal(shape).astype(jnp.dtype(dtype))
        kv = layout.pack(key, value)
        np.testing.assert_array_equal(layout.unpack(kv)[0], key)
        np.testing.assert_array_equal(layout.unpack(kv)[1], value)
        zeros = layout.init(5)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), zeros) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), kv
        )
        assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(kv))
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(kv)) == 5 * layout.block_bytes
        # a TPU's registers have 128 lanes, a GPU's matrix instructions take 16: what does not fill them is padded
        width = {
            "mosaic_tpu": lanes,
            "mosaic_gpu": num_kv_heads * -(-head_dim // 16) * 16,
            "triton_gpu": num_kv_heads * -(-head_dim // 16) * 16,
        }.get(target.name, num_kv_heads * head_dim)
        assert layout.block_bytes == 2 * 8 * width * jnp.dtype(dtype).itemsize


def test_a_layout_of_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size=0 must be a whole number, 1 or more"):
        KVLayout(num_kv_heads=2, head_dim=4, block_size=0, dtype="float32")
    with pytest.raises(ValueError, match="not float16"):
        KVLayout(num_kv_heads=2, head_dim=4, block_size=8, dtype="float16")
    with pytest.raises(ValueError, match="'paper' is unknown"):
        KVLayout(num_kv_heads=2, head_dim=4, block_size=8, dtype="float32", implementation="paper")


def test_metadata_puts_leading_single_tokens_among_the_decodes_and_cuts_the_rest_into_tiles() -> None:
    # tokens: 0 | 1 | 2 3 4 5 6 | 7, padded to 10; blocks of 4 tokens
    metadata = make_metadata(
        block_tables=np.array([[5, 0], [6, 7], [8, 9], [3, 0]], np.int32),
        context_lens=[1, 5, 7, 2],
        query_lens=[1, 1, 5, 1],
        block_size=4,
        num_tokens=10,
        num_seqs=5,
        tile_size=2,
        key_chunk_tokens=8,
    )
    assert metadata.num_decodes == 2
    assert metadata.query_starts.tolist() == [0, 1, 2, 7, 8, 8]
    assert metadata.slot_mapping.tolist() == [20, 28, 34, 35, 36, 37, 38, 13, 0, 0]
    tiles = (metadata.tile_sequences, metadata.tile_starts, metadata.tile_lens)
    assert [tile[: metadata.num_tiles].tolist() for tile in tiles] == [[2, 2, 2, 3], [2, 4, 6, 7], [2, 2, 1, 1]]
    with pytest.raises(ValueError, match="sequence 0 has 3 new of 9 tokens"):
        make_metadata(block_tables=np.array([[1, 2]]), context_lens=[9], query_lens=[3], block_size=4)
    with pytest.raises(ValueError, match="do not fit a bucket of 2 tokens"):
        make_metadata(
            block_tables=np.array([[1]]), context_lens=[3], query_lens=[3], block_size=4, num_tokens=2, num_seqs=1
        )


def test_the_example_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(pallas_kernels.__file__).parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("(6, 8, 64)\n")
