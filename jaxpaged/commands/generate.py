"""jaxpaged generate: complete prompts. Also what it shares with chat: loading, and text printed as it comes."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from jaxpaged.commands.flags import beam_params, engine_options, sampling_params
from jaxpaged.engine.outputs import FailedRequestWarning
from jaxpaged.llm import LLM
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

STDIN = "-"


def load(options: argparse.Namespace, started: float) -> tuple[Any, float]:
    """The LLM and the seconds that its imports took."""
    warnings.simplefilter("ignore", FailedRequestWarning)  # each is printed as an error
    imports_s = time.perf_counter() - started
    llm = LLM(
        options.model, tokenizer=options.tokenizer, show_progress=not options.quiet, **engine_options(options)
    )
    return llm, imports_s


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    # a bad value is refused before anything is loaded
    params: SamplingParams | BeamSearchParams = beam_params(options) or sampling_params(options)
    prompts = _read_prompts(options.prompts)
    llm, imports_s = load(options, started)
    ready = time.perf_counter()
    if len(prompts) == 1 and isinstance(params, SamplingParams) and params.n == 1:
        outputs = [print_stream(llm, prompts[0], params, is_echoed=not options.no_echo)]
    else:
        outputs = llm.generate(prompts, params, use_tqdm=not options.quiet)
        for number, output in enumerate(outputs, 1):
            for completion in output.outputs:
                labels = [f"prompt {number}"] if len(prompts) > 1 else []
                print(f"--- {', '.join(labels + _labels(completion, params))}")
                print(("" if options.no_echo else output.prompt or "") + completion.text)
            _print_errors(output)
    if not options.quiet:
        _print_summary(llm, outputs, time.perf_counter() - ready, params)
    if options.verbose:
        _print_times(llm, outputs, imports_s, ready - started, started)
    return 1 if any(done.finish_reason == "error" for output in outputs for done in output.outputs) else 0


def _labels(completion: Any, params: SamplingParams | BeamSearchParams) -> list[str]:
    """What tells a completion from the others of its prompt."""
    if isinstance(params, BeamSearchParams):
        score = [] if completion.score is None else [f"score {completion.score:.4f}"]
        return [f"beam {completion.index + 1}", *score]
    return [f"sample {completion.index + 1}"] if params.n > 1 else []


def _read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts of the command line, with the text on stdin where one is "-" or none is given and it is piped in."""
    if given.count(STDIN) > 1:
        raise ValueError(f"stdin can be one prompt, but {STDIN} was given {given.count(STDIN)} times")
    if given and STDIN not in given:
        return list(given)
    remedy = 'give one, as in `jaxpaged generate "ROMEO:"`, or pipe one in, as in `echo ROMEO: | jaxpaged generate`'
    if sys.stdin is None or (sys.stdin.isatty() and not given):
        raise ValueError(f"there is no prompt: {remedy}")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not text in {error.encoding}: {error.reason}") from error
    text = text.removesuffix("\n").removesuffix("\r")  # the end of a line, which every tool adds
    if not text:
        raise ValueError(f"there is no prompt, and stdin is empty: {remedy}")
    return [text if prompt == STDIN else prompt for prompt in given or [STDIN]]


def print_stream(llm: Any, prompt: Any, params: SamplingParams, *, is_echoed: bool) -> Any:
    """Print text as it comes; returns the finished RequestOutput."""
    shown = 0
    output: Any = None
    for output in llm.stream(prompt, params):
        if is_echoed:  # only now, behind the bar of the warm-up
            print(prompt, end="")
            is_echoed = False
        text = output.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()
    _print_errors(output)
    return output


def _print_errors(output: Any) -> None:
    for reason in dict.fromkeys(done.stop_reason for done in output.outputs if done.finish_reason == "error"):
        print(f"jaxpaged: error: {output.request_id}: {reason}", file=sys.stderr)


def _print_summary(
    llm: Any, outputs: Sequence[Any], elapsed_s: float, params: SamplingParams | BeamSearchParams
) -> None:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    seed = f"; seed {params.seed}" if isinstance(params, SamplingParams) and params.temperature > 0 else ""
    firsts = [output.metrics.time_to_first_token_s for output in outputs if output.metrics.time_to_first_token_s]
    running_s = max(elapsed_s - llm.last_warm_up_s, 1e-9)
    stats = llm.stats()
    first = f"first token after {(min(firsts) - llm.last_warm_up_s) * 1e3:.0f} ms, " if firsts else ""
    print(
        f"[{num_prompt} prompt tokens, {num_generated} generated in {running_s:.2f} s: "
        f"{num_generated / running_s:.1f} tok/s; {first}{stats.num_blocks - 1} blocks, "
        f"{stats.num_preemptions} preemptions{seed}]",
        file=sys.stderr,
    )
    ends = [(output, done) for output in outputs for done in output.outputs if done.finish_reason == "length"]
    if params.max_tokens and any(len(done.token_ids) < params.max_tokens for _, done in ends):
        print(
            f"[ended by the length: prompt and output have at most max_model_len={llm.engine.max_model_len} tokens, "
            f"which leaves less than --max-tokens {params.max_tokens}]",
            file=sys.stderr,
        )


def _print_times(llm: Any, outputs: Sequence[Any], imports_s: float, ready_s: float, started: float) -> None:
    # a request arrives before its buckets are warmed
    first_s = min((output.metrics.time_to_first_token_s or 0.0) for output in outputs) - llm.last_warm_up_s
    stats = llm.stats()
    rows = (
        ("imports", imports_s),
        ("load", llm.load_s),
        ("engine (memory plan, cache, tokenizer)", ready_s - imports_s - llm.load_s),
        ("warm-up (compile or read compiled steps)", llm.warm_up_s),
        ("prompt to first token", first_s),
        ("start to first token", ready_s + llm.warm_up_s + first_s),
        ("start to end", time.perf_counter() - started),
    )
    for name, seconds in rows:
        print(f"  {name:<42} {seconds:8.2f} s", file=sys.stderr)
    print(f"  {'host time per step':<42} {stats.host_seconds_per_step * 1e3:8.2f} ms", file=sys.stderr)
    print(f"  {'compiles after warm-up':<42} {stats.num_compiles_after_warmup:8d}", file=sys.stderr)
