"""How fast does a checkpoint load, and how much memory does that take?

Bound by memory bandwidth: the files are in the page cache, so that loading is copying them to where the device wants
them. The ceiling is `read()` of the same files by every core (or by one, if that is faster) into fresh memory that
holds all of them, which any loader needs. Beside it stands the same into memory that was used before, which spares the
system to clear it: a rate that no loader on a CPU can reach, but one that copies to an accelerator's memory might.
Each load has a process of its own, and all of them take turns. A load is timed from the folder's name to the last
array on the device: it reads and checks headers and builds the model too.

    python -m bench.load --bytes 2e9
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.load_worker import weight_files
from bench.record import describe_run, note, write_result
from bench.worker import Worker
from converters import convert
from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig

FORMATS = ("native", "huggingface", "orbax")
SHAPE = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=32_000, model_dim=2048, mlp_dim=8192, num_layers=1, num_q_heads=32,
    num_kv_heads=8, head_dim=64, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True,
    dtype="bfloat16",
)  # fmt: skip
"""One layer of a Llama of about a billion parameters; the bench takes as many as fill the bytes."""


def config_of(num_bytes: float, dtype: str) -> ModelConfig:
    """The smallest model of this shape whose weights have so many bytes."""
    config = replace(SHAPE, dtype=dtype)
    if num_bytes < 1e8:  # a trial: small tensors
        config = replace(config, vocab_size=512, model_dim=64, mlp_dim=128, num_q_heads=4, num_kv_heads=2, head_dim=16)
    sizes = [weight_bytes(replace(config, num_layers=layers)) for layers in (1, 2)]
    layer_bytes = sizes[1] - sizes[0]
    return replace(config, num_layers=max(1, 1 - int(-(num_bytes - sizes[0]) // layer_bytes)))


def weight_bytes(config: ModelConfig) -> int:
    return sum(spec.num_bytes for spec in checkpoint.parameter_files(config).values())


def write_checkpoints(config: ModelConfig, folder: Path, formats: Sequence[str], seed: int) -> dict[str, Path]:
    """The same random weights in each format."""
    rng = np.random.default_rng(seed)
    specs = checkpoint.parameter_files(config)

    def draw(path: str) -> np.ndarray:
        values = rng.standard_normal(int(np.prod(specs[path].shape)), np.float32) * np.float32(0.02)
        return values.astype(specs[path].dtype).reshape(specs[path].shape)

    folders = {kind: folder / kind for kind in ("native", *formats)}
    checkpoint.write(folders["native"], config, draw, max_shard_bytes=2**30)
    for kind, target in folders.items():
        if kind != "native":
            convert(folders["native"], target, to=kind, show_progress=False, max_shard_bytes=2**30)
    return {kind: folders[kind] for kind in formats}


def measure(folders: dict[str, Path], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Replies of the workers by what was measured, interleaved."""
    found: dict[str, list[dict[str, Any]]] = {}

    def worker() -> Worker:
        return Worker(sys.executable, "bench.load_worker", logs / "log.txt")

    with tempfile.TemporaryDirectory() as log_folder:
        logs = Path(log_folder)
        for turn in range(repeats + 1):  # one unmeasured: it brings the files into the page cache
            note(f"round {turn} of {repeats}")
            for kind, folder in folders.items():
                with worker() as reader:
                    for name, threads in (("all cores", reader.call("cores")), ("one core", 1)):
                        for memory in ("fresh", "used"):
                            reply = reader.call(
                                "read", folder=str(folder), num_threads=threads, is_memory_used_before=memory == "used"
                            )
                            found.setdefault(f"{kind}: read, {name}, {memory} memory", []).append(reply)
                with worker() as loader:
                    found.setdefault(f"{kind}: load", []).append(loader.call("load", folder=str(folder), dtype=None))
    return {name: replies[1:] for name, replies in found.items()}


def rows_of(found: dict[str, list[dict[str, Any]]], folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Rates of each format, medians of the rounds."""

    def rates(name: str, num_bytes: int) -> list[float]:
        return [num_bytes / reply["seconds"] for reply in found[name]]

    rows = []
    for kind, folder in folders.items():
        num_bytes = sum(path.stat().st_size for path in weight_files(folder))
        reads = {
            f"{name}, {memory}": statistics.median(rates(f"{kind}: read, {name}, {memory} memory", num_bytes))
            for name in ("all cores", "one core")
            for memory in ("fresh", "used")
        }
        loads = rates(f"{kind}: load", num_bytes)
        ceiling = max(rate for name, rate in reads.items() if "fresh" in name)
        used = max(rate for name, rate in reads.items() if "used" in name)
        rate = statistics.median(loads)
        rows.append({
            "format": kind, "num_bytes": num_bytes, "num_files": len(weight_files(folder)),
            "load_bytes_per_s": rate, "load_bytes_per_s_all": loads, "read_bytes_per_s": reads,
            "fraction_of_read": rate / ceiling, "fraction_of_read_into_used_memory": rate / used,
            "peak_bytes": max(reply["peak_bytes"] for reply in found[f"{kind}: load"]),
            "device": found[f"{kind}: load"][0]["device"],
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bytes", type=float, default=2e9, help="of the checkpoint (default: 2e9)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(arguments)
    if args.repeats < 1 or not 1e5 <= args.bytes <= 1e12:
        parser.error("repeats must be 1 or more, bytes from 1e5 to 1e12")
    config = config_of(args.bytes, args.dtype)
    with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
        note(f"writing {weight_bytes(config) / 1e9:.2f} GB in {len(args.formats)} formats")
        folders = write_checkpoints(config, Path(folder), args.formats, args.seed)
        rows = rows_of(measure(folders, args.repeats), folders)
    largest = max(spec.num_bytes for spec in checkpoint.parameter_files(config).values())
    print(f"{config.num_layers} layers, {weight_bytes(config):,} bytes in {config.dtype}, largest tensor {largest:,}")
    print(f"{'format':<12}{'load GB/s':>10}{'min':>7}{'max':>7}{'read GB/s':>11}{'of it':>7}{'peak - weights':>16}")
    for row in rows:
        loads = row["load_bytes_per_s_all"]
        ceiling = row["load_bytes_per_s"] / row["fraction_of_read"]
        print(f"{row['format']:<12}{row['load_bytes_per_s'] / 1e9:10.2f}{min(loads) / 1e9:7.2f}{max(loads) / 1e9:7.2f}"
              f"{ceiling / 1e9:11.2f}{row['fraction_of_read']:7.0%}"
              f"{(row['peak_bytes'] - weight_bytes(config)) / 1e6:13.1f} MB")  # fmt: skip
    result = {**describe_run("bench.load", arguments), "dtype": config.dtype}
    result |= {"weight_bytes": weight_bytes(config), "largest_tensor_bytes": largest, "rows": rows}
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
