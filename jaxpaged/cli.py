"""The command line: jaxpaged generate | chat | serve | batch | convert | plan | info.

A verb imports what it needs when it runs.
"""

import argparse
import dataclasses
import difflib
import errno
import importlib
import importlib.metadata
import os
import platform
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NoReturn, get_args, get_origin

from jaxpaged.config import OPTIONS
from jaxpaged.interrupts import exiting_interrupts, insistent_interrupts
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.server.config import OPTIONS as SERVER_OPTIONS
from jaxpaged.server.config import ServerConfig

STDIN = "-"
STDERR_NUMBER = 2
ROOMS = ("jaxpaged", "converters", "pallas_kernels")
"""The packages of this project."""
SAMPLING_FLAGS = {
    "n": (int, 1, "samples per prompt"),
    "max_tokens": (int, 64, "most tokens to generate"),
    "temperature": (float, 0.0, "0 is greedy"),
    "top_p": (float, 1.0, "keep the most likely tokens of this probability mass"),
    "top_k": (int, 0, "keep this many of the most likely tokens; 0 is off"),
    "min_p": (float, 0.0, "keep tokens at least this fraction as likely as the likeliest"),
    "repetition_penalty": (float, 1.0, "above 1 discourages repetition"),
    "seed": (int | None, None, "same seed, same text; None draws one, which the summary tells"),
}
PYTHON_ONLY = {field.name for field in dataclasses.fields(SamplingParams)} - {*SAMPLING_FLAGS, "stop"}
"""Sampling parameters without a flag."""
NO_FLAGS = ("seed", "max_logprobs", "logprobs_mode")
"""Engine options without a flag where a verb generates: a generation's seed is a sampling flag, and no such verb prints
log-probabilities."""
SERVER_EXTRA = ("starlette", "uvicorn", "pydantic", "prometheus_client", "h11", "anyio")
"""What the verbs serve and batch import that is not installed without the extra."""
VLLM_FLAGS = {
    "gpu_memory_utilization": "vLLM's name of --device-memory-fraction",
    "swap_space": "vLLM's name of --host-memory-bytes, in GiB",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. A ValueError becomes one line and exit code 2, an OSError one and 1."""
    with _forgiving_stderr():
        return _run(arguments, time.perf_counter())


def _run(arguments: Sequence[str] | None, started: float) -> int:
    try:
        with exiting_interrupts():
            options = make_parser().parse_args(arguments)
            if sys.stdout is None:
                raise OSError(errno.EBADF, "it is closed")
            importlib.import_module(options.module)  # the verb's imports, while an interrupt ends them well
        with insistent_interrupts(), warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, is_quiet=getattr(options, "quiet", False))
            code = options.run(options, started)
            sys.stdout.flush()  # what cannot be written shows here, not when the interpreter ends
            return code
    except ValueError as error:
        print(f"jaxpaged: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in SERVER_EXTRA:
            raise
        remedy = "it comes with the extra `server`: pip install 'jaxpaged[server]'"
        print(f"jaxpaged: error: {error.name} is not installed; {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxpaged: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        _drop_output()
        reason = error.strerror or error
        if isinstance(error, BrokenPipeError):
            reason = "the reader of the output has gone"
        elif error.filename is None:
            reason = f"the output cannot be written: {reason}"
        else:
            reason = f"{error.filename}: {reason}"
        print(f"jaxpaged: error: {reason}", file=sys.stderr)
        return 1


class _Forgiving:
    """A text stream that sends everything nowhere from the first write that fails on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # what is left in its buffer goes there too: else the interpreter would end with an error of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def _forgiving_stderr() -> Iterator[None]:
    """Bars, summaries and messages that cannot be written are lost, and not the output with them."""
    stderr = sys.stderr
    if stderr is None:  # closed: its number must not become that of a file
        sink = os.open(os.devnull, os.O_WRONLY)
        if sink != STDERR_NUMBER:
            os.dup2(sink, STDERR_NUMBER)
        sys.stderr = os.fdopen(STDERR_NUMBER, "w", closefd=False)
        yield
        return
    sys.stderr = _Forgiving(stderr)
    try:
        yield
    finally:
        sys.stderr = stderr


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None,
    *, is_quiet: bool,
) -> None:
    """A warning as one line; with --quiet only of what concerns the result, which are those of this project."""
    if is_quiet and _is_foreign(filename):
        return
    print(f"jaxpaged: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _is_foreign(filename: str) -> bool:
    """Whether a warning was raised for code outside this project: jax, for one, warns of a cache it cannot write."""
    return not any(f"{os.sep}{room}{os.sep}" in filename for room in ROOMS)


def _drop_output() -> None:
    """Where stdout takes no more, let the interpreter not complain again when it flushes what is left."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """One that refuses in one line, with what to use instead where that can be told, and points to the verb's help."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice: 'float16'" in message or "invalid choice: 'half'" in message:
            message += "; float16 is not computed in: use float32, which holds it exactly, or bfloat16, as small"
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{options.parser.hint(unknown[0])}")
        return options

    def hint(self, argument: str) -> str:
        """What may have been meant by an argument that is not known; empty where nobody can tell."""
        flag = argument.split("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if name in PYTHON_ONLY:
            return f" ({name} has no flag: use it from Python, as SamplingParams({name}=...))"
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; engine options come from the fields of EngineConfig."""
    parser = _Parser(
        prog="jaxpaged", description="Paged inference of language models in pure JAX, on TPU, CUDA GPU and CPU."
    )
    parser.add_argument("--version", action="version", version=f"jaxpaged {importlib.metadata.version('jaxpaged')}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    # an abbreviation would change its meaning with every new flag
    def add_verb(name: str, **facts: Any) -> Any:
        verb: argparse.ArgumentParser = verbs.add_parser(name, allow_abbrev=False, **facts)
        verb.set_defaults(parser=verb)
        return verb

    generate = add_verb("generate", help="complete prompts")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to go on with; - or none: that on stdin")
    generate.add_argument("--no-echo", action="store_true", help="print only what was generated, not the prompt")
    generate.add_argument("--stop", action="append", help="end at this string; may be given again")
    generate.set_defaults(run=_generate, module="jaxpaged.llm")

    chat = add_verb("chat", help="talk with a model that has a chat template")
    chat.add_argument("--system", help="system message")
    chat.set_defaults(run=_chat, module="jaxpaged.llm")

    for verb in (generate, chat):
        verb.add_argument("--verbose", action="store_true", help="print where the time went")
        verb.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
        for name, (kind, default, text) in SAMPLING_FLAGS.items():
            if name != "n" or verb is generate:  # a conversation has one answer
                verb.add_argument(
                    _flag(name), type=_kind(kind)[0], default=default, help=f"{text} (default: {default})"
                )
        _add_engine_flags(verb)

    serve = add_verb("serve", help="an HTTP server with OpenAI's API")
    serve.set_defaults(run=_serve, module="jaxpaged.server.process")
    _add_flags(serve.add_argument_group("server"), SERVER_OPTIONS)

    batch = add_verb("batch", help="answer a file of requests in OpenAI's batch format")
    batch.add_argument("requests", metavar="REQUESTS", help="JSON lines, one request each")
    batch.add_argument("-o", "--output", required=True, metavar="ANSWERS", help="JSON lines, appended as answers come")
    batch.add_argument("--resume", action="store_true", help="do only what ANSWERS lacks")
    batch.add_argument("--overwrite", action="store_true", help="replace ANSWERS if it is there")
    batch.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
    batch.add_argument("--served-model-name", help="name of the model in the requests (default: the model as given)")
    batch.set_defaults(run=_batch, module="jaxpaged.server.batch")

    serve.add_argument("model_name", metavar="MODEL", nargs="?", help="the same as --model")
    for verb in (serve, batch):
        _add_engine_flags(verb, without=())

    convert = add_verb("convert", help="convert a checkpoint between the Hugging Face, native and Orbax formats")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", metavar="DST")
    convert.add_argument(
        "--to", choices=("native", "huggingface", "orbax"), default="native", help="format of DST (default: native)"
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="type to store (default: the checkpoint's)")
    convert.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    convert.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    convert.set_defaults(run=_convert, module="jaxpaged.llm")

    plan = add_verb("plan", help="weights, KV blocks and activations against the device, before loading")
    plan.add_argument("model_name", metavar="MODEL")
    _add_engine_flags(plan, with_model=False)
    plan.set_defaults(run=_plan, module="jaxpaged.llm")

    models = add_verb("models", help="architectures that are served, as a table in Markdown")
    models.set_defaults(run=_models, module="jaxpaged.models.registry")

    info = add_verb("info", help="versions, devices, and which attention kernels are usable and why")
    info.set_defaults(run=_info, module="pallas_kernels")
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_engine_flags(
    parser: argparse.ArgumentParser, *, with_model: bool = True, without: Sequence[str] = NO_FLAGS
) -> None:
    if with_model:
        parser.add_argument("--model", default="demo", help="model folder, or demo (default: demo)")
        parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")
    group = parser.add_argument_group("engine")
    _add_flags(group, [option for option in OPTIONS if option.name not in without])
    for name, text in VLLM_FLAGS.items():
        group.add_argument(_flag(name), type=float, default=argparse.SUPPRESS, help=text)


def _add_flags(group: Any, options: Iterable[dataclasses.Field[Any]]) -> None:
    """A flag for each field of a config; one that is not given leaves no trace, so that the config's default holds."""
    for option in options:
        kind, choices = _kind(option.type)
        help_text = f"{option.metadata['help']} (default: {option.default})"
        if kind is bool:
            group.add_argument(
                _flag(option.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text
            )
        else:
            group.add_argument(
                _flag(option.name), type=kind, choices=choices, default=argparse.SUPPRESS, help=help_text
            )


def _kind(annotation: Any) -> tuple[Any, tuple[str, ...] | None]:
    """The parser and the choices of a field's type."""
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    parts = get_args(annotation) or (annotation,)
    words = {word: word for part in parts if get_origin(part) is Literal for word in get_args(part)}
    if type(None) in parts:
        words["None"] = None
    (kind,) = (part for part in parts if part is not type(None) and get_origin(part) is not Literal)
    return (_or_words(kind, words) if words else kind), None


def _or_words(kind: type, words: Mapping[str, Any]) -> Callable[[str], Any]:
    """A parser of values of `kind` and of a few words beside them, in any case."""
    of_word = {word.lower(): value for word, value in words.items()}

    def parse(text: str) -> Any:
        if text.lower() in of_word:
            return of_word[text.lower()]
        try:
            return kind(text)
        except ValueError:
            noun = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is neither {noun} nor {' nor '.join(words)}") from None

    return parse


def _engine_options(options: argparse.Namespace, *, without: Sequence[str] = NO_FLAGS) -> dict[str, Any]:
    names = [*(option.name for option in OPTIONS if option.name not in without), *VLLM_FLAGS]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _sampling_params(options: argparse.Namespace) -> SamplingParams:
    """The parameters of all prompts; where they sample, with a seed that the user can give again."""
    values = {name: getattr(options, name) for name in SAMPLING_FLAGS if hasattr(options, name)}
    if values["seed"] is None and values["temperature"] > 0:
        values["seed"] = secrets.randbelow(2**31)
    return SamplingParams(stop=getattr(options, "stop", None), **values)


def _load(options: argparse.Namespace, started: float) -> tuple[Any, float]:
    """The LLM and the seconds that its imports took."""
    from jaxpaged.engine.outputs import FailedRequestWarning  # noqa: PLC0415  a verb imports what it needs
    from jaxpaged.llm import LLM  # noqa: PLC0415

    warnings.simplefilter("ignore", FailedRequestWarning)  # each is printed as an error
    imports_s = time.perf_counter() - started
    llm = LLM(
        options.model, tokenizer=options.tokenizer, show_progress=not options.quiet, **_engine_options(options)
    )
    return llm, imports_s


def _generate(options: argparse.Namespace, started: float) -> int:
    params = _sampling_params(options)  # a bad value is refused before anything is loaded
    prompts = _read_prompts(options.prompts)
    llm, imports_s = _load(options, started)
    ready = time.perf_counter()
    if len(prompts) == 1 and params.n == 1:
        outputs = [_print_stream(llm, prompts[0], params, is_echoed=not options.no_echo)]
    else:
        outputs = llm.generate(prompts, params, use_tqdm=not options.quiet)
        for number, output in enumerate(outputs, 1):
            for completion in output.outputs:
                labels = [f"prompt {number}"] if len(prompts) > 1 else []
                labels += [f"sample {completion.index + 1}"] if params.n > 1 else []
                print(f"--- {', '.join(labels)}")
                print(("" if options.no_echo else output.prompt or "") + completion.text)
            _print_errors(output)
    if not options.quiet:
        _print_summary(llm, outputs, time.perf_counter() - ready, params)
    if options.verbose:
        _print_times(llm, outputs, imports_s, ready - started, started)
    return 1 if any(done.finish_reason == "error" for output in outputs for done in output.outputs) else 0


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


def _print_stream(llm: Any, prompt: Any, params: SamplingParams, *, is_echoed: bool) -> Any:
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


def _print_summary(llm: Any, outputs: Sequence[Any], elapsed_s: float, params: SamplingParams) -> None:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    firsts = [output.metrics.time_to_first_token_s for output in outputs if output.metrics.time_to_first_token_s]
    running_s = max(elapsed_s - llm.last_warm_up_s, 1e-9)
    stats = llm.stats()
    first = f"first token after {(min(firsts) - llm.last_warm_up_s) * 1e3:.0f} ms, " if firsts else ""
    print(
        f"[{num_prompt} prompt tokens, {num_generated} generated in {running_s:.2f} s: "
        f"{num_generated / running_s:.1f} tok/s; {first}{stats.num_blocks - 1} blocks, "
        f"{stats.num_preemptions} preemptions{f'; seed {params.seed}' if params.temperature > 0 else ''}]",
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


def _chat(options: argparse.Namespace, started: float) -> int:
    params = _sampling_params(options)
    llm, _ = _load(options, started)
    messages: list[dict[str, str]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    tokenizer = llm.engine.tokenizer
    if tokenizer is None or not tokenizer.has_chat_template:
        raise ValueError(
            f"model {options.model!r} has no chat template: use `jaxpaged generate`, or a model that was tuned to chat"
        )
    max_model_len = llm.engine.max_model_len
    if sys.stdin.isatty() and not options.quiet:
        seed = f"; seed {params.seed}" if params.temperature > 0 else ""
        print(f"[a line is a message to the model; Ctrl-D ends the conversation{seed}]", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if not any(message["role"] == "user" for message in messages):
                print("jaxpaged: there was no message: a line of text is one", file=sys.stderr)
            print()
            return 0
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        kept, prompt_token_ids = _fit_conversation(tokenizer, messages, max_model_len, options.max_tokens)
        if len(prompt_token_ids) >= max_model_len:
            print(
                f"jaxpaged: this message does not fit into the model's context: with what stands around it, it has "
                f"{len(prompt_token_ids)} tokens, and max_model_len is {max_model_len}; send a shorter one",
                file=sys.stderr,
            )
            del messages[-1]
            continue
        if len(kept) < len(messages):
            turns = (len(messages) - len(kept)) // 2
            print(
                f"jaxpaged: the conversation has outgrown the model's context (max_model_len={max_model_len}): its "
                f"oldest {'turn is' if turns == 1 else f'{turns} turns are'} forgotten",
                file=sys.stderr,
            )
        messages = kept
        output = _print_stream(llm, {"prompt_token_ids": prompt_token_ids}, params, is_echoed=False)
        messages.append({"role": "assistant", "content": output.outputs[0].text})


def _fit_conversation(
    tokenizer: Any, messages: list[dict[str, str]], max_model_len: int, max_tokens: int
) -> tuple[list[dict[str, str]], list[int]]:
    """The conversation without its oldest turns where it has outgrown the context, and its token ids.

    The system message and the last message stay, whether or not they fit. The answer is left `max_tokens`, or half
    the context if that is less.
    """
    room = max_model_len - min(max_tokens, max_model_len // 2)
    num_system = 1 if messages[0]["role"] == "system" else 0
    for start in range(num_system, len(messages), 2):
        kept = messages[:num_system] + messages[start:]
        prompt_token_ids = tokenizer.encode_chat(kept, add_generation_prompt=True)
        if len(prompt_token_ids) <= room:
            break
    return kept, prompt_token_ids


def _serve(options: argparse.Namespace, started: float) -> int:
    from jaxpaged.llm import LLM, engine_config_from, resolve_folder  # noqa: PLC0415  a verb imports what it needs
    from jaxpaged.server.process import serve  # noqa: PLC0415

    if options.model_name is not None and options.model != "demo":
        raise ValueError("the model was given twice: as MODEL and as --model")
    model = options.model_name or options.model
    names = [option.name for option in SERVER_OPTIONS]
    config = ServerConfig(**{name: getattr(options, name) for name in names if hasattr(options, name)})
    engine_options = _engine_options(options, without=())
    engine_config_from(engine_options)  # a bad value is refused before anything is loaded
    resolve_folder(model)
    is_watched = sys.stderr.isatty()  # bars are for people; the log is for both
    return serve(
        model, lambda: LLM(model, tokenizer=options.tokenizer, show_progress=is_watched, **engine_options), config
    )


def _batch(options: argparse.Namespace, started: float) -> int:
    from jaxpaged.llm import LLM  # noqa: PLC0415  a verb imports what it needs
    from jaxpaged.server.batch import run_batch  # noqa: PLC0415

    engine_options = _engine_options(options, without=())
    return run_batch(
        options.requests,
        options.output,
        load=lambda: LLM(
            options.model, tokenizer=options.tokenizer, show_progress=not options.quiet, **engine_options
        ),
        model_name=options.served_model_name or options.model,
        is_resumed=options.resume,
        is_overwriting=options.overwrite,
        is_quiet=options.quiet,
    )


def _convert(options: argparse.Namespace, started: float) -> int:
    from converters.formats import convert  # noqa: PLC0415  a verb imports what it needs
    from jaxpaged.llm import resolve_folder  # noqa: PLC0415

    source = resolve_folder(options.source)
    report = convert(
        source,
        options.target,
        to=options.to,
        dtype=options.dtype,
        overwrite=options.overwrite,
        show_progress=not options.quiet,
    )
    if not options.quiet:
        print(report)
    return 0


def _plan(options: argparse.Namespace, started: float) -> int:
    from jaxpaged.llm import plan_for  # noqa: PLC0415  a verb imports what it needs

    print(plan_for(options.model_name, **_engine_options(options)))
    return 0


def _models(options: argparse.Namespace, started: float) -> int:
    from jaxpaged.models.registry import support_matrix  # noqa: PLC0415  a verb imports what it needs

    print(support_matrix())
    return 0


def _info(options: argparse.Namespace, started: float) -> int:
    import jax  # noqa: PLC0415  a verb imports what it needs

    import pallas_kernels  # noqa: PLC0415
    from jaxpaged.models.registry import MODELS  # noqa: PLC0415

    print(f"python        {platform.python_version()} on {platform.platform()}")
    for name in ("jaxpaged", "jax", "jaxlib", "flax", "numpy", "transformers", "orbax-checkpoint"):
        print(f"{name:<13} {importlib.metadata.version(name)}")
    for device in jax.devices():
        print(f"device        {device.id}: {device.device_kind} ({device.platform})")
    print(f"models        {', '.join(sorted(MODELS))}")
    print("attention kernels:")
    print(pallas_kernels.explain())
    reason = pallas_kernels.linear_misfit("native_cpu", "float32")
    print(f"linear layers in float32: {'native_cpu' if reason is None else f'xla (native_cpu {reason})'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
