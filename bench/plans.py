"""What requests of a workload ask for, before there are prompts: lengths, arrivals, and texts where a file brings them.

Read by the load generator, which makes texts of them, and by the offline benches, which make token ids.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.workloads import lognormal_lens

LIKE = {"sharegpt-like": (161, 338), "alpaca-like": (19, 58)}
"""Mean prompt and output tokens of the two data sets (Kwon et al. 2023, figure 11); drawn from log-normals."""
LIKE_CONTEXT = 2048
"""Most tokens of a request drawn so, as of the paper's models; a third of them prompt."""
DEFAULT_NUM = 64
"""Requests."""
SLACK_TOKENS = 8
"""Kept free beside a part of the prompt, where its length is an estimate."""
FIXED = (256, 128)
"""Prompt and output tokens where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """One request. Lengths are in tokens."""

    input_len: int
    """Of the prompt; where it has a text, this is not known exactly."""
    output_len: int
    arrival_s: float = 0.0
    """After the beginning of the run."""
    text: str | None = None
    """The prompt, where a file brings it."""
    messages: tuple[tuple[str, str], ...] = ()
    """Role and content of each turn, where a file brings a conversation."""
    prefix_ids: tuple[int, ...] = ()
    """Names of the blocks that its prompt begins with: requests that share a name share the text."""


def add_length_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say how long prompts and outputs are, and how many there are."""
    group = parser.add_argument_group("lengths")
    group.add_argument(
        "--lengths", choices=("fixed", *LIKE), default="sharegpt-like",
        help="log-normal with the means of that data set, or all alike (default: sharegpt-like)",
    )
    group.add_argument("--input-len", type=int, help="tokens of a prompt: all of them if fixed, else their mean")
    group.add_argument("--output-len", type=int, help="tokens of an output, as --input-len; forced, by ignore_eos")
    group.add_argument("--num-prompts", type=int, help="requests (default: 64; of a trace, all of it)")
    group.add_argument(
        "--dataset", type=existing_file,
        help="prompts from a file: ShareGPT's JSON, or JSON lines with prompt, messages or turns; --output-len sets "
        "their outputs",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of all that is drawn")


def check_length_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("input_len", "output_len", "num_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} is not allowed: it must be 1 or more")


def draw_plans(
    kind: str, num: int, *, input_len: int | None, output_len: int | None, max_model_len: int | None,
    rng: np.random.Generator,
) -> list[RequestPlan]:
    """`num` plans of lengths that are all alike, or like a data set's. ValueError where they do not fit the model."""
    if kind == "fixed":
        lens = (input_len or FIXED[0], output_len or FIXED[1])
        if max_model_len is not None and sum(lens) > max_model_len:
            raise ValueError(
                f"{lens[0]} prompt and {lens[1]} output tokens do not fit a model of {max_model_len}: "
                "give a smaller --input-len or --output-len"
            )
        return [RequestPlan(input_len=lens[0], output_len=lens[1])] * num
    means = (input_len or LIKE[kind][0], output_len or LIKE[kind][1])
    context = min(LIKE_CONTEXT, max_model_len or LIKE_CONTEXT)
    longest = (context // 3, context - context // 3)
    try:
        columns = [lognormal_lens(rng, num, mean, longest=most) for mean, most in zip(means, longest, strict=True)]
    except ValueError as error:
        raise ValueError(
            f"lengths {kind} of {means[0]} and {means[1]} tokens on average do not fit {context} in all: {error}; give "
            "other means by --input-len and --output-len"
        ) from error
    return [
        RequestPlan(input_len=prompt_len, output_len=new_len)
        for prompt_len, new_len in zip(*columns, strict=True)
    ]


def cut_to_fit(
    plans: Sequence[RequestPlan], max_model_len: int | None, *, slack: float = 0.0
) -> tuple[list[RequestPlan], int, int]:
    """Plans that fit the model: outputs are cut to half of it at most, then prompts to what is left.

    `slack` is the part by which prompts may be longer than planned, and a few tokens, where lengths are estimates. Also
    returns how many were cut, and how many were dropped because a text of theirs cannot be cut.
    """
    if max_model_len is None:
        return list(plans), 0, 0
    few = SLACK_TOKENS if slack else 0
    fitting: list[RequestPlan] = []
    num_cut = num_dropped = 0
    for plan in plans:
        input_len = math.ceil(plan.input_len * (1 + slack)) + few
        if input_len + plan.output_len <= max_model_len:
            fitting.append(plan)
        elif plan.text is not None:
            num_dropped += 1
        else:
            output_len = max(1, min(plan.output_len, max(max_model_len // 2, max_model_len - input_len)))
            left = int((max_model_len - output_len - few) / (1 + slack))
            fitting.append(replace(plan, output_len=output_len, input_len=max(1, left)))
            num_cut += 1
    return fitting, num_cut, num_dropped


def existing_file(text: str) -> Path:
    """A parser of flags that name a file to read."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path
