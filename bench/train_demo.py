"""Train a Llama-shaped model of a few million parameters on any text, on CPU, and write it as a Hugging Face folder.

Answers: can anyone remake the shipped demo model from its text with one command? The regime is compute-bound: the
ceiling is the processor's float32 matmul rate. The bytes of the text decide the tokenizer (byte-level BPE), its tail
is held out, and the weights kept are those of the best validation loss. Run it as

    python -m bench.train_demo --text PATH --out DIR

The last line printed is JSON: sizes, losses and seconds. Needs optax (the `bench` extra).
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
# The roles of a chat, as speakers of a play. A turn reads "Romeo:\n...\n\n", as the text does.
CHAT_TEMPLATE = (
    "{%- set speakers = {'system': 'CHORUS', 'user': 'ROMEO', 'assistant': 'JULIET'} -%}"
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message.role not in speakers -%}"
    "{{ raise_exception('role must be system, user or assistant, not ' ~ message.role) }}"
    "{%- endif -%}"
    "{{ speakers[message.role] ~ ':\\n' ~ message.content | trim ~ '\\n\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'JULIET:\\n' }}{%- endif -%}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of the model: those of a Llama with tied embeddings."""

    vocab_size: int
    dim: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


# ---------------------------------------------------------------------------------------------------- the tokenizer


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly the bytes, with `<s>` put before every prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode_paragraphs(tokenizer: Tokenizer, text: str) -> list[np.ndarray]:
    """Token ids of each paragraph (a speech, in a play), its closing blank line included."""
    paragraphs = [part + "\n\n" for part in text.strip().split("\n\n") if part.strip()]
    encoded = tokenizer.encode_batch(paragraphs, add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in encoded]


# --------------------------------------------------------------------------------------------------------- the data


