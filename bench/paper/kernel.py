"""What does attention cost when keys and values lie in scattered blocks? (Kwon et al. 2023, figure 18a)

Decodes of some sequences at some context length, one layer, on the same keys and values. Bound by memory bandwidth.
On a CPU the contiguous contestants are: the compiled kernel with one block a sequence, so that only where tokens lie
differs; and two attentions as frameworks with contiguous caches write them in XLA, one batched product over all
sequences (`dense`, on equal lengths, its best case) and one sequence after the other (`dense, in turn`). All write the
new token's key and value, and give the same output, or the bench ends in an error. Each layer has a cache of its own,
so that none is still in the processor's caches. On an accelerator `kernel_agenda.py` times our kernels, JAX's paged
ones and `jax.nn.dot_product_attention` on contiguous keys and values.

    python -m bench.paper.kernel --output bench/results/kernel.json
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.device_cases import DTYPE, DeviceCase
from bench.device_kernels import attention_case
from bench.device_layers import CONTIGUOUS, PEERS
from bench.kernel_agenda import Job, time_case
from bench.kernels import Contestant, enter, time_in_turn
from bench.kernels_on_device import device_names
from bench.paper.command import describe, make_parser, parse_sized
from bench.record import note, write_result
from pallas_kernels import AttentionMetadata, KVLayout, make_metadata, misfits, paged_attention
from pallas_kernels.cases import BENCH, HEAD_SHAPES, Batch, BatchCase, HeadShape, make_batch
from pallas_kernels.paged_attention.api import find

PAPER_OVERHEAD = (0.20, 0.26)
"""More time than the contiguous kernel of FasterTransformer, figure 18a."""
TOLERANCE = 1e-4
"""Between two contestants' outputs: float32 sums in another order, of values around 1."""
SMALL = {"num_seqs": [2], "contexts": [32], "num_layers": 2, "repeats": 2}


def dense(
    query: Any, key: Any, value: Any, kv: Any, metadata: AttentionMetadata, *, scale: float, is_batched: bool = True,
    **options: None,
) -> tuple[Any, Any]:  # fmt: skip
    """Attention of one new token a sequence; keys and values [seqs, kv_heads, context, head_dim], all equally long."""
    keys, values = kv
    num_seqs, num_kv_heads, _, head_dim = keys.shape
    rows = jnp.arange(num_seqs)
    last = metadata.context_lens[:num_seqs] - 1
    keys, values = keys.at[rows, :, last].set(key), values.at[rows, :, last].set(value)
    grouped = query.reshape(num_seqs, num_kv_heads, -1, head_dim) * scale

    def attend(one: tuple[Any, Any, Any]) -> Any:
        queries, keys, values = one
        weights = jax.nn.softmax(jnp.einsum("...hgd,...hkd->...hgk", queries, keys), axis=-1)
        return jnp.einsum("...hgk,...hkd->...hgd", weights, values)

    everything = (grouped, keys, values)
    output = attend(everything) if is_batched else lax.map(attend, everything)
    return output.reshape(query.shape), (keys, values)


