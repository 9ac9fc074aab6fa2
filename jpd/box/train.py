"""Trains the model in the box from the text in the repository, with one command.

    python -m jpd.box.train [--out DIR] [--steps N] [--minutes M]

Runs on whatever device JAX finds: bfloat16 compute on a GPU, float32 on a CPU. The folder that it
writes holds the weights with the best validation loss, and `training.json` with the loss curve.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from jpd import box, ops
from jpd.box import corpus, export
from jpd.layers.attention import causal_attend
from jpd.models import (
    DENSE_KERNELS,
    ModelConfig,
    Params,
    bind,
    config_from_hf,
    init_params,
    logits,
)

PROMPTS = (
    "It is a truth universally acknowledged, that",
    "The captain looked at the sea, and",
    '"My dear sister," said Elizabeth,',
    "",
)
WARMUP = 0.05
"""Share of the training in which the learning rate rises."""


class Dropped(nnx.Module):
    """Stands in for a module of the model while training: the same, with dropout on its output."""

    def __init__(self, inner: Callable[..., jax.Array], rate: float, key: jax.Array):
        self.inner, self.rate, self.key = inner, rate, key

    def __call__(self, *args: Any, residual: jax.Array | None = None, **options: Any) -> jax.Array:
        out = self.inner(*args, **options)
        keep = jax.random.bernoulli(self.key, 1.0 - self.rate, out.shape)
        out = jnp.where(keep, out / (1.0 - self.rate), 0.0).astype(out.dtype)
        return out if residual is None else residual + out


class MixedEmbedding(nnx.Module):
    """Looks up in a float32 table, so that gradients of frequent tokens add up in float32."""

    def __init__(self, table: jax.Array, inner: nnx.Module, rate: float, key: jax.Array):
        self.inner = inner
        self.look_up = Dropped(lambda t: table[t].astype(inner.weight.dtype), rate, key)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.look_up(tokens)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits, as of the embedding in its place."""
        return self.inner.attend(x)


def cross_entropy(model: Callable[..., jax.Array], config: ModelConfig, window: jax.Array):
    """Mean loss in nats of predicting `window[1:]` from `window[:-1]`; window `[T + 1]` ids."""
    attend = jax.checkpoint(causal_attend(config), static_argnums=0)
    out = model(window[:-1], jnp.arange(window.shape[0] - 1), attend)
    return optax.softmax_cross_entropy_with_integer_labels(out, window[1:]).mean()


def training_loss(
    config: ModelConfig, dropout: float, dtype: jnp.dtype, params: Params, windows, key
) -> jax.Array:
    """Mean loss with dropout of windows `[B, T + 1]`; params are float32, compute is in `dtype`."""
    cast = jax.tree.map(lambda p: p.astype(dtype), params)

    def one(window: jax.Array, key: jax.Array) -> jax.Array:
        model = bind(config, cast)
        keys = iter(jax.random.split(key, 2 * config.num_layers + 1))
        table = params["embed"]["weight"]
        model.embed = MixedEmbedding(table, model.embed, dropout, next(keys))
        for layer in model.layers:
            layer.attention = Dropped(layer.attention, dropout, next(keys))
            layer.mlp = Dropped(layer.mlp, dropout, next(keys))
        return cross_entropy(model, config, window)

    return jax.vmap(one)(windows, jax.random.split(key, windows.shape[0])).mean()


def sample_windows(
    train: jax.Array, paragraphs: jax.Array, batch: int, seq_len: int, key: jax.Array
) -> jax.Array:
    """Windows `[B, T + 1]` that start with BOS and a paragraph, spread evenly over the text."""
    offsets = jax.random.randint(key, (batch,), 0, paragraphs[-1] + 1)
    starts = paragraphs[jnp.searchsorted(paragraphs, offsets)]
    windows = train[starts[:, None] + jnp.arange(seq_len + 1)]
    return windows.at[:, 0].set(corpus.BOS_ID)


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW without its learning rate, which the loop gives; norms are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(weight_decay, mask=partial(jax.tree.map, lambda p: p.ndim > 1)),
    )


def learning_rates(peak: float, progress: float, per_step: float, steps: int) -> np.ndarray:
    """Linear warm-up, then a cosine to zero, of the steps after `progress` (0 to 1)."""
    at = np.minimum(progress + per_step * (1 + np.arange(steps)), 1.0)
    cosine = 0.5 * (1 + np.cos(np.pi * (at - WARMUP).clip(0) / (1 - WARMUP)))
    return (peak * np.minimum(at / WARMUP, 1.0) * cosine).astype(np.float32)


