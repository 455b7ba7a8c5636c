"""How does a server with OpenAI's API answer under load: how soon, how fast, how many requests a second?

For any such server, ours or another's. Requests arrive as a Poisson process, in bursts, as a trace says, or as soon as
others end (closed loop); outputs have forced lengths where the server knows `ignore_eos`. Bound by the server, as long
as the client is not: what the client costs, and how late it is, are part of the result. `bench/README.md` says what
each number means; their names are those of `vllm bench serve`.

    jaxpaged bench serve --base-url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200
    jaxpaged bench serve --lengths fixed --input-len 512 --output-len 128 --max-concurrency 32
    jaxpaged bench serve --trace azure.csv --trace-speed 2 --goodput ttft:500 tpot:50 --output result.json
"""

import argparse
import asyncio
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.client.arrivals import arrival_times
from bench.client.flags import ENDPOINTS, parse
from bench.client.http import Connections, Target
from bench.client.load import LoadRun, Outcome, Sender, send_all
from bench.client.metrics import details_of, print_metrics, remarks, summarize
from bench.client.prompts import WORDS, BodyMaker, TokenPrompts, WordPrompts, bodies_of, load_tokenizer
from bench.client.server import ServerFacts, ask_server, calibrate, first_request, when_ready
from bench.plans import DEFAULT_NUM, RequestPlan, cut_to_fit, draw_plans
from bench.record import describe_run, note, save_result, write_result
from bench.request_files import Count, choose, read_dataset, read_trace, sample_text

NUM_FILES = 256
"""That are open beside a connection for each request."""
WORD_SLACK, TEXT_SLACK = 1 / 32, 1 / 4
"""By what part prompts of random words, and texts that are only estimated, may have more tokens than they should."""
WARM_UP_SEED = 1_000_003
"""Added to the seed of prompts that only warm up: no prefix cache may hold a measured prompt because of them."""


@dataclass(kw_only=True)
class Measured:
    """A run and what it was."""

    run: LoadRun
    plans: list[RequestPlan]
    facts: ServerFacts
    num_cut: int
    tokens_per_word: float | None


def read_plans(
    args: argparse.Namespace, count: Count, max_model_len: int | None, slack: float
) -> tuple[list[RequestPlan], int]:
    """The requests with their arrivals, and how many were cut to fit the model; `slack` as in `cut_to_fit`."""
    rng = np.random.default_rng(args.seed)
    num_prompts = args.num_prompts or DEFAULT_NUM
    if args.trace is not None:
        plans = read_trace(args.trace, unit_s=args.trace_unit, speed=args.trace_speed, limit=args.num_prompts)
    elif args.dataset is not None:
        found = read_dataset(args.dataset, count, output_len=args.output_len)
        plans = choose(found, num_prompts, max_model_len, rng, slack=slack)
    else:
        plans = draw_plans(
            args.lengths, num_prompts, input_len=args.input_len, output_len=args.output_len,
            max_model_len=max_model_len, rng=rng,
        )  # fmt: skip
    if args.trace is None:
        times = arrival_times(len(plans), args.request_rate, args.burstiness, rng)
        plans = [replace(plan, arrival_s=arrival_s) for plan, arrival_s in zip(plans, times, strict=True)]
    plans, num_cut, _ = cut_to_fit(plans, max_model_len, slack=slack)
    if num_cut:
        note(f"{num_cut} of {len(plans)} requests are cut to fit in {max_model_len} tokens")
    return plans, num_cut