def in_one_piece(case: BatchCase, batch: Batch) -> Batch:
    """The same batch with each sequence's keys and values in one piece, free of the poison of blocks not in use."""
    layout = KVLayout(
        num_kv_heads=case.heads.num_kv_heads, head_dim=case.heads.head_dim, block_size=case.block_size,
        dtype=case.dtype, implementation="xla",
    )  # fmt: skip
    context = case.sequences[0][0]
    tables = np.asarray(batch.metadata.block_tables)[: len(case.sequences)]
    blocks = tables[:, : -(-context // case.block_size)]
    pieces = []
    for part in layout.unpack(batch.kv):  # [blocks, block_size, kv_heads, head_dim]
        gathered = np.asarray(part)[blocks].reshape(len(blocks), -1, *part.shape[2:])[:, :context]
        pieces.append(jnp.nan_to_num(jnp.asarray(gathered.transpose(0, 2, 1, 3))))
    return replace(batch, kv=tuple(pieces))


def in_one_block(case: BatchCase, piece: Batch) -> Batch:
    """The same batch for the compiled kernel, with a block as long as a sequence; block 0 is nobody's."""
    (context, _), num_seqs = case.sequences[0], len(case.sequences)
    layout = KVLayout(
        num_kv_heads=case.heads.num_kv_heads, head_dim=case.heads.head_dim, block_size=context, dtype=case.dtype,
        implementation="native_cpu",
    )  # fmt: skip
    parts = [np.asarray(part).transpose(0, 2, 1, 3) for part in piece.kv]
    keys, values = (np.concatenate([np.zeros_like(part[:1]), part]) for part in parts)
    metadata = make_metadata(
        block_tables=np.arange(1, num_seqs + 1, dtype=np.int32)[:, None], context_lens=[context] * num_seqs,
        query_lens=[1] * num_seqs, block_size=context, tile_size=case.tile_size,
        key_chunk_tokens=max(case.key_chunk_tokens, context),
    )  # fmt: skip
    return replace(piece, kv=layout.pack(keys, values), metadata=metadata)


def contestants(heads: HeadShape, num_seqs: int, context: int, args: Any) -> dict[str, tuple[bool, Contestant]]:
    """By name: whether it is paged, and who it is."""
    options: dict[str, Any] = BENCH | {"num_padding_seqs": 0}
    case = BatchCase(
        name=f"{num_seqs} x {context}", heads=heads, sequences=((context, 1),) * num_seqs, block_size=args.block_size,
        **options,
    )  # fmt: skip
    plain = make_batch(case, "xla")
    piece = in_one_piece(case, plain)
    entered: dict[str, tuple[bool, Contestant]] = {}

    def add(name: str, is_paged: bool, function: Any, batch: Batch) -> None:
        entered[name] = is_paged, enter(name, function, batch, args.num_layers)

    add("xla", True, partial(paged_attention, implementation="xla"), plain)
    add("dense", False, dense, piece)
    add("dense, in turn", False, partial(dense, is_batched=False), piece)
    if args.has_native:
        native = partial(paged_attention, implementation="native_cpu")
        add("native_cpu", True, native, make_batch(case, "native_cpu"))
        add("native_cpu, one block a sequence", False, native, in_one_block(case, piece))
    return entered


def measure_on_cpu(args: Any) -> list[dict[str, Any]]:
    """A row for each number of sequences, context length and contestant; RuntimeError where outputs differ."""
    rows = []
    heads = HEAD_SHAPES[args.heads]
    for num_seqs in args.num_seqs:
        for context in args.contexts:
            entered = contestants(heads, num_seqs, context, args)
            truth = entered["dense"][1].output
            for name, (_, one) in entered.items():
                difference = float(np.abs(one.output[:num_seqs] - truth[:num_seqs]).max())
                if not difference <= TOLERANCE:
                    raise RuntimeError(f"{name} differs from dense by {difference:.3g}: its times mean nothing")
            times = time_in_turn([one for _, one in entered.values()], num_layers=args.num_layers, repeats=args.repeats)
            for name, (is_paged, _) in entered.items():
                rows.append({
                    "num_seqs": num_seqs, "context": context, "implementation": name, "is_paged": is_paged,
                    "us_a_layer": 1e6 * statistics.median(times[name]), "us_a_layer_min": 1e6 * min(times[name]),
                })  # fmt: skip
            note(f"{num_seqs} x {context}: done")
    return rows


def measure_on_device(args: Any, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same on an accelerator, bfloat16; and who was not timed, and why."""
    rows, not_timed = [], []
    for num_seqs in args.num_seqs:
        for context in args.contexts:
            case = DeviceCase(
                name=f"{num_seqs} x {context}", heads=HEAD_SHAPES[args.heads], batch=num_seqs, context=context,
                block_size=args.block_size,
            )  # fmt: skip
            for name in names:
                labels = {"num_seqs": num_seqs, "context": context, "implementation": name}
                reason = "; ".join(Job(name, case).reasons_against())
                try:
                    times_ms = [] if reason else time_case(
                        case, name, num_layers=args.num_layers, repeats=args.repeats
                    )[0]  # fmt: skip
                except Exception as error:  # whatever a peer raises is why it has no time
                    if name not in PEERS:
                        raise
                    times_ms, reason = [], (str(error) or type(error).__name__).splitlines()[0][:200]
                if reason:
                    not_timed.append({"case": case.name, "implementation": name, "because": reason})
                    continue
                rows.append({
                    **labels, "is_paged": name not in CONTIGUOUS, "us_a_layer": 1e3 * statistics.median(times_ms),
                    "us_a_layer_min": 1e3 * min(times_ms),
                })  # fmt: skip
    return rows, not_timed


def overheads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case the fastest that is paged over the fastest that is contiguous, less one.

    Where the compiled kernel ran both ways, also its own.
    """
    found = []
    for num_seqs, context in dict.fromkeys((row["num_seqs"], row["context"]) for row in rows):
        times = {
            (row["is_paged"], row["implementation"]): row["us_a_layer"]
            for row in rows
            if (row["num_seqs"], row["context"]) == (num_seqs, context)
        }
        best = {
            is_paged: min((us for (paged, _), us in times.items() if paged is is_paged), default=None)
            for is_paged in (True, False)
        }
        paged, contiguous = best[True], best[False]
        same = times.get((True, "native_cpu")), times.get((False, "native_cpu, one block a sequence"))
        found.append({
            "num_seqs": num_seqs, "context": context,
            "overhead": paged / contiguous - 1 if paged and contiguous else None,
            "overhead_of_the_same_kernel": same[0] / same[1] - 1 if same[0] and same[1] else None,
        })  # fmt: skip
    return found


def print_report(result: dict[str, Any]) -> None:
    """The table for people."""
    print(f"{'sequences':>9}{'context':>9}  {'attention':<36}{'us a layer':>11}{'min':>9}")
    for row in result["rows"]:
        name = row["implementation"] + (" (paged)" if row["is_paged"] else "")
        print(f"{row['num_seqs']:9d}{row['context']:9d}  {name:<36}{row['us_a_layer']:11.1f}"
              f"{row['us_a_layer_min']:9.1f}")
    low, high = PAPER_OVERHEAD
    print(f"\nmore time, paged against the fastest contiguous one (paper: {100 * low:.0f} to {100 * high:.0f} %)")
    for row in result["overheads"]:
        shown = [f"{100 * value:+.0f} %" if value is not None else "not timed"
                 for value in (row["overhead"], row["overhead_of_the_same_kernel"])]
        print(f"{row['num_seqs']:9d}{row['context']:9d}  {shown[0]}, of the same kernel {shown[1]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser("bench.paper.kernel", __doc__)
    parser.add_argument("--heads", choices=sorted(HEAD_SHAPES), help="default: dim768, on an accelerator llama3-8b")
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 128, 256, 1024], help="powers of two")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=20)
    args = parse_sized(parser, arguments, SMALL)
    if min(args.num_layers, args.repeats, *args.num_seqs) < 1:
        parser.error("--num-seqs, --num-layers and --repeats must be 1 or more")
    if any(context < args.block_size or context & (context - 1) for context in args.contexts):
        parser.error(f"--contexts must be powers of two from --block-size={args.block_size} on: a block is one of them")
    is_cpu = jax.default_backend() == "cpu"
    args.heads = args.heads or ("dim768" if is_cpu else "llama3-8b")
    not_timed: list[dict[str, Any]] = []
    if is_cpu:
        reason = why_not_native(args)
        args.has_native = reason is None
        rows = measure_on_cpu(args)
        not_timed += [{"implementation": "native_cpu", "because": reason}] if reason else []
    else:
        rows, not_timed = measure_on_device(args, device_names())
    result = describe("bench.paper.kernel", arguments, args) | {
        "heads": args.heads, "block_size": args.block_size, "num_layers": args.num_layers,
        "dtype": "float32" if is_cpu else DTYPE, "rows": rows, "overheads": overheads(rows),
        "not_timed": not_timed, "paper_overhead": list(PAPER_OVERHEAD),
    }  # fmt: skip
    print_report(result)
    write_result(result, args.output)
    return 0


def why_not_native(args: Any) -> str | None:
    """Why the compiled kernel is not here."""
    heads = HEAD_SHAPES[args.heads]
    reasons = misfits(
        find("native_cpu"), attention_case(heads, args.block_size, "float32")
    )
    return "; ".join(reasons) or None


if __name__ == "__main__":
    sys.exit(main())
