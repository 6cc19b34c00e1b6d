"""What `jaxeff.monitor` adds to a training step of AdamW, analyzing the training batch, in CPU seconds.

python benchmarks/monitor.py [--network lenet-300-100] [--every 100] [--repeats 15]
python benchmarks/monitor.py --network transformer --every 20 --repeats 5

LeNet-300-100 on 512 images; a transformer of 4 layers of width 256 on 16 x 128 tokens. What is added is
measured by analyzing in each of a few steps: at `every`, it is less than what runs differ by.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import timing
from lenet import LeNet300100
from transformer import Transformer

import jaxeff


def lenet():
    images = jax.random.normal(jax.random.key(0), (512, 784))
    return LeNet300100(), images, jax.random.randint(jax.random.key(1), (512,), 0, 10)


def transformer():
    tokens = jax.random.randint(jax.random.key(0), (16, 129), 0, 256)
    return Transformer(layers=4, width=256, heads=8, vocabulary=256), tokens[:, :-1], tokens[:, 1:]


NETWORKS = {"lenet-300-100": lenet, "transformer": transformer}


class Prepared(NamedTuple):
    """A network to train.

    Attributes:
        step: step(monitored) takes one training step, compiled.
        steps: steps(monitored, every, count) gives a function that takes `count` of them, as one program.
        analysis: one report, outside of any step.
    """

    every: int
    step: Callable[[bool], Any]
    steps: Callable[[bool, int, int], Callable[[], Any]]
    analysis: Callable[[], Any]


def prepare(network: str, every: int) -> Prepared:
    model, inputs, labels = NETWORKS[network]()
    optimizer = optax.adamw(1e-3)
    params = jax.jit(model.init)(jax.random.key(2), inputs)

    def loss(params):
        outputs = model.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    def start(monitored: bool, every: int):
        state = jaxeff.monitor(every=every).init(params, model.apply, inputs) if monitored else None
        return params, jax.jit(optimizer.init)(params), state

    def step(carry, every: int):
        params, state, monitor = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        if monitor is not None:
            monitor = jaxeff.monitor(every=every).update(monitor, params, model.apply, inputs)
        return params, state, monitor

    def steps(monitored: bool, every: int, count: int) -> Callable[[], Any]:
        run = jax.jit(lambda carry: jax.lax.fori_loop(0, count, lambda _, carry: step(carry, every), carry))
        carry = start(monitored, every)
        return lambda: run(carry)

    def first(monitored: bool) -> Any:
        return jax.jit(lambda carry: step(carry, every))(start(monitored, every))

    return Prepared(every, first, steps, lambda: jaxeff.analyze(params, model.apply, inputs))


def share(prepared: Prepared, repeats: int) -> float:
    """What a report every `every` steps adds to a step, as a fraction of it."""
    found = analyzed(prepared, repeats)
    return (statistics.median(timing.ratios(found, "analyzed", "plain")) - 1) / prepared.every


def analyzed(prepared: Prepared, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of ten steps, of ten each of which analyzes, and of one report outside of any."""
    functions = {
        "plain": prepared.steps(False, 1, 10),
        "analyzed": prepared.steps(True, 1, 10),
        "report": prepared.analysis,
    }
    return timing.interleaved(functions, repeats, timing.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--network", choices=NETWORKS, default="lenet-300-100")
    _ = parser.add_argument("--every", type=int, default=100)
    _ = parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    prepared = prepare(chosen.network, chosen.every)
    print(timing.machine())
    found = analyzed(prepared, chosen.repeats)
    for name in ("plain", "analyzed"):
        print(f"{name}: {timing.spread([100 * seconds for seconds in found[name]], ' ms')} a step")
    alone = [1e3 * seconds for seconds in found["report"]]
    print(f"one report, outside a step: {timing.spread(alone, ' ms')}")
    added = [100 * (ratio - 1) / chosen.every for ratio in timing.ratios(found, "analyzed", "plain")]
    print(f"a report every {chosen.every} steps adds {timing.spread(added, ' %')}")
    directly = {
        "plain": prepared.steps(False, chosen.every, chosen.every),
        "monitored": prepared.steps(True, chosen.every, chosen.every),
    }
    runs = timing.interleaved(directly, chosen.repeats, timing.seconds)
    ratios = timing.ratios(runs, "monitored", "plain")
    print(f"{chosen.every} steps with a monitor / without: {timing.spread(ratios)}")


if __name__ == "__main__":
    main()
