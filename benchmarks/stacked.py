"""Stacked blocks of a trained transformer: units of their own in each block, or the same in all; which blocks go.

    python benchmarks/stacked.py [--seeds 5] [--steps 1500]

A character transformer of four scanned blocks on the help texts of Python, whose held-out loss, in nats a
character, is measured right after removal: nothing is retrained.
"""

from __future__ import annotations

import argparse
import functools
import pydoc_data.topics
import statistics
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax import lax

import jaxeff
from jaxeff import prune

BLOCKS, WIDTH, HEADS, HIDDEN, CONTEXT, BATCH = 4, 64, 4, 256, 64, 32
Params = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--steps", type=int, default=1500)
    chosen = parser.parse_args()
    print(timing.machine())
    found = [losses_of(seed, chosen.steps) for seed in range(chosen.seeds)]
    print("| | held-out loss, mean ± standard deviation |\n|---|---|")
    for name in found[0]:
        values = [each[name] for each in found]
        print(f"| {name} | {statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f} |", flush=True)
    for one, other in (("units, own", "units, same"), ("heads, own", "heads, same")):
        better = sum(each[one] < each[other] for each in found)
        print(f"{one} below {other} in {better} of {len(found)} seeds")


def losses_of(seed: int, steps: int) -> dict[str, float]:
    codes, vocabulary = _text()
    cut = len(codes) * 9 // 10
    params = _trained(
        _start(jax.random.key(seed), vocabulary), codes[:cut], jax.random.key(100 + seed), steps
    )
    calibration, test = (_windows(codes[:cut], 64, seed), _windows(codes[cut:], 256, 0))
    (inputs, _), loss = calibration, functools.partial(_held_out, *test)
    groups = prune.groups(params, logits, inputs)
    scores = prune.scored(params, jaxeff.collect(params, logits, inputs, criterion="wanda"), "wanda")
    ranked = groups.scored(scores)
    found = {"dense": loss(params)}
    for kind, share in (("unit", 0.5), ("head", 0.25)):
        (group,) = [group for group in ranked.unlocked if group.kind == kind]
        own = prune.plan(groups, scores, share, kinds=kind)
        same = np.argsort(group.importance.sum(axis=0))[: group.size - own.sizes()[group.name]]
        found[f"{kind}s, own"] = loss(prune.shrink(params, own))
        found[f"{kind}s, same"] = loss(
            prune.shrink(params, prune.Plan.of(groups, {group.name: same.tolist()}))
        )
    (blocks,) = [group for group in groups.unlocked if group.kind == "block"]
    order = prune.order_blocks(params, logits, inputs, loss_fn=cross_entropy, targets=calibration[1], count=1)
    for name, importance in _importances(params, inputs, blocks, order, seed).items():
        found[f"one block, {name}"] = loss(
            prune.shrink(params, prune.plan(groups, importance, 0.25, kinds="block"))
        )
    return found


def _importances(params: Params, inputs: Any, blocks: Any, order: Any, seed: int) -> Mapping[str, Any]:
    random = np.random.default_rng(seed).random(blocks.size)
    return {
        "measured": order.importance,
        "influence": prune.block_influence(params, logits, inputs),
        "random": {blocks.name: random},
    }


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def logits(params: Params, tokens: jax.Array) -> jax.Array:
    """[n, length] -> [n, length, vocabulary]; as wide as the params are."""

    def block(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        h = _normalized(x)
        query, key, value = (jnp.einsum("nsd,dhk->nshk", h, p[name]) for name in ("query", "key", "value"))
        scores = jnp.einsum("nshk,nthk->nhst", query, key) / (WIDTH // HEADS) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
        x = x + jnp.einsum("nhst,nthk,hkd->nsd", jax.nn.softmax(scores), value, p["out"])
        return x + nn.gelu(_normalized(x) @ p["up"]) @ p["down"], None

    x = params["embedding"][tokens] + params["position"][None, : tokens.shape[1]]
    x, _ = lax.scan(block, x, params["blocks"])
    return _normalized(x) @ params["head"]


def _normalized(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def _start(key: jax.Array, vocabulary: int) -> Params:
    size = WIDTH // HEADS
    shapes = {
        "embedding": (vocabulary, WIDTH),
        "position": (CONTEXT, WIDTH),
        "head": (WIDTH, vocabulary),
        "blocks": {
            **dict.fromkeys(("query", "key", "value"), (BLOCKS, WIDTH, HEADS, size)),
            "out": (BLOCKS, HEADS, size, WIDTH),
            "up": (BLOCKS, WIDTH, HIDDEN),
            "down": (BLOCKS, HIDDEN, WIDTH),
        },
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    keys = jax.random.split(key, len(leaves))
    arrays = [jax.random.normal(key, shape) * 0.08 for key, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


@functools.partial(jax.jit, static_argnames="steps")
def _trained(params: Params, codes: jax.Array, key: jax.Array, steps: int) -> Params:
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    def step(state: tuple[Params, Any], key: jax.Array) -> tuple[tuple[Params, Any], None]:
        params, moments = state
        starts = jax.random.randint(key, (BATCH,), 0, len(codes) - CONTEXT)
        given = codes[starts[:, None] + jnp.arange(CONTEXT + 1)]
        loss = lambda params: cross_entropy(logits(params, given[:, :-1]), given[:, 1:]).mean()  # noqa: E731
        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    return lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


def _text() -> tuple[jax.Array, int]:
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    characters, codes = np.unique(np.frombuffer(text.encode(), np.uint8), return_inverse=True)
    return jnp.asarray(codes, jnp.int32), len(characters)


def _windows(codes: jax.Array, count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    starts = np.random.default_rng(seed).integers(0, len(codes) - CONTEXT, count)
    given = codes[starts[:, None] + np.arange(CONTEXT + 1)]
    return given[:, :-1], given[:, 1:]


@jax.jit
def _loss(inputs: jax.Array, targets: jax.Array, params: Params) -> jax.Array:
    return cross_entropy(logits(params, inputs), targets).mean()


def _held_out(inputs: jax.Array, targets: jax.Array, params: Params) -> float:
    return float(_loss(inputs, targets, params))


if __name__ == "__main__":
    main()
