"""The loss of each layer pruned alone: against masks applied one by one, and what is made of it."""

import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from networks import NETWORKS, normal

import jaxeff
from jaxeff import plot, prune
from jaxeff.prune import Sensitivity

SPARSITIES = (0.3, 0.5, 0.75)
X, Y = (jnp.asarray(normal(16, 8, seed=seed), jnp.float32) for seed in (1, 2))


def squared(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


class Network(nn.Module):
    """Two Dense layers around a norm with state."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12)(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(8)(x)


VARIABLES = Network().init(jax.random.key(0), X)
LAYERS = ("Dense_0/kernel", "Dense_1/kernel")


def explicit(
    variables, importance, sparsities=SPARSITIES, pattern=None, paths=LAYERS, apply=None, loss=squared
):
    """[layers, sparsities], one mask after the other, in eager mode."""
    pattern = pattern or prune.Unstructured()
    apply = apply or Network().apply
    found = []
    for path in paths:
        for sparsity in sparsities:
            alone = jax.tree_util.tree_map_with_path(
                lambda keys, leaf, path=path: leaf if "/".join(k.key for k in keys).endswith(path) else 0.0,
                importance,
            )
            pruned = prune.apply(variables, prune.masks(alone, sparsity, pattern=pattern))
            found.append(float(jnp.mean(loss(apply(pruned, X), Y))))
    return np.reshape(found, (len(paths), len(sparsities)))


# Measuring

PATTERNS = {
    "single": (prune.Unstructured(), SPARSITIES),
    "units": (prune.Units(), SPARSITIES),
    "inputs": (prune.Units(axis=0), SPARSITIES),
    "blocks": (prune.Block((2, 4)), SPARSITIES),
    "n of m": (prune.NByM(1, 4), (0.75,)),
}


@pytest.mark.parametrize(("pattern", "sparsities"), PATTERNS.values(), ids=PATTERNS)
def test_the_loss_is_that_of_masks_applied_to_one_layer(pattern, sparsities):
    found = prune.sensitivity(
        VARIABLES, Network().apply, X, targets=Y, loss_fn=squared, sparsities=sparsities, pattern=pattern
    )
    expected = explicit(VARIABLES, prune.scored(VARIABLES), sparsities, pattern)
    assert found.paths == LAYERS and found.sizes == (96, 96) and found.sparsities == sparsities
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
    assert float(found.dense) == pytest.approx(float(squared(Network().apply(VARIABLES, X), Y)), rel=1e-6)
    # A test of nothing, were they all alike.
    assert np.ptp(expected) > 0.01


def test_equal_scores_go_by_index():
    importance = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf)), prune.scored(VARIABLES))
    found = prune.sensitivity(
        VARIABLES,
        Network().apply,
        X,
        targets=Y,
        loss_fn=squared,
        sparsities=SPARSITIES,
        importance=importance,
    )
    np.testing.assert_allclose(found.losses, explicit(VARIABLES, importance), rtol=1e-6)
    assert not np.allclose(
        found.losses,
        prune.sensitivity(
            VARIABLES, Network().apply, X, targets=Y, loss_fn=squared, sparsities=SPARSITIES
        ).losses,
    )


def test_scores_of_a_criterion_decide_what_goes_and_which_layers():
    statistics = jaxeff.collect(VARIABLES, Network().apply, X, criterion="wanda")
    importance = prune.scored(VARIABLES, statistics, "wanda", prunable={"Dense_0/kernel": False})
    found = prune.sensitivity(
        VARIABLES,
        Network().apply,
        X,
        targets=Y,
        loss_fn=squared,
        sparsities=SPARSITIES,
        importance=importance,
    )
    assert found.paths == LAYERS[1:] and found.scores == "importance"
    np.testing.assert_allclose(found.losses, explicit(VARIABLES, importance, paths=LAYERS[1:]), rtol=1e-6)


def test_small_floats():
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), VARIABLES)
    found = prune.sensitivity(small, Network().apply, X, targets=Y, loss_fn=squared, sparsities=SPARSITIES)
    assert found.losses.dtype == jnp.float32
    np.testing.assert_allclose(found.losses, explicit(small, prune.scored(small)), rtol=1e-2)


def test_float64(x64):
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), VARIABLES)
    found = prune.sensitivity(
        variables,
        Network().apply,
        np.float64(X),
        targets=np.float64(Y),
        loss_fn=squared,
        sparsities=SPARSITIES,
    )
    assert found.losses.dtype == jnp.float64
    weight = np.asarray(variables["params"]["Dense_1"]["kernel"])
    weight = np.where(np.abs(weight) > np.sort(np.abs(weight), None)[47], weight, 0)
    params = {**variables["params"], "Dense_1": {**variables["params"]["Dense_1"], "kernel": weight}}
    expected = squared(Network().apply({**variables, "params": params}, np.float64(X)), np.float64(Y))
    assert float(found.losses[1, 1]) == pytest.approx(float(expected), rel=1e-12)


def test_every_kind_of_model_is_taken():
    expected = prune.sensitivity(
        VARIABLES, Network().apply, X, targets=Y, loss_fn=squared, sparsities=SPARSITIES
    )
    state = TrainState.create(
        apply_fn=lambda params, x: Network().apply({**VARIABLES, **params}, x),
        params=VARIABLES["params"],
        tx=optax.sgd(0.1),
    )
    of_state = prune.sensitivity(
        state.params,
        lambda p, x: state.apply_fn({"params": p}, x),
        X,
        targets=Y,
        loss_fn=squared,
        sparsities=SPARSITIES,
    )
    of_variables = prune.sensitivity(
        {"params": state.params}, state.apply_fn, X, targets=Y, loss_fn=squared, sparsities=SPARSITIES
    )
    for found in (of_state, of_variables):
        assert found.paths == expected.paths
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)


def test_nnx():
    model = nnx.Sequential(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(12, 8, rngs=nnx.Rngs(1)))
    found = prune.sensitivity(*jaxeff.functional(model), X, targets=Y, loss_fn=squared, sparsities=(0.5,))
    assert found.paths == ("layers/0/kernel", "layers/2/kernel")
    kernel = np.asarray(model.layers[2].kernel[...])
    kept = np.where(np.abs(kernel) > np.sort(np.abs(kernel), None)[47], kernel, 0)
    hidden = np.maximum(np.asarray(X) @ np.asarray(model.layers[0].kernel[...]), 0)
    assert float(found.losses[1, 0]) == pytest.approx(float(np.mean((hidden @ kept - Y) ** 2)), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [lambda o, t: jnp.mean(jnp.square(o - t), -1), lambda o, t: jnp.square(o - t)],
    ids=["[n]", "[n, 8]"],
)
def test_a_loss_of_each_example_is_averaged(loss):
    found = prune.sensitivity(VARIABLES, Network().apply, X, targets=Y, loss_fn=loss, sparsities=SPARSITIES)
    np.testing.assert_allclose(found.losses, explicit(VARIABLES, prune.scored(VARIABLES)), rtol=1e-6)


def test_dropout_is_the_same_in_each_run():
    def apply(variables, x, **keywords):
        return nn.Dropout(0.5).apply({}, x @ variables["w"], **keywords)

    keywords = {"rngs": {"dropout": jax.random.key(3)}, "deterministic": False}
    params = {"w": VARIABLES["params"]["Dense_0"]["kernel"]}
    found = prune.sensitivity(
        params, apply, X, targets=jnp.zeros((16, 12)), loss_fn=squared, sparsities=(0.0, 0.5), **keywords
    )
    assert float(found.losses[0, 0]) == float(found.dense) != float(found.losses[0, 1])
    without = prune.sensitivity(
        params, apply, X, targets=jnp.zeros((16, 12)), loss_fn=squared, sparsities=(0.5,), deterministic=True
    )
    assert float(without.dense) != float(found.dense)


# Compiling


def test_other_values_compile_nothing(compilations):
    measure = lambda params: prune.sensitivity(  # noqa: E731
        params, Network().apply, X, targets=Y, loss_fn=lambda o, t: squared(o, t), sparsities=SPARSITIES
    )
    first = measure(VARIABLES)
    other = jax.tree.map(lambda leaf: 2 * leaf, VARIABLES)
    with compilations() as compiled:
        second = measure(other)
    assert compiled.count == 0
    assert not np.array_equal(first.losses, second.losses)


def test_the_model_is_traced_as_often_for_many_sparsities_as_for_one():
    traces = []

    def apply(params, x):
        traces.append(None)
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return x

    def counted(layers, sparsities):
        traces.clear()
        params = {f"layer{i}": jnp.asarray(normal(8, 8, seed=i), jnp.float32) for i in range(layers)}
        _ = prune.sensitivity(params, apply, X, targets=Y, loss_fn=squared, sparsities=sparsities)
        return len(traces)

    assert counted(1, (0.5,)) == counted(5, (0.1, 0.2, 0.5, 0.7, 0.8, 0.9))


def test_memory_is_one_copy_of_the_weights_whatever_the_number_of_runs():
    params = {f"layer{i}": jnp.ones((256, 256)) for i in range(10)}

    def apply(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return x

    def scratch(sparsities):
        measure = jax.jit(
            lambda params, x: (
                prune.sensitivity(
                    params, apply, x, targets=jnp.zeros_like(x), loss_fn=squared, sparsities=sparsities
                ).losses
            )
        )
        return measure.lower(params, jnp.ones((2, 256))).compile().memory_analysis().temp_size_in_bytes

    weights = 10 * 4 * 256**2
    # Beside the copy a weight's scores, while thresholds are found, and the forward pass.
    assert scratch((0.5,)) < 1.5 * weights
    assert scratch(tuple(np.linspace(0, 0.9, 40).tolist())) < 1.5 * weights


def test_under_jit():
    measure = lambda v: prune.sensitivity(  # noqa: E731
        v, Network().apply, X, targets=Y, loss_fn=squared, sparsities=SPARSITIES
    )
    inside, outside = jax.jit(measure)(VARIABLES), measure(VARIABLES)
    assert inside.paths == outside.paths
    np.testing.assert_allclose(inside.losses, outside.losses, rtol=1e-6)
    assert str(inside) == str(outside)


# What is made of it


def measured(losses, dense=1.0, sparsities=(0.5, 0.8, 0.9), sizes=None):
    losses = np.atleast_2d(np.asarray(losses, np.float32))
    paths = tuple(f"layer{i}/kernel" for i in range(len(losses)))
    return Sensitivity(
        paths, sizes or (100,) * len(losses), sparsities, "magnitude", prune.Unstructured(),
        jnp.asarray(losses), jnp.float32(dense),
    )  # fmt: skip


HIGHEST = {
    "all": ([1, 1, 1], 0.0, 0.9),
    "none": ([1.5, 2, 3], 0.25, 0.0),
    "up to the limit": ([1.125, 1.25, 3], 0.25, 0.8),
    "it falls": ([0.5, 0.25, 3], 0.0, 0.8),
    # What holds above a sparsity that does not is not believed.
    "it comes back": ([1.125, 3, 1], 0.25, 0.5),
    "nan": ([1, np.nan, 1], 0.25, 0.5),
}


@pytest.mark.parametrize(("losses", "tolerance", "expected"), HIGHEST.values(), ids=HIGHEST)
def test_the_highest_within_a_tolerance(losses, tolerance, expected):
    assert measured(losses).highest(tolerance) == {"layer0/kernel": expected}


def test_one_layer_gets_what_was_asked_of_all():
    for sparsity in (0, 0.1, 0.5, 0.77, 0.9):
        assert measured([1.5, 1.75, 3]).allocation(sparsity)["layer0/kernel"] == pytest.approx(sparsity)


def test_equal_layers_get_the_same():
    shares = measured([[1.5, 1.75, 3]] * 3, sizes=(10, 1000, 3)).allocation(0.6)
    assert [*shares.values()] == pytest.approx([0.6] * 3)


def _rise_at(share, losses, sparsities=(0.5, 0.8, 0.9), dense=1.0):
    return np.interp(share, (0, *sparsities), (0, *(np.asarray(losses) - dense)))


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.6, 0.8, 0.85])
def test_the_loss_rises_alike_in_all_layers_and_the_total_is_met(sparsity):
    draw = np.random.default_rng(0)
    losses = 1 + np.cumsum(draw.exponential(size=(5, 3)), 1)
    sizes = (10, 2000, 300, 44, 5)
    shares = measured(losses, sizes=sizes).allocation(sparsity)
    total = sum(share * size for share, size in zip(shares.values(), sizes, strict=True)) / sum(sizes)
    assert total == pytest.approx(sparsity, rel=1e-6)
    rises = [_rise_at(share, own) for share, own in zip(shares.values(), losses, strict=True)]
    capped = [share == pytest.approx(0.9) for share in shares.values()]
    free = [rise for rise, at_most in zip(rises, capped, strict=True) if not at_most]
    assert free and np.ptp(free) < 1e-5
    # A layer that may go no further has not cost more than the others.
    assert all(rise <= free[0] + 1e-5 for rise in rises)


def test_what_costs_nothing_goes_first():
    # Nothing up to 80 % of the first layer; in the second every weight counts.
    found = measured([[1, 1, 2], [2, 3, 4]])
    assert found.allocation(0.2)["layer0/kernel"] == pytest.approx(0.4)
    assert found.allocation(0.4)["layer0/kernel"] == pytest.approx(0.8)
    assert found.allocation(0.4)["layer1/kernel"] == pytest.approx(0, abs=1e-6)


def test_a_layer_goes_no_further_than_its_loss_was_a_number():
    shares = measured([[1.5, np.nan, 1.5], [1.5, 1.75, np.inf]]).allocation(0.6)
    assert shares["layer0/kernel"] == pytest.approx(0.5) and shares["layer1/kernel"] == pytest.approx(0.7)


def test_masks_take_it_as_it_is():
    found = prune.sensitivity(
        VARIABLES, Network().apply, X, targets=Y, loss_fn=squared, sparsities=SPARSITIES
    )
    importance = prune.scored(VARIABLES)
    given = prune.masks(importance, 0.6, allocation=found)
    by_hand = prune.masks(importance, 0.6, allocation=found.allocation(0.6))
    assert all(map(np.array_equal, jax.tree.leaves(given), jax.tree.leaves(by_hand)))
    assert prune.sparsity(given) == pytest.approx(0.6, abs=1 / 96)
    uniform = prune.masks(importance, 0.6)
    assert not all(map(np.array_equal, jax.tree.leaves(given), jax.tree.leaves(uniform)))


def test_an_optimizer_takes_it_while_the_sparsity_grows():
    found = prune.sensitivity(
        VARIABLES, Network().apply, X, targets=Y, loss_fn=squared, sparsities=(0.2, 0.5, 0.7)
    )
    params = VARIABLES["params"]
    optimizer = prune.sparsify(optax.sgd(0.0), prune.cubic(0.6, 0, 4, 2), allocation=found)
    state = optimizer.init(params)
    step = jax.jit(lambda params, state: optimizer.update(params, state, params)[1])
    for _ in range(5):
        state = step(params, state)
    expected = prune.masks(prune.scored(params), 0.6, allocation=found)
    for ours, theirs in zip(jax.tree.leaves(state.masks), jax.tree.leaves(expected), strict=True):
        assert abs(int(jnp.sum(ours)) - int(jnp.sum(theirs))) <= 1
    assert prune.sparsity(state.masks) == pytest.approx(0.6, abs=1 / 96)


def test_the_table():
    found = measured([[1.01, 1.05, 1.25], [1.5, np.nan, 3]], sizes=(590592, 12))
    text = str(found).splitlines()
    assert text[0].split() == ["layer", "weights", "50%", "80%", "90%", "within"]
    assert text[2].split() == ["layer0/kernel", "591k", "1.01", "1.05", "1.25", "80%"]
    assert text[3].split() == ["layer1/kernel", "12", "1.5", "?", "3", "0%"]
    assert len({len(line) for line in text[:4]}) == 1
    assert "whole: 1." in str(found) and "at most 0.1." in str(found)
    assert found.table(0.5).splitlines()[2].split()[-1] == "90%"
    long = Sensitivity(("a/" * 80,), (1,), (0.5,), "magnitude", prune.Units(), jnp.ones((1, 1)), jnp.ones(()))
    assert max(map(len, str(long).splitlines())) <= 100 and "Units(axis='output')" in str(long)


# Recommending


@pytest.fixture(scope="module")
def report():
    return jaxeff.analyze(VARIABLES, Network().apply, X)


def test_recommendations_quote_what_was_measured(report):
    found = Sensitivity(
        LAYERS, (96, 96), (0.5, 0.8, 0.9), "magnitude", prune.Unstructured(),
        jnp.array([[1.0, 1.0625, 1.25], [1.5, 2.0, 3.0]]), jnp.float32(1.0),
    )  # fmt: skip
    advice = [each for each in report.recommendations(found) if each.rule == "measured sensitivity"]
    assert [each.path for each in advice] == [*LAYERS]
    first, second = advice
    assert (
        first.message
        == "pruned alone by magnitude up to 80 %, the loss rose by at most 0.062 from 1 (measured)."
    )
    assert first.evidence == {"sparsity": 0.8, "loss_rise": 0.0625, "dense_loss": 1.0, "limit": 0.1}
    assert "to 50 %, the loss rose by 0.5 from 1 (measured): prune other layers first" in second.message
    others = [each for each in report.recommendations(found) if each.rule != "measured sensitivity"]
    assert others == [*report.recommendations()]


def test_stacked_layers_are_spoken_of_once_each():
    network = NETWORKS["scanned"]()
    report = jaxeff.analyze(*network.arguments)
    assert "stack/dense/kernel[0]" in report.layers
    found = prune.sensitivity(
        *network.arguments, (0.5,), targets=np.zeros((16, 6), np.float32), loss_fn=squared
    )
    advice = [each for each in report.recommendations(found) if each.rule == "measured sensitivity"]
    assert sorted(each.path for each in advice) == sorted(found.paths)
    assert found.paths == tuple(f"stack/dense/kernel[{i}]" for i in range(3))


def test_a_sensitivity_of_other_params_is_refused(report):
    with pytest.raises(
        ValueError, match="`sensitivity` belongs to other params: the report has no 'layer0/kernel'"
    ):
        _ = report.recommendations(measured([1, 1, 1]))


# Drawing


def test_a_line_for_each_layer_and_the_dense_loss():
    matplotlib.use("agg")
    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    assert plot.sensitivity(measured([[1.5, 2, 3], [1, 1, 1.25]], dense=0.5), axes) is axes
    first, second, dense = axes.get_lines()
    assert [line.get_label() for line in axes.get_lines()] == ["layer0/kernel", "layer1/kernel", "dense"]
    np.testing.assert_allclose(first.get_xdata(), (0, 0.5, 0.8, 0.9))
    np.testing.assert_allclose(first.get_ydata(), (0.5, 1.5, 2, 3))
    np.testing.assert_allclose(second.get_ydata(), (0.5, 1, 1, 1.25))
    np.testing.assert_allclose(dense.get_ydata(), 0.5)
    assert axes.get_xlabel().startswith("sparsity") and axes.get_ylabel() == "loss"
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "dense"


def test_axes_of_its_own():
    matplotlib.use("agg")
    from matplotlib import pyplot

    axes = plot.sensitivity(measured([1, 2, 3]))
    assert len(axes.get_lines()) == 2
    pyplot.close(axes.figure)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        _ = plot.sensitivity(measured([1, 2, 3]))


def test_matplotlib_is_not_imported_with_jaxeff():
    code = "import jaxeff, sys; assert jaxeff.plot.sensitivity and 'matplotlib' not in sys.modules"
    environment = {"PYTHONPATH": str(Path(jaxeff.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What is wrong


def run(variables=VARIABLES, batch=X, targets=Y, loss=squared, sparsities=SPARSITIES, **keywords):
    return prune.sensitivity(
        variables, Network().apply, batch, targets=targets, loss_fn=loss, sparsities=sparsities, **keywords
    )


def _with_kernel(tree, value):
    params = {**tree["params"], "Dense_1": {**tree["params"]["Dense_1"], "kernel": value}}
    return {**tree, "params": params}


NAN = jnp.full((12, 8), jnp.nan)
SCORES = prune.scored(VARIABLES)

WRONG = {
    "empty": (lambda: run(sparsities=()), "`sparsities` must be one or more increasing"),
    "order": (lambda: run(sparsities=(0.5, 0.4)), "`sparsities` must be one or more increasing"),
    "twice": (lambda: run(sparsities=(0.5, 0.5)), "`sparsities` must be one or more increasing"),
    "all": (lambda: run(sparsities=(0.5, 1.0)), r"in \[0, 1\), got \(0.5, 1.0\)"),
    "below": (lambda: run(sparsities=(-0.1,)), r"in \[0, 1\)"),
    "nan": (lambda: run(sparsities=(float("nan"),)), r"in \[0, 1\)"),
    "n of m": (lambda: run(pattern=prune.NByM(2, 4)), r"`sparsities` must be \(0.5,\) where 2 of 4 stay"),
    "block": (lambda: run(pattern=prune.Block((5, 1))), "does not divide 'Dense_0/kernel'"),
    "other tree": (lambda: run(importance={"w": jnp.ones(2)}), "`importance` must match the params"),
    "other shape": (lambda: run(importance=_with_kernel(SCORES, jnp.ones((8, 8)))), "`importance` must match"),
    "scores": (lambda: run(importance=_with_kernel(SCORES, NAN)), "`importance` of 'Dense_1/kernel' holds"),
    "both": (lambda: run(importance=SCORES, prunable={}), "`prunable` is for magnitudes"),
    "prunable": (lambda: run(prunable={"kernel": True}), "`prunable` names 'kernel', which is not a leaf"),
    "nothing": (lambda: run(prunable=lambda path, leaf: False), "`prunable` leaves nothing to prune"),
    "no scores": (lambda: run(importance=jax.tree.map(lambda s: 0.0, SCORES)), "`importance` leaves nothing"),
    "magnitude": (lambda: run(_with_kernel(VARIABLES, NAN)), "`params` hold nan at 'Dense_1/kernel'"),
    "weight": (
        lambda: run(_with_kernel(VARIABLES, NAN), importance=SCORES),
        r"the loss is nan before anything is removed. `params` is not finite at \['Dense_1'\]\['kernel'\]",
    ),
    "batch": (lambda: run(batch=jnp.full_like(X, jnp.nan)), "is nan before .* `batch` is not finite$"),
    "targets": (lambda: run(targets=jnp.full_like(Y, jnp.inf)), "is inf before .* `targets` is not finite$"),
    "loss": (lambda: run(loss=lambda o, t: jnp.log(-1.0 - o**2).mean()), "look at `loss_fn`"),
    "tolerance": (lambda: measured([1, 1, 1]).highest(-1), "`tolerance` must be 0 or more"),
    "nan tolerance": (lambda: measured([1, 1, 1]).highest(float("nan")), "`tolerance` must be 0 or more"),
    "reach": (lambda: measured([1, 1, 1]).allocation(0.95), "0.95 is out of reach: .* at most 0.9;"),
    "finite": (lambda: measured([1, 2, np.nan]).allocation(0.85), "at most 0.8;"),
    "sparsity": (lambda: measured([1, 1, 1]).allocation(1.0), r"`sparsity` must be in \[0, 1\)"),
    "masks": (lambda: prune.masks(SCORES, 0.5, allocation=measured([1, 1, 1])), "`allocation` must name"),
    "global": (
        lambda: prune.masks(SCORES, 0.5, scope="global", allocation=run()), "`allocation` by path is for"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_pattern_of_no_kind_is_named():
    with pytest.raises(TypeError, match="`pattern` must be"):
        _ = run(pattern="2:4")
