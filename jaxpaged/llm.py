"""LLM: the offline door. Load a model, give it prompts, get texts."""

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from converters.formats import load, load_state, read_config
from converters.orbax import looks_like_orbax
from jaxpaged.config import GIB, OPTIONS, EngineConfig
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.outputs import FailedRequestWarning, RequestOutput
from jaxpaged.engine.prompts import Prompt, as_prompt_list
from jaxpaged.engine.stats import EngineStats
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.engine.turn import Turn
from jaxpaged.models import checkpoint
from jaxpaged.models.config import GenerationDefaults, ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parameters import parameter_specs
from jaxpaged.models.registry import build_abstract
from jaxpaged.runner.kv_cache import MemoryPlan
from jaxpaged.runner.parallel import cut_over
from jaxpaged.runner.shapes import (
    RunnerShapes,
    costly_cache,
    memory_plan,
    missing_kernels,
    resolve_shapes,
    with_checked_attention,
)
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.sharding import Cut, Placement, make_mesh

DEMO_FOLDER = Path(__file__).parent / "data" / "demo"
ALIASES = {"gpu_memory_utilization": "device_memory_fraction"}
REMEDIES = {
    "trust_remote_code": "no remote code is ever run: convert the model with a port of its architecture",
    "enforce_eager": "every step is compiled; leave it out",
    "quantization": "weights are not quantized; choose dtype, or kv_cache_dtype for the KV cache",
    "pipeline_parallel_size": "not supported; leave it out",
    "max_num_partial_prefills": "use max_num_batched_tokens",
    "guided_decoding_backend": "there is one grammar backend: leave it out",
    "structured_outputs_config": "there is one grammar backend: leave it out",
}


Params = SamplingParams | BeamSearchParams | Sequence[SamplingParams | BeamSearchParams] | None
"""One for all prompts, one per prompt, or the checkpoint's defaults."""

CALL_REMEDIES = {
    "lora_request": "not supported; leave it out",
    "prompt_token_ids": "give token ids as the prompts: generate([[1, 2, 3]])",
    "chat_template": "put a chat_template.jinja into the tokenizer's folder",
    "chat_template_content_format": "messages may have text or lists of text parts; leave it out",
    "continue_final_message": "not supported; leave it out",
    "mm_processor_kwargs": "models take text only; leave it out",
}


def resolve_folder(model: str | Path) -> Path:
    """The folder of a model: a path, or "demo" for the one in the package. Raises ValueError; asks no network."""
    if not isinstance(model, (str, Path)) or not str(model).strip():
        shown = repr(model) if isinstance(model, (str, Path)) else f"(a {type(model).__name__})"
        hint = "; converters.from_state writes the folder of an nnx.State" if isinstance(model, nnx.State) else ""
        raise ValueError(f"model={shown} is not a path: give the folder of a model, 'demo', or a Decoder{hint}")
    if str(model) == "demo":
        return DEMO_FOLDER
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"model={str(model)!r} is not a folder: give the path of a Hugging Face, native or Orbax model folder, or "
            "'demo' (nothing is downloaded)"
        )
    if not (folder / "config.json").is_file() and not looks_like_orbax(folder):  # which is told what it lacks
        raise ValueError(f"model folder {str(folder)!r} has no config.json: it is not the folder of a model")
    return folder


def engine_config_from(options: Mapping[str, Any]) -> EngineConfig:
    """An EngineConfig from keyword options, vLLM's names included; any other name is refused with what to use."""
    known = {option.name for option in OPTIONS}
    resolved: dict[str, Any] = {}
    for name, value in options.items():
        if name == "swap_space":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
                raise ValueError(f"swap_space={value!r} is not allowed: it must be a number of GiB")
            name, value = "host_memory_bytes", int(value * GIB)
        name = ALIASES.get(name, name)
        if name == "trust_remote_code" and value is False:
            continue
        if name not in known:
            remedy = REMEDIES.get(name, f"choose among {', '.join(sorted(known))}")
            raise ValueError(f"{name}={value!r} is not accepted: {remedy}")
        if name in resolved:
            raise ValueError(f"{name} was given twice, under two names")
        resolved[name] = value
    return EngineConfig(**resolved)


