"""Flags of the verbs: those of the engine come from the fields of EngineConfig, those of sampling from a table."""

import argparse
import dataclasses
import difflib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from jaxpaged.config import OPTIONS
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

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
BEAM_FLAGS = {
    "beam_width": (int | None, None, "search with this many beams instead of drawing; all are printed, best first"),
    "length_penalty": (float, 1.0, "of beams: a score is divided by length ** this, so that more favours long texts"),
    "early_stopping": (bool, False, "of beams: end once beam_width texts are complete"),
}
SHARED_FLAGS = ("max_tokens",)
"""Sampling flags that searches with beams read, too."""
PYTHON_ONLY = {field.name for field in dataclasses.fields(SamplingParams)} - {*SAMPLING_FLAGS, "stop"}
"""Sampling parameters without a flag."""
FOREIGN_NAMES = {"num_beams": "beam_width", "max_new_tokens": "max_tokens"}
"""Names of transformers, and the flags that they stand for."""
NO_FLAGS = ("seed", "max_logprobs", "logprobs_mode")
"""Engine options without a flag where a verb generates: a generation's seed is a sampling flag, and no such verb prints
log-probabilities."""
VLLM_FLAGS = {
    "gpu_memory_utilization": "vLLM's name of --device-memory-fraction",
    "swap_space": "vLLM's name of --host-memory-bytes, in GiB",
}


class Parser(argparse.ArgumentParser):
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
        known = self._option_string_actions
        foreign = "--" + FOREIGN_NAMES.get(name, "").replace("_", "-")
        near = [foreign] if foreign in known else difflib.get_close_matches(flag, known, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


def flag(name: str) -> str:
    """The flag of an option's name."""
    return "--" + name.replace("_", "-")


def add_engine_flags(
    parser: argparse.ArgumentParser, *, with_model: bool = True, without: Sequence[str] = NO_FLAGS
) -> None:
    if with_model:
        parser.add_argument("--model", default="demo", help="model folder, or demo (default: demo)")
        parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")
    group = parser.add_argument_group("engine")
    add_flags(group, [option for option in OPTIONS if option.name not in without])
    for name, text in VLLM_FLAGS.items():
        group.add_argument(flag(name), type=float, default=argparse.SUPPRESS, help=text)


def add_generation_flags(parser: argparse.ArgumentParser, flags: Mapping[str, tuple[Any, Any, str]]) -> None:
    """A flag for each row of such a table as SAMPLING_FLAGS."""
    for name, (kind, default, text) in flags.items():
        how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": parser_of(kind)[0]}
        shown = "" if kind is bool else f" (default: {default})"
        parser.add_argument(flag(name), default=default, help=text + shown, **how)


def add_flags(group: Any, options: Iterable[dataclasses.Field[Any]]) -> None:
    """A flag for each field of a config; one that is not given leaves no trace, so that the config's default holds."""
    for option in options:
        kind, choices = parser_of(option.type)
        help_text = f"{option.metadata['help']} (default: {option.default})"
        if kind is bool:
            group.add_argument(
                flag(option.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text
            )
        else:
            group.add_argument(
                flag(option.name), type=kind, choices=choices, default=argparse.SUPPRESS, help=help_text
            )


def parser_of(annotation: Any) -> tuple[Any, tuple[str, ...] | None]:
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


def engine_options(options: argparse.Namespace, *, without: Sequence[str] = NO_FLAGS) -> dict[str, Any]:
    names = [*(option.name for option in OPTIONS if option.name not in without), *VLLM_FLAGS]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """The parameters of all prompts; where they sample, with a seed that the user can give again."""
    values = {name: getattr(options, name) for name in SAMPLING_FLAGS if hasattr(options, name)}
    if values["seed"] is None and values["temperature"] > 0:
        values["seed"] = secrets.randbelow(2**31)
    return SamplingParams(stop=getattr(options, "stop", None), **values)


def beam_params(options: argparse.Namespace) -> BeamSearchParams | None:
    """The search that all prompts get; None where none is asked for. ValueError for flags that would do nothing."""
    given = {name for name, row in (SAMPLING_FLAGS | BEAM_FLAGS).items() if getattr(options, name) != row[1]}
    is_search = "beam_width" in given
    idle = given & SAMPLING_FLAGS.keys() - set(SHARED_FLAGS) if is_search else given & BEAM_FLAGS.keys()
    if idle:
        name = min(idle)
        why = "a search with beams draws nothing" if is_search else "it is of a search with beams"
        remedy = f"leave out {flag(name)} or --beam-width" if is_search else "give --beam-width too, or leave it out"
        raise ValueError(f"{flag(name)} has no effect here, as {why}: {remedy}")
    if not is_search:
        return None
    values = {name: getattr(options, name) for name in (*BEAM_FLAGS, *SHARED_FLAGS)}
    return BeamSearchParams(stop=options.stop, **values)
