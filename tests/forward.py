"""Forward passes of three networks of `networks`, written out in NumPy float64.

Each returns, by path, the weight and for each of its uses the pre- and post-activation, laid out so
that the mean over positions broadcasts against the weight: (positions, *units), or for a use whose
units are the weight's first axis (positions, units, 1).
"""

from __future__ import annotations

import numpy as np
from networks import gelu, relu

Array = np.ndarray
Uses = list[tuple[Array, Array]]
Layers = dict[str, tuple[Array, Uses]]


def importance(weight: Array, emitted: list[Array]) -> Array:
    """abs(w_ij) mean abs(a_j); the mean is over all positions of all uses."""
    scores = [np.abs(weight) * np.abs(a).mean(0) * len(a) for a in emitted]
    return np.sum(scores, axis=0) / sum(len(a) for a in emitted)


def mlp(variables: dict, x: Array, outputs: list | None = None) -> Layers:
    params = _wide(variables["params"])
    layers: Layers = {}
    x = x.astype(np.float64)
    for index, nonlinearity in enumerate((relu, np.tanh, lambda y: y)):
        layer = params[f"Dense_{index}"]
        y = x @ layer["kernel"] + layer["bias"]
        x = nonlinearity(y)
        layers[f"Dense_{index}/kernel"] = (layer["kernel"], [(y, x)])
    _keep(outputs, x)
    return layers


def cnn(variables: dict, x: Array, outputs: list | None = None) -> Layers:
    params, averages = _wide(variables["params"]), _wide(variables["batch_stats"])
    layers: Layers = {}
    x = x.astype(np.float64)
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    y = _convolve(np.pad(x, padding), params["conv0"]["kernel"], 1) + params["conv0"]["bias"]
    x = relu(_batch_norm(y, params["norm0"], averages["norm0"]))
    layers["conv0/kernel"] = (params["conv0"]["kernel"], [(_positions(y), _positions(x))])
    x = x.reshape(len(x), 4, 2, 4, 2, 6).max((2, 4))
    y = _convolve(x, params["conv1"]["kernel"], 2)
    x = relu(_batch_norm(y, params["norm1"], averages["norm1"]))
    layers["conv1/kernel"] = (params["conv1"]["kernel"], [(_positions(y), _positions(x))])
    y = x.reshape(len(x), -1) @ params["head"]["kernel"] + params["head"]["bias"]
    layers["head/kernel"] = (params["head"]["kernel"], [(y, y)])
    _keep(outputs, y)
    return layers


def transformer(variables: dict, tokens: Array, outputs: list | None = None) -> Layers:
    params = _wide(variables["params"])
    layers: Layers = {}

    def dense(path: str, x: Array, layer: dict, nonlinearity=lambda y: y) -> Array:
        kernel = layer["kernel"]
        y = np.tensordot(x, kernel, x.ndim - 2) + layer["bias"]
        emitted = nonlinearity(y)
        units = kernel.shape[kernel.ndim - (y.ndim - 2) :]
        layers[f"{path}/kernel"] = (kernel, [(y.reshape(-1, *units), emitted.reshape(-1, *units))])
        return emitted

    wte, block = params["wte"]["embedding"], params["block"]
    positions = params["wpe"]["embedding"][: tokens.shape[1]]
    looked_up = wte[tokens]
    layers["wpe/embedding"] = (params["wpe"]["embedding"], [(positions, positions)])
    x = looked_up + positions
    y = _layer_norm(x, block["norm0"])
    attention = block["attention"]
    query, key, value = (
        dense(f"block/attention/{name}", y, attention[name]) for name in ("query", "key", "value")
    )
    weights = _softmax(np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1]))
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value)
    out = attention["out"]
    y = np.einsum("bqhd,hdo->bqo", mixed, out["kernel"]) + out["bias"]
    layers["block/attention/out/kernel"] = (out["kernel"], [(_positions(y), _positions(y))])
    x = x + y
    y = dense("block/expand", _layer_norm(x, block["norm1"]), block["expand"], gelu)
    x = x + dense("block/contract", y, block["contract"])
    logits = _layer_norm(x, params["norm"]) @ wte.T
    looked_up, units = _positions(looked_up)[:, None], _positions(logits)[:, :, None]
    layers["wte/embedding"] = (wte, [(looked_up, looked_up), (units, units)])
    _keep(outputs, logits)
    return layers


def _wide(tree: dict) -> dict:
    return {k: _wide(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def _positions(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _keep(outputs: list | None, x: Array) -> None:
    if outputs is not None:
        outputs.append(x)


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    height, width = kernel.shape[:2]
    rows = range(0, x.shape[1] - height + 1, stride)
    columns = range(0, x.shape[2] - width + 1, stride)
    patches = [[x[:, i : i + height, j : j + width] for j in columns] for i in rows]
    return np.einsum("ijbhwc,hwco->bijo", np.array(patches), kernel)


def _batch_norm(x: Array, layer: dict, averages: dict) -> Array:
    return (x - averages["mean"]) / np.sqrt(averages["var"] + 1e-5) * layer["scale"] + layer["bias"]


def _layer_norm(x: Array, layer: dict) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]


def _softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
