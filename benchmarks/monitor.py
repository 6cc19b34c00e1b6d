"""What `jaxeff.monitor` adds to a training step: LeNet-300-100, AdamW, on the training batch.

python benchmarks/monitor.py [--batch 512] [--every 100] [--repeats 15]
"""

from __future__ import annotations

import argparse

import jax
import optax
import timing
from lenet import LeNet300100

import jaxeff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--batch", type=int, default=512)
    _ = parser.add_argument("--every", type=int, default=100)
    _ = parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    model, optimizer, watch = LeNet300100(), optax.adamw(1e-3), jaxeff.monitor(every=chosen.every)
    images = jax.random.normal(jax.random.key(0), (chosen.batch, 784))
    labels = jax.random.randint(jax.random.key(1), (chosen.batch,), 0, 10)
    params = model.init(jax.random.key(2), images)
    start = (params, optimizer.init(params), watch.init(params, model.apply, images))

    def loss(params):
        outputs = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    def steps(monitored: bool):
        def step(carry, _):
            params, state, monitor = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            if monitored:
                monitor = watch.update(monitor, params, model.apply, images)
            return (params, state, monitor), None

        run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=chosen.every)[0])
        return lambda: run(start)

    functions = {
        "plain": steps(False),
        "monitored": steps(True),
        "analysis": lambda: jaxeff.analyze(params, model.apply, images),
    }
    found = timing.interleaved(functions, chosen.repeats)
    print(timing.machine())
    for name in ("plain", "monitored"):
        each = [1e3 * seconds / chosen.every for seconds in found[name]]
        print(f"{name}: {timing.spread(each, ' ms')} a step")
    print(f"one analysis: {timing.spread([1e3 * seconds for seconds in found['analysis']], ' ms')}")
    print(f"time, monitored / plain: {timing.spread(timing.ratios(found, 'monitored', 'plain'))}")


if __name__ == "__main__":
    main()
