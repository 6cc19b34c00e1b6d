"""What `jaxeff.monitor` adds to a training step of AdamW, analysing the training batch.

python benchmarks/monitor.py [--network lenet-300-100] [--every 100] [--repeats 15]
python benchmarks/monitor.py --network transformer --repeats 5

LeNet-300-100 on 512 images; a transformer of 4 layers of width 256 on 16 x 128 tokens.
"""

from __future__ import annotations

import argparse

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--network", choices=NETWORKS, default="lenet-300-100")
    _ = parser.add_argument("--every", type=int, default=100)
    _ = parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    model, inputs, labels = NETWORKS[chosen.network]()
    optimizer, watch = optax.adamw(1e-3), jaxeff.monitor(every=chosen.every)
    params = jax.jit(model.init)(jax.random.key(2), inputs)
    start = (params, optimizer.init(params), watch.init(params, model.apply, inputs))

    def loss(params):
        outputs = model.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    def steps(monitored: bool):
        def step(carry, _):
            params, state, monitor = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            if monitored:
                monitor = watch.update(monitor, params, model.apply, inputs)
            return (params, state, monitor), None

        run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=chosen.every)[0])
        return lambda: run(start)

    functions = {
        "plain": steps(False),
        "monitored": steps(True),
        "analysis": lambda: jaxeff.analyze(params, model.apply, inputs),
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
