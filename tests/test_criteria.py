"""Criteria against ground truth: `jax.grad`, `jax.hessian` and published definitions on small networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from networks import NETWORKS, drawn, normal

import jaxeff
from jaxeff import importance
from jaxeff.statistics import derivatives

# Derivatives of float32 networks, which XLA fuses differently.
RTOL, ATOL = 1e-4, 1e-7


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, name="first")(x))
        return nn.Dense(3, name="second")(x)


def cross_entropy(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def squared(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


@pytest.fixture(scope="module")
def tiny():
    """A network, its kernels by path, its loss of those kernels, a batch and its labels."""
    x, labels = normal(6, 5), np.array([0, 1, 2, 0, 1, 2])
    variables = drawn(Tiny(), x)
    kernels = {f"{name}/kernel": variables["params"][name]["kernel"] for name in ("first", "second")}

    def losses(kernels, x=x, labels=labels):
        params = {
            name: {**variables["params"][name], "kernel": kernels[f"{name}/kernel"]}
            for name in ("first", "second")
        }
        return cross_entropy(Tiny().apply({"params": params}, x), labels)

    return variables, kernels, losses, x, labels


def _scores(tiny, criterion, **keywords):
    variables, kernels, _, x, labels = tiny
    statistics = jaxeff.collect(
        variables, Tiny().apply, x, criterion=criterion, loss_fn=cross_entropy, targets=labels, **keywords
    )
    return importance.scores(variables, statistics, criterion), statistics


def _mean(losses):
    return lambda kernels: jnp.mean(losses(kernels))


def _assert_close(ours, theirs, rtol=RTOL):
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=rtol, atol=ATOL, err_msg=path)


@pytest.mark.parametrize(
    ("criterion", "formula"),
    [
        ("gradient", lambda w, g: np.abs(g)),
        ("taylor", lambda w, g: np.square(g * w)),
        ("snip", lambda w, g: np.abs(g * w)),
    ],
)
def test_first_order_criteria_are_formulas_of_the_gradient(criterion, formula, tiny):
    _, kernels, losses, _, _ = tiny
    gradient = jax.grad(_mean(losses))(kernels)
    _assert_close(
        _scores(tiny, criterion)[0], {path: formula(kernels[path], gradient[path]) for path in kernels}
    )


def test_fisher_takes_the_gradient_of_every_example(tiny):
    _, kernels, losses, x, labels = tiny
    each = [jax.grad(lambda k, i=i: losses(k, x[i : i + 1], labels[i : i + 1])[0])(kernels) for i in range(6)]
    expected = {p: np.mean([np.square(g[p]) for g in each], 0) * kernels[p] ** 2 for p in kernels}
    _assert_close(_scores(tiny, "fisher")[0], expected)


@pytest.mark.parametrize("name", ["mlp", "cnn", "swiglu", "shared", "transformer", "lstm", "lifted"])
def test_fisher_by_taps_and_by_backward_passes_is_that_of_a_loop_over_examples(name):
    """Dense layers at one position are tapped; convolutions, shared weights and sequences are not."""
    network = NETWORKS[name]()
    (x,) = network.batch
    loss = lambda outputs, targets: jnp.square(outputs - targets).reshape(len(outputs), -1).mean(-1)  # noqa: E731
    targets = normal(*jax.eval_shape(network.module.apply, network.variables, x).shape)
    found = jaxeff.collect(*network.arguments, criterion="fisher", loss_fn=loss, targets=targets)

    def example_loss(params, x, y):
        outputs = network.module.apply({**network.variables, "params": params}, x[None])
        return loss(outputs, y[None])[0]

    each = jax.vmap(jax.grad(example_loss), (None, 0, 0))(network.variables["params"], x, targets)
    for keys, gradient in jax.tree_util.tree_flatten_with_path(each)[0]:
        path = "/".join(key.key for key in keys)
        if path in found.derivatives:
            ours = found.derivatives[path].example_gradient
            expected = np.mean(np.square(gradient), 0)
            np.testing.assert_allclose(ours.mean_square, expected, rtol=1e-3, atol=1e-5 * expected.max())
            assert int(ours.terms) == len(x)


def _hessian_diagonal(tiny):
    _, kernels, losses, _, _ = tiny
    hessian = jax.hessian(_mean(losses))(kernels)
    return {
        path: np.diag(np.reshape(hessian[path][path], (kernel.size, kernel.size))).reshape(kernel.shape)
        for path, kernel in kernels.items()
    }


def test_hutchinsons_hessian_is_within_its_stated_standard_error(tiny):
    statistics = [_scores(tiny, "obd", seed=seed)[1] for seed in range(20)]
    merged = statistics[0]
    for more in statistics[1:]:
        merged = jaxeff.merge(merged, more)
    for path, exact in _hessian_diagonal(tiny).items():
        found = merged.derivatives[path].hessian
        assert int(found.terms) == 20 * derivatives.SAMPLES
        deviations = np.abs(found.mean - exact) / found.standard_error
        # 32 normal deviations: one beyond 4.5 has a chance of 2e-4; their rms is 1.
        assert np.max(deviations) < 4.5
        assert 0.5 < np.sqrt(np.mean(np.square(deviations))) < 1.5


def test_obd_is_exact_where_the_hessian_is_diagonal():
    curvature = jnp.array([[0.5, 2.0], [3.0, 0.0]])
    w, x = {"w": jnp.array([[1.0, -2.0], [0.5, 4.0]])}, jnp.eye(2)
    # x @ w is w itself.
    loss = lambda outputs, targets: jnp.sum(targets * jnp.square(outputs)) / 2  # noqa: E731
    report = jaxeff.collect(w, lambda p, x: x @ p["w"], x, criterion="obd", loss_fn=loss, targets=curvature)
    found = importance.scores(w, report, "obd")["w"]
    np.testing.assert_allclose(found, curvature * w["w"] ** 2 / 2, rtol=1e-6)


def test_where_the_curvature_is_negative_its_size_counts():
    w, x = {"w": jnp.ones((1, 1))}, jnp.ones((1, 1))
    loss = lambda outputs, targets: -jnp.sum(jnp.square(outputs))  # noqa: E731
    found = jaxeff.collect(w, lambda p, x: x @ p["w"], x, criterion="obd", loss_fn=loss, targets=())
    assert float(importance.scores(w, found, "obd")["w"][0, 0]) == 1
    assert float(found.derivatives["w"].hessian.mean[0, 0]) == -2


def test_gauss_newton_is_the_hessian_of_a_linear_network_and_never_negative(tiny):
    w, x, y = {"w": normal(5, 3)}, normal(7, 5), normal(7, 3, seed=8)
    criteria = ("obd", "obd_gauss_newton")
    found = jaxeff.collect(w, lambda p, x: x @ p["w"], x, criterion=criteria, loss_fn=squared, targets=y)
    derivatives = found.derivatives["w"]
    # The same random signs: equal estimates of equal matrices.
    np.testing.assert_allclose(derivatives.hessian.mean, derivatives.gauss_newton.mean, rtol=1e-4, atol=1e-6)
    _, kernels, losses, x, labels = tiny
    outputs = lambda k: _outputs(tiny, k)  # noqa: E731
    jacobian = jax.jacobian(outputs)(kernels)
    curvature = jax.hessian(lambda o: jnp.mean(cross_entropy(o, labels)))(outputs(kernels)).reshape(18, 18)
    estimates = [_scores(tiny, "obd_gauss_newton", seed=seed)[1] for seed in range(20)]
    for path, kernel in kernels.items():
        j = jacobian[path].reshape(18, kernel.size)
        exact = np.diag(j.T @ curvature @ j).reshape(kernel.shape)
        assert exact.min() >= 0
        mean = np.mean([s.derivatives[path].gauss_newton.mean for s in estimates], 0)
        errors = np.std([s.derivatives[path].gauss_newton.mean for s in estimates], 0) / np.sqrt(19)
        assert np.max(np.abs(mean - exact) / errors) < 5


def _outputs(tiny, kernels):
    variables, _, _, x, _ = tiny
    params = {
        name: {**variables["params"][name], "kernel": kernels[f"{name}/kernel"]}
        for name in ("first", "second")
    }
    return Tiny().apply({"params": params}, x)


def test_grasp_is_the_published_score_where_that_keeps_a_weight(tiny):
    _, kernels, losses, _, _ = tiny
    gradient = jax.grad(_mean(losses))
    flow = jax.grad(lambda k: sum(jnp.sum(jnp.square(g)) for g in gradient(k).values()) / 2)(kernels)
    published = {path: -kernels[path] * flow[path] for path in kernels}
    found = _scores(tiny, "grasp")[0]
    _assert_close(found, {path: np.maximum(-score, 0) for path, score in published.items()}, rtol=1e-3)
    assert any(np.any(score > 0) for score in published.values())


def test_synflow_of_a_linear_network_is_the_published_definition():
    a, b, c = normal(5, 4), normal(4, 3, seed=8), normal(3, 2, seed=9)
    params, x = {"a": a, "b": b, "c": c}, normal(6, 5)
    network = lambda p, x: x @ p["a"] @ p["b"] @ p["c"]  # noqa: E731
    found = jaxeff.collect(params, network, x, criterion="synflow")
    # R = 1^T |A| |B| |C| 1, score = |w| dR/d|w|.
    a, b, c = np.abs(a), np.abs(b), np.abs(c)
    into, out = (
        [np.ones(5), np.ones(5) @ a, np.ones(5) @ a @ b],
        [b @ c @ np.ones(2), c @ np.ones(2), np.ones(2)],
    )
    expected = {p: w * i[:, None] * o for p, w, i, o in zip("abc", (a, b, c), into, out, strict=True)}
    _assert_close(importance.scores(params, found, "synflow"), expected)
    # What flows through each layer is the same.
    totals = [float(jnp.sum(score)) for score in importance.scores(params, found, "synflow").values()]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-5)


UNIT_NETWORKS = ["mlp", "cnn", "fused", "lstm", "scanned", "transformer"]


@pytest.mark.parametrize("name", UNIT_NETWORKS)
def test_unit_taylor_is_the_slope_of_the_loss_by_a_factor_on_the_units(name):
    """The sum of a dL/da of a unit is that of w dL/dw and b dL/db over its weights and bias, by Euler.

    Where the post-activation is the unit's own output, that is.
    """
    network = NETWORKS[name]()
    targets = jnp.zeros(jax.eval_shape(network.module.apply, network.variables, *network.batch).shape)
    loss = lambda outputs, targets: jnp.mean(jnp.square(outputs - targets))  # noqa: E731
    found = jaxeff.collect(
        *network.arguments, criterion=("unit_taylor", "snip"), loss_fn=loss, targets=targets
    )
    gradient = jax.grad(
        lambda p: loss(network.module.apply({**network.variables, "params": p}, *network.batch), 0)
    )(network.variables["params"])
    checked = 0
    for site in found.sites:
        *keys, leaf = site.path.split("/")
        own, slope = network.variables["params"], gradient
        for key in keys:
            own, slope = own[key], slope[key]
        alone = sum(other.path == site.path for other in found.sites) == 1
        if site.nonlinearity not in ("identity", "relu") or not alone or leaf == "embedding":
            continue
        over = tuple(a for a in range(own[leaf].ndim) if a not in (*site.unit_axes, *site.layer_axes))
        expected = jnp.sum(own[leaf] * slope[leaf], over)
        if site.bias is not None:
            expected = expected + own["bias"] * slope["bias"]
        if site.nonlinearity == "relu" and name == "cnn":
            continue  # BatchNorm's own scale and bias stand between.
        ours = jnp.abs(jnp.reshape(site.gate.mean_absolute, expected.shape))
        np.testing.assert_allclose(ours, jnp.abs(expected), rtol=2e-3, atol=1e-6, err_msg=site.path)
        checked += 1
    assert checked


def test_filter_norm_is_the_l1_norm_of_each_channel():
    network = NETWORKS["cnn"]()
    report = jaxeff.analyze(*network.arguments, criterion="filter_norm")
    kernel = network.variables["params"]["conv0"]["kernel"]
    np.testing.assert_allclose(report["conv0/kernel"].units, np.abs(kernel).sum((0, 1, 2)), rtol=1e-6)
    assert float(report["conv0/kernel"].effective_fan_in) == pytest.approx(27, rel=1e-5)


class Layouts(nn.Module):
    """Inputs and units along one axis each, along several, and beside a window."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).reshape(len(x), -1, 4)
        x = nn.relu(nn.DenseGeneral((2, 3), name="heads")(x))
        return nn.Dense(5, name="last")(nn.DenseGeneral(4, axis=(-2, -1), name="out")(x))


