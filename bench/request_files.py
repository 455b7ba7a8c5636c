"""Files that say what requests ask for: data sets of prompts, and traces of arrivals and lengths."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.plans import RequestPlan, cut_to_fit
from bench.record import note

DEFAULT_OUTPUT_LEN = 128
"""Of a prompt whose file does not say."""
TIME_NAMES = ("timestamp", "arrival_s", "arrival_time", "time")
INPUT_NAMES = ("contexttokens", "input_length", "input_len", "prompt_len", "prompt_tokens", "request tokens")
OUTPUT_NAMES = ("generatedtokens", "output_length", "output_len", "output_tokens", "response tokens", "max_tokens")

NUM_SAMPLES, SAMPLE_CHARS = 16, 80

Count = Callable[[str], int]
"""Tokens of a text."""


def read_trace(path: Path, *, unit_s: float = 1.0, speed: float = 1.0, limit: int | None = None) -> list[RequestPlan]:
    """The plans of a trace in CSV or JSON lines, by arrival, the first at 0: a time, prompt tokens, output tokens.

    Columns go by the names of the public traces, in any case. Times are dates, or numbers of `unit_s` seconds, and
    pass `speed` times as fast. `hash_ids` (Mooncake's) name the blocks that prompts share. ValueError names the line.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    plans: list[tuple[float, RequestPlan]] = []
    for number, row in rows:
        names = {str(name).strip().lower(): value for name, value in row.items()}
        try:
            arrival_s = _seconds(_first(names, TIME_NAMES), unit_s)
            plan = RequestPlan(
                # an empty prompt is refused by servers, and an output has at least its first token
                input_len=max(1, int(_first(names, INPUT_NAMES))),
                output_len=max(1, int(_first(names, OUTPUT_NAMES))),
                prefix_ids=tuple(int(one) for one in names.get("hash_ids") or ()),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        plans.append((arrival_s, plan))
    if not plans:
        raise ValueError(f"{path} holds no request")
    plans.sort(key=lambda pair: pair[0])
    begin_s = plans[0][0]
    return [
        RequestPlan(
            input_len=plan.input_len, output_len=plan.output_len, prefix_ids=plan.prefix_ids,
            arrival_s=(arrival_s - begin_s) / speed,
        )
        for arrival_s, plan in plans[:limit]
    ]


def read_dataset(path: Path, count: Count, *, output_len: int | None = None) -> list[RequestPlan]:
    """The plans of a ShareGPT file (a JSON list of conversations) or of JSON lines, one prompt each.

    A line has `prompt`, `messages` (OpenAI's), `turns` (the first counts) or `conversations` (ShareGPT's: the first
    turn is the prompt, the second says how long an answer is), and may have a number of output tokens. `output_len`
    takes the place of what the file says. Lines without a prompt are left out. ValueError where nothing is left.
    """
    rows: Iterable[tuple[int, Any]]
    if path.suffix.lower() == ".json":
        content = _parse(path, path.read_text(encoding="utf-8-sig"), 1)
        if not isinstance(content, list):
            raise ValueError(f"{path} is no list of conversations: name a file of JSON lines .jsonl")
        rows = enumerate(content, 1)
    else:
        rows = _json_rows(path)
    plans = []
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}, entry {number} is no JSON object")
        plan = _plan_of(row, count, output_len)
        if plan is not None:
            plans.append(plan)
    if not plans:
        raise ValueError(
            f"{path} holds no prompt: an entry has one of prompt, messages, turns and conversations"
        )
    return plans


def choose(
    found: list[RequestPlan], num: int, max_model_len: int | None, rng: np.random.Generator, *, slack: float = 0.0
) -> list[RequestPlan]:
    """`num` of the plans of a file that fit, in a seeded order; all of them again where they are too few."""
    fitting, _, num_long = cut_to_fit(found, max_model_len, slack=slack)
    if not fitting:
        raise ValueError(f"no prompt of the data set fits in {max_model_len} tokens with its output: give --output-len")
    if num_long:
        note(f"{num_long} of {len(found)} prompts of the data set do not fit in {max_model_len} tokens with their "
             "outputs, and are left out")  # fmt: skip
    if num > len(fitting):
        note(f"the data set has {len(fitting)} prompts for {num} requests: a prefix cache may hold those sent again")
    order = np.concatenate([rng.permutation(len(fitting)) for _ in range(math.ceil(num / len(fitting)))])
    return [fitting[index] for index in order[:num]]


def sample_text(path: Path) -> str:
    """Some of the text of a data set, by which the tokens of the rest can be estimated."""
    plans = read_dataset(path, len)
    return "\n".join((plan.text or "")[:SAMPLE_CHARS] for plan in plans[:: -(-len(plans) // NUM_SAMPLES)])


def _plan_of(row: Mapping[str, Any], count: Count, output_len: int | None) -> RequestPlan | None:
    turns = row.get("conversations")
    answer = None
    text = row.get("prompt")
    messages: tuple[tuple[str, str], ...] = ()
    if isinstance(turns, list):
        said = [turn.get("value") for turn in turns[:2] if isinstance(turn, Mapping)]
        if len(said) < 2 or not all(isinstance(one, str) and one for one in said):
            return None
        text, answer = said
    elif isinstance(row.get("turns"), list):
        text = next(iter(row["turns"]), None)
    elif isinstance(row.get("messages"), list):
        messages = tuple(
            (str(one["role"]), one["content"]) for one in row["messages"]
            if isinstance(one, Mapping) and isinstance(one.get("content"), str) and "role" in one
        )  # fmt: skip
        text = "\n".join(content for _, content in messages)
    if not isinstance(text, str) or not text:
        return None
    if output_len is None:
        given = next((row[name] for name in OUTPUT_NAMES if isinstance(row.get(name), int)), None)
        output_len = given if given is not None else count(answer) if answer is not None else DEFAULT_OUTPUT_LEN
    return RequestPlan(
        input_len=max(1, count(text)), output_len=max(1, output_len), text=text, messages=messages
    )


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in (reader := csv.DictReader(file)):
            yield reader.line_num, {name: value for name, value in row.items() if name is not None}


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse(path, line, number)


def _parse(path: Path, text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise ValueError(f"it has none of the columns {', '.join(names)}")


def _seconds(value: Any, unit_s: float) -> float:
    """Of a number, or of a date (in UTC where it does not say)."""
    try:
        seconds = float(value) * unit_s
    except ValueError:
        date = datetime.fromisoformat(str(value).strip())
        return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"its time is {value}")
    return seconds
