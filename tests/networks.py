"""The networks that the tests share, and what the graph has to find in each.

`NETWORKS[name]()` is a `Network`. Its `sites` say, in execution order, which operation consumes which
weight and what its units emit: the truth that test_graph and test_statistics compare with. The MLP,
the square one, the CNN and the transformer are trained for a few steps; the others, which would spend
their time compiling it, are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import recurrent
import transformed
from network import BY_NAME as BY_NAME
from network import Array as Array
from network import Network as Network
from network import Seen as Seen
from network import Site as Site
from network import drawn as drawn
from network import gelu as gelu
from network import module_of as module_of
from network import normal as normal
from network import relu as relu
from network import sigmoid as sigmoid
from network import tokens as tokens
from network import train as train


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
    """Equal layers, which share one compiled kernel: the network to analyze where any will do."""

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
        # Written as slices: indexing with a step is a gather to older versions of jax, which is not followed.
        even, odd = (jax.lax.slice_in_dim(y, start, None, 2, axis=-1) for start in (0, 1))
        y = nn.sigmoid(even) * jnp.tanh(odd)
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


class Normalized(nn.Module):
    """A norm mixes units before the relu: each Dense keeps its own output."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Dense(12, name="group")(x)))
        x = nn.relu(nn.LayerNorm()(nn.Dense(10, name="layer")(x)))
        return nn.relu(nn.RMSNorm()(nn.Dense(8, name="rms")(x)))


def normalized() -> Network:
    module, x = Normalized(), normal(16, 6)
    sites = tuple(Site(f"{name}/kernel", "dense", "identity", (1,)) for name in ("group", "layer", "rms"))
    return Network(module, drawn(module, x), (x,), {}, sites)


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
    "normalized": normalized,
    "lstm": recurrent.lstm,
    "optimized lstm": recurrent.optimized_lstm,
    "gru": recurrent.gru,
    "simple cell": recurrent.simple_cell,
    "bidirectional": recurrent.bidirectional,
    "scanned": scanned,
    "remat scan": transformed.remat_scan,
    "vmapped": transformed.vmapped,
    "experts": transformed.experts,
    "transposed": transformed.transposed,
    "local": transformed.local,
    "weight norm": transformed.weight_norm,
    "low rank": transformed.low_rank,
    "masked": transformed.masked,
    "boxed": transformed.boxed,
    "multi-query": transformed.multi_query,
    "bfloat16": bfloat16,
    "mixed": mixed,
}

NETWORKS: Mapping[str, Callable[[], Network]] = {
    name: functools.cache(builder) for name, builder in _BUILDERS.items()
}
