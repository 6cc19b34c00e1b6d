"""The networks that the tests share, and what the graph has to find in each.

`NETWORKS[name]()` is a `Network`. Its `sites` say, in execution order, which operation consumes which
weight and what its units emit: the truth that test_graph and test_statistics compare with. The MLP,
the square one, the CNN and the transformer are trained for a few steps; the others, which would spend
their time compiling it, are not.
"""

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


class Site(NamedTuple):
    """One use of one weight. `emits` is the post-activation where it is not `nonlinearity(output)`."""

    path: str
    kind: str
    nonlinearity: str
    unit_axes: tuple[int, ...]
    emits: Callable[[Seen], Array] | None = None

    @property
    def module(self) -> str:
        return self.path.rpartition("/")[0]


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


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        x = nn.tanh(nn.Dense(12)(x))
        return nn.Dense(5)(x)


def mlp() -> Network:
    module, x = MLP(), normal(32, 8)
    sites = (
        Site("Dense_0/kernel", "dense", "relu", (1,)),
        Site("Dense_1/kernel", "dense", "tanh", (1,)),
        Site("Dense_2/kernel", "dense", "identity", (1,)),
    )
    return Network(module, train(module, x), (x,), {}, sites)


class Square(nn.Module):
    """Equal layers, which share one compiled kernel: the network to analyse where any will do."""

    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = nn.relu(nn.Dense(8, name=f"layer{index}")(x))
        return x


def square() -> Network:
    module, x = Square(), normal(16, 8)
    sites = tuple(Site(f"layer{index}/kernel", "dense", "relu", (1,)) for index in range(3))
    return Network(module, train(module, x), (x,), {}, sites)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="conv0")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm0")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(8, (3, 3), strides=2, padding="VALID", use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm1")(x))
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


@functools.cache
def _trained_cnn() -> dict[str, Any]:
    return train(CNN(), normal(8, 8, 8, 3), train=True)


def cnn(**keywords: Any) -> Network:
    module, x = CNN(), normal(8, 8, 8, 3)
    sites = (
        Site("conv0/kernel", "conv", "relu", (3,), lambda seen: relu(seen["norm0"])),
        Site("conv1/kernel", "conv", "relu", (3,), lambda seen: relu(seen["norm1"])),
        Site("head/kernel", "dense", "identity", (1,)),
    )
    return Network(module, _trained_cnn(), (x,), keywords, sites)


