"""Squared gradients of single examples (`fisher`): from taps, beside one backward pass an example.

    python benchmarks/example_gradients.py [--batch 512] [--repeats 15]

LeNet-300-100: every weight meets an example at one position, so that its gradients are never made.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
import timing
from lenet import LeNet300100

import jaxeff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--batch", type=int, default=512)
    _ = parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    model, loss_fn = LeNet300100(), optax.softmax_cross_entropy_with_integer_labels
    images = jax.random.normal(jax.random.key(0), (chosen.batch, 784))
    labels = jax.random.randint(jax.random.key(1), (chosen.batch,), 0, 10)
    variables = model.init(jax.random.key(2), images)

    @jax.jit
    def taps(variables, images, labels):
        return jaxeff.collect(
            variables, model.apply, images, criterion="fisher", loss_fn=loss_fn, targets=labels
        )

    @jax.jit
    def backward_passes(variables, images, labels):
        def loss(variables, image, label):
            return loss_fn(model.apply(variables, image), label)

        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(variables, images, labels)
        return jax.tree.map(lambda g: jnp.sum(jnp.square(g), 0), gradients)

    @jax.jit
    def one_gradient(variables, images, labels):
        return jax.grad(lambda v: loss_fn(model.apply(v, images), labels).mean())(variables)

    functions = {"taps": taps, "backward passes": backward_passes, "gradient of the mean": one_gradient}
    arguments = variables, images, labels
    found = timing.interleaved(
        {name: lambda f=function: f(*arguments) for name, function in functions.items()}, chosen.repeats
    )
    print(timing.machine())
    for name, seconds in found.items():
        print(f"{name}: {timing.spread([1e3 * each for each in seconds], ' ms')}")
    for name in ("backward passes", "gradient of the mean"):
        print(f"time, {name} / taps: {timing.spread(timing.ratios(found, name, 'taps'))}")


if __name__ == "__main__":
    main()