def batches(
    paragraphs: list[np.ndarray], rows: int, context: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Endless int32[rows, context + 1] batches. A row is passages one after another, `<s>` + whole paragraphs + `</s>`.

    Passages start at any paragraph, so `<s>` stands before every kind of beginning; they are long (40 paragraphs on
    average), so that most of what is learnt is to go on.
    """
    while True:
        batch = np.empty((rows, context + 1), np.int32)
        for row in batch:
            parts: list[np.ndarray] = []
            length = 0
            while length <= context:
                start = int(generator.integers(len(paragraphs)))
                count = int(generator.geometric(1 / 40))
                parts += [np.asarray([BOS_ID], np.int32), *paragraphs[start : start + count]]
                parts.append(np.asarray([EOS_ID], np.int32))
                length = sum(map(len, parts))
                if length > 4 * context:
                    break
            row[:] = np.concatenate(parts)[: context + 1]
        yield batch


def validation_batch(paragraphs: list[np.ndarray], context: int) -> np.ndarray:
    """int32[rows, context + 1]: the held-out paragraphs, each row led by `<s>`."""
    tokens = np.concatenate(paragraphs)
    rows = max(1, len(tokens) // context)
    tokens = np.resize(tokens, rows * context).reshape(rows, context)
    return np.concatenate([np.full((rows, 1), BOS_ID, np.int32), tokens], axis=1)


# -------------------------------------------------------------------------------------------------------- the model


def init_params(shape: Shape, key: jax.Array) -> dict[str, Any]:
    """Kernels are [in, out]; the outputs of both branches start smaller, so that the residual does not grow."""
    widths = {
        "q_proj": (shape.dim, shape.q_heads * shape.head_dim),
        "k_proj": (shape.dim, shape.kv_heads * shape.head_dim),
        "v_proj": (shape.dim, shape.kv_heads * shape.head_dim),
        "o_proj": (shape.q_heads * shape.head_dim, shape.dim),
        "gate_proj": (shape.dim, shape.mlp_dim),
        "up_proj": (shape.dim, shape.mlp_dim),
        "down_proj": (shape.mlp_dim, shape.dim),
    }
    keys = iter(jax.random.split(key, 1 + shape.layers * len(widths)))

    def kernel(name: str) -> jax.Array:
        fan_in, _ = widths[name]
        branch = (2 * shape.layers) ** -0.5 if name in ("o_proj", "down_proj") else 1.0
        return branch * fan_in**-0.5 * jax.random.normal(next(keys), widths[name])

    layers = [
        {name: kernel(name) for name in widths}
        | {"input_layernorm": jnp.ones(shape.dim), "post_attention_layernorm": jnp.ones(shape.dim)}
        for _ in range(shape.layers)
    ]
    embedding = 0.02 * jax.random.normal(next(keys), (shape.vocab_size, shape.dim))
    return {"embed_tokens": embedding, "layers": layers, "norm": jnp.ones(shape.dim)}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x: jax.Array, shape: Shape) -> jax.Array:
    """Rotary embedding of [rows, tokens, heads, head_dim], halves paired as in the Hugging Face layout."""
    half = shape.head_dim // 2
    frequency = shape.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
    angle = np.arange(x.shape[1], dtype=np.float32)[:, None] * frequency
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, block: int = 128) -> jax.Array:
    """Attention of [rows, tokens, heads, head_dim], a block of queries against the keys up to its end at a time: on CPU
    five times faster than the whole square, whose upper half is masked anyway and which leaves the cache."""
    rows, length, q_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = q_heads // kv_heads
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        queries = q[:, start:end].transpose(0, 2, 1, 3).reshape(rows * kv_heads, -1, head_dim)
        keys = k[:, :end].transpose(0, 2, 3, 1).reshape(rows * kv_heads, head_dim, end)
        values = v[:, :end].transpose(0, 2, 1, 3).reshape(rows * kv_heads, end, head_dim)
        visible = np.tril(np.ones((end - start, end), bool), start)
        scores = (queries @ keys).reshape(-1, group, end - start, end) * head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e9), axis=-1)
        output = (weights.reshape(rows * kv_heads, -1, end) @ values).reshape(rows, q_heads, end - start, head_dim)
        outputs.append(output.transpose(0, 2, 1, 3))
    return jnp.concatenate(outputs, axis=1)


def forward(params: dict[str, Any], tokens: jax.Array, shape: Shape) -> jax.Array:
    """Logits float32[rows, tokens, vocab]."""
    rows, length = tokens.shape
    x = params["embed_tokens"][tokens]
    for layer in params["layers"]:
        h = rms_norm(x, layer["input_layernorm"], shape.norm_eps)
        q = rotate((h @ layer["q_proj"]).reshape(rows, length, shape.q_heads, shape.head_dim), shape)
        k = rotate((h @ layer["k_proj"]).reshape(rows, length, shape.kv_heads, shape.head_dim), shape)
        v = (h @ layer["v_proj"]).reshape(rows, length, shape.kv_heads, shape.head_dim)
        x = x + causal_attention(q, k, v).reshape(rows, length, -1) @ layer["o_proj"]
        h = rms_norm(x, layer["post_attention_layernorm"], shape.norm_eps)
        x = x + (jax.nn.silu(h @ layer["gate_proj"]) * (h @ layer["up_proj"])) @ layer["down_proj"]
    return rms_norm(x, params["norm"], shape.norm_eps) @ params["embed_tokens"].T


def loss_of(params: dict[str, Any], batch: jax.Array, shape: Shape) -> jax.Array:
    """Mean cross entropy in nats a token of int32[rows, tokens + 1]."""
    logits = forward(params, batch[:, :-1], shape)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


# ----------------------------------------------------------------------------------------------------- the training


def train(
    shape: Shape,
    train_paragraphs: list[np.ndarray],
    held_out: list[np.ndarray],
    *,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    weight_decay: float,
    eval_every: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best parameters seen and the report. Five sixths of the steps use rows of a quarter of the context (cheaper),
    the rest rows of the whole of it, so that every position is trained; the best is chosen among the latter."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), steps, 0.05 * learning_rate)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: dict[str, Any], state: Any, batch: jax.Array) -> tuple[dict[str, Any], Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params, batch, shape)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(partial(loss_of, shape=shape))

    def validate(params: dict[str, Any], context: int) -> float:
        rows = validation_batch(held_out, context)
        few = max(1, batch_tokens // context)  # one compiled shape, little memory
        whole = len(rows) // few * few or len(rows)
        return float(np.mean([float(evaluate(params, rows[i : i + few])) for i in range(0, whole, few)]))

    params = init_params(shape, jax.random.key(seed))
    state = optimizer.init(params)
    generator = np.random.default_rng(seed)
    best: dict[str, Any] = {"validation_loss": float("inf")}
    kept = params
    recent: list[jax.Array] = []
    start = time.perf_counter()
    long_from = steps - max(1, steps // 6)
    stages = ((0, long_from, max(1, shape.context // 4)), (long_from, steps, shape.context))
    with tqdm(total=steps, unit="step", desc="training") as bar:
        for first, last, context in stages:
            feed = batches(train_paragraphs, max(1, batch_tokens // context), context, generator)
            for number in range(first + 1, last + 1):
                params, state, loss = step(params, state, next(feed))
                recent = [*recent[-49:], loss]
                bar.update()
                if number % eval_every == 0 or number == steps:
                    train_loss, validation_loss = float(np.mean(jax.device_get(recent))), validate(params, context)
                    bar.write(
                        f"step {number:5d}  context {context:4d}  training {train_loss:.4f}  "
                        f"held out {validation_loss:.4f}"
                    )
                    if context == shape.context and validation_loss < best["validation_loss"]:
                        best = {"validation_loss": validation_loss, "train_loss": train_loss, "best_step": number}
                        kept = jax.device_get(params)
    return kept, best | {"steps": steps, "seconds": round(time.perf_counter() - start, 1)}


# ----------------------------------------------------------------------------------------------------- the folder


def to_huggingface(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Hugging Face names, [out, in], bfloat16."""
    tensors = {"model.embed_tokens.weight": params["embed_tokens"], "model.norm.weight": params["norm"]}
    for index, layer in enumerate(params["layers"]):
        for name, value in layer.items():
            room = "" if name.endswith("layernorm") else "self_attn." if name[0] in "qkvo" else "mlp."
            tensors[f"model.layers.{index}.{room}{name}.weight"] = value.T
    # a contiguous copy: safetensors stores the buffer, not the strides
    return {name: np.ascontiguousarray(np.asarray(value, jnp.bfloat16)) for name, value in tensors.items()}


def write_folder(out: Path, shape: Shape, params: dict[str, Any], tokenizer: Tokenizer, card: str) -> None:
    """config.json, model.safetensors, tokenizer files, generation_config.json and README.md."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_huggingface(params), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library leaves it to its owner
    tokenizer.save(str(out / "tokenizer.json"))
    documents = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.dim,
            "intermediate_size": shape.mlp_dim,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.q_heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": shape.context,
            "rms_norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": shape.context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in documents.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")


def card_of(shape: Shape, report: dict[str, Any], text_note: str, command: str) -> str:
    heads = f"{shape.q_heads} query and {shape.kv_heads} key/value heads of {shape.head_dim}"
    minutes = f"{report['seconds'] / 60:.0f} minutes on {os.cpu_count()} CPU cores"
    losses = f"training {report['train_loss']:.3f}, held out {report['validation_loss']:.3f}"
    density = f"{report['bytes_per_token']:.2f} bytes a token"
    bits = f"{report['validation_bits_per_byte']:.3f} bits a byte"
    return f"""# The demo model

A Llama-shaped language model of {report["parameters"] / 1e6:.2f} million parameters, trained from scratch on
{text_note}.
It writes in the manner of its text and knows nothing else: it is here so that an installed engine can be tried, tested
and timed without a download.

| | |
|---|---|
| shape | {shape.layers} layers, width {shape.dim}, {heads}, MLP {shape.mlp_dim}, tied embeddings |
| tokenizer | byte-level BPE of {shape.vocab_size:,} tokens, {density}, `<s>` before a prompt |
| context | {shape.context} tokens, all of them trained |
| data | {report["train_tokens"]:,} training tokens; the last {report["validation_tokens"]:,} held out |
| training | {report["steps"]} steps of {report["batch_tokens"]:,} tokens, AdamW, float32, {minutes} |
| loss, nats a token | {losses} ({bits}), at step {report["best_step"]} |
| weights | bfloat16 |

A passage begins with `<s>` and the name of a speaker, as in `ROMEO:`; `</s>` comes once in some 40 speeches. The
chat template turns system, user and assistant into CHORUS, ROMEO and JULIET: give `stop=["\\n\\n"]` to stop after one
speech.

Made with

    {command}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text; a blank line ends a paragraph")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text-note", default="a text", help="what the model card calls the text")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens a step")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--q-heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--mlp-dim", type=int, default=704)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--held-out", type=float, default=0.05, help="fraction of the text, from its end")
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps} must be 2 or more: the learning rate rises and falls")
    if not 0 < arguments.held_out < 1:
        parser.error(f"--held-out {arguments.held_out} must lie between 0 and 1")
    if arguments.q_heads % arguments.kv_heads:
        parser.error(f"--q-heads {arguments.q_heads} must be a multiple of --kv-heads {arguments.kv_heads}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    text = arguments.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text, arguments.vocab_size)
    paragraphs = encode_paragraphs(tokenizer, text)
    cut = max(1, int(len(paragraphs) * (1 - arguments.held_out)))
    train_paragraphs, held_out = paragraphs[:cut], paragraphs[cut:]
    if not held_out:
        raise ValueError(
            f"{arguments.text} has {len(paragraphs)} paragraph(s), too few to hold any out: separate its "
            "passages by blank lines, or use a longer text"
        )
    shape = Shape(
        vocab_size=tokenizer.get_vocab_size(),
        dim=arguments.dim,
        layers=arguments.layers,
        q_heads=arguments.q_heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        mlp_dim=arguments.mlp_dim,
        context=arguments.context,
    )
    params, report = train(
        shape,
        train_paragraphs,
        held_out,
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        eval_every=arguments.eval_every,
        seed=arguments.seed,
    )
    num_tokens = sum(map(len, paragraphs))
    bytes_per_token = len(text.encode()) / num_tokens
    report |= {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "vocab_size": shape.vocab_size,
        "batch_tokens": arguments.batch_tokens,
        "train_tokens": sum(map(len, train_paragraphs)),
        "validation_tokens": sum(map(len, held_out)),
        "bytes_per_token": round(bytes_per_token, 3),
        "validation_bits_per_byte": round(report["validation_loss"] / np.log(2) / bytes_per_token, 4),
    }
    flags = (("steps", "batch_tokens", "vocab_size", "dim", "layers", "q_heads", "kv_heads", "head_dim", "mlp_dim")
             + ("context", "learning_rate", "weight_decay", "held_out", "seed"))
    given = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in flags)
    command = f"python -m bench.train_demo --text TEXT --out DIR {given}"
    write_folder(arguments.out, shape, params, tokenizer, card_of(shape, report, arguments.text_note, command))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