def train(args: argparse.Namespace, config: ModelConfig, data: corpus.Corpus):
    """Trains until `args.steps` or `args.minutes`, whichever is first.

    Returns:
      The parameters with the best validation loss, rounded to bfloat16, and the loss curve.
    """
    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype("bfloat16" if on_gpu else "float32")
    seq_len = args.seq_len
    tokens = jnp.asarray(data.train)
    paragraphs = jnp.asarray(data.paragraphs[data.paragraphs < len(data.train) - seq_len])
    blocks = data.validation[: len(data.validation) // seq_len * seq_len].reshape(-1, seq_len)
    held_out = jnp.asarray(np.pad(blocks, ((0, 0), (1, 0)), constant_values=corpus.BOS_ID))

    optimizer = make_optimizer(args.weight_decay)
    loss = jax.value_and_grad(partial(training_loss, config, args.dropout, dtype))

    def step(state, inputs):
        (params, moments), (rate, key) = state, inputs
        pick, drop = jax.random.split(key)
        windows = sample_windows(tokens, paragraphs, args.batch_size, seq_len, pick)
        value, grads = loss(params, windows, drop)
        updates, moments = optimizer.update(grads, moments, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, moments), value

    @partial(jax.jit, donate_argnums=0)
    def run(state, rates, key):
        return jax.lax.scan(step, state, (rates, jax.random.split(key, len(rates))))

    @jax.jit
    def rounded(params):
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    @jax.jit
    def validate(saved):
        model = bind(config, jax.tree.map(lambda p: p.astype(dtype), saved))
        return jax.lax.map(partial(cross_entropy, model, config), held_out, batch_size=8).mean()

    params = init_params(config, "float32", args.seed)
    state = (params, optimizer.init(params))
    key, begin, done = jax.random.key(args.seed), time.perf_counter(), 0
    best, best_loss, curve = None, math.inf, []
    while done < args.steps:
        seconds = time.perf_counter() - begin
        late, per_step = seconds / (60 * args.minutes), 1 / args.steps
        if late >= 1:
            break
        if done and late / done > per_step:  # the minutes end first: the schedule follows them
            progress, per_step = late, late / done
        else:
            progress = done / args.steps
        chunk = min(args.eval_every, args.steps - done)
        rates = learning_rates(args.learning_rate, progress, per_step, chunk)
        state, losses = run(state, jnp.asarray(rates), jax.random.fold_in(key, done))
        done += chunk
        saved = rounded(state[0])
        point = {
            "step": done,
            "tokens": done * args.batch_size * seq_len,
            "train_loss": round(float(losses.mean()), 4),
            "val_loss": round(float(validate(saved)), 4),
            "learning_rate": float(rates[-1]),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        curve.append(point)
        print(json.dumps(point), flush=True)
        if point["val_loss"] < best_loss:
            best, best_loss = saved, point["val_loss"]
    if best is None:
        raise RuntimeError(f"no finite validation loss in {done} steps")
    return best, curve


def continue_text(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, prompt: str, seed: int
) -> str:
    """The prompt with 150 more tokens, drawn at temperature 0.8."""
    ids, rng = tokenizer.encode(prompt).ids, np.random.default_rng(seed)
    for _ in range(150):
        padded = np.zeros(192, np.int32)
        padded[: len(ids)] = ids
        row = np.asarray(logits(config, params, padded)[len(ids) - 1], np.float64) / 0.8
        chances = np.exp(row - row.max())
        ids.append(int(rng.choice(len(row), p=chances / chances.sum())))
        if ids[-1] == corpus.EOS_ID:
            break
    return tokenizer.decode(ids)


def _git_commit() -> str | None:
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() if run.returncode == 0 else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are those of the shipped model."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=box.path(), help="folder to write")
    add("--steps", type=int, default=2000, help="optimizer steps at most")
    add("--minutes", type=float, default=60.0, help="minutes of training at most")
    add("--batch-size", type=int, default=32, help="sequences in a step")
    add("--seq-len", type=int, default=1024, help="tokens of a sequence, and the context length")
    add("--learning-rate", type=float, default=2e-3, help="peak")
    add("--weight-decay", type=float, default=0.1, help="of everything but the norms")
    add("--dropout", type=float, default=0.3, help="on the embedding and every residual branch")
    add("--eval-every", type=int, default=50, help="steps between validations")
    add("--seed", type=int, default=0, help="of weights, batches, dropout and samples")
    add("--vocab-size", type=int, default=4096)
    add("--hidden-size", type=int, default=256)
    add("--layers", type=int, default=5)
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=4)
    add("--head-dim", type=int, default=64)
    add("--ffn-size", type=int, default=640)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, writes the folder and prints what it wrote."""
    args = parse_args(argv)
    tokenizer, data = corpus.load(Path(box.__file__).parent / "text", args.vocab_size)
    hf = export.hf_config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        ffn_size=args.ffn_size,
        max_position=args.seq_len,
    )
    config = config_from_hf(hf)
    begin = time.perf_counter()
    with ops.using(DENSE_KERNELS):
        params, curve = train(args, config, data)
        seconds = time.perf_counter() - begin
        samples = [continue_text(config, params, tokenizer, p, args.seed) for p in PROMPTS]
    export.save(args.out, hf, export.checkpoint_tensors(config, params), tokenizer)

    best = min(curve, key=lambda point: point["val_loss"])
    bits = best["val_loss"] / math.log(2) * len(data.validation) / data.validation_bytes
    summary = {
        "val_loss": best["val_loss"],
        "val_bits_per_byte": round(bits, 4),
        "best_step": best["step"],
        "steps": curve[-1]["step"],
        "tokens_seen": curve[-1]["tokens"],
        "train_tokens": len(data.train),
        "val_tokens": len(data.validation),
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "git_commit": _git_commit(),
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "samples": samples,
        "curve": curve,
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    (args.out / "training.json").write_text(text + "\n")
    print("\n\n".join(f"--- {sample}" for sample in samples))
    print({k: v for k, v in summary.items() if k not in ("samples", "curve", "arguments")})
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"wrote {args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
