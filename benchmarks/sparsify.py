"""What `prune.sparsify` adds to a training step between mask updates: LeNet-300-100, AdamW.

python benchmarks/sparsify.py [--batch 512] [--repeats 30]
"""

from __future__ import annotations

import argparse

import jax
import optax
import timing
from lenet import LeNet300100

from jaxeff import prune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--batch", type=int, default=512)
    _ = parser.add_argument("--repeats", type=int, default=30)
    chosen = parser.parse_args()
    model = LeNet300100()
    images = jax.random.normal(jax.random.key(0), (chosen.batch, 784))
    labels = jax.random.randint(jax.random.key(1), (chosen.batch,), 0, 10)
    params = model.init(jax.random.key(2), images)
    plain = optax.adamw(1e-3)
    sparse = prune.sparsify(plain, prune.one_shot(0.9))

    def ten_steps(optimizer):
        def loss(params):
            outputs = model.apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=10)[0])
        carry = run((params, optimizer.init(params)))  # masks are made in the first step
        return lambda: run(carry)

    found = timing.interleaved({"plain": ten_steps(plain), "sparsify": ten_steps(sparse)}, chosen.repeats)
    print(timing.machine())
    for name, seconds in found.items():
        print(f"{name}: {timing.spread([1e2 * each for each in seconds], ' ms')} a step")
    print(f"time, sparsify / plain: {timing.spread(timing.ratios(found, 'sparsify', 'plain'))}")


if __name__ == "__main__":
    main()
