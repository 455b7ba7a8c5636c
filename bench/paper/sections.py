"""What the report says of each experiment: the question, the way, a plot, a table, what the figures mean."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.paper.plots import bars, lines

Result = dict[str, Any]
POLICIES = {"max": "whole length", "pow2": "next power of two", "oracle": "exact length", "paging": "paging"}


@dataclass
class Table:
    """Rows of text and numbers; a number is shown rounded and kept whole in its cell."""

    head: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def html(self) -> str:
        def cell(value: Any) -> str:
            if value is None:
                return "<td>&ndash;</td>"
            if isinstance(value, float):
                return f'<td data-value="{value!r}">{value:.3g}</td>'
            return f"<td>{html.escape(str(value))}</td>"

        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.head)
        body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass
class Content:
    """What a result gives."""

    plots: list[tuple[str, str]]
    """SVG and caption."""
    table: Table
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """An experiment; `bench` names the module whose result it reads."""

    key: str
    bench: str
    title: str
    figure: str
    asked: str
    how: str
    content: Callable[[Result], Content]
    not_measured: str


def _by_policy(result: Result) -> dict[str, Result]:
    """Rows with buddies, as in the paper, and paging."""
    return {row["policy"]: row for row in result["rows"] if row["has_buddies"] is not False}


def _policies(result: Result, value: str, paper: dict[str, float], unit: str, what: str) -> tuple[Any, Table]:
    rows = _by_policy(result)
    names = list(POLICIES)
    svg = bars(
        what, [POLICIES[name] for name in names],
        {"here": [rows[name][value] for name in names], "paper": [paper[name] for name in names]},
        unit=unit, paper=["paper"],
    )  # fmt: skip
    table = Table(["memory policy", "pieces", f"{unit}, here", "paper"])
    for row in result["rows"]:
        pieces = {True: "buddies", False: "ideally packed", None: "blocks"}[row["has_buddies"]]
        table.rows.append(
            (POLICIES[row["policy"]], pieces, row[value], None if pieces == "ideally packed" else paper[row["policy"]])
        )
    return svg, table


def memory(result: Result) -> Content:
    svg, table = _policies(
        result, "percent_of_memory_with_tokens", result["paper_percent_of_memory_with_tokens"], "% of memory",
        "memory that holds tokens",
    )  # fmt: skip
    rows = _by_policy(result)
    key = "percent_of_memory_with_tokens"
    return Content(
        [(svg, "Share of the KV memory that holds keys and values of tokens, while requests wait.")], table,
        f"Reservations leave most of the memory empty ({rows['max'][key]:.0f} to "
        f"{rows['oracle'][key]:.0f} % is used) even"
        f" when the length of every output is known beforehand; blocks fill {rows['paging'][key]:.0f} % of it.",
    )  # fmt: skip


def batching(result: Result) -> Content:
    svg, table = _policies(result, "mean_running", result["paper_requests"], "requests at once", "requests at once")
    rows, paper = _by_policy(result), result["paper_requests"]
    gains = {
        name: (rows["paging"]["mean_running"] / rows[name]["mean_running"], paper["paging"] / paper[name])
        for name in ("max", "oracle")
    }
    return Content(
        [(svg, "Requests that run at once, the mean over steps in which others wait.")], table,
        f"In the same memory paging runs {gains['max'][0]:.1f} times as many requests at once as reserving the whole "
        f"length (paper: {gains['max'][1]:.1f}) and {gains['oracle'][0]:.1f} times as many as reserving "
        "exactly what will "
        f"be needed (paper: {gains['oracle'][1]:.1f}).",
    )  # fmt: skip


def _name_of(row: Result) -> str:
    """Of a case of the rate experiment."""
    if row["method"] == "greedy":
        return str(row["lengths"])
    return f"{row['number']} {'samples' if row['method'] == 'sampling' else 'beams'}"


def _rates(result: Result, rows: Sequence[Result]) -> tuple[list[tuple[str, str]], Table]:
    factors = [str(factor) for factor in result["factors"]]
    head = ["requests", "clock", "memory policy"]
    for factor in factors:
        head += [f"requests/s at {float(factor):g}x", "paging's multiple"]
    table = Table([*head, "paper"])
    plots = []
    for row in rows:
        name = f"{_name_of(row)}, {row['clock']} clock"
        for curve in row["curves"]:
            cells: list[Any] = []
            for factor in factors:
                cells += [curve["sustained"][factor], curve["paging_sustains"][factor]]
            paper = row["paper_gains"].get(curve["contender"])
            told = None if paper is None else " to ".join(f"{value:g}x" for value in dict.fromkeys(paper))
            table.rows.append((_name_of(row), row["clock"], curve["contender"], *cells, told))
        if row["method"] == "greedy":
            series = {
                curve["contender"]: [(point["rate"], 1e3 * point["normalized_latency_s"]) for point in curve["points"]]
                for curve in row["curves"]
            }
            limits = [1e3 * factor * row["unloaded_s"] for factor in result["factors"]]
            plots.append((
                lines(name, series, x="requests a second", y="ms a token of output", limits=limits, has_log_y=True),
                f"{name}. Dashed: {', '.join(f'{factor:g}' for factor in result['factors'])} times the latency without "
                "load.",
            ))  # fmt: skip
    return plots, table


def _check(result: Result) -> str:
    errors = [
        f"{row['lengths']}, {row['method']} {row['number']}, {row['contender']}: {100 * row['latency_error']:+.0f} %"
        for row in result["validation"]
    ]
    return (
        "The clock is virtual: the real scheduler plans every step, no model runs. On the fitted clock "
        "a step takes what "
        f"steps of the live engine ({result['shape']} shape) took on this machine; its latencies differ from those of "
        f"requests served live by {'; '.join(errors) or 'an amount that was not measured'}. The roofline clock is "
        "calculated, not measured: the least time in which the peak rates of an "
        f"{result['roofline']['device']} allow a "
        f"step of {result['roofline']['model']}, which the paper served on it."
    )


def _gains(result: Result, rows: Sequence[Result]) -> str:
    factor = str(result["factors"][len(result["factors"]) // 2])
    told = []
    for row in rows:
        for curve in row["curves"]:
            gain = curve["paging_sustains"][factor]
            if curve["contender"] in ("max", "oracle") and gain is not None:
                told.append(f"{_name_of(row)}, {row['clock']} clock, against {curve['contender']}: {gain:.2f} times")
    shown = "; ".join(told) or "no rate was reached by two policies"
    return f"At {float(factor):g} times the latency without load paging sustains, as a multiple of the rate: {shown}."


def rate(result: Result) -> Content:
    rows = [row for row in result["rows"] if row["method"] == "greedy"]
    plots, table = _rates(result, rows)
    return Content(plots, table, f"{_gains(result, rows)} {_check(result)} Where a step takes as many times longer as "
                   "it has "
                   "more sequences (two cores), a larger batch gains little; where it waits for weights to be read "
                   "(the "
                   "paper's GPU), it gains nearly all of it.")  # fmt: skip


def samples(result: Result) -> Content:
    rows = [row for row in result["rows"] if row["method"] != "greedy"]
    plots, table = _rates(result, rows)
    factor = str(result["factors"][len(result["factors"]) // 2])
    for clock in dict.fromkeys(row["clock"] for row in rows):
        shown = [row for row in rows if row["clock"] == clock]
        series: dict[str, list[float | None]] = {
            name: [
                next((curve["paging_sustains"][factor] for curve in row["curves"] if curve["contender"] == name), None)
                for row in shown
            ]
            for name in ("oracle", "max")
        }
        plots.append((
            bars(f"paging's multiple, {clock} clock", [_name_of(row) for row in shown], series, unit="times the rate"),
            f"How many times the rate of a reservation paging sustains, {clock} clock, Alpaca-like lengths.",
        ))  # fmt: skip
    return Content(plots, table, f"{_gains(result, rows)} {_check(result)} Samples and beams of a request share "
                   "the blocks they have in common; a reservation is made for each of them.")  # fmt: skip


def sharing(result: Result) -> Content:
    rows = [row for row in result["rows"] if row["model"] == "demo"] or result["rows"]
    numbers = sorted({row["number"] for row in rows})
    saved = {(row["lengths"], row["method"], row["number"]): row["saved"] for row in rows}
    groups = list(dict.fromkeys(key[:2] for key in saved))
    names = [f"{method}\n{lengths}" for lengths, method in groups]
    ranges = [tuple(result["paper"][lengths][method]) for lengths, method in groups]
    bands = dict(zip(names, ranges, strict=True))
    svg = bars(
        "blocks saved", names, {str(number): [saved.get((*group, number)) for group in groups] for number in numbers},
        unit="% of blocks", bands=bands, digits=0,
    )  # fmt: skip
    table = Table(["model", "lengths", "method", "samples or beams", "% of blocks saved", "paper, 2 to 6"])
    for row in result["rows"]:
        low, high = result["paper"][row["lengths"]][row["method"]]
        paper = f"{low} to {high}"
        table.rows.append((row["model"], row["lengths"], row["method"], row["number"], row["saved"], paper))
    told = []
    for lengths, method in groups:
        values = [saved[key] for key in saved if key[:2] == (lengths, method)]
        told.append(f"{method}, {lengths}: {min(values):.0f} to {max(values):.0f} %")
    return Content([(svg, "Blocks that sharing saves, by number of samples or beams; grey: the paper's range.")], table,
                   f"Saved are: {'; '.join(told)}.")  # fmt: skip


def prefix(cases: Sequence[str]) -> Callable[[Result], Content]:
    def content(result: Result) -> Content:
        rows = [row for row in result["rows"] if row["case"] in cases]
        svg = bars(
            "gain of sharing", [row["case"] for row in rows],
            {"here": [row["gain"] for row in rows], "paper": [row["paper_gain"] for row in rows]},
            unit="times the throughput", digits=2, paper=["paper"],
        )  # fmt: skip
        table = Table(["requests", "tokens/s, shared", "not shared", "gain", "paper", "prompt tokens found, part"])
        for row in rows:
            rates = row["shared_tokens_per_s"]["median"], row["unshared_tokens_per_s"]["median"]
            table.rows.append((row["case"], *map(float, rates), row["gain"], row["paper_gain"], row["cached_fraction"]))
        told = "; ".join(f"{row['case']}: {row['gain']:.2f} times" for row in rows)
        return Content([(svg, "Output tokens a second with shared prefixes over those without.")], table,
                       f"Output tokens a second with sharing are, of those without, {told}.")  # fmt: skip

    return content


def kernel(result: Result) -> Content:
    cases = list(dict.fromkeys((row["num_seqs"], row["context"]) for row in result["rows"]))
    names = list(dict.fromkeys(row["implementation"] for row in result["rows"]))
    times = {(row["num_seqs"], row["context"], row["implementation"]): row for row in result["rows"]}
    series = {
        name: [times[*case, name]["us_a_layer"] if (*case, name) in times else None for case in cases] for name in names
    }
    svg = bars("attention", [f"{seqs} x {context}" for seqs, context in cases], series, unit="microseconds", digits=0)
    table = Table(["sequences x context", "attention", "memory", "microseconds a layer", "least"])
    for row in result["rows"]:
        table.rows.append((
            f"{row['num_seqs']} x {row['context']}", row["implementation"],
            "blocks" if row["is_paged"] else "one piece", row["us_a_layer"], row["us_a_layer_min"],
        ))  # fmt: skip
    overheads = [row["overhead"] for row in result["overheads"] if row["overhead"] is not None]
    low, high = (100 * value for value in result["paper_overhead"])
    told = f"{100 * min(overheads):+.0f} to {100 * max(overheads):+.0f} %" if overheads else "not known"
    return Content([(svg, "Time of attention in one layer.")], table,
                   f"The fastest attention over blocks takes {told} more time than the fastest over contiguous memory "
                   f"(paper: {low:.0f} to {high:.0f} % more).")  # fmt: skip


def block_size(result: Result) -> Content:
    series: dict[str, list[tuple[float, float]]] = {}
    table = Table(["lengths", "block size", "tokens/s", "requests at once", "% of memory with tokens", "paper"])
    for row in result["rows"]:
        rate = row["tokens_per_s"]["median"]
        series.setdefault(row["lengths"], []).append((row["block_size"], rate))
        low, high = result["paper_good"][row["lengths"]]
        table.rows.append((row["lengths"], row["block_size"], float(rate), float(row["mean_running"]),
                           float(row["percent_of_memory_with_tokens"]),
                           "good" if low <= row["block_size"] <= high else "worse"))  # fmt: skip
    sizes = sorted({row["block_size"] for row in result["rows"]})
    svg = lines("block size", series, x="tokens in a block", y="tokens a second", has_log_x=True, ticks=sizes)
    told = []
    for name, points in series.items():
        best = max(rate for _, rate in points)
        good = [f"{size:g}" for size, rate in points if rate >= 0.95 * best]
        told.append(f"{name}: {', '.join(good)} (paper: {' to '.join(map(str, result['paper_good'][name]))})")
    return Content([(svg, "Tokens a second, end to end, in equal memory.")], table,
                   f"Within 5 % of the best are blocks of, {'; '.join(told)}.")  # fmt: skip


def preemption(result: Result) -> Content:
    alone = {
        way: [(row["block_size"], row[f"{way}_ms"]["median"]) for row in result["alone"]]
        for way in ("swap", "recompute")
    }
    whole: dict[str, list[tuple[float, float]]] = {}
    for row in result["end_to_end"]:
        whole.setdefault(row["way"], []).append((row["block_size"], row["tokens_per_s"]["median"]))
    sizes = [row["block_size"] for row in result["alone"]]
    options: dict[str, Any] = {"x": "tokens in a block", "has_log_x": True, "ticks": sizes}
    table = Table(["block size", "swap, ms", "recompute, ms", "swap, tokens/s", "recompute, tokens/s", "preempted"])
    for row in result["alone"]:
        ends = {each["way"]: each for each in result["end_to_end"] if each["block_size"] == row["block_size"]}
        table.rows.append((
            row["block_size"], float(row["swap_ms"]["median"]), float(row["recompute_ms"]["median"]),
            *(float(ends[way]["tokens_per_s"]["median"]) for way in ("swap", "recompute")),
            ends["swap"]["num_preemptions"],
        ))  # fmt: skip
    ratios = [row["recompute_ms"]["median"] / row["swap_ms"]["median"] for row in result["alone"]]
    return Content(
        [(lines("alone", alone, y="milliseconds", has_log_y=True, **options),
          f"{result['alone'][0]['num_tokens']} tokens copied out and in again, or computed again."),
         (lines("end to end", whole, y="tokens a second", **options), "The same requests with much preemption.")],
        table,
        f"To compute the tokens again takes {min(ratios):.1f} to {max(ratios):.1f} times as long as to "
        "copy their blocks "
        f"out and in again. The paper: {result['paper_says']}. On a CPU a swap is a copy within one "
        "memory, and cheaper "
        "than over the link of a GPU.",
    )  # fmt: skip


GATES = (
    "A request begins when its policy has a piece of memory for it: the whole length of the model, "
    "the output rounded up "
    "to a power of two, or exactly what it will need, which nobody knows beforehand. Pieces come "
    "from a buddy allocator, as "
    "in the paper; ideally packed ones lose no room between them. Lengths are log-normal with the "
    "means of ShareGPT's chats."
)
RATE = (
    "Requests arrive at random (Poisson); of each the time from arrival to its last token is "
    "divided by the length of its "
    "output, and the mean is told."
)
SECTIONS = (
    Section(key="memory", bench="batching", title="How much of the memory holds tokens", figure="Figure 2",
            asked="Of the memory for keys and values, which part holds some?", how=GATES, content=memory,
            not_measured="The paper splits waste into its kinds; here only what is used is told."),
    Section(key="batching", bench="batching", title="Requests at once", figure="Figure 13", how=GATES, content=batching,
            asked="How many requests run at once in the same memory?",
            not_measured="The paper's model and its real chats; weights are random, which does not change a count."),
    Section(key="rate", bench="rate", title="Request rate at equal latency", figure="Figure 12", how=RATE, content=rate,
            asked="How many requests a second may come before their latency grows beyond bounds?",
            not_measured="Whole curves in wall time, and any GPU or TPU."),
    Section(key="samples", bench="rate", title="Request rate with samples and beams", figure="Figure 14", how=RATE,
            asked="And when each request wants several outputs?", content=samples,
            not_measured="What a contiguous system pays to copy beams: the reservations here are spared it, and share "
                         "computing. Beams fork by random scores on the virtual clock."),
    Section(key="sharing", bench="sharing", title="Blocks saved by sharing", figure="Figure 15", content=sharing,
            asked="How many blocks do samples and beams of one request save?",
            how="The engine counts blocks held and blocks named in tables, over all steps.",
            not_measured="The paper's model and real texts."),
    Section(key="prefix", bench="prefix", title="Shared prefix: translation", figure="Figure 16",
            asked="What is it worth that requests share the examples before their question?",
            how="The same requests with and without prefix caching, in turn, from an empty cache.",
            content=prefix(("one-shot", "five-shot")), not_measured="Request rates; throughput is told."),
    Section(key="chat", bench="prefix", title="Chat and questions about one text", figure="Figure 17",
            asked="And when each prompt holds all that was said before, or one long text?",
            how="Conversations of six rounds, and eight questions about each text; with and without prefix caching.",
            content=prefix(("chat", "retrieval")), not_measured="Request rates; the paper has no retrieval."),
    Section(key="kernel", bench="kernel", title="Attention over blocks", figure="Figure 18a", content=kernel,
            asked="What does attention itself lose when tokens lie in scattered blocks?",
            how="One layer's decodes on the same keys and values, in blocks and in one piece, in turn.",
            not_measured="Devices other than the one named below."),
    Section(key="block-size", bench="block_size", title="Block size", figure="Figure 18b", content=block_size,
            asked="How many tokens should a block hold?",
            how="The same requests at once in equal memory, for each block size in turn.",
            not_measured="Latency at a fixed rate, which the paper tells: here throughput."),
    Section(key="preemption", bench="preemption", title="Swap or recompute", figure="Figure 19", content=preemption,
            asked="When memory runs out, is it better to move a request's blocks away or to compute them again?",
            how="Both alone, by block size; then both end to end under pressure, in turn.",
            not_measured="The link of a GPU or TPU."),
)  # fmt: skip