def _ria(weight, others_of_unit, others_on_input, squares):
    """Sums over the axes of the others; mean squares of the inputs, which broadcast against the weight."""
    size = np.abs(np.asarray(weight, np.float64))
    within_unit, on_input = (size.sum(axes, keepdims=True) for axes in (others_of_unit, others_on_input))
    return (size / within_unit + size / on_input) * squares**0.25


def test_ria_is_its_definition_in_every_layout():
    x = np.abs(normal(3, 6, 6, 2))
    variables = drawn(Layouts(), x)
    statistics = jaxeff.collect(variables, Layouts().apply, x, criterion="ria")
    found = importance.scores(variables, statistics, "ria")
    _, seen = Layouts().apply(variables, x, capture_intermediates=True)
    outputs = {
        name: np.asarray(seen["intermediates"][name]["__call__"][0], np.float64)
        for name in ("conv", "heads", "out")
    }
    squares = {
        "conv": np.square(x).mean((0, 1, 2))[:, None],
        "heads": np.square(np.maximum(outputs["conv"], 0)).mean((0, 1, 2))[:, None, None],
        "out": np.square(np.maximum(outputs["heads"], 0)).mean((0, 1))[:, :, None],
        "last": np.square(outputs["out"]).mean((0, 1))[:, None],
    }
    axes = {
        "conv": ((0, 1, 2), (0, 1, 3)),
        "heads": ((0,), (1, 2)),
        "out": ((0, 1), (2,)),
        "last": ((0,), (1,)),
    }
    for name, (others_of_unit, others_on_input) in axes.items():
        kernel = variables["params"][name]["kernel"]
        expected = _ria(kernel, others_of_unit, others_on_input, squares[name])
        np.testing.assert_allclose(found[f"{name}/kernel"], expected, rtol=1e-4, err_msg=name)


