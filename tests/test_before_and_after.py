"""Two networks beside each other: counts by hand, times of runs that took place."""

import dataclasses
import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from flax import nnx
from jax.experimental import io_callback
from network import drawn, normal

import jaxeff
from jaxeff import cost, plot, prune
from jaxeff.prune._before_and_after import MeasuredNetwork


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, scale=1.0):
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        return scale * nn.Dense(5, name="head")(x.mean((1, 2)))


X = normal(8, 6, 6, 3)
measure = functools.partial(prune.before_and_after, repeats=2)


def network(width):
    return drawn(Net(width), X), Net(width).apply


def test_counts_by_hand():
    found = measure(network(8), network(4), [X[:2], X])
    for measured, width in ((found.before, 8), (found.after, 4)):
        parameters = 27 * width + 2 * width + 5 * width + 5
        assert measured.parameters == parameters
        assert measured.bytes == 4 * (parameters + 2 * width)
        one = 36 * 27 * width + 5 * width
        assert measured.macs == (2 * one, 8 * one)
        assert [len(each.seconds) for each in measured.latencies] == [2, 2]
        assert all(each.compiled.compile_seconds > 0 and min(each.seconds) > 0 for each in measured.latencies)
    assert found.batch_sizes == (2, 8) and found.before.scores == {}


def test_scores_are_those_of_the_users_function():
    large, small = network(8), network(4)

    def evaluate(params, apply_fn):
        outputs = apply_fn(params, X)
        return {"mean": outputs.mean(), "units": params["params"]["head"]["kernel"].shape[0]}

    found = measure(large, small, [X], evaluate=evaluate)
    assert found.before.scores == {"mean": float(large[1](large[0], X).mean()), "units": 8.0}
    assert found.after.scores == {"mean": float(small[1](small[0], X).mean()), "units": 4.0}
    assert measure(large, small, [X], evaluate=lambda *network: 0.25).after.scores == {"score": 0.25}
    with pytest.raises(ValueError, match=r"`evaluate` must return numbers, got an array of shape \(8, 5\)"):
        _ = measure(large, small, [X], evaluate=lambda params, apply_fn: apply_fn(params, X))


COMPILED = cost.Compiled(1, *8 * (None,), lower_seconds=0.5, compile_seconds=1.0)


def by_hand(before, after, score=0.5):
    def measured(seconds, factor):
        work = cost.Work(macs=6000 * factor)
        counted = cost.Cost((cost.Entry("forward", "", None, "dot_general", 1, work, work),), (), 32, 1)
        times = cost.Latency(tuple(seconds), counted, COMPILED, None)
        return MeasuredNetwork(1000 * factor, 4000 * factor, {"accuracy": score / factor}, (times,))

    return prune.BeforeAndAfter(measured(before, 4), measured(after, 1), (32,), "a device")


def test_speedups_are_ratios_of_neighboring_runs():
    # The machine is slow in the middle: both networks suffer, and their ratio stays.
    found = by_hand([2e-3, 8e-3, 2e-3], [1e-3, 4e-3, 1e-3])
    assert found.speedups == ((2.0, 2.0, 2.0),)
    (ratios,) = by_hand(1e-3 * np.arange(1, 12), np.full(11, 2e-3)).speedups
    np.testing.assert_allclose(ratios, (1, 3, 5))
    slower = by_hand([1e-3, 1e-3], [2e-3, 2e-3])
    assert "0.50x (0.50 to 0.50)" in str(slower)


def test_the_table():
    lines = str(by_hand([2e-3, 4e-3, 3e-3], [1e-3, 2e-3, 1.5e-3])).splitlines()
    cells = [line.split("  ") for line in lines]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in cells}
    assert rows["parameters"] == ["4k", "1k", "4.00x"]
    assert rows["bytes"] == ["16k", "4k", "4.00x"]
    assert rows["accuracy"] == ["0.125", "0.5", "+0.375"]
    assert rows["MACs, batch of 32"] == ["24k", "6k", "4.00x"]
    assert rows["time, batch of 32"] == ["3 ms (2.2 to 3.8)", "1.5 ms (1.1 to 1.9)", "2.00x (2.00 to 2.00)"]
    assert "1.5 s" in lines[7] and "3 runs on a device" in lines[-2]
    assert max(map(len, lines)) <= 100