class ResidualBlock(nn.Module):
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), strides=self.strides, use_bias=False, name="conv0")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="norm0")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv1")(y)
        y = nn.BatchNorm(use_running_average=True, name="norm1")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), strides=self.strides, use_bias=False, name="project")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        x = ResidualBlock(6, name="block0")(x)
        x = ResidualBlock(8, strides=2, name="block1")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def resnet() -> Network:
    module, x = ResNet(), normal(4, 6, 6, 3)
    first = lambda block: lambda seen: relu(seen[f"{block}/norm0"])  # noqa: E731
    whole = lambda block: lambda seen: seen[block]  # noqa: E731
    sites = (
        Site("stem/kernel", "conv", "relu", (3,)),
        Site("block0/conv0/kernel", "conv", "relu", (3,), first("block0")),
        Site("block0/conv1/kernel", "conv", "relu", (3,), whole("block0")),
        Site("block1/conv0/kernel", "conv", "relu", (3,), first("block1")),
        Site("block1/conv1/kernel", "conv", "relu", (3,), whole("block1")),
        Site("block1/project/kernel", "conv", "relu", (3,), whole("block1")),
        Site("head/kernel", "dense", "identity", (1,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Convolutions(nn.Module):
    """Every way in which a kernel's input axis is not the input's channels, or the strides are not 1."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="depthwise")(x))
        x = nn.silu(nn.Conv(6, (3, 3), feature_group_count=2, name="grouped")(x))
        x = nn.relu(nn.Conv(5, (3, 2), strides=(2, 1), padding=((1, 0), (0, 2)), name="strided")(x))
        return nn.Conv(3, (3, 3), kernel_dilation=2, name="dilated")(x)


def convolutions() -> Network:
    module, x = Convolutions(), normal(3, 8, 7, 4)
    sites = (
        Site("depthwise/kernel", "conv", "relu", (3,)),
        Site("grouped/kernel", "conv", "silu", (3,)),
        Site("strided/kernel", "conv", "relu", (3,)),
        Site("dilated/kernel", "conv", "identity", (3,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Conv1D(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3,), name="second")(nn.relu(nn.Conv(6, (3,), name="first")(x)))


def conv_1d() -> Network:
    module, x = Conv1D(), normal(4, 10, 3)
    sites = (
        Site("first/kernel", "conv", "relu", (2,)),
        Site("second/kernel", "conv", "identity", (2,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Conv3D(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.elu(nn.Conv(3, (2, 3, 2))(x)).mean(axis=(1, 2, 3))


def conv_3d() -> Network:
    module, x = Conv3D(), normal(2, 4, 5, 4, 2)
    elu = lambda seen: np.where(seen["Conv_0"] > 0, seen["Conv_0"], np.expm1(seen["Conv_0"]))  # noqa: E731
    return Network(module, drawn(module, x), (x,), {}, (Site("Conv_0/kernel", "conv", "elu", (4,), elu),))


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.DenseGeneral((3, 4), name="split")(x))
        return nn.DenseGeneral(5, axis=(-2, -1), name="join")(x)


def dense_general() -> Network:
    module, x = Heads(), normal(6, 7, 8)
    sites = (
        Site("split/kernel", "dense", "relu", (1, 2)),
        Site("join/kernel", "dense", "identity", (2,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm0")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        y = nn.LayerNorm(name="norm1")(x)
        y = nn.gelu(nn.Dense(24, name="expand")(y))
        return x + nn.Dense(x.shape[-1], name="contract")(y)


class Transformer(nn.Module):
    vocabulary: int = 11

    @nn.compact
    def __call__(self, tokens):
        wte = nn.Embed(self.vocabulary, 12, name="wte")
        positions = nn.Embed(9, 12, name="wpe")(jnp.arange(tokens.shape[1]))
        x = wte(tokens) + positions[None]
        x = TransformerBlock(name="block")(x)
        return wte.attend(nn.LayerNorm(name="norm")(x))


def transformer() -> Network:
    module, x = Transformer(), tokens(4, 6, vocabulary=11)
    sites = (
        Site("wpe/embedding", "embedding", "identity", (1,)),
        Site("wte/embedding", "embedding", "identity", (1,)),
        *(
            Site(f"block/attention/{name}/kernel", "dense", "identity", (1, 2))
            for name in ("query", "key", "value")
        ),
        Site("block/attention/out/kernel", "dense", "identity", (2,)),
        Site("block/expand/kernel", "dense", "gelu_tanh", (1,)),
        Site("block/contract/kernel", "dense", "identity", (1,)),
        Site("wte/embedding", "dense", "identity", (0,)),
    )
    return Network(module, train(module, x), (x,), {}, sites)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, name="layer")
        return layer(nn.relu(layer(x)))


def shared() -> Network:
    module, x = Shared(), normal(16, 8)
    sites = (
        Site("layer/kernel", "dense", "relu", (1,)),
        Site("layer/kernel", "dense", "identity", (1,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(7, name="inner")(x))


class Lifted(nn.Module):
    """A block inside nn.remat and one inside nn.jit; `lifted=False` is the same network without."""

    lifted: bool = True

    @nn.compact
    def __call__(self, x):
        remat, jit = (nn.remat, nn.jit) if self.lifted else (lambda kind: kind,) * 2
        x = remat(Block)(name="remat")(x)
        x = jit(Block)(name="jit")(x)
        return nn.Dense(3, name="head")(x)


def lifted() -> Network:
    module, x = Lifted(), normal(16, 5)
    sites = (
        Site("remat/inner/kernel", "dense", "relu", (1,)),
        Site("jit/inner/kernel", "dense", "relu", (1,)),
        Site("head/kernel", "dense", "identity", (1,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Dropped(nn.Module):
    """Dropout before the nonlinearity of one layer and after that of the next."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dropout(0.4, deterministic=not train, name="drop0")(nn.Dense(12, name="first")(x)))
        x = nn.Dropout(0.4, deterministic=not train, name="drop1")(nn.gelu(nn.Dense(9, name="second")(x)))
        return nn.Dense(3, name="head")(x)


def dropout() -> Network:
    module, x = Dropped(), normal(32, 6)
    keywords = {"train": True, "rngs": {"dropout": jax.random.key(3)}}
    sites = (
        Site("first/kernel", "dense", "relu", (1,), lambda seen: relu(seen["drop0"])),
        Site("second/kernel", "dense", "gelu_tanh", (1,)),
        Site("head/kernel", "dense", "identity", (1,)),
    )
    return Network(module, drawn(module, x), (x,), keywords, sites)


class Projection(nn.Module):
    """A weight that no layer of Flax holds; Flax's own layout is not to be relied on for it."""

    features: int
    outputs_first: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (self.features, x.shape[-1]) if self.outputs_first else (x.shape[-1], self.features)
        w = self.param("w", nn.initializers.normal(0.5), shape)
        return jnp.einsum("...i,oi->...o", x, w) if self.outputs_first else x @ w


class Bare(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(Projection(7, name="plain")(x))
        return nn.relu(Projection(4, outputs_first=True, name="turned")(x))


def bare() -> Network:
    module, x = Bare(), normal(16, 5)
    sites = (Site("plain/w", "dense", "sigmoid", (1,)), Site("turned/w", "dense", "relu", (0,)))
    return Network(module, drawn(module, x), (x,), {}, sites)


class SwiGLU(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = nn.Dense(10, name="gate")(x), nn.Dense(10, name="up")(x)
        return nn.Dense(x.shape[-1], name="down")(nn.silu(gate) * up)


def swiglu() -> Network:
    module, x = SwiGLU(), normal(16, 6)
    sites = (
        Site("gate/kernel", "dense", "silu", (1,)),
        Site("up/kernel", "dense", "identity", (1,)),
        Site("down/kernel", "dense", "identity", (1,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Fused(nn.Module):
    """Layers whose output is taken apart: halves, every other unit, heads of which none is gated."""

    @nn.compact
    def __call__(self, x):
        gate, up = jnp.split(nn.Dense(20, name="halves")(x), 2, axis=-1)
        y = nn.Dense(14, use_bias=False, name="turns")(nn.silu(gate) * up)
        y = nn.sigmoid(y[..., ::2]) * jnp.tanh(y[..., 1::2])
        y = nn.Dense(12, name="stacked")(y).reshape(*y.shape[:-1], 3, 4)
        return nn.Dense(3, name="head")(nn.relu(y[..., 0, :]) + y[..., 1, :] * y[..., 2, :])


def fused() -> Network:
    module, x = Fused(), normal(16, 6)

    def parts(name: str, *nonlinearities: Callable[[Array], Array], every: bool = False):
        def emits(seen: Seen) -> Array:
            emitted = np.array(seen[name])
            count = len(nonlinearities)
            size = emitted.shape[-1] // count
            for i, nonlinearity in enumerate(nonlinearities):
                own = np.s_[..., i::count] if every else np.s_[..., i * size : (i + 1) * size]
                emitted[own] = nonlinearity(emitted[own])
            return emitted

        return emits

    identity = BY_NAME["identity"]
    sites = (
        Site("halves/kernel", "dense", "silu/identity", (1,), parts("halves", BY_NAME["silu"], identity)),
        Site("turns/kernel", "dense", "sigmoid/tanh", (1,), parts("turns", sigmoid, np.tanh, every=True)),
        Site("stacked/kernel", "dense", "relu/identity", (1,), parts("stacked", relu, identity, identity)),
        Site("head/kernel", "dense", "identity", (1,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Normalised(nn.Module):
    """A norm mixes units before the relu: each Dense keeps its own output."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Dense(12, name="group")(x)))
        x = nn.relu(nn.LayerNorm()(nn.Dense(10, name="layer")(x)))
        return nn.relu(nn.RMSNorm()(nn.Dense(8, name="rms")(x)))


def normalised() -> Network:
    module, x = Normalised(), normal(16, 6)
    sites = tuple(Site(f"{name}/kernel", "dense", "identity", (1,)) for name in ("group", "layer", "rms"))
    return Network(module, drawn(module, x), (x,), {}, sites)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(nn.LSTMCell(6, name="cell"), name="rnn")(x))


def lstm() -> Network:
    module, x = Recurrent(), normal(4, 5, 3)
    variables = drawn(module, x)
    # As the cell names them: input, forget, candidate and output gate.
    gates = {"i": "sigmoid", "f": "sigmoid", "g": "tanh", "o": "sigmoid"}
    sites = tuple(
        Site(f"cell/{side}{gate}/kernel", "dense", name, (1,), lambda seen, gate=gate: seen[f"gate {gate}"])
        for gate, name in gates.items()
        for side in "ih"
    )
    head = Site("head/kernel", "dense", "identity", (1,))
    return Network(module, variables, (x,), {}, (*sites, head), seen=_unrolled(variables["params"], x))


def _unrolled(params: dict[str, Any], x: Array) -> Seen:
    """The LSTM and its head in NumPy, step by step."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    cell, head = wide["cell"], wide["head"]
    h, c = np.zeros((2, len(x), 6))
    inputs: dict[str, list[Array]] = {}
    outputs: dict[str, list[Array]] = {}
    states = []
    for step in np.moveaxis(x.astype(np.float64), 1, 0):
        gate = {}
        for name in "ifgo":
            fed, back = step @ cell[f"i{name}"]["kernel"], h @ cell[f"h{name}"]["kernel"]
            back = back + cell[f"h{name}"]["bias"]
            gate[name] = np.tanh(fed + back) if name == "g" else sigmoid(fed + back)
            for path, taken, given in ((f"cell/i{name}", step, fed), (f"cell/h{name}", h, back)):
                inputs.setdefault(path, []).append(taken)
                outputs.setdefault(path, []).append(given)
            outputs.setdefault(f"gate {name}", []).append(gate[name])
        c = gate["f"] * c + gate["i"] * gate["g"]
        h = gate["o"] * np.tanh(c)
        states.append(h)
    inputs["head"], outputs["head"] = states, [h @ head["kernel"] + head["bias"] for h in states]
    return Seen(*({path: [np.stack(steps)] for path, steps in calls.items()} for calls in (inputs, outputs)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(x.shape[-1], name="dense")(x)), None


class Scanned(nn.Module):
    """Three layers, stacked along the first axis of one kernel."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="stack")(x, None)[0]


def scanned() -> Network:
    module, x = Scanned(), normal(16, 6)
    variables = drawn(module, x)
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["stack"]["dense"])
    inputs, outputs = [], []
    y = x.astype(np.float64)
    for kernel, bias in zip(layer["kernel"], layer["bias"], strict=True):
        inputs.append(y)
        outputs.append(y @ kernel + bias)
        y = relu(outputs[-1])
    seen = Seen(*({"stack/dense": [np.stack(calls, 1)]} for calls in (inputs, outputs)))
    return Network(
        module, variables, (x,), {}, (Site("stack/dense/kernel", "dense", "relu", (2,)),), seen=seen
    )


class Narrow(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(9, dtype=jnp.float32, param_dtype=jnp.bfloat16)(x))
        return nn.Dense(4, dtype=jnp.float32, param_dtype=jnp.bfloat16)(x)


def bfloat16() -> Network:
    """Weights in bfloat16, activations in float32: what is rounded is the same compiled or not."""
    module, x = Narrow(), normal(16, 6)
    sites = (
        Site("Dense_0/kernel", "dense", "relu", (1,)),
        Site("Dense_1/kernel", "dense", "identity", (1,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Mixed(nn.Module):
    """Beside its one layer: integers that choose the outputs, a scale, leaves that nothing reads."""

    @nn.compact
    def __call__(self, x):
        chosen = self.param("chosen", lambda key: jnp.array([4, 0, 2], jnp.int32))
        temperature = self.param("temperature", lambda key: jnp.array(0.5))
        self.param("forgotten", nn.initializers.normal(), (3, 4))
        self.param("forgotten_too", nn.initializers.normal(), (3,))
        return (nn.Dense(5, name="head")(x) * temperature)[:, chosen]


def mixed() -> Network:
    module, x = Mixed(), normal(16, 6)
    return Network(
        module,
        module.init(jax.random.key(0), x),
        (x,),
        {},
        (Site("head/kernel", "dense", "identity", (1,)),),
        unpaired={"forgotten": "unused"},
        others={"chosen": "int32 array", "temperature": "scale", "forgotten_too": "unused"},
    )


_BUILDERS: Mapping[str, Callable[[], Network]] = {
    "mlp": mlp,
    "square": square,
    "cnn": cnn,
    "cnn in training": lambda: cnn(train=True, mutable=["batch_stats"]),
    "resnet": resnet,
    "convolutions": convolutions,
    "conv 1d": conv_1d,
    "conv 3d": conv_3d,
    "dense general": dense_general,
    "transformer": transformer,
    "shared": shared,
    "lifted": lifted,
    "dropout": dropout,
    "bare": bare,
    "swiglu": swiglu,
    "fused": fused,
    "normalised": normalised,
    "lstm": lstm,
    "scanned": scanned,
    "bfloat16": bfloat16,
    "mixed": mixed,
}

NETWORKS: Mapping[str, Callable[[], Network]] = {
    name: functools.cache(builder) for name, builder in _BUILDERS.items()
}