def test_ria_scores_each_stacked_block_alone():
    network = NETWORKS["scanned"]()
    statistics = jaxeff.collect(*network.arguments, criterion="ria")
    found = importance.scores(network.variables, statistics, "ria")["stack/dense/kernel"]
    kernels = network.variables["params"]["stack"]["dense"]["kernel"]
    inputs = np.moveaxis(network.seen.inputs["stack/dense"][0], 1, 0)
    for scores, kernel, x in zip(found, kernels, inputs, strict=True):
        expected = _ria(kernel, (0,), (1,), np.square(x).mean(0)[:, None])
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_ria_of_units_and_inputs_without_weights_is_0():
    weight = np.array([[0.0, 0.0, 0.0], [0.0, 2.0, 6.0]], np.float32)
    statistics = jaxeff.collect({"w": weight}, lambda p, x: x @ p["w"], np.ones((4, 2), np.float32))
    found = importance.scores({"w": weight}, statistics, "ria")["w"]
    np.testing.assert_allclose(found, [[0, 0, 0], [0, 1 + 0.25, 1 + 0.75]], rtol=1e-6)


def test_random_scores_are_the_same_again_and_other_in_another_layer():
    w = {"a": normal(30, 40), "b": normal(30, 40, seed=8)}
    statistics = jaxeff.collect(w, lambda p, x: x @ p["a"] + x @ p["b"], normal(2, 30))
    first, again = (importance.scores(w, statistics, "random") for _ in range(2))
    assert np.array_equal(first["a"], again["a"]) and not np.array_equal(first["a"], first["b"])
    assert abs(np.corrcoef(np.ravel(first["a"]), np.abs(np.ravel(w["a"])))[0, 1]) < 0.1
    assert 0.45 < float(jnp.mean(first["a"])) < 0.55


