"""Networks whose layers are lifted, stacked, normalized, masked or boxed, and what they take and give."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from network import Array, Network, Seen, Site, drawn, gelu, normal, relu


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _seen(**calls: tuple[Array, Array]) -> Seen:
    """What each layer took in and gave out, once; `__` in a name stands for '/'."""
    named = {name.replace("__", "/"): call for name, call in calls.items()}
    return Seen(
        {name: [taken] for name, (taken, _) in named.items()}, {n: [given] for n, (_, given) in named.items()}
    )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(x.shape[-1], name="dense")(x))


class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(Block, lengths=(2, 3))(name="stack")(x)


def remat_scan() -> Network:
    """Two times three layers, each stack an axis of one kernel."""
    module, x = RematScan(), normal(16, 6)
    variables = drawn(module, x)
    dense = _wide(variables["params"]["stack"]["dense"])
    y, inputs, outputs = x.astype(np.float64), np.zeros((2, 3, 16, 6)), np.zeros((2, 3, 16, 6))
    for index in np.ndindex(2, 3):
        inputs[index], outputs[index] = y, y @ dense["kernel"][index] + dense["bias"][index]
        y = relu(outputs[index])
    seen = _seen(stack__dense=(np.moveaxis(inputs, 2, 0), np.moveaxis(outputs, 2, 0)))
    return Network(
        module, variables, (x,), {}, (Site("stack/dense/kernel", "dense", "relu", (3,)),), seen=seen
    )


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        lifted = nn.vmap(
            nn.Dense, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return nn.tanh(lifted(4, name="ensemble")(x))


def vmapped() -> Network:
    """Three dense layers side by side, each with an input of its own."""
    module, x = Vmapped(), normal(16, 3, 6)
    variables = drawn(module, x)
    layer = _wide(variables["params"]["ensemble"])
    given = np.einsum("bei,eio->beo", x.astype(np.float64), layer["kernel"]) + layer["bias"]
    seen = _seen(ensemble=(x.astype(np.float64), given))
    return Network(
        module, variables, (x,), {}, (Site("ensemble/kernel", "dense", "tanh", (0, 2)),), seen=seen
    )


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate = nn.softmax(nn.Dense(3, name="router")(x))
        up = self.param("up", nn.initializers.normal(), (3, 6, 8))
        down = self.param("down", nn.initializers.normal(), (3, 8, 6))
        hidden = nn.gelu(jnp.einsum("td,edf->tef", x, up))
        return jnp.einsum("tef,efd->ted", hidden, down) * gate[..., None]


def experts() -> Network:
    module, x = Experts(), normal(16, 6)
    variables = drawn(module, x)
    params, wide = _wide(variables["params"]), x.astype(np.float64)
    logits = wide @ params["router"]["kernel"] + params["router"]["bias"]
    up = np.einsum("td,edf->tef", wide, params["up"])
    down = np.einsum("tef,efd->ted", gelu(up), params["down"])
    sites = (
        Site("router/kernel", "dense", "identity", (1,)),
        Site("up", "dense", "gelu_tanh", (0, 2)),
        Site("down", "dense", "identity", (0, 2)),
    )
    seen = _seen(router=(wide, logits), up=(wide, up), down=(gelu(up), down))
    return Network(module, variables, (x,), {}, sites, seen=seen)


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvTranspose(5, (3, 3), strides=(2, 2), name="up")(x))
        return nn.ConvTranspose(4, (2, 3), padding="VALID", use_bias=False, name="wide")(x)


def transposed() -> Network:
    module, x = Transposed(), normal(2, 4, 5, 3)
    sites = (Site("up/kernel", "conv", "relu", (3,)), Site("wide/kernel", "conv", "identity", (3,)))
    return Network(module, drawn(module, x), (x,), {}, sites)


class Local(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.ConvLocal(3, (2, 2), padding="VALID", name="local")(x))


def local() -> Network:
    """A kernel of its own at each position: units are positions times features."""
    module, x = Local(), normal(4, 3, 4, 2)
    variables = drawn(module, x)
    layer = _wide(variables["params"]["local"])
    # As Flax lays a patch out: features first, then its rows and columns.
    patches = np.array([[x[:, i : i + 2, j : j + 2] for j in range(3)] for i in range(2)], np.float64)
    patches = np.moveaxis(patches, 2, 0).transpose(0, 1, 2, 5, 3, 4).reshape(4, 2, 3, 8)
    given = np.einsum("bijp,ijpo->bijo", patches, layer["kernel"]) + layer["bias"]
    sites = (Site("local/kernel", "dense", "relu", (0, 1, 3)),)
    return Network(module, variables, (x,), {}, sites, seen=_seen(local=(patches, given)))


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.WeightNorm(nn.Dense(7, name="dense"), name="norm")(x))


def weight_norm() -> Network:
    module, x = WeightNormed(), normal(16, 6)
    others = {"norm/dense/kernel/scale": "scale"}
    sites = (Site("dense/kernel", "dense", "relu", (1,)),)
    return Network(module, drawn(module, x), (x,), {}, sites, others=others)


class LowRank(nn.Module):
    """A Dense with an adapter beside it."""

    @nn.compact
    def __call__(self, x):
        adapted = nn.Dense(8, use_bias=False, name="b")(nn.Dense(2, use_bias=False, name="a")(x))
        return nn.tanh(nn.Dense(8, name="dense")(x) + adapted)


def low_rank() -> Network:
    module, x = LowRank(), normal(16, 6)
    summed = lambda seen: np.tanh(seen["dense"] + seen["b"])  # noqa: E731
    sites = (
        Site("a/kernel", "dense", "identity", (1,)),
        Site("b/kernel", "dense", "tanh", (1,), summed),
        Site("dense/kernel", "dense", "tanh", (1,), summed),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        kernel = self.param("kernel", nn.initializers.normal(), (6, 7))
        return nn.relu(x @ jnp.where(mask, kernel, 0))


def masked() -> Network:
    module, x = Masked(), normal(16, 6)
    mask = normal(6, 7, seed=9) > 0
    variables = drawn(module, x, mask)
    given = x.astype(np.float64) @ np.where(mask, _wide(variables["params"]["kernel"]), 0)
    sites = (Site("kernel", "dense", "relu", (1,)),)
    seen = _seen(kernel=(x.astype(np.float64), given))
    return Network(module, variables, (x,), {"mask": jnp.asarray(mask)}, sites, seen=seen)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(0.5), ("in", "out"))
        return nn.relu(nn.Dense(7, kernel_init=init, name="dense")(x))


def boxed() -> Network:
    module, x = Boxed(), normal(16, 6)
    variables = module.init(jax.random.key(0), x)
    return Network(module, variables, (x,), {}, (Site("dense/kernel", "dense", "relu", (1,)),))


class MultiQuery(nn.Module):
    """Six query heads on two keys and values, repeated for them."""

    @nn.compact
    def __call__(self, x):
        query = nn.DenseGeneral((6, 4), use_bias=False, name="query")(x)
        key, value = (nn.DenseGeneral((2, 4), use_bias=False, name=name)(x) for name in ("key", "value"))
        key, value = (jnp.repeat(y, 3, axis=2) for y in (key, value))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2.0)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(mixed)


def multi_query() -> Network:
    module, x = MultiQuery(), normal(3, 5, 8)
    sites = (
        *(Site(f"{name}/kernel", "dense", "identity", (1, 2)) for name in ("query", "key", "value")),
        Site("out/kernel", "dense", "identity", (2,)),
    )
    return Network(module, drawn(module, x), (x,), {}, sites)
