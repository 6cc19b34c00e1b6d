"""Many batches are as one: sums, derivatives, what compiles, what is warned of and refused."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, Square, drawn, normal

import jaxeff
from jaxeff import importance
from jaxeff.statistics import derivatives

SIDES = ("input", "pre", "post")


def squared(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets), -1)


@pytest.fixture(scope="module")
def square():
    """The square network with 96 examples and their targets."""
    return drawn(Square(), normal(2, 8)), normal(96, 8), normal(96, 8, seed=8)


def _batches(square, size=8, targets=False):
    _, x, y = square
    parts = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    return parts if targets else [part for part, _ in parts]


@pytest.mark.filterwarnings("default:the scores of")
def test_many_batches_are_as_one_large_batch(square):
    variables, x, _ = square
    whole = jaxeff.collect(variables, Square().apply, x)
    # 96 = 9 x 10 + 6: the last batch is a smaller one.
    many = jaxeff.calibrate(variables, Square().apply, _batches(square, size=10))
    for ours, theirs in zip(many.sites, whole.sites, strict=True):
        for side in SIDES:
            for one, other in zip(
                jax.tree.leaves(getattr(ours, side)), jax.tree.leaves(getattr(theirs, side)), strict=True
            ):
                # float32 sums in another order.
                np.testing.assert_allclose(one, other, rtol=1e-6)


def test_thousands_of_batches_add_up_as_exactly_as_one():
    x = np.full((1, 1), 0.1, np.float32)
    found = jaxeff.calibrate({"w": jnp.ones((1, 1))}, lambda p, x: x @ p["w"], [x] * 3000)
    np.testing.assert_allclose(found.sites[0].post.absolute_sum, 3000 * np.float64(x), rtol=1e-7)
    assert float(found.sites[0].post.count) == 3000


@pytest.mark.filterwarnings("default:the scores of")
def test_derivatives_of_many_batches(square):
    variables, x, y = square
    criteria = ("fisher", "snip", "taylor", "obd", "unit_taylor")
    many = jaxeff.calibrate(
        variables, Square().apply, _batches(square, 24, targets=True), criterion=criteria, loss_fn=squared
    )
    loss = {"loss_fn": squared, "targets": y}
    whole = jaxeff.collect(variables, Square().apply, x, criterion=criteria, **loss)
    each = [
        jaxeff.collect(variables, Square().apply, b, criterion=criteria, loss_fn=squared, targets=t)
        for b, t in _batches(square, 24, targets=True)
    ]
    for path, ours in many.derivatives.items():
        theirs = whole.derivatives[path]
        # What is linear in a batch is that of the whole; the rest is a mean over batches.
        for one, other in (
            (ours.example_gradient.mean_square, theirs.example_gradient.mean_square),
            (ours.gradient.mean, theirs.gradient.mean),
            (
                ours.gradient.mean_square,
                np.mean([found.derivatives[path].gradient.mean_square for found in each], 0),
            ),
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-8)
        assert int(ours.hessian.terms) == 4 * derivatives.SAMPLES
    for ours, theirs in zip(many.sites, zip(*(found.sites for found in each), strict=True), strict=True):
        expected = np.mean([site.gate.mean_absolute for site in theirs], 0)
        np.testing.assert_allclose(ours.gate.mean_absolute, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.filterwarnings("default:the scores of")
def test_batches_of_one_shape_compile_once(square, compilations):
    variables, *_ = square
    batches = [jnp.asarray(batch) for batch in _batches(square)]
    lambda_ = lambda v, x: Square().apply(v, x)  # noqa: E731
    jax.block_until_ready(jaxeff.calibrate(variables, lambda_, batches[:4]))
    with compilations() as compiled:
        jax.block_until_ready(jaxeff.calibrate(variables, lambda_, batches))
    # The last comparison of ranks (8 with 12 batches) stacks one correlation more than before.
    assert compiled.count <= 1


@pytest.mark.filterwarnings("default:the scores of")
def test_stability_is_the_rank_correlation_with_half_as_many_batches(square):
    variables, *_ = square
    batches = _batches(square)
    stability = jaxeff.calibrate(variables, Square().apply, batches, criterion="wanda").stability
    assert stability.criterion == "wanda" and stability.batches.tolist() == [2, 4, 8, 12]
    assert stability.paths == tuple(f"layer{i}/kernel" for i in range(3))
    halves = [jaxeff.calibrate(variables, Square().apply, batches[:n]) for n in (4, 8)]
    scores = [importance.scores(variables, half, "wanda")["layer1/kernel"].ravel() for half in halves]
    order = [np.argsort(np.argsort(score)) for score in scores]
    expected = np.corrcoef(*order)[0, 1]
    np.testing.assert_allclose(stability.correlation[2, 1], expected, rtol=1e-5)


def test_one_batch_is_warned_of(square):
    variables, x, _ = square
    with pytest.warns(UserWarning, match="calibrated on one batch"):
        found = jaxeff.calibrate(variables, Square().apply, [x])
    assert found.stability.batches.size == 0


def test_scores_that_still_move_are_warned_of():
    def network(p, x):
        return x @ p["w"]

    # Each batch shows one input alone: the scores of the others move from 0.
    batches = [np.eye(8, dtype=np.float32)[i : i + 1] for i in range(8)]
    with pytest.warns(
        UserWarning, match="the scores of 'w' are not stable yet: rank correlation .* to 8 batches"
    ):
        jaxeff.calibrate({"w": jnp.ones((8, 3))}, network, batches, criterion="wanda")


@pytest.mark.filterwarnings("default:the scores of")
def test_a_generator_is_run_through_once_and_its_batches_are_let_go(square):
    variables, x, _ = square
    made = []

    def batches():
        for i in range(6):
            batch = jnp.asarray(x[8 * i : 8 * i + 8])
            made.append(weakref.ref(batch))
            # The first stays with its shapes; else there is this one and the one before.
            assert sum(reference() is not None for reference in made) <= 3
            yield batch

    jaxeff.calibrate(variables, Square().apply, batches())
    assert len(made) == 6


X = normal(4, 8)
BAD = {
    "nothing": ([], {}, ValueError, "`batches` is empty"),
    "one array": (X, {}, TypeError, r"`batches` is one ndarray.*\[batch\]"),
    "no iterable": (3, {}, TypeError, "`batches` must be an iterable of batches, got int"),
    "another shape": (
        [X, X[:, :7]],
        {},
        ValueError,
        r"batch 1 of `batches` has float32\[4, 7\].*float32\[4, 8\]",
    ),
    "another dtype": ([X, X.astype(np.float16)], {}, ValueError, "batch 1 of `batches` has float16"),
    "no targets": ([X], {"loss_fn": squared}, ValueError, "item 0 of `batches` is a ndarray.*pair"),
    "no loss": ([(X, X)], {"criterion": "taylor"}, ValueError, "`loss_fn` is missing"),
}


@pytest.mark.parametrize(("batches", "keywords", "error", "said"), BAD.values(), ids=BAD)
def test_bad_batches_are_named(batches, keywords, error, said, square):
    with pytest.raises(error, match=said):
        jaxeff.calibrate(square[0], Square().apply, batches, **keywords)


def test_a_report_of_many_batches(square):
    variables, *_ = square
    batches = _batches(square, size=48)
    statistics = jaxeff.calibrate(variables, Square().apply, batches)
    report = jaxeff.analyze(variables, statistics=statistics)
    assert float(report["layer0/kernel"].activity.count) == 96


def test_merging_statistics_for_different_criteria_is_refused(square):
    variables, x, y = square
    plain = jaxeff.collect(variables, Square().apply, x)
    taylor = jaxeff.collect(variables, Square().apply, x, criterion="taylor", loss_fn=squared, targets=y)
    with pytest.raises(ValueError, match="collected for different criteria"):
        jaxeff.merge(plain, taylor)


def test_a_network_of_loops_calibrates():
    network = NETWORKS["lstm"]()
    (x,) = network.batch
    whole = jaxeff.collect(*network.arguments)
    many = jaxeff.calibrate(network.variables, network.module.apply, [x[:2], x[2:]], criterion="magnitude")
    for ours, theirs in zip(many.sites, whole.sites, strict=True):
        np.testing.assert_allclose(ours.post.absolute_sum, theirs.post.absolute_sum, rtol=1e-5)