NULLED = [name for name, criterion in importance.CRITERIA.items() if criterion.null_power is not None]


@pytest.mark.parametrize("name", NULLED)
def test_weights_that_are_noise_are_near_their_null(name):
    """A layer whose weights are independent of all that the criterion reads besides."""
    w, x = normal(60, 80), normal(400, 60, seed=8)
    loss = lambda outputs, targets: jnp.mean(outputs * targets + jnp.square(outputs), -1)  # noqa: E731
    # Linear in w but for a small part: derivatives hardly depend on it.
    network = lambda p, x: 1e-3 * (x @ p["w"])  # noqa: E731
    layer = jaxeff.analyze(
        {"w": w}, network, x, criterion=name, loss_fn=loss, targets=normal(400, 80, seed=9)
    )["w"]
    assert float(layer.metrics.utilization) == pytest.approx(float(layer.null.utilization), abs=0.03)
    assert float(layer.metrics.gini) == pytest.approx(float(layer.null.gini), abs=0.03)


def test_a_users_function_finds_the_gradients(tiny):
    variables, kernels, losses, x, labels = tiny

    def own(weight, site):
        return jnp.abs(weight) * site.derivatives.gradient.mean_absolute * site.input.rms

    loss = {"loss_fn": cross_entropy, "targets": labels}
    report = jaxeff.analyze(variables, Tiny().apply, x, criterion=own, **loss)
    gradient = jax.grad(_mean(losses))(kernels)["first/kernel"]
    expected = np.abs(kernels["first/kernel"] * gradient) * np.sqrt(np.mean(x**2, 0))[:, None]
    np.testing.assert_allclose(report["first/kernel"].units, expected.sum(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_a_loss_for_each_position_is_averaged(name):
    weight, x, y = normal(5, 3), normal(4, 6, 5), normal(4, 6, 3, seed=2)
    analyze = lambda loss: jaxeff.analyze(  # noqa: E731
        {"w": weight}, lambda p, x: x @ p["w"], x, criterion=name, loss_fn=loss, targets=y
    )
    each = analyze(lambda outputs, targets: jnp.mean(jnp.square(outputs - targets), -1))
    averaged = analyze(lambda outputs, targets: jnp.mean(jnp.square(outputs - targets), (1, 2)))
    np.testing.assert_allclose(each["w"].units, averaged["w"].units, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, c in importance.CRITERIA.items() if c.needs_loss])
def test_a_mean_loss_and_a_loss_for_each_example_are_one_to_all_but_fisher(name, tiny):
    variables, _, _, x, labels = tiny
    mean = lambda outputs, targets: jnp.mean(cross_entropy(outputs, targets))  # noqa: E731
    analyze = lambda loss: jaxeff.analyze(  # noqa: E731
        variables, Tiny().apply, x, criterion=name, loss_fn=loss, targets=labels
    )
    if name == "fisher":
        with pytest.raises(ValueError, match="`loss_fn`.*one loss per example"):
            analyze(mean)
        return
    ours, theirs = analyze(mean), analyze(cross_entropy)
    for path in ours.layers:
        np.testing.assert_allclose(ours[path].units, theirs[path].units, rtol=1e-4, atol=1e-7)


def test_a_weight_without_a_site_is_scored_by_its_gradient():
    w = {"w": normal(3, 4, 4)}

    def network(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return x

    x, y = normal(8, 4), normal(8, 4, seed=8)
    report = jaxeff.analyze(w, network, x, criterion="taylor", loss_fn=squared, targets=y)
    gradient = jax.grad(lambda p: squared(network(p, x), y))(w)["w"]
    assert report["w"].side == "gradient" and "w" in report.unpaired
    np.testing.assert_allclose(report["w"].units, np.square(w["w"] * gradient).sum((0, 1)), rtol=1e-4)


def test_a_layer_that_the_loss_does_not_see_has_score_0_and_the_reason():
    params = {"seen": normal(4, 3), "unseen": normal(4, 3, seed=8)}
    network = lambda p, x: (x @ p["seen"], x @ p["unseen"])  # noqa: E731
    loss = lambda outputs, targets: squared(outputs[0], targets)  # noqa: E731
    report = jaxeff.analyze(
        params, network, normal(5, 4), criterion="taylor", loss_fn=loss, targets=normal(5, 3)
    )
    assert float(report["unseen"].metrics.max) == 0 and float(report["seen"].metrics.max) > 0
    assert "the loss does not depend on it" in report["unseen"].note and report["seen"].note == ""


def test_a_loss_written_anew_at_each_step_does_not_compile_again(tiny, compilations):
    variables, _, _, x, labels = tiny

    def step(scale):
        loss = lambda outputs, targets: cross_entropy(outputs, targets) * scale  # noqa: E731
        return jaxeff.analyze(variables, Tiny().apply, x, criterion="taylor", loss_fn=loss, targets=labels)

    scales = [jnp.asarray(value) for value in (1.0, 2.0)]
    first = jax.block_until_ready(step(scales[0]))
    with compilations() as compiled:
        second = jax.block_until_ready(step(scales[1]))
    assert compiled.count == 0
    np.testing.assert_allclose(second["first/kernel"].units, 4 * first["first/kernel"].units, rtol=1e-5)


def test_gradient_criteria_run_inside_jit(tiny):
    variables, _, _, x, labels = tiny
    loss = {"loss_fn": cross_entropy, "criterion": "fisher"}
    analyze = lambda v, x, y: jaxeff.analyze(v, Tiny().apply, x, targets=y, **loss)  # noqa: E731
    inside, outside = jax.jit(analyze)(variables, x, labels), analyze(variables, x, labels)
    for path in outside.layers:
        np.testing.assert_allclose(inside[path].units, outside[path].units, rtol=1e-5)


X, LABELS = normal(6, 5), np.array([0, 1, 2, 0, 1, 2])
BAD = {
    "no loss": ({"targets": LABELS}, ValueError, "`loss_fn` is missing: criterion 'taylor'"),
    "no targets": ({"loss_fn": cross_entropy}, ValueError, "`targets` is missing: criterion 'taylor'"),
    "no function": ({"loss_fn": 3, "targets": LABELS}, TypeError, "`loss_fn` must be a function"),
    "a loss of another shape": (
        {"loss_fn": lambda o, t: o.T, "targets": LABELS},
        ValueError,
        r"`loss_fn` returned float32\[3,6\].*6 examples",
    ),
    "two losses": (
        {"loss_fn": lambda o, t: (o.sum(), 1.0), "targets": LABELS},
        ValueError,
        "`loss_fn` returned",
    ),
    "an integer loss": (
        {"loss_fn": lambda o, t: t.sum(), "targets": LABELS},
        ValueError,
        "`loss_fn` returned int",
    ),
    "targets that do not fit": (
        {"loss_fn": squared, "targets": np.zeros((4, 3))},
        ValueError,
        r"`loss_fn` does not accept the model's outputs, float32\[6, 3\], with `targets`, float\d+\[4, 3\]",
    ),
}


@pytest.mark.parametrize(("loss", "error", "said"), BAD.values(), ids=BAD)
def test_a_bad_loss_is_named(loss, error, said, tiny):
    with pytest.raises(error, match=said):
        jaxeff.analyze(tiny[0], Tiny().apply, X, criterion="taylor", **loss)


def test_statistics_without_the_derivatives_asked_for_are_refused(tiny):
    variables, _, _, x, _ = tiny
    statistics = jaxeff.collect(variables, Tiny().apply, x)
    with pytest.raises(ValueError, match="`statistics` hold no gradient for criterion 'taylor'"):
        jaxeff.analyze(variables, statistics=statistics, criterion="taylor")


def test_a_criterion_that_needs_a_model_says_so(tiny):
    for criterion in ("wanda", "taylor"):
        with pytest.raises(ValueError, match=f"`criterion` '{criterion}' needs `apply_fn` and `batch`"):
            jaxeff.analyze(tiny[0], criterion=criterion)
    assert jaxeff.analyze(tiny[0], criterion="random").criterion == "random"


def test_what_cannot_be_differentiated_is_named():
    def network(p, x):
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x))[1]

    with pytest.raises(ValueError, match="`criterion` 'taylor'.*cannot be differentiated"):
        jaxeff.analyze(
            {"w": jnp.eye(3)},
            network,
            jnp.ones((2, 3)),
            criterion="taylor",
            loss_fn=squared,
            targets=np.zeros((2, 3)),
        )