def keep_compiles() -> None:
    """Keep every compile on disk, however short, unless the user configured jax's persistent cache."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxpaged" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclass(eq=False)
class _OpenStream:
    """A stream that was begun and has not ended."""

    request_id: str
    latest: RequestOutput | None = None
    """What the caller has not seen yet; each holds all of the ones before it."""
    is_finished: bool = False

    def take(self) -> RequestOutput | None:
        output, self.latest = self.latest, None
        return output


class LLM:
    """A loaded model and the engine that serves it.

    Several threads may call it: their calls wait for one another, so many prompts are fastest in one call.

    Args:
        model: A Hugging Face folder (safetensors), a native folder, an Orbax folder, or "demo"; or a live Flax model (a
            `Decoder` with its weights, which are shared: a training step that donates them takes them away).
        tokenizer: A folder with a tokenizer; the model's own folder if None. A live model without one is served
            prompts of token ids only.
        show_progress: Bars for loading and warm-up.
        logits_processors: Functions by the names that `SamplingParams.logits_processors` asks for: pure JAX functions
            of one row, `(logits, context, *, argument=default, ...)`, traced once; see the README.
        options: The fields of `EngineConfig`; vLLM's `gpu_memory_utilization` and `swap_space` (GiB) are understood.

    Raises ValueError with the cause and a remedy for anything that cannot be served.
    """

    def __init__(
        self, model: str | Path | Decoder = "demo", *, tokenizer: str | Path | None = None, show_progress: bool = True,
        logits_processors: Mapping[str, Callable[..., Any]] | None = None, **options: Any,
    ) -> None:
        config = engine_config_from(options)
        keep_compiles()
        if tokenizer is not None and (not isinstance(tokenizer, (str, Path)) or not str(tokenizer).strip()):
            raise ValueError(f"tokenizer={tokenizer!r} is not a path: give the folder of a tokenizer")
        # whatever can be refused is refused before a weight is read
        mesh = make_mesh(config.tensor_parallel_size)
        given = _given(model, config)
        model_config, text_folder = given.config, given.folder if tokenizer is None else Path(tokenizer)
        config = with_checked_attention(config, model_config, model_config.dtype)
        shapes, plan, cut = _plan(config, model_config, logits_processors)
        if (warning := costly_cache(shapes.layout)) is not None:
            warnings.warn(warning, stacklevel=2)
        if show_progress and (slow := missing_kernels(shapes.layout)) is not None:
            print(f"jaxpaged: {slow}", file=sys.stderr)
        put = None if mesh is None else Placement(mesh, cut).put
        self._defaults = (
            GenerationDefaults() if given.folder is None else checkpoint.read_generation_defaults(given.folder)
        )
        text = None if text_folder is None else Tokenizer.load(text_folder)
        if text is not None:
            text.check_fits(model_config.vocab_size)
        started = time.perf_counter()
        model_config, module = given.load(
            dtype=model_config.dtype, max_model_len=config.max_model_len, show_progress=show_progress, put=put
        )
        jax.block_until_ready(jax.tree.leaves(nnx.state(module)))
        self.load_s = time.perf_counter() - started
        self.warm_up_s = self.last_warm_up_s = 0.0
        self._show_progress = show_progress
        self._turn = Turn()
        self._open_stream: _OpenStream | None = None
        try:
            self.engine = Engine(
                module, model_config, config, shapes, plan, tokenizer=text, mesh=mesh,
                logits_processors=logits_processors,
            )
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"{plan.kv_bytes:,} bytes for the KV cache or {plan.host_bytes:,} bytes for swapped blocks could not "
                "be had, though the memory plan allows them: something else uses the memory; lower num_device_blocks, "
                "device_memory_fraction or host_memory_bytes"
            ) from error

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer as a transformers object."""
        return self._tokenizer().as_transformers()

    def _tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise ValueError("this model was loaded without a tokenizer: pass tokenizer=, the folder of one, to LLM")
        return self.engine.tokenizer

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """What the checkpoint's generation_config.json sets; None where it says nothing."""
        return self._defaults

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's generation_config.json as SamplingParams; used where a call brings none."""
        defaults: dict[str, Any] = dict(self._defaults.as_dict())
        return SamplingParams(**defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = True,
        sampling_params: Params = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Complete prompts, in their order.

        Args:
            prompts: One prompt or a list; see `Prompt`.
            params: One for all, or one per prompt; None takes the checkpoint's defaults.
            priority: One number per prompt; lower runs first under scheduling_policy="priority".
            sampling_params: vLLM's name for `params`.

        Raises ValueError before anything runs if one prompt or parameter cannot be served. A request that ends in an
        error (`finish_reason="error"`) leaves the others alone; one FailedRequestWarning names those of the call.
        """
        params = _one_of(params, sampling_params, unknown)
        if not isinstance(use_tqdm, bool):
            raise ValueError(f"use_tqdm={use_tqdm!r} is not allowed: it must be True or False")
        texts = as_prompt_list(prompts)
        all_params = self._params_per_prompt(params, len(texts))
        if priority is not None and (not isinstance(priority, (list, tuple)) or len(priority) != len(texts)):
            raise ValueError(f"priority={priority!r} must be a list with one integer for each of {len(texts)} prompts")
        added: list[str] = []
        with self._driving():
            try:
                for index, (prompt, one) in enumerate(zip(texts, all_params, strict=True)):
                    try:
                        added.append(
                            self.engine.add_request(prompt, one, priority=0 if priority is None else priority[index])
                        )
                    except ValueError as error:
                        place = f"prompt {index}: " if len(texts) > 1 else ""
                        raise ValueError(f"{place}{error}") from error
                self._warm_up(added)
                finished = self._run(added, use_tqdm)
            finally:
                self._abandon(added)
        outputs = [finished[request_id] for request_id in added]
        _warn_of_errors(outputs, stacklevel=3)
        return outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding its output so far after every step that added to it.

        It does not keep other calls waiting between its outputs: one that comes then first runs this request to its
        end, which is the next output here. A stream that is dropped or closed ends its request.
        """
        (one,) = self._params_per_prompt(params, 1)
        with self._driving():
            request_id = self.engine.add_request(prompt, one, is_streamed=True)
            stream = self._open_stream = _OpenStream(request_id)
            try:
                self._warm_up([request_id])
            except BaseException:
                self._cut_short(stream)
                raise
        try:
            while stream.latest is not None or not stream.is_finished:
                if not stream.is_finished:
                    with self._driving(stream):
                        if not stream.is_finished:
                            self._advance(stream)
                if (output := stream.take()) is not None:
                    if output.finished:
                        _warn_of_errors([output], stacklevel=3)
                    yield output
        finally:
            if not stream.is_finished:
                # where the turn is taken, whoever has it runs this stream to its end just now
                with self._turn.if_free() as is_free:
                    if is_free and not stream.is_finished:
                        self._cut_short(stream)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: Params = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sampling_params: Params = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, through the checkpoint's chat template.

        Args:
            tools: Function descriptions for the template; what the model answers is given back as text.
            chat_template_kwargs: Further names for the template, such as `enable_thinking`.
            sampling_params: vLLM's name for `params`.
        """
        params = _one_of(params, sampling_params, unknown)
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError("messages must be a non-empty list of {'role': ..., 'content': ...}, or a list of such")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        tokenizer = self._tokenizer()
        prompts: list[Prompt] = [
            {
                "prompt_token_ids": tokenizer.encode_chat(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    tools=tools,
                    **(chat_template_kwargs or {}),
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Search the `beam_width` likeliest completions of each prompt: `outputs` are those, best first, with `score`.

        As Hugging Face's `generate(num_beams=..., do_sample=False)`. Beams share the blocks of what they have in common
        and copy one when they write to it (Kwon et al. 2023, section 4.4). `generate` takes such parameters, too,
        beside others. Raises ValueError as `generate` does.
        """
        for one in params if isinstance(params, (list, tuple)) else [params]:
            if not isinstance(one, BeamSearchParams):
                raise ValueError(f"params={one!r} is no BeamSearchParams: give one for all prompts, or one per prompt")
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def warm_up(self, request_ids: Iterable[str] | None = None) -> None:
        """Compile the buckets that these requests can reach (every bucket if None), with a progress bar."""
        with self._driving():
            self._warm_up(request_ids)

    def _warm_up(self, request_ids: Iterable[str] | None) -> None:
        started = time.perf_counter()
        engine = self.engine
        buckets = engine.buckets_for(request_ids)
        wanted: dict[str, Any] = {
            "with_sampler": engine.needs_sampler(request_ids),
            "num_candidates": engine.num_candidates(request_ids),
            "with_extended": engine.needs_extended_sampler(request_ids),
        }
        cold = engine.runner.cold_buckets(buckets, **wanted)
        with tqdm(
            total=len(cold), desc="Warming up", unit="bucket", disable=not (self._show_progress and cold), leave=False
        ) as bar:
            engine.warm_up(cold, lambda bucket, seconds: bar.update() and None, **wanted)
        engine.warm_up_rows_and_copies(request_ids)
        if engine.can_run_out_of_blocks(request_ids):
            engine.warm_up_preemption()
        self.last_warm_up_s = time.perf_counter() - started
        self.warm_up_s += self.last_warm_up_s

    def get_metrics(self) -> dict[str, float]:
        """Counters and gauges by Prometheus-like names."""
        stats = self.engine.stats()
        return {f"jaxpaged:{name}": float(value) for name, value in dataclasses.asdict(stats).items()}

    def stats(self) -> EngineStats:
        """Blocks, sharing, preemption, compiles."""
        return self.engine.stats()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing done, while requests run."""
        with self._turn.if_free() as is_free:
            return is_free and self.engine.reset_prefix_cache()

    @contextmanager
    def _driving(self, stream: _OpenStream | None = None) -> Iterator[None]:
        """The engine for one call, with no requests in it but those of `stream`."""
        with self._turn.taken():
            other = self._open_stream
            if other is not None and other is not stream:
                try:
                    while not other.is_finished:
                        self._advance(other)
                except BaseException:
                    self._cut_short(other)
                    raise
            yield

    def _advance(self, stream: _OpenStream) -> None:
        for output in self.engine.step():
            stream.latest = output
        if not self.engine.has_unfinished:
            self._open_stream = None
            stream.is_finished = True  # last: from here on another thread may take the output

    def _cut_short(self, stream: _OpenStream) -> None:
        """After an error, an interrupt or the caller's loss of interest: end it, so that its blocks come back."""
        self.engine.abort(stream.request_id)
        while not stream.is_finished:
            self._advance(stream)

    def _params_per_prompt(
        self, params: Params, count: int
    ) -> list[SamplingParams | BeamSearchParams]:
        if params is None:
            params = self.get_default_sampling_params()
        many: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * count
        if len(many) != count:
            raise ValueError(f"params has {len(many)} entries for {count} prompts: give one for all, or one per prompt")
        for index, one in enumerate(many):
            if not isinstance(one, (SamplingParams, BeamSearchParams)):
                place = f"params of prompt {index}" if len(many) > 1 else "params"
                raise ValueError(
                    f"{place}: {one!r} is not a SamplingParams or BeamSearchParams: give one for all prompts, or one "
                    "per prompt"
                )
        return many

    def _run(self, request_ids: list[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        num_tokens = 0
        started = time.perf_counter()
        with tqdm(total=len(request_ids), desc="Generating", unit="request", disable=not use_tqdm, leave=False) as bar:
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    if output.finished:
                        finished[output.request_id] = output
                        num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                        bar.set_postfix_str(
                            f"{num_tokens / (time.perf_counter() - started):.0f} tok/s", refresh=False
                        )
                        bar.update()
        return finished

    def _abandon(self, request_ids: list[str]) -> None:
        """After an error or an interrupt: end what is left, so that its blocks come back."""
        aborted = [request_id for request_id in request_ids if self.engine.abort(request_id)]
        while aborted and self.engine.has_unfinished:
            self.engine.step()


def _warn_of_errors(outputs: Sequence[RequestOutput], *, stacklevel: int) -> None:
    """Name the requests that ended in an error, and why; `stacklevel` is seen from here."""
    reasons = {
        index: next(one.stop_reason for one in output.outputs if one.finish_reason == "error")
        for index, output in enumerate(outputs)
        if any(one.finish_reason == "error" for one in output.outputs)
    }
    if not reasons:
        return
    shown = "; ".join(f"prompt {index} ({outputs[index].request_id}): {reasons[index]}" for index in list(reasons)[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    warnings.warn(
        f"{len(reasons)} of {len(outputs)} requests ended in an error (finish_reason='error'): {shown}{more}",
        FailedRequestWarning,
        stacklevel=stacklevel,
    )


@dataclass(frozen=True)
class _Given:
    """What a user gave as the model."""

    folder: Path | None
    """None for a live model."""
    config: ModelConfig
    """Its facts, in the dtype that is asked for."""
    load: Callable[..., tuple[ModelConfig, Decoder]]


def _given(model: str | Path | Decoder, config: EngineConfig) -> _Given:
    """The model that a user gave, checked down to the shapes of its weights; reads no weight."""
    dtype = None if config.dtype == "auto" else config.dtype
    if isinstance(model, Decoder):
        own = model.config if dtype is None else checkpoint.config_with_dtype(model.config, dtype)
        return _Given(None, own, partial(load_state, model, model.config))
    folder = resolve_folder(model)
    return _Given(folder, read_config(folder, dtype), partial(load, folder))


def _plan(
    config: EngineConfig, model_config: ModelConfig, logits_processors: Mapping[str, Callable[..., Any]] | None = None
) -> tuple[RunnerShapes, MemoryPlan, Cut]:
    """Shapes, memory plan, and how parameters are cut over the devices, before any weight is there."""
    shapes = resolve_shapes(config, model_config, model_config.dtype)
    itemsize = jnp.dtype(model_config.dtype).itemsize
    model = build_abstract(model_config)
    cut = cut_over(config.tensor_parallel_size, model)
    specs = parameter_specs(model)
    weight_bytes = sum(math.prod(cut.part_shape(path, spec.shape)) * itemsize for path, spec in specs.items())
    plan = memory_plan(
        config, model_config, shapes, weight_bytes=weight_bytes, dtype=model_config.dtype,
        logits_processors=logits_processors,
    )  # fmt: skip
    return shapes, plan, cut


def plan_for(model: str | Path, **options: Any) -> str:
    """The memory plan of a model as a table, before anything is loaded."""
    config = engine_config_from(options)
    shapes, plan, _ = _plan(config, _given(model, config).config)
    warning = costly_cache(shapes.layout)
    return plan.table() + ("" if warning is None else f"\nwarning: {warning}")


def _one_of(params: Any, sampling_params: Any, unknown: Mapping[str, Any]) -> Any:
    """`params` under either of its names; ValueError for both, and for names that a call does not have."""
    for name in unknown:
        is_of_params = name in {field.name for field in dataclasses.fields(SamplingParams)}
        remedy = f"give it as SamplingParams({name}=...)" if is_of_params else "leave it out"
        raise ValueError(f"{name} is not accepted: {CALL_REMEDIES.get(name, remedy)}")
    if params is not None and sampling_params is not None:
        raise ValueError("params and sampling_params are two names of the same: give one")
    return sampling_params if params is None else params