def test_json():
    found = by_hand([2e-3, 4e-3], [1e-3, 1e-3], score=math.nan)
    data = json.loads(found.to_json())
    (latency,) = data["before"]["latencies"]
    assert latency["seconds"] == [2e-3, 4e-3] and latency["cost"]["total"]["macs"] == 24000
    assert data["after"]["scores"] == {"accuracy": None}
    assert data["speedups"][0]["median"] == found.speedups[0].median == 3
    assert data["batch_sizes"] == [32] and data["device"] == "a device"
    assert json.loads(measure(network(8), network(4), [X]).to_json())["before"]["parameters"] == 277


def test_runs_are_taken_in_turn():
    order = []

    def told(name):
        return lambda x: (x, io_callback(lambda: order.append(name), None, ordered=True))[0]

    calls = {name: (told(name), (jnp.ones(2),)) for name in "ab"}
    found = cost.latencies(calls, repeats=3, warmup=2)
    jax.effects_barrier()
    assert "".join(order) == "abba" + "abbaab"
    assert [len(each.seconds) for each in found.values()] == [3, 3]


class Scaled(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.drop(nnx.relu(self.first(x))))


def test_networks_as_users_have_them():
    models = [Scaled(width, nnx.Rngs(0)) for width in (8, 4)]
    for model in models:
        model.eval()
    found = measure(*map(jaxeff.functional, models), [normal(7, 3)])
    assert found.before.macs == (7 * 40,) and found.after.macs == (7 * 20,)
    variables, apply_fn = network(4)
    bare = lambda params, x, scale: apply_fn({**variables, "params": params}, x, scale)  # noqa: E731
    found = measure((variables, jax.jit(apply_fn)), (variables["params"], bare), [X], scale=2.0)
    assert found.before.parameters == found.after.parameters and found.before.macs == found.after.macs
    # Running averages that a function closed over are no variables.
    assert found.before.bytes == found.after.bytes + 4 * 2 * 4


def test_a_count_that_is_not_of_all_says_so():
    def until_large(params, x):
        return jax.lax.while_loop(lambda y: jnp.abs(y).max() < 9, lambda y: y @ params["w"], x)

    params = {"w": 2 * jnp.eye(3)}
    looped, plain = (params, until_large), (params, lambda params, x: x @ params["w"])
    assert "Not all work is in the MACs" in str(measure(plain, looped, [jnp.ones((2, 3))]))
    assert "Not all work is in the MACs" not in str(measure(plain, plain, [jnp.ones((2, 3))]))


def test_speedups_are_drawn_as_they_were_measured():
    found = {0.25: by_hand([2e-3, 4e-3], [2e-3, 2e-3]), 0.5: by_hand([3e-3, 9e-3], [1e-3, 1e-3])}
    axes = matplotlib.figure.Figure().subplots()
    assert plot.speedups(found, axes) is axes
    ((line, _, (bars,)),) = [container.lines for container in axes.containers]
    np.testing.assert_allclose(line.get_xydata(), [[0.25, 1.5], [0.5, 6]])
    ends = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[1.1, 1.9], [3.6, 8.4]])
    macs = next(drawn for drawn in axes.lines if drawn.get_label() == "multiply-accumulates")
    np.testing.assert_allclose(macs.get_ydata(), [4, 4])
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(texts) == ["batch of 32", "multiply-accumulates"]


@pytest.mark.parametrize("sizes", [(), ((32,), (1, 32))])
def test_measurements_of_other_batches_are_not_drawn_together(sizes):
    one = by_hand([2e-3], [1e-3])
    found = {str(each): dataclasses.replace(one, batch_sizes=each) for each in sizes}
    with pytest.raises(ValueError, match="`found` must hold measurements of the same batches"):
        _ = plot.speedups(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"before": network(4)[0]}, r"`before` must be a pair \(params, apply_fn\), got dict"),
        ({"after": (*network(4), 1)}, r"`after` must be a pair \(params, apply_fn\), got a tuple of 3"),
        ({"after": (network(4)[0], Net(4))}, "is the module Net itself: pass its `apply`"),
        ({"after": (network(4)[0], Net(8).apply)}, "`after`: `apply_fn` failed on these `params`"),
        ({"before": (jax.eval_shape(lambda: network(4)[0]), Net(4).apply)}, "`before` holds shapes"),
        ({"batches": X}, "`batches` must be a list.*got ndarray"),
        ({"batches": []}, "`batches` must be a list.*got an empty list"),
        ({"batches": [X, X[..., :2]]}, "and a `batch` of shape"),
        ({"batches": ["text"]}, "`batch` holds a str"),
        ({"repeats": 0}, "`repeats` must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    given = {"before": network(8), "after": network(4), "batches": [X], **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        _ = measure(**given)