# Examples that do not stand alone, and complex numbers


def _graph(params, batch):
    """Sum messages along the edges of a graph."""
    sent = (batch["nodes"] @ params["message"])[batch["from"]]
    received = jax.ops.segment_sum(sent, batch["to"], num_segments=batch["nodes"].shape[0])
    return jnp.tanh(received + batch["nodes"] @ params["own"])


def _of_batch(params, x):
    h = x @ params["w"]
    return (h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 0.1)


GRAPH = {"nodes": normal(6, 4), "from": np.arange(12) % 6, "to": (np.arange(12) * 5 + 1) % 6}
GRAPH_PARAMS = {"message": normal(4, 3, seed=1), "own": normal(4, 3, seed=2)}


@pytest.mark.parametrize(
    ("function", "params", "batch", "warns"),
    [
        (_graph, GRAPH_PARAMS, GRAPH, True),
        (_of_batch, {"w": normal(4, 3)}, normal(6, 4), True),
        (lambda p, x: jnp.tanh(x @ p["w"]), {"w": normal(4, 3)}, normal(6, 4), False),
    ],
    ids=["edges", "batch norm", "alone"],
)
def test_fisher_warns_where_an_example_alone_has_another_loss(function, params, batch, warns, recwarn):
    targets = normal(6, 3, seed=3)
    loss_fn = lambda outputs, targets: jnp.mean((outputs - targets) ** 2, -1)  # noqa: E731
    jaxeff.collect(params, function, batch, criterion="fisher", loss_fn=loss_fn, targets=targets)
    assert [("alone" in str(each.message)) for each in recwarn] == [True] * warns


