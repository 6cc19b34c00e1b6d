"""Compacted models: are they right, and do they run as fast as a rebuilt module?

    python benchmarks/compact.py speed
    KERAS_BACKEND=jax python benchmarks/compact.py keras     # needs keras

`speed` times an MLP, a CNN and a transformer of half their width twice, compacted by `prune.compact` and rebuilt, in
turn in one process. `keras` compacts keras.applications with random weights, whose modules cannot be rebuilt
at other sizes, and compares each with the masked model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import timing
from transformer import Transformer, sizes_of

from jaxeff import prune

APPLICATIONS = {
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "MobileNetV3Large": 32,
    "EfficientNetB0": 32,
    "EfficientNetB1": 32,
    "EfficientNetV2B0": 32,
    "EfficientNetV2S": 32,
    "DenseNet121": 32,
    "DenseNet169": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "ResNet101": 32,
    "ResNet101V2": 32,
    "ConvNeXtTiny": 32,
    "VGG16": 32,
    "VGG19": 32,
    "NASNetMobile": 32,
    "Xception": 71,
    "InceptionV3": 75,
}
"""Names, and the side of the images that each is given."""


class MLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for times in (1, 2, 4):
            x = nn.Conv(times * self.width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def half(groups: prune.Groups, seed: int = 0) -> prune.Plan:
    """The plan that removes half of every group, drawn at random, but leaves heads of one size."""
    draw = np.random.default_rng(seed)
    chosen = [group for group in groups.unlocked if group.kind not in ("head_size", "block")]
    return prune.Plan.of(
        groups, {one.name: draw.permutation(one.size)[: one.size // 2].tolist() for one in chosen}
    )


def speed(repeats: int) -> None:
    images, tokens = jnp.ones((32, 32, 32, 3)), jnp.ones((4, 128), jnp.int32)
    compare("MLP", MLP(2048), lambda params: MLP(1024), jnp.ones((256, 256)), repeats)
    compare("CNN", CNN(64), lambda params: CNN(32), images, repeats)
    large = Transformer(layers=4, width=256, heads=8)
    compare(
        "transformer",
        large,
        lambda params: large.clone(blocks=tuple(sizes_of(params[f"block_{i}"]) for i in range(4))),
        tokens,
        repeats,
    )


def compare(
    name: str, large: nn.Module, rebuilt: Callable[[Any], nn.Module], x: jax.Array, repeats: int
) -> None:
    variables = large.init(jax.random.key(0), x)
    plan = half(prune.groups(variables, large.apply, x))
    small, small_apply = prune.compact(variables, large.apply, x, plan)
    module = rebuilt(small["params"])
    applied = jax.jit(module.apply)
    error = jnp.abs(small_apply(small, x) - applied(small, x)).max()
    seconds = timing.interleaved(
        {"compact": lambda: small_apply(small, x), "rebuilt": lambda: applied(small, x)}, repeats
    )
    found = timing.spread(timing.ratios(seconds, "compact", "rebuilt"))
    base = timing.spread([1e3 * one for one in seconds["rebuilt"]], " ms")
    print(f"{name:12}  rebuilt {base}, compact / rebuilt {found}, largest difference {error:.1e}")


def applications() -> None:
    # The values count here, and not the time.
    jax.config.update("jax_disable_most_optimizations", True)
    right = 0
    for name, side in APPLICATIONS.items():
        start = time.perf_counter()
        try:
            error, kept = compacted(name, side)
        except ValueError as failure:
            print(f"{name:17}  {failure}", flush=True)
            continue
        right += error < 1e-5
        spent = time.perf_counter() - start
        print(f"{name:17}  error {error:.1e}, {kept:.2f} of the parameters, {spent:.0f} s", flush=True)
    print(f"{right} of {len(APPLICATIONS)}")


def compacted(name: str, side: int) -> tuple[float, float]:
    """Largest difference from the masked model, relative to the largest output, and the share of parameters left."""
    import keras

    model = getattr(keras.applications, name)(
        weights=None, include_top=False, pooling="avg", input_shape=(side, side, 3)
    )
    draw = np.random.default_rng(0)

    def drawn(variable: Any) -> np.ndarray:
        """Averages and offsets are 0 or 1 at first, which would hide a unit too many."""
        value = np.asarray(variable.value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        offset = 0.01 * draw.uniform(size=value.shape) if value.ndim == 1 else 0
        return (value * draw.uniform(0.8, 1.2, value.shape) + offset).astype(value.dtype)

    params = {
        "trainable": list(map(drawn, model.trainable_variables)),
        "other": list(map(drawn, model.non_trainable_variables)),
    }

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return model.stateless_call(params["trainable"], params["other"], x, training=False)[0]

    x = jnp.asarray(draw.normal(size=(2, side, side, 3)), jnp.float32)
    plan = half(prune.groups(params, apply_fn, x))
    small, small_apply = prune.compact(params, apply_fn, x, plan)
    masked = jax.tree.map(np.multiply, params, plan.masks(params))
    expected = jax.jit(apply_fn)(masked, x)
    error = jnp.abs(small_apply(small, x) - expected).max() / jnp.abs(expected).max()
    return float(error), size(small) / size(params)


def size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("what", choices=("speed", "keras"))
    _ = parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    print(timing.machine())
    if arguments.what == "speed":
        speed(arguments.repeats)
    else:
        applications()


if __name__ == "__main__":
    main()
