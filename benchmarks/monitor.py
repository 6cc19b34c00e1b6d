"""What `jaxeff.monitor` adds to a training step of AdamW, given the gradients and updates, in CPU seconds.

python benchmarks/monitor.py [--network lenet-300-100] [--mode jitted] [--every 100] [--repeats 15]
python benchmarks/monitor.py --network transformer --mode donated --steps 1 --repeats 5 [--spectra]

LeNet-300-100 on 512 images; a transformer of 4 layers of width 256 on 16 x 128 tokens. The mode is `jitted`, a
compiled step called ten times; `donated`, the same step donating its state; `eager`, without `jit`; or `looped`, ten
steps in one program, which finds out at each step whether to check and is given the parameters before the step in
place of the updates. The others are told.

At `every`, a monitor adds less than runs differ by, so its parts are measured in ten steps each: steps that only wait,
steps that all check, and steps that all check and make a report, with `--spectra` also of ranks.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
        steps: steps(watch, count) gives a function that takes `count` of them, without a monitor if it is None.
        analysis: one report, outside of any step.
    """

    every: int
    step: Callable[[bool], Any]
    steps: Callable[[jaxeff.Monitor | None, int], Callable[[], Any]]
    analysis: Callable[[], Any]


def prepare(network: str, every: int, mode: str = "jitted") -> Prepared:
    model, inputs, labels = NETWORKS[network]()
    optimizer = optax.adamw(1e-3)
    params = jax.jit(model.init)(jax.random.key(2), inputs)

    def loss(params):
        outputs = model.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    def start(watch: jaxeff.Monitor | None):
        own = jax.tree.map(jnp.copy, params)
        state = watch.init(own, model.apply, inputs) if watch else None
        return own, jax.jit(optimizer.init)(own), state

    def step(watch: jaxeff.Monitor | None, carry):
        before, state, monitor = carry
        gradients = jax.grad(loss)(before)
        updates, state = optimizer.update(gradients, state, before)
        params = optax.apply_updates(before, updates)
        if watch is not None:
            if mode == "looped":  # The host does not know at which of the steps it calls.
                known, trees = None, {"gradients": gradients, "params_before": before}
            else:
                known, trees = watch.every == 1, {"gradients": gradients, "updates": updates}
            monitor = watch.update(monitor, params, model.apply, inputs, **trees, check_now=known)
        return params, state, monitor

    def steps(watch: jaxeff.Monitor | None, count: int) -> Callable[[], Any]:
        own = functools.partial(step, watch)
        if mode == "looped":
            run = jax.jit(lambda carry: jax.lax.fori_loop(0, count, lambda _, carry: own(carry), carry))
            return functools.partial(run, start(watch))
        donated = {"jitted": None, "donated": 0}
        once = own if mode == "eager" else jax.jit(own, donate_argnums=donated[mode])
        carried = [start(watch)]

        def run():
            for _ in range(count):
                carried[0] = once(carried[0])
            return carried[0]

        return run

    def first(monitored: bool) -> Any:
        watch = jaxeff.monitor(every=every) if monitored else None
        return jax.jit(functools.partial(step, watch))(start(watch))

    return Prepared(every, first, steps, lambda: jaxeff.analyze(params, model.apply, inputs))


NEVER = 10**8


def parts(
    prepared: Prepared, repeats: int, steps: int = 10, *, spectra: bool = False
) -> dict[str, list[float]]:
    """CPU seconds of steps: plain, with a monitor that waits, checks, or analyzes in each; and of one report."""
    monitor = jaxeff.monitor
    functions = {
        "plain": prepared.steps(None, steps),
        "waiting": prepared.steps(monitor(every=NEVER), steps),
        "checking": prepared.steps(monitor(every=1, report_every=NEVER), steps),
        "analyzing": prepared.steps(monitor(every=1, report_every=1, spectra=spectra), steps),
        "report": prepared.analysis,
    }
    return timing.interleaved(functions, repeats, timing.seconds)


def added(found: dict[str, list[float]], every: int) -> dict[str, list[float]]:
    """What each part adds to a step, as a fraction of it, run by run; reports are ten times rarer than checks."""
    waiting, checking, analyzing = (
        timing.ratios(found, name, "plain") for name in ("waiting", "checking", "analyzing")
    )
    return {
        "waiting": [ratio - 1 for ratio in waiting],
        "checks": [(b - a) / every for a, b in zip(waiting, checking, strict=True)],
        "reports": [(b - a) / (10 * every) for a, b in zip(checking, analyzing, strict=True)],
    }


def share(prepared: Prepared, repeats: int) -> float:
    """What a check every `every` steps and its reports add to a step, as a fraction of it."""
    return sum(map(statistics.median, added(parts(prepared, repeats), prepared.every).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--network", choices=NETWORKS, default="lenet-300-100")
    _ = parser.add_argument("--every", type=int, default=100)
    _ = parser.add_argument("--repeats", type=int, default=15)
    _ = parser.add_argument("--steps", type=int, default=10)
    _ = parser.add_argument("--mode", choices=("jitted", "donated", "eager", "looped"), default="jitted")
    _ = parser.add_argument("--spectra", action="store_true")
    chosen = parser.parse_args()
    prepared = prepare(chosen.network, chosen.every, chosen.mode)
    print(timing.machine(), chosen.network, chosen.mode)
    found = parts(prepared, chosen.repeats, chosen.steps, spectra=chosen.spectra)
    for name in ("plain", "waiting", "checking", "analyzing"):
        print(
            f"{name}: {timing.spread([1e3 / chosen.steps * seconds for seconds in found[name]], ' ms')} a step"
        )
    alone = [1e3 * seconds for seconds in found["report"]]
    print(f"one report, outside a step: {timing.spread(alone, ' ms')}")
    each = added(found, chosen.every)
    for name, shares in each.items():
        print(f"{name} add {timing.spread([100 * share for share in shares], ' %')}")
    print(f"together, at every={chosen.every}: {100 * sum(map(statistics.median, each.values())):.3g} %")


if __name__ == "__main__":
    main()
