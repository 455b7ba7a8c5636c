"""The command line: jaxpaged generate | chat | serve | batch | convert | plan | models | info | bench.

What a verb does is in `jaxpaged.commands`, imported when it runs.
"""

import argparse
import errno
import importlib
import importlib.metadata
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxpaged.commands.flags import (
    BEAM_FLAGS,
    SAMPLING_FLAGS,
    Parser,
    add_engine_flags,
    add_flags,
    add_generation_flags,
)
from jaxpaged.commands.output import drop_output, forgiving_stderr, show_warning
from jaxpaged.interrupts import exiting_interrupts, insistent_interrupts
from jaxpaged.server.config import OPTIONS as SERVER_OPTIONS

SERVER_EXTRA = ("starlette", "uvicorn", "pydantic", "prometheus_client", "h11", "anyio")
"""What the verbs serve and batch import that is not installed without the extra."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. A ValueError becomes one line and exit code 2, an OSError one and 1."""
    with forgiving_stderr():
        return _run(arguments, time.perf_counter())


def _run(arguments: Sequence[str] | None, started: float) -> int:
    try:
        with exiting_interrupts():
            options = make_parser().parse_args(arguments)
            if sys.stdout is None:
                raise OSError(errno.EBADF, "it is closed")
            # while an interrupt ends a verb's imports well
            verb: Any = importlib.import_module(f"jaxpaged.commands.{options.module}")
        with insistent_interrupts(), warnings.catch_warnings():
            warnings.showwarning = partial(show_warning, is_quiet=getattr(options, "quiet", False))
            code = int(verb.run(options, started))
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
        drop_output()
        reason = error.strerror or error
        if isinstance(error, BrokenPipeError):
            reason = "the reader of the output has gone"
        elif error.filename is None:
            reason = f"the output cannot be written: {reason}"
        else:
            reason = f"{error.filename}: {reason}"
        print(f"jaxpaged: error: {reason}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets `module`, the one in `jaxpaged.commands` that runs it."""
    parser = Parser(
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
    generate.set_defaults(module="generate")

    chat = add_verb("chat", help="talk with a model that has a chat template")
    chat.add_argument("--system", help="system message")
    chat.set_defaults(module="chat")

    for verb in (generate, chat):
        verb.add_argument("--verbose", action="store_true", help="print where the time went")
        verb.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
        # a conversation has one answer, which is shown as it comes
        is_chat = verb is chat
        flags = {k: v for k, v in SAMPLING_FLAGS.items() if k != "n"} if is_chat else SAMPLING_FLAGS | BEAM_FLAGS
        add_generation_flags(verb, flags)
        add_engine_flags(verb)

    serve = add_verb("serve", help="an HTTP server with OpenAI's API")
    serve.set_defaults(module="serve")
    add_flags(serve.add_argument_group("server"), SERVER_OPTIONS)

    batch = add_verb("batch", help="answer a file of requests in OpenAI's batch format")
    batch.add_argument("requests", metavar="REQUESTS", help="JSON lines, one request each")
    batch.add_argument("-o", "--output", required=True, metavar="ANSWERS", help="JSON lines, appended as answers come")
    batch.add_argument("--resume", action="store_true", help="do only what ANSWERS lacks")
    batch.add_argument("--overwrite", action="store_true", help="replace ANSWERS if it is there")
    batch.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
    batch.add_argument("--served-model-name", help="name of the model in the requests (default: the model as given)")
    batch.set_defaults(module="batch")

    serve.add_argument("model_name", metavar="MODEL", nargs="?", help="the same as --model")
    for verb in (serve, batch):
        add_engine_flags(verb, without=())

    convert = add_verb("convert", help="convert a checkpoint between the Hugging Face, native and Orbax formats")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", metavar="DST")
    convert.add_argument(
        "--to", choices=("native", "huggingface", "orbax"), default="native", help="format of DST (default: native)"
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="type to store (default: the checkpoint's)")
    convert.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    convert.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    convert.set_defaults(module="convert")

    plan = add_verb("plan", help="weights, KV blocks and activations against the device, before loading")
    plan.add_argument("model_name", metavar="MODEL")
    add_engine_flags(plan, with_model=False)
    plan.set_defaults(module="plan")

    models = add_verb("models", help="architectures that are served, as a table in Markdown")
    models.set_defaults(module="models")

    info = add_verb("info", help="versions, devices, and which attention kernels are usable and why")
    info.set_defaults(module="info")

    bench = add_verb("bench", help="measure, on whatever device is at hand: without a name, which benches there are")
    bench.add_argument("bench", metavar="NAME", nargs="?", help="which one")
    bench.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its own flags: see NAME --help")
    bench.set_defaults(module="bench")
    return parser


if __name__ == "__main__":
    sys.exit(main())