async def measure(args: argparse.Namespace, target: Target) -> Measured:
    """Ask the server what it serves, send what warms up, then what is measured."""
    async with Connections(target) as connections:
        deadline_s = time.monotonic() + args.ready_timeout
        facts = await when_ready(
            lambda: ask_server(
                connections, base_url=args.base_url, model=args.model, api_key_env=args.api_key_env
            ),
            deadline_s,
        )
        is_chat = ENDPOINTS[args.endpoint] == "openai-chat"
        make = BodyMaker(model=facts.model, is_chat=is_chat, extra=args.extra_body)
        sender = Sender(connections, args.endpoint, timeout_s=args.timeout, keeps_text=args.save_detailed)
        exact = None if args.tokenizer is None else TokenPrompts(load_tokenizer(args.tokenizer))
        await when_ready(lambda: first_request(sender, make, WORDS[0]), deadline_s)
        prompts: WordPrompts | TokenPrompts
        if exact is not None and not is_chat:
            prompts = exact
        else:
            sample = None if args.dataset is None or exact is not None else sample_text(args.dataset)
            prompts = await calibrate(sender, make, args.seed, sample)
        slack = 0.0 if prompts is exact else WORD_SLACK if args.dataset is None or exact is not None else TEXT_SLACK
        plans, num_cut = read_plans(
            args, (exact or prompts).count, args.max_model_len or facts.max_model_len, slack
        )
        bodies = bodies_of(plans, make, lambda plan, index: prompts.prompt(plan, args.seed, index))
        await warm_up(sender, make, prompts, plans, args)
        open_files(len(bodies) if args.max_concurrency is None else min(len(bodies), args.max_concurrency))
        with tqdm(total=len(bodies), desc="Requests", unit="request", disable=args.quiet, file=sys.stderr) as bar:
            num_failed = 0

            def tell(outcome: Outcome) -> None:
                nonlocal num_failed
                if outcome.error:
                    num_failed += 1
                    bar.set_postfix(failed=num_failed, refresh=False)
                bar.update()

            run = await send_all(
                sender, bodies, [plan.arrival_s for plan in plans], max_concurrency=args.max_concurrency, tell=tell
            )
    tokens_per_word = prompts.tokens_per_word if isinstance(prompts, WordPrompts) else None
    return Measured(run=run, plans=plans, facts=facts, num_cut=num_cut, tokens_per_word=tokens_per_word)


async def warm_up(
    sender: Sender, make: BodyMaker, prompts: WordPrompts | TokenPrompts, plans: Sequence[RequestPlan],
    args: argparse.Namespace,
) -> None:
    """Requests of the first plans' lengths, all at once, uncounted. ValueError where one fails."""
    # what a file brings is not sent: it would be found in a prefix cache
    chosen = [RequestPlan(input_len=plan.input_len, output_len=plan.output_len) for plan in plans[: args.num_warmups]]
    if not chosen:
        return
    bodies = bodies_of(chosen, make, lambda plan, index: prompts.prompt(plan, args.seed + WARM_UP_SEED, index))
    run = await send_all(
        sender, bodies, [0.0] * len(bodies), max_concurrency=args.max_concurrency, tell=lambda outcome: None
    )
    for outcome in run.outcomes:
        if outcome.error:
            raise ValueError(f"a warm-up request failed: {outcome.error}")


def open_files(num_streams: int) -> None:
    """Let this process have a connection for each stream, as far as the system allows. ValueError where it does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_streams + NUM_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ValueError(
            f"{num_streams} requests at once need {wanted} open files, and this process may have {hard}: "
            f"raise `ulimit -n`, or give --max-concurrency {max(1, hard - NUM_FILES)}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def result_of(measured: Measured, args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Without what only --save-detailed keeps."""
    num = len(measured.plans)
    last_s = measured.plans[-1].arrival_s
    is_trace = args.trace is not None
    return {
        **describe_run("bench.serve", arguments),
        "backend": ENDPOINTS[args.endpoint],
        "endpoint_type": ENDPOINTS[args.endpoint],
        "endpoint": args.endpoint,
        "label": args.label,
        "model_id": measured.facts.model,
        "tokenizer_id": args.tokenizer,
        "server_version": measured.facts.version,
        "max_model_len": measured.facts.max_model_len,
        "num_prompts": num,
        "workload": Path(args.trace or args.dataset).name if is_trace or args.dataset else args.lengths,
        "num_cut_to_fit": measured.num_cut,
        "tokens_per_word": measured.tokens_per_word,
        "seed": args.seed,
        "request_rate": "trace" if is_trace else "inf" if math.isinf(args.request_rate) else args.request_rate,
        "offered_request_rate": (num - 1) / last_s if last_s > 0 else None,
        "burstiness": None if is_trace else args.burstiness,
        "max_concurrency": args.max_concurrency,
        "goodput_limits_ms": args.goodput,
        **summarize(
            measured.run, [plan.input_len for plan in measured.plans], percentiles=args.metric_percentiles,
            goodput_ms=args.goodput,
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; 1 if no request succeeded."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments, (__doc__ or "").partition("\n")[0])
    target = Target.parse(args.base_url, os.environ.get(args.api_key_env) or None)
    measured = asyncio.run(measure(args, target))
    result = result_of(measured, args, arguments)
    print_metrics(result)
    for remark in remarks(result):
        note(remark)
    lens = {name: result.pop(name) for name in ("input_lens", "output_lens")}
    write_result(result, args.output)
    if args.save_detailed:
        save_result({**result, **lens, **details_of(measured.run)}, args.output)
    return 0 if result["completed"] else 1


if __name__ == "__main__":
    sys.exit(main())