def test_fisher_says_where_it_knows_no_examples():
    apply_fn = lambda p, x, mask: (mask @ (x @ p["w"])).reshape(-1, 3)  # noqa: E731
    batch = normal(2, 5, 4), np.tril(np.ones((5, 5), np.float32))
    with pytest.raises(ValueError, match="no output has the first axis of an array of `batch`"):
        jaxeff.collect(
            {"w": normal(4, 3)},
            apply_fn,
            batch,
            criterion="fisher",
            loss_fn=lambda y, _: y.mean(),
            targets=0.0,
        )


def test_fisher_runs_examples_that_lie_along_an_explicit_mesh():
    params, x, targets = {"w": normal(4, 3)}, normal(6, 4), normal(6, 3, seed=3)
    loss_fn = lambda outputs, targets: jnp.mean((outputs - targets) ** 2, -1)  # noqa: E731

    def fisher(x, targets):
        apply_fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
        found = jaxeff.collect(params, apply_fn, x, criterion="fisher", loss_fn=loss_fn, targets=targets)
        return importance.scores(params, found, "fisher")["w"]

    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        laid = jax.device_put((x, targets), NamedSharding(mesh, PartitionSpec("d")))
        found = np.asarray(fisher(*laid))
    np.testing.assert_allclose(found, fisher(x, targets), rtol=1e-5)


