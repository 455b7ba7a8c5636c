"""The law of laziness: beside what it gives back, a conversion holds one and a half of the largest tensor at most.

Measured in a process of its own, by what the system counts as its most resident memory.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoints

from jaxpaged.models.tensor_files import TensorSpec, write_tensors

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts memory in /proc"),
]
SHAPE = {
    "vocab_size": 16_384, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True,
}  # fmt: skip
"""270 MB in float32; the embedding has 67 of them, an MLP's matrix 17."""
ALLOWED = 1.5
"""Of the largest tensor."""
BY_ORBAX = 2.5
"""The same where orbax has to restore: it holds all chunks of a tensor beside the tensor they are put together to."""
SLACK = 24 * 2**20
"""What an allocator keeps, stacks of threads, and modules that the first conversion imports."""

MEASURE = """
import json, sys, threading, time
from converters import convert, load

def count(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))

def run(folder):
    if sys.argv[2] == "load":
        return load(folder)
    return convert(folder, f"{folder}.out", to=sys.argv[2], dtype=sys.argv[4] or None, show_progress=False)

class Sampler(threading.Thread):
    # views of files are memory of the page cache: only what is not counts
    most, ends = 0, False
    def run(self):
        while not self.ends:
            self.most = max(self.most, count("RssAnon"))
            time.sleep(0.001)

run(sys.argv[1])  # imports, threads, small buffers
before = count("VmRSS"), count("RssAnon")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
sampler = Sampler()
sampler.start()
kept = run(sys.argv[3])
sampler.ends = True
sampler.join()
print(json.dumps({"all": count("VmHWM") - before[0], "own": sampler.most - before[1]}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny and a moderately large checkpoint of each format that is read."""
    root = tmp_path_factory.mktemp("memory")
    values = tiny_checkpoints.BASE | SHAPE
    tiny = tiny_checkpoints.write_case(root / "tiny", "gqa_tied")
    large = root / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(values))
    specs = {
        name: TensorSpec("", np.dtype(np.float32), shape)
        for name, shape in tiny_checkpoints.tensor_shapes(values).items()
    }
    rng = np.random.default_rng(0)
    write_tensors(
        large, specs, lambda name: rng.standard_normal(specs[name].shape, np.float32), max_shard_bytes=2**30
    )
    for folder in (tiny, large):
        for kind in ("native", "orbax"):
            subprocess.run(
                [sys.executable, "-m", "converters", folder, f"{folder}-{kind}", "--to", kind, "--quiet"],
                check=True, cwd=ROOT,
            )  # fmt: skip
        # what a trainer saves: compressed, in orbax's database
        trainers = Path(f"{folder}-trainer")
        shutil.copytree(f"{folder}-orbax", trainers, ignore=shutil.ignore_patterns("orbax"))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(trainers / "orbax", checkpointer.restore(Path(f"{folder}-orbax", "orbax")))
    return {
        "huggingface": large, **{kind: Path(f"{large}-{kind}") for kind in ("native", "orbax", "trainer")}
    }  # fmt: skip


@pytest.fixture(scope="module")
def sizes(folders) -> tuple[int, int]:
    """Bytes of the checkpoint, and of its largest tensor."""
    shapes = tiny_checkpoints.tensor_shapes(tiny_checkpoints.BASE | SHAPE).values()
    sizes = [int(np.prod(shape)) * 4 for shape in shapes]
    return sum(sizes), max(sizes)


def measure(folders, source: str, what: str, dtype: str = "") -> dict[str, int]:
    large = folders[source]
    tiny = large.with_name(large.name.replace("large", "tiny"))
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, tiny, what, large, dtype],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    finally:
        for folder in (tiny, large):
            subprocess.run(["rm", "-rf", f"{folder}.out"], check=True)


@pytest.mark.parametrize(
    ("source", "allowed"),
    [("huggingface", ALLOWED), ("native", ALLOWED), ("orbax", ALLOWED), ("trainer", BY_ORBAX)],
)
def test_loading_holds_the_checkpoint_and_little_more(folders, sizes, source, allowed):
    whole, largest = sizes
    used = measure(folders, source, "load")
    assert whole * 0.9 < used["all"] < whole + allowed * largest + SLACK, used


@pytest.mark.parametrize(
    ("source", "to", "dtype"),
    [
        ("huggingface", "native", ""), ("huggingface", "native", "bfloat16"), ("native", "huggingface", ""),
        ("orbax", "native", ""),
    ],
)  # fmt: skip
def test_converting_holds_one_tensor(folders, sizes, source, to, dtype):
    _, largest = sizes
    used = measure(folders, source, to, dtype)
    assert used["all"] < ALLOWED * largest + SLACK, used


@pytest.mark.parametrize(("source", "dtype"), [("huggingface", ""), ("native", ""), ("huggingface", "bfloat16")])
def test_orbax_gets_views_of_files(folders, sizes, source, dtype):
    _, largest = sizes
    used = measure(folders, source, "orbax", dtype)
    assert used["own"] < ALLOWED * largest + SLACK, used
