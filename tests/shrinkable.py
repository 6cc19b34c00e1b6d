"""Networks as functions of their widths, and what of each may be removed.

`NETWORKS[name]` is a `Shrinkable`. `build(width)` makes the module of the widths that `width(path, axis)`
gives: those of the large network, or of one that a plan made smaller. `free` are the groups that may
shrink, with their sizes: all others have to be locked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from network import normal, tokens

Width = Callable[[str, int], int]


class Shrinkable(NamedTuple):
    module: nn.Module
    build: Callable[[Width], nn.Module]
    batch: tuple[Any, ...]
    free: dict[str, int]


class MLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.sigmoid(nn.Dense(width)(x))
        return nn.Dense(3)(x)


def mlp() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        return MLP((width("Dense_0/kernel", 1), width("Dense_1/kernel", 1)))

    return Shrinkable(MLP((9, 7)), build, (normal(8, 5),), {"Dense_0/kernel:1": 9, "Dense_1/kernel:1": 7})


class CNN(nn.Module):
    """Flattened after convolutions: each channel is 9 rows of the dense kernel."""

    widths: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(self.widths[0], (3, 3))(x))
        x = nn.avg_pool(nn.Conv(self.widths[1], (3, 3))(x), (2, 2), strides=(2, 2))
        return nn.Dense(4)(nn.relu(x).reshape(x.shape[0], -1))


def cnn() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        return CNN((width("Conv_0/kernel", 3), width("Conv_1/kernel", 3)))

    return Shrinkable(CNN((6, 8)), build, (normal(4, 6, 6, 3),), {"Conv_0/kernel:3": 6, "Conv_1/kernel:3": 8})


class Residual(nn.Module):
    inner: int
    outer: int
    strides: int = 1
    project: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.inner, (3, 3), strides=self.strides, use_bias=False, name="conv0")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="norm0")(y))
        y = nn.Conv(self.outer, (3, 3), use_bias=False, name="conv1")(y)
        y = nn.BatchNorm(use_running_average=True, name="norm1")(y)
        if self.project:
            x = nn.Conv(self.outer, (1, 1), strides=self.strides, use_bias=False, name="project")(x)
            x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    stem: int
    inner: tuple[int, int, int]
    wide: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.stem, (3, 3), name="stem")(x))
        x = Residual(self.inner[0], self.stem, name="block0")(x)
        x = Residual(self.inner[1], self.wide, strides=2, project=True, name="block1")(x)
        x = Residual(self.inner[2], self.wide, name="block2")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def resnet() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        inner = tuple(width(f"block{i}/conv0/kernel", 3) for i in range(3))
        return ResNet(width("stem/kernel", 3), inner, width("head/kernel", 0))

    free = {"stem/kernel:3": 6, "block1/conv1/kernel:3": 8}
    free |= {f"block{i}/conv0/kernel:3": size for i, size in enumerate((5, 7, 4))}
    return Shrinkable(ResNet(6, (5, 7, 4), 8), build, (normal(2, 6, 6, 3),), free)


class MobileNet(nn.Module):
    """A depthwise convolution in an inverted bottleneck, and one that makes two channels of each."""

    expanded: int
    width: int
    times: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.BatchNorm(use_running_average=True)(nn.Conv(self.expanded, (1, 1), name="expand")(x)))
        x = nn.Conv(self.expanded, (3, 3), feature_group_count=self.expanded, name="depthwise")(x)
        x = nn.Conv(self.width, (1, 1), name="project")(nn.hard_swish(x))
        x = nn.Conv(self.times * self.width, (3, 3), feature_group_count=self.width, name="doubled")(x)
        return nn.Dense(3, name="head")(jnp.mean(nn.relu(x), axis=(1, 2)))


def mobilenet() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        width_of = width("project/kernel", 3)
        return MobileNet(width("expand/kernel", 3), width_of, width("doubled/kernel", 3) // width_of)

    free = {"expand/kernel:3": 8, "project/kernel:3": 5, "doubled/kernel:3": 2}
    return Shrinkable(MobileNet(8, 5, 2), build, (normal(2, 5, 5, 3),), free)


class Grouped(nn.Module):
    """Groups, and channels within groups, are removed independently of each other."""

    groups: int
    each: int
    out: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.groups * self.each, (1, 1), name="before")(x))
        x = nn.Conv(self.groups * self.out, (3, 3), feature_group_count=self.groups, name="grouped")(x)
        return nn.Conv(3, (1, 1), name="after")(nn.tanh(x))


def grouped() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        each = width("grouped/kernel", 2)
        groups = width("before/kernel", 3) // each
        return Grouped(groups, each, width("grouped/kernel", 3) // groups)

    free = {"before/kernel:3": 3, "before/kernel:3#2": 4, "grouped/kernel:3": 2}
    return Shrinkable(Grouped(4, 3, 2), build, (normal(2, 4, 4, 3),), free)


class DenseNet(nn.Module):
    stem: int
    growth: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.stem, (3, 3), name="stem")(x)
        for i, width in enumerate(self.growth):
            y = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm{i}")(x))
            x = jnp.concatenate([x, nn.Conv(width, (3, 3), name=f"conv{i}")(y)], axis=-1)
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def densenet() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        return DenseNet(width("stem/kernel", 3), tuple(width(f"conv{i}/kernel", 3) for i in range(3)))

    free = {"stem/kernel:3": 5, "conv0/kernel:3": 4, "conv1/kernel:3": 3, "conv2/kernel:3": 4}
    return Shrinkable(DenseNet(5, (4, 3, 4)), build, (normal(2, 4, 4, 3),), free)


class UNet(nn.Module):
    down: int
    deep: int
    up: int

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(self.down, (3, 3), name="down")(x))
        x = nn.max_pool(skip, (2, 2), strides=(2, 2))
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=1)(nn.Conv(self.deep, (3, 3), name="deep")(x)))
        x = nn.ConvTranspose(self.up, (2, 2), strides=(2, 2), name="up")(x)
        return nn.Conv(2, (3, 3), name="head")(jnp.concatenate([x, skip], axis=-1))


def unet() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        return UNet(width("down/kernel", 3), width("deep/kernel", 3), width("up/kernel", 3))

    free = {"down/kernel:3": 4, "deep/kernel:3": 6, "up/kernel:3": 5}
    return Shrinkable(UNet(4, 6, 5), build, (normal(2, 6, 6, 3),), free)


class Attention(nn.Module):
    heads: int
    value: int
    size: int = 4

    @nn.compact
    def __call__(self, x):
        query, key = (nn.DenseGeneral((self.heads, self.size), name=name)(x) for name in ("query", "key"))
        value = nn.DenseGeneral((self.heads, self.value), name="value")(x)
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(self.size))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(mixed)


class Encoder(nn.Module):
    heads: int
    value: int
    expanded: int

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.heads, self.value, name="attention")(nn.LayerNorm(name="norm0")(x))
        y = nn.gelu(nn.Dense(self.expanded, name="expand")(nn.LayerNorm(name="norm1")(x)))
        return x + nn.Dense(x.shape[-1], name="contract")(y)


class ViT(nn.Module):
    heads: int
    value: int
    expanded: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=(2, 2), name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = self.param("first", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        x = Encoder(self.heads, self.value, self.expanded, name="block")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def vit() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        heads, value = width("block/attention/value/kernel", 1), width("block/attention/value/kernel", 2)
        return ViT(heads, value, width("block/expand/kernel", 1))

    free = {
        "block/attention/query/kernel:1": 3,
        "block/attention/value/kernel:2": 5,
        "block/expand/kernel:1": 9,
    }
    return Shrinkable(ViT(3, 5, 9), build, (normal(2, 4, 4, 3),), free)


class GroupedQueries(nn.Module):
    """Queries, keys and values of one product; several queries share a key and a value."""

    keys: int
    queries: int
    value: int
    size: int = 4

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        of_query, of_key = self.keys * self.queries * self.size, self.keys * self.size
        fused = nn.Dense(of_query + of_key + self.keys * self.value, use_bias=False, name="qkv")(x)
        query, key, value = jnp.split(fused, [of_query, of_query + of_key], axis=-1)
        query = query.reshape(batch, length, self.keys, self.queries, self.size)
        key, value = (y.reshape(batch, length, self.keys, -1) for y in (key, value))
        scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key) / np.sqrt(self.size)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
        mixed = jnp.einsum("bkgqs,bskd->bqkgd", nn.softmax(scores), value)
        return nn.Dense(width, use_bias=False, name="out")(mixed.reshape(batch, length, -1))


class GPT(nn.Module):
    """Fused grouped-query attention, SwiGLU from one product, tied embeddings."""

    keys: int
    queries: int
    value: int
    expanded: int

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(words)
        y = nn.RMSNorm(name="norm0")(x)
        x = x + GroupedQueries(self.keys, self.queries, self.value, name="attention")(y)
        gate, up = jnp.split(nn.Dense(2 * self.expanded, name="up")(nn.RMSNorm(name="norm1")(x)), 2, axis=-1)
        x = x + nn.Dense(8, name="down")(nn.silu(gate) * up)
        return embed.attend(nn.RMSNorm(name="norm")(x))


def gpt() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        # The kernels of the fused products give sums of widths: keys and queries come of these.
        fused, out = width("attention/qkv/kernel", 1), width("attention/out/kernel", 0)
        ways = [
            (keys, queries, value)
            for keys in range(1, 4)
            for queries in range(1, 4)
            for value in range(1, 6)
            if keys * queries * value == out and keys * (queries * 4 + 4 + value) == fused
        ]
        assert len(ways) == 1
        return GPT(*ways[0], width("down/kernel", 0))

    free = {
        "attention/qkv/kernel:1#2": 3,
        "attention/qkv/kernel:1#3": 2,
        "attention/qkv/kernel:1#4": 5,
        "up/kernel:1": 7,
    }
    return Shrinkable(GPT(3, 2, 5, 7), build, (tokens(2, 5, vocabulary=11),), free)


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]
    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(self.cell(self.hidden, name="cell"))(x))  # pyright: ignore


def recurrent(cell: type[nn.RNNCellBase], first: str) -> Shrinkable:
    def build(width: Width) -> nn.Module:
        return Recurrent(cell, width("head/kernel", 0))

    return Shrinkable(Recurrent(cell, 6), build, (normal(3, 4, 5),), {first: 6})


class Layer(nn.Module):
    heads: int
    value: int
    expanded: int

    @nn.compact
    def __call__(self, x, _):
        return Encoder(self.heads, self.value, self.expanded, name="block")(x), None


class Scanned(nn.Module):
    heads: int
    value: int
    expanded: int
    length: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        stack = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length
        )
        x, _ = stack(self.heads, self.value, self.expanded, name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


def scanned() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        heads, value = (width("layers/block/attention/value/kernel", axis) for axis in (2, 3))
        return Scanned(
            heads, value, width("layers/block/expand/kernel", 2), width("layers/block/expand/kernel", 0)
        )

    free = {
        "layers/block/norm0/scale:0": 3,
        "layers/block/attention/query/kernel:2": 3,
        "layers/block/attention/value/kernel:3": 5,
        "layers/block/expand/kernel:2": 9,
    }
    return Shrinkable(Scanned(3, 5, 9), build, (normal(2, 4, 5),), free)


class Mixture(nn.Module):
    hidden: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.width, name="embed")(x))
        gate = nn.softmax(nn.Dense(3, name="router")(x))
        up = self.param("up", nn.initializers.normal(), (3, self.width, self.hidden))
        down = self.param("down", nn.initializers.normal(), (3, self.hidden, 4))
        hidden = nn.gelu(jnp.einsum("td,edf->tef", x, up))
        return jnp.einsum("tef,efd,te->td", hidden, down, gate)


def mixture() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        return Mixture(width("up", 2), width("up", 1))

    return Shrinkable(
        Mixture(8, 6), build, (normal(7, 5),), {"embed/kernel:1": 6, "router/kernel:1": 3, "up:2": 8}
    )


class Shuffled(nn.Module):
    """Even and odd units gate each other, and a position takes one of them by itself."""

    half: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(2 * self.half, name="turns")(x)
        y = y.reshape(*y.shape[:-1], self.half, 2)
        return nn.Dense(3, name="head")(nn.sigmoid(y[..., 0]) * jnp.tanh(y[..., 1]))


def shuffled() -> Shrinkable:
    def build(width: Width) -> nn.Module:
        return Shuffled(width("head/kernel", 0))

    return Shrinkable(Shuffled(6), build, (normal(7, 5),), {"turns/kernel:1": 6})


NETWORKS: Mapping[str, Callable[[], Shrinkable]] = {
    "mlp": mlp,
    "cnn with flatten": cnn,
    "resnet": resnet,
    "mobilenet": mobilenet,
    "grouped convolution": grouped,
    "densenet": densenet,
    "unet": unet,
    "vit": vit,
    "gpt": gpt,
    "lstm": lambda: recurrent(nn.LSTMCell, "cell/ii/kernel:1"),
    "optimized lstm": lambda: recurrent(nn.OptimizedLSTMCell, "cell/hi/kernel:0"),
    "gru": lambda: recurrent(nn.GRUCell, "cell/ir/kernel:1"),
    "scanned transformer": scanned,
    "mixture of experts": mixture,
    "shuffled": shuffled,
}
