"""How long does the host think before each step, and how does that grow with the sequences that run?

Bound by one core's plain Python and numpy; the bar is 1 ms a step at 64 running sequences, and linear growth. The real
scheduler, block manager and input batch run one step ahead, as in the engine, around a runner that has no device: every
sequence decodes one token a step, greedily. Scheduling, building and updating are timed apart; no prefill is timed.

    python -m bench.host_time --num-seqs 64 256 1024 --output bench/results/host_time.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import describe_run, note, write_result
from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.request import Request
from jaxpaged.core.scheduler import Scheduler
from jaxpaged.core.scheduler_output import RunnerOutput, SchedulerOutput, SequenceOutput
from jaxpaged.runner.buckets import make_buckets
from jaxpaged.runner.input_batch import Attending, BuiltBatch, PackedLayout, RowTables, build
from jaxpaged.sampling_params import SamplingParams

BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
PARTS = ("schedule", "build", "update")


class DevicelessRunner:
    """Builds the inputs of a step as the model runner does, and answers with token 7 for every sample."""

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.buckets = make_buckets(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
        blocks_per_seq = MAX_MODEL_LEN // BLOCK_SIZE
        attending = Attending(tile_size=32, key_chunk_tokens=256, has_decode_tiles=True)
        self._tables = RowTables(max_num_seqs, blocks_per_seq)
        self._layouts = {bucket: PackedLayout(bucket, blocks_per_seq, attending) for bucket in self.buckets.all}

    def build(self, plan: SchedulerOutput) -> BuiltBatch:
        num_tokens = num_logits = 0
        for sequence, _, num_new_tokens, num_samples in plan.scheduled:
            assert sequence.row is not None
            if not self._tables.is_owned_by(sequence.row, sequence):
                self._tables.claim(sequence.row, sequence)
            num_tokens += num_new_tokens
            num_logits += num_samples
        bucket = self.buckets.pick(num_tokens, num_logits, len(plan.scheduled))
        return build(plan.scheduled, self._tables, self._layouts[bucket], BLOCK_SIZE)

    def read(self, plan: SchedulerOutput) -> RunnerOutput:
        return RunnerOutput(tuple(SequenceOutput((7,) * item.num_samples, (), (), True) for item in plan.scheduled))


def measure(num_seqs: int, *, context_len: int, num_steps: int) -> dict[str, Any]:
    """Milliseconds of each part of a step with `num_seqs` decoding at `context_len` and beyond; medians over steps."""
    # large enough for all prompts to be computed in about 16 steps, whatever num_seqs
    budget = max(2048, 16 * num_seqs)
    runner = DevicelessRunner(max_num_seqs=num_seqs, max_num_batched_tokens=budget)
    # ample: nobody is preempted, the scheduler's reserve of free blocks keeps nobody waiting, and one could end alone
    num_blocks = MAX_MODEL_LEN // BLOCK_SIZE + 2 * num_seqs * -(-(context_len + num_steps + 64) // BLOCK_SIZE) + 1
    scheduler = Scheduler(
        block_manager=BlockManager(num_device_blocks=num_blocks, num_host_blocks=0, block_size=BLOCK_SIZE),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
        max_num_logits=runner.buckets.max_num_logits,
    )
    for index in range(num_seqs):
        # the first tokens differ, so that no prompt shares blocks with another
        prompt = (3 + index, *range(4, 3 + context_len))
        max_tokens = MAX_MODEL_LEN - context_len
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        scheduler.add(
            Request(
                request_id=str(index),
                prompt_token_ids=prompt,
                params=params,
                max_tokens=max_tokens,
                arrival_index=index,
            )
        )
    previous: SchedulerOutput | None = None
    times: list[tuple[float, ...]] = []
    while len(times) < num_steps:
        started = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        runner.build(plan)
        built = time.perf_counter()
        # the device's answer is made outside the clock
        result = runner.read(previous) if previous is not None else None
        read = time.perf_counter()
        if previous is not None and result is not None:
            scheduler.update(previous, result)
        updated = time.perf_counter()
        is_decode = all(item.num_new_tokens == 1 for item in plan.scheduled) and len(plan.scheduled) == num_seqs
        if is_decode and previous is not None and len(previous.scheduled) == num_seqs:
            times.append((scheduled - started, built - scheduled, updated - read))
        previous = plan
    totals = [1e3 * sum(step) for step in times]
    columns = zip(*times, strict=True)
    parts = {f"{name}_ms": 1e3 * statistics.median(column) for name, column in zip(PARTS, columns, strict=True)}
    return {
        "num_seqs": num_seqs,
        **parts,
        "host_ms": statistics.median(totals),
        "host_ms_min": min(totals),
        "host_ms_p95": sorted(totals)[int(0.95 * (len(totals) - 1))],
        "host_us_per_seq": 1e3 * statistics.median(totals) / num_seqs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-seqs", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--context-len", type=int, default=250)
    parser.add_argument("--num-steps", type=int, default=100, help="steps measured, every sequence decoding")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(arguments)
    if min(args.num_seqs) < 1 or args.num_steps < 1 or not 1 <= args.context_len <= MAX_MODEL_LEN - args.num_steps - 64:
        parser.error(f"counts must be 1 or more, and context and steps fit in {MAX_MODEL_LEN} tokens")
    rows = []
    for num_seqs in args.num_seqs:
        rows.append(measure(num_seqs, context_len=args.context_len, num_steps=args.num_steps))
        note(f"{num_seqs} sequences: {rows[-1]['host_ms']:.3f} ms a step")
    result = {**describe_run("bench.host_time", arguments), "context_len": args.context_len}
    result |= {"num_steps": args.num_steps, "rows": rows}
    print(f"{'sequences':>9}{'schedule':>10}{'build':>9}{'update':>9}"
          f"{'total ms':>10}{'min ms':>9}{'p95 ms':>9}{'us a seq':>10}")
    for row in rows:
        print(f"{row['num_seqs']:9d}{row['schedule_ms']:10.3f}{row['build_ms']:9.3f}{row['update_ms']:9.3f}"
              f"{row['host_ms']:10.3f}{row['host_ms_min']:9.3f}{row['host_ms_p95']:9.3f}{row['host_us_per_seq']:10.2f}")
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