COMPLEX = {name: normal(*size, seed=i) for i, (name, size) in enumerate(
    {"real": (3, 4), "imaginary": (3, 4), "out": (4, 2)}.items()
)}  # fmt: skip


TURN = np.exp(1j * np.arange(4.0))[None].astype(np.complex64)


def _complex(p, x):
    """Two weights that make one complex matrix, as in S5."""
    return (x @ (p["real"] + 1j * p["imaginary"]) * TURN @ p["out"]).real


def test_complex_activations_count_by_their_absolute_values():
    p, x = {name: np.float64(leaf) for name, leaf in COMPLEX.items()}, normal(7, 3, seed=4)
    targets, loss_fn = normal(7, 2), lambda outputs, targets: jnp.mean((outputs - targets) ** 2, -1)
    made = np.float64(x) @ (p["real"] + 1j * p["imaginary"])
    turned = made * TURN

    def scores(criterion, **keywords):
        given = {"loss_fn": loss_fn, "targets": targets} if importance.CRITERIA[criterion].needs_loss else {}
        statistics = jaxeff.collect(COMPLEX, _complex, x, criterion=criterion, **given, **keywords)
        return statistics, importance.scores(COMPLEX, statistics, criterion)

    _, activation = scores("activation")
    for name in ("real", "imaginary"):
        np.testing.assert_allclose(activation[name], np.abs(p[name]) * np.abs(made).mean(0), rtol=1e-5)
    statistics, wanda = scores("wanda", hessians=True)
    rms = np.sqrt((np.abs(turned) ** 2).mean(0))
    np.testing.assert_allclose(wanda["out"], np.abs(p["out"]) * rms[:, None], rtol=1e-5)
    # The squared outputs of a real weight are w^T Re(X* X) w.
    (products,) = (site.second_moments for site in statistics.sites if site.path == "out")
    np.testing.assert_allclose(products.sum, (turned.conj().T @ turned).real, rtol=1e-4, atol=1e-5)

    def loss(p, rows):
        return jnp.mean(loss_fn(_complex(p, x[rows]), targets[rows]))

    _, fisher = scores("fisher")
    squares = sum(np.float64(jax.grad(loss)(COMPLEX, slice(n, n + 1))["out"]) ** 2 for n in range(7))
    np.testing.assert_allclose(fisher["out"], p["out"] ** 2 * squares / 7, rtol=1e-4)

    def scaled(gates):
        made = x @ (COMPLEX["real"] + 1j * COMPLEX["imaginary"]) * (1 + gates)
        return loss_fn((made * TURN @ COMPLEX["out"]).real, targets).mean()

    _, unit_taylor = scores("unit_taylor")
    of_units = np.abs(jax.grad(scaled)(jnp.zeros((1, 4)))[0])
    np.testing.assert_allclose(np.sum(unit_taylor["real"], 0), of_units, rtol=1e-4)
