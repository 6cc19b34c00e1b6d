"""Recurrent networks, and what their layers take in and give out, unrolled in NumPy step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from network import Array, Network, Seen, Site, drawn, normal, sigmoid

HIDDEN = 6


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        cell = self.cell(HIDDEN, name="cell")  # pyright: ignore
        return nn.Dense(3, name="head")(nn.RNN(cell, name="rnn")(x))


class Calls:
    """What each layer took in and gave out so far, step by step."""

    def __init__(self, params: dict[str, Any], prefix: str):
        self.params, self.prefix = params, prefix
        self.inputs: dict[str, list[Array]] = {}
        self.outputs: dict[str, list[Array]] = {}

    def __call__(self, name: str, taken: Array) -> Array:
        """One layer of the cell."""
        layer = self.params[name]
        given = taken @ layer["kernel"] + layer.get("bias", 0)
        self.keep(f"{self.prefix}/{name}", given, taken)
        return given

    def keep(self, name: str, given: Array, taken: Array | None = None) -> Array:
        self.outputs.setdefault(name, []).append(given)
        if taken is not None:
            self.inputs.setdefault(name, []).append(taken)
        return given


State = tuple[Array, Array]
Step = Callable[[Calls, Array, State], State]


def _lstm(layer: Calls, x: Array, state: State) -> State:
    h, c = state
    gate = {name: layer(f"i{name}", x) + layer(f"h{name}", h) for name in "ifgo"}
    for name, z in gate.items():
        gate[name] = layer.keep(f"gate {name}", np.tanh(z) if name == "g" else sigmoid(z))
    c = gate["f"] * c + gate["i"] * gate["g"]
    return gate["o"] * np.tanh(c), c


def _gru(layer: Calls, x: Array, state: State) -> State:
    h, c = state
    r = layer.keep("gate r", sigmoid(layer("ir", x) + layer("hr", h)))
    z = layer.keep("gate z", sigmoid(layer("iz", x) + layer("hz", h)))
    n = layer.keep("gate n", np.tanh(layer("in", x) + r * layer("hn", h)))
    return (1 - z) * n + z * h, c


def _simple(layer: Calls, x: Array, state: State) -> State:
    h, c = state
    return layer.keep("gate ", np.tanh(layer("i", x) + layer("h", h))), c


def _run(step: Step, params: dict[str, Any], x: Array, path: str = "cell", backwards: bool = False) -> Calls:
    """The cell over time; its states are the outputs 'states'."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    calls = Calls(wide, path)
    state = np.zeros((len(x), HIDDEN)), np.zeros((len(x), HIDDEN))
    times = np.moveaxis(x.astype(np.float64), 1, 0)
    for now in times[::-1] if backwards else times:
        state = step(calls, now, state)
        calls.keep("states", state[0])
    return calls


def _network(cell: type[nn.RNNCellBase], step: Step, gates: Mapping[str, str], order: list[str]) -> Network:
    """`order` is that in which the cell's layers run; a layer's last letter names its gate."""
    module, x = Recurrent(cell), normal(4, 5, 3)
    variables = drawn(module, x)
    calls = _run(step, variables["params"]["cell"], x)
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["head"])
    for state in calls.outputs["states"]:
        calls.keep("head", state @ head["kernel"] + head["bias"], state)
    sites = (*(_site("cell", name, gates) for name in order), Site("head/kernel", "dense", "identity", (1,)))
    return Network(module, variables, (x,), {}, sites, seen=_stacked(calls))


def _site(path: str, name: str, gates: Mapping[str, str], gate: str = "gate") -> Site:
    emits = lambda seen: seen[f"{gate} {name[1:]}"]  # noqa: E731
    return Site(f"{path}/{name}/kernel", "dense", gates[name[1:]], (1,), emits)


def _stacked(calls: Calls) -> Seen:
    inputs, outputs = (
        {path: [np.stack(steps)] for path, steps in kept.items()} for kept in (calls.inputs, calls.outputs)
    )
    return Seen(inputs, outputs)


LSTM = {"i": "sigmoid", "f": "sigmoid", "g": "tanh", "o": "sigmoid"}
GRU = {"r": "sigmoid", "z": "sigmoid", "n": "tanh"}
SIMPLE = {"": "tanh"}


def lstm() -> Network:
    return _network(nn.LSTMCell, _lstm, LSTM, [side + gate for gate in "ifgo" for side in "ih"])


def optimized_lstm() -> Network:
    """All gates in one product a side, whose kernels are concatenated for it."""
    return _network(nn.OptimizedLSTMCell, _lstm, LSTM, [side + gate for side in "hi" for gate in "ifgo"])


def gru() -> Network:
    return _network(nn.GRUCell, _gru, GRU, [side + gate for gate in "rzn" for side in "ih"])


def simple_cell() -> Network:
    return _network(nn.SimpleCell, _simple, SIMPLE, ["i", "h"])


class Bidirectional(nn.Module):
    @nn.compact
    def __call__(self, x):
        forwards, backwards = (nn.RNN(nn.SimpleCell(HIDDEN, name=name)) for name in ("forwards", "backwards"))
        return nn.Bidirectional(forwards, backwards, name="both")(x)


def bidirectional() -> Network:
    module, x = Bidirectional(), normal(4, 5, 3)
    variables = drawn(module, x)
    inputs: dict[str, list[Array]] = {}
    outputs: dict[str, list[Array]] = {}
    sites = []
    for name in ("forwards", "backwards"):
        seen = _stacked(_run(_simple, variables["params"][name], x, name, name == "backwards"))
        inputs.update(seen.inputs)
        outputs.update(
            {f"{name} {path}" if path == "gate " else path: calls for path, calls in seen.outputs.items()}
        )
        sites += [_site(name, layer, SIMPLE, f"{name} gate") for layer in "ih"]
    return Network(module, variables, (x,), {}, tuple(sites), seen=Seen(inputs, outputs))
