"""What a test network is, and how its variables are drawn: the ground under `networks`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = np.ndarray

_erf = np.vectorize(math.erf, otypes=[np.float64])


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


BY_NAME: Mapping[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": relu,
    "gelu_tanh": gelu,
    "gelu_erf": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
}


class Seen(NamedTuple):
    """What each module took in and gave out, call by call, in float64, by module path."""

    inputs: dict[str, list[Array]]
    outputs: dict[str, list[Array]]

    def __getitem__(self, path: str) -> Array:
        """The one output of a module."""
        (output,) = self.outputs[path]
        return output


def module_of(path: str) -> str:
    """The module that holds a weight; a weight of the outermost one stands for itself."""
    return path.rpartition("/")[0] or path


class Site(NamedTuple):
    """One use of one weight. `emits` is the post-activation where it is not `nonlinearity(output)`."""

    path: str
    kind: str
    nonlinearity: str
    unit_axes: tuple[int, ...]
    emits: Callable[[Seen], Array] | None = None

    @property
    def module(self) -> str:
        return module_of(self.path)


class Network(NamedTuple):
    """`module.apply(variables, *batch, **keywords)`, and what there is to find in it.

    `unpaired`: weights without a site -> a part of the reason. `others`: leaves that are not
    weights and have another role than their name ('bias', 'scale') -> that role. `seen`: what the
    layers took in and gave out, where they run in a loop, into which Flax's interceptor cannot look.
    """

    module: nn.Module
    variables: dict[str, Any]
    batch: tuple[Any, ...]
    keywords: dict[str, Any]
    sites: tuple[Site, ...]
    unpaired: dict[str, str] = {}
    others: dict[str, str] = {}
    seen: Seen | None = None

    @property
    def leaves(self) -> dict[str, jax.Array]:
        """The parameters by path."""
        found = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(self.variables["params"]))[0]
        return {"/".join(key.key for key in keys): leaf for keys, leaf in found}

    @property
    def arguments(self) -> tuple[Any, Callable, tuple[Any, ...]]:
        """The first arguments of `jaxeff.analyze` and `jaxeff.collect`."""
        return self.variables, self.module.apply, self.batch


def drawn(module: nn.Module, *batch: Any, **keywords: Any) -> dict[str, Any]:
    """Random variables of the shapes that the module asks for; nothing is run or compiled.

    Biases, scales and running averages are drawn too: at 0 and 1 a forgotten one goes unnoticed.
    """
    shapes = jax.eval_shape(functools.partial(module.init, **keywords), jax.random.key(0), *batch)
    generator = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        z = generator.normal(size=leaf.shape)
        fan_in = max(math.prod(leaf.shape[:-1]), 1)
        named = {"scale": 1 + 0.2 * z, "bias": 0.3 * z, "mean": 0.3 * z, "var": np.exp(0.3 * z)}
        return jnp.asarray(named.get(path[-1].key, z / math.sqrt(fan_in)), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def train(module: nn.Module, *batch: Any, **keywords: Any) -> dict[str, Any]:
    """Variables after three steps of Adam towards random targets; running averages move along."""
    variables = drawn(module, *batch, **keywords)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables: dict[str, Any], state: Any) -> tuple[dict[str, Any], Any]:
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, updates = module.apply({**rest, "params": params}, *batch, mutable=[*rest], **keywords)
            targets = jax.random.normal(jax.random.key(1), outputs.shape)
            return jnp.mean(jnp.square(outputs - targets)), updates

        gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(gradients, state)
        return {**rest, **updates, "params": optax.apply_updates(variables["params"], changes)}, state

    state = optimizer.init(variables["params"])
    for _ in range(3):
        variables, state = step(variables, state)
    return variables


def normal(*shape: int, seed: int = 7) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(*shape: int, vocabulary: int) -> Array:
    return np.random.default_rng(7).integers(0, vocabulary, size=shape).astype(np.int32)
