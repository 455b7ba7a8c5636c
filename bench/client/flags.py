"""The flags of `jaxpaged bench serve`, and what is wrong with them."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.client.metrics import GOODPUT_TIMES
from bench.plans import add_length_flags, check_length_flags, existing_file

ENDPOINTS = {"/v1/completions": "openai", "/v1/chat/completions": "openai-chat"}
"""And their names in vLLM's results."""
OURS = ("stream", "prompt", "messages")
"""Fields that --extra-body may not set."""


def parse(argv: Sequence[str], question: str) -> argparse.Namespace:
    """Checked flags; `question` is the first line of the help."""
    parser = argparse.ArgumentParser(
        prog="jaxpaged bench serve", description=question, allow_abbrev=False
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--endpoint", choices=list(ENDPOINTS), default="/v1/completions")
    parser.add_argument("--model", help="its name at the server (default: the first that /v1/models names)")
    parser.add_argument("--tokenizer", help="folder with its tokenizer.json: prompts of completions are exact then")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", help="variable with the key (default: %(default)s)")
    parser.add_argument("--ready-timeout", type=float, default=0.0, help="seconds to wait for the server to be ready")
    parser.add_argument("--extra-body", type=_json_object, default={}, help="JSON object of further fields; null "
                        'takes one of ours away, as in {"ignore_eos": null}')  # fmt: skip
    group = parser.add_argument_group("arrivals")
    group.add_argument("--request-rate", type=_positive, default=math.inf, help="a second (default: inf, all at once)")
    group.add_argument("--burstiness", type=_positive, default=1.0, help="1 is Poisson, less burstier, more steadier")
    group.add_argument("--max-concurrency", type=int, help="requests at once at most: a closed loop, with inf")
    group.add_argument("--trace", type=existing_file, help="CSV or JSON lines: times, prompt and output tokens")
    group.add_argument("--trace-unit", type=_unit, default=1.0, help="of numbers that are times: s or ms (default: s)")
    group.add_argument("--trace-speed", type=_positive, default=1.0, help="2 replays it in half the time")
    add_length_flags(parser)
    parser.add_argument("--max-model-len", type=int, help="most tokens of a request (default: as the server says)")
    group = parser.add_argument_group("measuring")
    group.add_argument("--num-warmups", type=int, default=1, help="requests before the run (default: 1)")
    group.add_argument("--timeout", type=_positive, default=600.0, help="seconds of one request (default: 600)")
    group.add_argument("--goodput", nargs="+", metavar="NAME:MS", default=[], help="limits, as in ttft:500 tpot:50 "
                       "e2el:5000: requests a second that keep all of them")  # fmt: skip
    group.add_argument("--metric-percentiles", type=_percentiles, default=[50.0, 99.0], help="default: 50,99")
    group.add_argument("--label", help="kept in the result, as for the server's device")
    group.add_argument("--save-detailed", action="store_true", help="times, texts and errors of each request, in "
                       "--output")  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(argv)
    if not args.ready_timeout >= 0:
        parser.error("--ready-timeout must be 0 or more")
    check_length_flags(parser, args)
    _check(parser, args)
    args.goodput = _goodput(parser, args.goodput)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.max_concurrency is not None and args.max_concurrency < 1:
        parser.error("--max-concurrency must be 1 or more")
    if args.max_model_len is not None and args.max_model_len < 16:
        parser.error("--max-model-len must be 16 or more")
    if args.num_warmups < 0:
        parser.error("--num-warmups must be 0 or more")
    if args.trace is not None and (args.dataset is not None or not math.isinf(args.request_rate)):
        parser.error("--trace says when requests come and how long they are: leave out --dataset and --request-rate, "
                     "and scale its times with --trace-speed")  # fmt: skip
    if args.trace is not None and (args.input_len or args.output_len):
        parser.error("--trace says how long requests are: leave out --input-len and --output-len")
    if args.save_detailed and args.output is None:
        parser.error("--save-detailed writes to the file of --output: give one")
    for name in OURS:
        if name in args.extra_body:
            parser.error(f"--extra-body may not set {name}, which this bench sets")
    for name in ("n", "best_of", "beam_width"):
        if args.extra_body.get(name) not in (None, 1):
            parser.error(f"--extra-body {name} must be 1: the times of several samples at once cannot be told apart")


def _goodput(parser: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for one in given:
        name, _, text = one.partition(":")
        try:
            limits[name] = _positive(text)
        except (ValueError, argparse.ArgumentTypeError):
            limits.clear()
        if name not in GOODPUT_TIMES or not limits:
            parser.error(f"--goodput {one} is not allowed: give {', '.join(GOODPUT_TIMES)}, a colon and milliseconds")
    return limits


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be above 0")
    return value


def _unit(text: str) -> float:
    units = {"s": 1.0, "ms": 1e-3}
    if text not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(units)}")
    return units[text]


def _percentiles(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: numbers from 0 to 100, with commas between")
    return values


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it is no JSON object")
    return value
