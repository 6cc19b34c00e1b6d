"""A character-level transformer on real text: held-out loss by criterion and sparsity.

    sh benchmarks/fetch_shakespeare.sh FILE
    python benchmarks/characters.py --text FILE

Each seed trains its own network on the first 90 % of the text. Each criterion removes so much of each layer
at once; the loss is that of the rest of the text, in nats a character, right away and after a short training
of what is left.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from flax.training.train_state import TrainState
from transformer import Transformer

from jaxeff import calibrate, prune

CONTEXT = 64
BATCH = 16
HELD_OUT = 1024
"""Windows of the held-out text, evenly spread."""

CRITERIA = ("magnitude", "activation", "wanda", "taylor", "random")


def read_text(path: Path) -> tuple[jax.Array, jax.Array, int]:
    """Characters as numbers, training and held out, and how many different ones there are."""
    characters, numbers = np.unique(list(path.read_text(encoding="utf-8")), return_inverse=True)
    cut = len(numbers) * 9 // 10
    if len(numbers) - cut <= CONTEXT:
        raise ValueError(f"`--text` must hold more than {10 * CONTEXT} characters, got {len(numbers)}")
    tokens = jnp.asarray(numbers, jnp.int32)
    return tokens[:cut], tokens[cut:], len(characters)


def windows(tokens: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Characters [n, CONTEXT], and those that follow each."""
    found = tokens[starts[:, None] + jnp.arange(CONTEXT + 1)]
    return found[:, :-1], found[:, 1:]


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def apply(params: Any, tokens: jax.Array, *, model: Transformer) -> jax.Array:
    return model.apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnames="steps")
def train(state: TrainState, tokens: jax.Array, key: jax.Array, steps: int) -> TrainState:
    """Windows at random, all steps in one program."""

    def step(state: TrainState, key: jax.Array) -> tuple[TrainState, None]:
        starts = jax.random.randint(key, (BATCH,), 0, len(tokens) - CONTEXT)
        inputs, targets = windows(tokens, starts)

        def loss(params: Any) -> jax.Array:
            return cross_entropy(state.apply_fn(params, inputs), targets).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

    return jax.lax.scan(step, state, jax.random.split(key, steps))[0]


@functools.partial(jax.jit, static_argnums=0)
def held_out_loss(apply_fn: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """In nats a character, []."""
    starts = jnp.linspace(0, len(tokens) - CONTEXT - 1, HELD_OUT).astype(jnp.int32).reshape(-1, 64)

    def one(starts: jax.Array) -> jax.Array:
        inputs, targets = windows(tokens, starts)
        return cross_entropy(apply_fn(params, inputs), targets).mean()

    return jax.lax.map(one, starts).mean()


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW, its rate falling to 0, that keeps to the masks in its state."""
    adamw = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps), weight_decay=1e-2)
    return prune.sparsify(adamw, lambda step: (jnp.float32(0), False))


def importance(params: Any, apply_fn: Any, tokens: jax.Array, criterion: str) -> Any:
    """From 16 batches of the training text."""
    starts = jnp.linspace(0, len(tokens) - CONTEXT - 1, 16 * 32).astype(jnp.int32).reshape(16, 32)
    batches = [windows(tokens, part) for part in starts]
    found = calibrate(params, apply_fn, batches, criterion=criterion, loss_fn=cross_entropy, progress=False)
    return prune.scored(params, found, criterion)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--text", type=Path, required=True, help="any text, UTF-8")
    _ = parser.add_argument("--seeds", type=int, default=3)
    _ = parser.add_argument("--layers", type=int, default=2)
    _ = parser.add_argument("--steps", type=int, default=2000)
    _ = parser.add_argument("--tune-steps", type=int, default=100)
    _ = parser.add_argument("--sparsities", type=numbers, default=(0.5, 0.7, 0.9))
    chosen = parser.parse_args()
    training, held_out, vocabulary = read_text(chosen.text)
    model = Transformer(chosen.layers, 128, 4, vocabulary, CONTEXT)
    apply_fn = functools.partial(apply, model=model)
    at_first, again = optimizer(chosen.steps), optimizer(chosen.tune_steps)
    print(timing.machine())
    print(f"{len(training)} characters, {vocabulary} different ones; {len(held_out)} held out", flush=True)
    dense: list[float] = []
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    begin = time.perf_counter()
    for seed in range(chosen.seeds):
        start, order, later = jax.random.split(jax.random.key(seed), 3)
        params = model.init(start, jnp.zeros((1, CONTEXT), jnp.int32))["params"]
        state = TrainState.create(apply_fn=apply_fn, params=params, tx=at_first)
        params = train(state, training, order, chosen.steps).params
        dense.append(float(held_out_loss(apply_fn, params, held_out)))
        print(f"{time.perf_counter() - begin:.0f} s: seed {seed}, dense {dense[-1]:.3f}", flush=True)
        for criterion in CRITERIA:
            scores = importance(params, apply_fn, training, criterion)
            for sparsity in chosen.sparsities:
                masks = prune.masks(scores, sparsity)
                state = TrainState.create(apply_fn=apply_fn, params=prune.apply(params, masks), tx=again)
                before = float(held_out_loss(apply_fn, state.params, held_out))
                state = state.replace(opt_state=state.opt_state._replace(masks=masks))
                state = train(state, training, later, chosen.tune_steps)
                after = float(held_out_loss(apply_fn, state.params, held_out))
                found.setdefault((criterion, sparsity), []).append((before, after))
                passed = f"{time.perf_counter() - begin:.0f} s"
                print(f"{passed}: {criterion} {sparsity:g}: {before:.3f}, tuned {after:.3f}", flush=True)
    print(f"\nDense {cell(dense)}; mean (standard deviation) of {chosen.seeds} seeds, in nats a character.")
    headers = " | ".join(f"{100 * sparsity:g} %" for sparsity in chosen.sparsities)
    for title, part in (("at once", 0), (f"after {chosen.tune_steps} steps", 1)):
        print(f"\n| {title} | {headers} |\n|---|{'---|' * len(chosen.sparsities)}")
        for criterion in CRITERIA:
            values = [[each[part] for each in found[criterion, s]] for s in chosen.sparsities]
            print(f"| {criterion} | {' | '.join(map(cell, values))} |")


def cell(values: list[float]) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
