"""What the arrays of a tree are called: by their keys, whatever wraps them."""

from typing import Any, NamedTuple

import equinox
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from networks import normal

import jaxeff
from jaxeff import prune
from jaxeff.model.params import leaves_by_path

FIELDS = ("query", "key", "value")


class Tuple(NamedTuple):
    query: Any
    key: Any
    value: Any


class Equinox(equinox.Module):
    query: Any
    key: Any
    value: Any


@flax.struct.dataclass
class Struct:
    query: Any
    key: Any
    value: Any


def _rebuilt(fields):
    return {"query": fields.query, "key": fields.key, "value": fields.value}


# Trees of three arrays, and how to read them as a dict.
FORMS = {
    "NamedTuple": (lambda *arrays: Tuple(*arrays), _rebuilt),
    "Equinox module": (lambda *arrays: Equinox(*arrays), _rebuilt),
    "flax.struct": (lambda *arrays: Struct(*arrays), _rebuilt),
    "dict": (lambda *arrays: dict(zip(FIELDS, arrays, strict=True)), dict),
}
BOXES = {
    "bare": lambda array: array,
    "nnx.Param": nnx.Param,
    "nn.Partitioned": lambda array: nn.Partitioned(array, (None,) * array.ndim),
    "nn.LogicallyPartitioned": lambda array: nn.LogicallyPartitioned(array, (None,) * array.ndim),
    "a box in a box": lambda array: nnx.Param(nn.Partitioned(array, (None,) * array.ndim)),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("form", [form for form, _ in FORMS.values()], ids=FORMS)
def test_a_field_called_value_keeps_its_name_and_a_box_adds_none(form, box):
    arrays = [jnp.full((2, 3), float(index)) for index in range(3)]
    tree = {"attn": form(*map(box, arrays))}
    named = leaves_by_path(tree)
    assert {path: float(leaf[0, 0]) for path, leaf in named} == {
        "attn/query": 0.0,
        "attn/key": 1.0,
        "attn/value": 2.0,
    }
    # The order is that of the leaves, so that a tree can be rebuilt from them.
    assert all(leaf is other for (_, leaf), other in zip(named, jax.tree.leaves(tree), strict=True))


def test_a_box_around_a_tree_hands_on_the_names_inside():
    tree = {"w": nnx.Param({"value": jnp.ones(2), "scale": jnp.ones(1)})}
    assert [path for path, _ in leaves_by_path(tree)] == ["w/scale", "w/value"]


def test_a_state_of_a_module_called_value_keeps_its_name():
    class Net(nnx.Module):
        def __init__(self):
            self.value = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.key = nnx.Param(jnp.ones(2))

    state = nnx.state(Net())
    assert {path for path, _ in leaves_by_path(state)} == {"value/kernel", "value/bias", "key"}


@pytest.mark.parametrize(("form", "read"), FORMS.values(), ids=FORMS)
def test_every_part_of_jaxeff_names_a_field_called_value(form, read):
    def apply(params, x):
        fields = read(params["attn"])
        weights = jax.nn.softmax((x @ fields["query"]) @ (x @ fields["key"]).T)
        return weights @ jax.nn.relu(x @ fields["value"]) @ params["out"]

    params = {"attn": form(*(normal(4, 6) for _ in FIELDS)), "out": normal(6, 2)}
    x = normal(5, 4)
    paths = {f"attn/{name}" for name in FIELDS}
    assert set(jaxeff.analyze(params, apply, x).layers) == {*paths, "out"}
    masks = prune.masks(prune.scored(params, prunable=dict.fromkeys(paths, False)), 0.5)
    assert int(masks["out"].sum()) == 6
    groups = prune.groups(params, apply, x)
    members = {(member.path, member.axis) for group in groups for member in group.members}
    assert {("attn/value", 1), ("out", 0)} <= members
    plan = prune.Plan.of(groups, {"attn/value:1": [0, 2, 3]})
    small, state = prune.shrink(params, plan, optax.adam(0.1).init(params))
    for tree in (small, state[0].mu):
        assert (read(tree["attn"])["value"].shape, tree["out"].shape) == ((4, 3), (3, 2))
        assert read(tree["attn"])["query"].shape == (4, 6)
