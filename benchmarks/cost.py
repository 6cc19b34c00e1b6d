"""How long counting takes beside tracing the model, and what bounds a few programs on this machine.

python benchmarks/cost.py [--repeats 7]
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import timing
from lenet import LeNet300100
from transformer import Transformer

from jaxeff import cost, demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    _ = parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    print(timing.machine())
    _count(chosen.repeats)
    _bounds()


def _count(repeats: int) -> None:
    """GPT-2 small on 1,024 tokens, from shapes."""
    model = Transformer(layers=12, width=768, vocabulary=50257)
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    arrays = len(jax.live_arrays())

    def trace():
        # A new function each time: JAX keeps the traces of functions that it knows.
        return jax.make_jaxpr(lambda *arguments: model.apply(*arguments))(variables, tokens)

    runs = {"trace": trace, "count": lambda: cost.count(variables, model.apply, tokens)}
    seconds = timing.interleaved({name: _nothing(run) for name, run in runs.items()}, repeats)
    for name in runs:
        print(f"{name}: {timing.spread(seconds[name], ' s')}")
    print(f"count / trace: {timing.spread(timing.ratios(seconds, 'count', 'trace'))}")
    found = cost.count(variables, model.apply, tokens)
    print(f"{found.macs:,} MACs, {found.flops:,} FLOPs; {len(jax.live_arrays()) - arrays} new arrays")


def _nothing(run):
    """Run it for its time alone: what it returns is nothing to wait for."""

    def timed():
        _ = run()

    return timed


def _bounds() -> None:
    peak = cost.peak()
    print(
        f"peak: {peak.flops_per_second / 1e9:.3g} GFLOP/s, {peak.bytes_per_second / 1e9:.3g} GB/s, "
        f"balance {peak.balance:.3g} FLOPs a byte"
    )
    key = jax.random.key(0)
    square, tall = jax.random.normal(key, (1024, 1024)), jax.random.normal(key, (2**24,))
    programs = {
        "1024 x 1024 product": (jnp.matmul, (square, square)),
        "matrix times vector": (jnp.matmul, (square, square[0])),
        "sum of two arrays of 64 MiB": (jnp.add, (tall, tall)),
        "tanh of an array of 64 MiB": (jnp.tanh, (tall,)),
        "256 small products in a scan": (_small, (square[:32, :32],)),
    }
    networks = {
        "LeNet-300-100, 1,000 images": (LeNet300100(), jnp.ones((1000, 784))),
        "digits CNN, 256 images": (demo.DigitsCNN(), jnp.ones((256, 8, 8, 1))),
        "transformer, 512 tokens": (
            Transformer(layers=4, width=256, heads=4),
            jnp.zeros((2, 256), jnp.int32),
        ),
    }
    for name, (model, batch) in networks.items():
        variables = model.init(key, batch)
        programs[name] = model.apply, (variables, batch)
        programs[f"gradient of {name}"] = jax.grad(_mean_square(model)), (variables, batch)
    for name, (function, arguments) in programs.items():
        found = cost.latency(function, *arguments, repeats=15, peak=peak)
        floor = cost.floor(function, *arguments, chip=peak)
        print(
            f"{name}: {found.median * 1e3:.3g} ms ({found.percentile_10 * 1e3:.3g} to "
            f"{found.percentile_90 * 1e3:.3g}), {found.arithmetic_intensity:.3g} FLOPs a byte, "
            f"compute {found.compute_share:.1%}, memory {found.memory_share:.1%}: {found.bound}; "
            f"floor / median {floor.seconds / found.median:.2f}"
        )


def _mean_square(model):
    return lambda variables, batch: jnp.mean(model.apply(variables, batch) ** 2)


def _small(matrix: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 256, lambda _, x: x @ matrix / 32, matrix)


if __name__ == "__main__":
    main()
