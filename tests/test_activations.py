"""What a unit emits, beside whatever else the network makes of it: the same as without."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from network import normal

import jaxeff
from jaxeff import graph

X, W, HEAD = normal(8, 4), normal(4, 6, seed=1), normal(6, 3, seed=2)
B = np.zeros(6, np.float32)

# Of a layer's output before its nonlinearity.
STATISTICS = {
    "mean square": lambda h: jnp.mean(h**2),
    "mean magnitude": lambda h: jnp.mean(jnp.abs(h)),
    "L2 norm": jnp.linalg.norm,
    "L2 norm of each example": lambda h: jnp.linalg.norm(h, axis=1),
    "fraction of positives": lambda h: jnp.mean(h > 0),
    "number of zeros": lambda h: jnp.sum(h == 0),
    "isfinite": lambda h: jnp.all(jnp.isfinite(h)),
    "histogram": lambda h: jnp.histogram(h, 8)[0],
    "histogram of magnitudes": lambda h: jnp.histogram(jnp.abs(h), 8)[0],
    "median magnitude": lambda h: jnp.median(jnp.abs(h)),
    "quantile": lambda h: jnp.quantile(jnp.abs(h), 0.9),
    "largest magnitudes": lambda h: lax.top_k(jnp.abs(h), 1)[0],
    "position of the largest": lambda h: jnp.argmax(jnp.abs(h)),
    "kurtosis": lambda h: jnp.mean(h**4) / jnp.mean(h**2) ** 2,
    "mean square of each unit": lambda h: jnp.mean(h**2, 0),
    "logarithm of the variance": lambda h: jnp.log(jnp.var(h, 0)),
    "mean square of two units": lambda h: jnp.mean(h[:, :2] ** 2),
    "mean sigmoid": lambda h: jnp.mean(nn.sigmoid(h)),
    "softmax entropy": lambda h: -jnp.sum(nn.softmax(h) * nn.log_softmax(h)),
    "logarithm of a sum of exponentials": lambda h: jnp.mean(jnp.log(jnp.sum(jnp.exp(h), -1)) ** 2),
    "covariance": lambda h: jnp.sum((h.T @ h) ** 2),
    "inner product of squares": lambda h: jnp.vdot(h**2, h**2),
    "running sum": lambda h: jnp.cumsum(h**2)[-1],
    "sum in a scan": lambda h: lax.scan(lambda c, row: (c + jnp.sum(row**2), None), 0.0, h)[0],
    "sum of segments": lambda h: jax.ops.segment_sum(jnp.abs(h), jnp.zeros(8, int), 2),
    "none": lambda h: jnp.zeros(()),
}


def _standardized(h, mean, square):
    return (h - mean[None]) * lax.rsqrt(square - mean**2 + 1)[None]


# What the network makes of the layer's output, and the layer's nonlinearity in it.
HEADS = {
    "relu": (lambda h, o: nn.relu(h) @ o, "relu"),
    "linear": (lambda h, o: h @ o, "identity"),
    "pooled": (lambda h, o: jnp.mean(nn.gelu(h), 0) @ o, "gelu_tanh"),
    "returned": (lambda h, o: jnp.tanh(h), "tanh"),
    "logits": (lambda h, o: h, "identity"),
    "gated": (lambda h, o: (nn.silu(h[:, :3]) * h[:, 3:]) @ o[:3], "silu/identity"),
    "squeezed and excited": (
        lambda h, o: nn.relu(h * nn.sigmoid(nn.relu(jnp.mean(h, 0, keepdims=True) @ o) @ o.T)) @ o,
        "relu",
    ),
    "normalized in a batch": (
        lambda h, o: nn.relu(_standardized(h, h.mean(0), jnp.mean(h**2, 0))) @ o,
        "relu",
    ),
    "normalized across units": (
        lambda h, o: nn.silu(h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1)) @ o,
        "identity",
    ),
}


def _first_site(function):
    """The first site of `function(w, b, o, x)`."""
    arrays = {"w": W, "b": B, "o": HEAD}
    closed = jax.make_jaxpr(function)(*arrays.values(), X)
    leaves = [graph.Leaf(name, array.shape, array.dtype) for name, array in arrays.items()]
    program = graph.flatten(closed)
    return graph.build(program, leaves, batch=program.inputs[3:]).sites[0]


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_a_side_statistic_changes_nothing_wherever_it_is_computed(statistic):
    def before(head):
        def function(w, b, o, x):
            h = x @ w + b[None]
            found = statistic(h)
            return head(h, o), found

        return function

    def after(head):
        def function(w, b, o, x):
            h = x @ w + b[None]
            outputs = head(h, o)
            return outputs, statistic(h)

        return function

    for head, expected in HEADS.values():
        for order in (before, after):
            activation = _first_site(order(head)).activation
            assert (activation.nonlinearity, activation.bias) == (expected, 1)


def test_a_statistic_of_the_bare_product_leaves_the_layer_its_bias():
    def function(w, b, o, x):
        h = x @ w
        return nn.relu(h + b[None]) @ o, jnp.mean(h**2)

    activation = _first_site(function).activation
    assert (activation.nonlinearity, activation.bias) == ("relu", 1)


def test_a_step_of_a_nonlinearity_may_be_logged():
    def function(w, b, o, x):
        gate = nn.sigmoid(x @ w)
        return ((x @ w) * gate) @ o, jnp.mean(gate)

    def silu(w, b, o, x):
        h = x @ w
        gate = 1 / (1 + jnp.exp(-h))
        jax.debug.callback(lambda mean: None, jnp.mean(gate))
        jax.debug.callback(lambda gates: None, gate)
        return (h * gate) @ o

    assert _first_site(function).activation.nonlinearity == "sigmoid"
    assert _first_site(silu).activation.nonlinearity == "silu"


@pytest.mark.parametrize(
    "act", [nn.relu, jnp.tanh, nn.silu, nn.gelu, nn.elu, lambda h: jnp.where(h > 0, h, 0)]
)
def test_a_gradient_penalty_changes_nothing(act):
    def network(w, b, o, x):
        return act(x @ w + b[None]) @ o

    def penalized(w, b, o, x):
        outputs, pull = jax.vjp(lambda x: network(w, b, o, x), x)
        return outputs, jnp.mean((jnp.linalg.norm(pull(jnp.ones_like(outputs))[0], axis=-1) - 1) ** 2)

    alone, beside = _first_site(network).activation, _first_site(penalized).activation
    assert (beside.nonlinearity, beside.bias) == (alone.nonlinearity, 1)
    assert alone.nonlinearity not in ("pointwise", "identity")


def test_dead_units_are_dead_though_their_mean_square_is_returned():
    params = {"w": jnp.asarray(W), "b": jnp.asarray([-100.0, -100.0, 0, 0, 0, 0]), "o": jnp.asarray(HEAD)}

    def function(p, x):
        h = x @ p["w"] + p["b"][None]
        mean_square = jnp.mean(h**2)
        return nn.relu(h) @ p["o"], mean_square

    layer = jaxeff.analyze(params, function, X)["w"]
    emitted = np.maximum(X @ W + np.asarray(params["b"]), 0)
    assert layer.nonlinearity == "relu" and int(layer.activity.dead) == 2
    expected = np.mean(emitted, 0) * np.abs(W).sum(0)
    assert expected[:2].tolist() == [0, 0] and (expected[2:] > 0).all()
    # The mean activation of each unit scales its weights.
    np.testing.assert_allclose(
        np.ravel(layer.units) / np.sum(layer.units), expected / expected.sum(), rtol=1e-5
    )


# --- BatchNorm over an axis name ----------------------------------------------------------------------


def _moments(kind, h):
    """Mean and mean square of each unit over the devices' batches."""
    mean, square = h.mean(0), (h**2).mean(0)
    if kind == "psum":
        return lax.psum(h.sum(0), "i") / 8, lax.psum((h**2).sum(0), "i") / 8
    if kind == "pmean":
        return lax.pmean(mean, "i"), lax.pmean(square, "i")
    if kind == "pmean of a tuple":
        return lax.pmean((mean, square), "i")
    if kind == "pmean of a stack":
        stacked = lax.pmean(jnp.concatenate([mean[None], square[None]]), "i")
        return stacked[0], stacked[1]
    if kind == "all_gather":
        return lax.all_gather(mean, "i").mean(0), lax.all_gather(square, "i").mean(0)
    if kind == "all_gather of the batch":
        batch = lax.all_gather(h, "i")
        return batch.mean((0, 1)), (batch**2).mean((0, 1))
    batch = lax.all_gather(h, "i", tiled=True)
    return batch.mean(0), (batch**2).mean(0)


COLLECTIVES = [
    "psum",
    "pmean",
    "pmean of a tuple",
    "pmean of a stack",
    "all_gather",
    "all_gather of the batch",
    "all_gather, tiled",
]


def _batch_normed(kind):
    def function(p, x):
        h = x @ p["w"]
        mean, square = _moments(kind, h)
        return nn.relu(_standardized(h, mean, square)) @ p["o"]

    return function


def _nonlinearities(function, x):
    statistics = jaxeff.collect({"w": W, "o": HEAD}, function, x)
    return {site.path: site.nonlinearity for site in statistics.sites}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_batch_norm_over_an_axis_name_keeps_the_nonlinearity_behind_it(kind):
    function, batches, found = _batch_normed(kind), X.reshape(2, 4, 4), []

    def inside(x):
        found.append(_nonlinearities(function, x))
        return x

    def outside(x):
        found.append(_nonlinearities(jax.vmap(function, in_axes=(None, 0), axis_name="i"), x))
        return x

    _ = jax.eval_shape(outside, batches)
    _ = jax.eval_shape(jax.vmap(inside, axis_name="i"), batches)
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("i")
    for check in (True, False):
        step = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
        _ = jax.eval_shape(step, X)
    assert found == [{"w": "relu", "o": "identity"}] * 4


@pytest.mark.parametrize("kind", ["psum", "pmax", "all_gather"])
def test_a_normalization_across_units_over_an_axis_name_ends_the_search(kind):
    def function(p, x):
        h = x @ p["w"]
        squares = jnp.sum(h**2, -1, keepdims=True)
        if kind == "psum":
            total = lax.psum(squares, "i")
        elif kind == "pmax":
            total = lax.pmax(squares, "i")
        else:
            total = lax.all_gather(squares, "i").sum(0)
        return nn.relu(h * lax.rsqrt(total)) @ p["o"]

    found = []
    _ = jax.eval_shape(
        jax.vmap(lambda x: found.append(_nonlinearities(function, x)) or x, axis_name="i"), X.reshape(2, 4, 4)
    )
    assert found == [{"w": "identity", "o": "identity"}]


def test_batch_norm_of_one_example_keeps_the_nonlinearity_behind_it():
    head, expected = HEADS["normalized in a batch"]
    assert _nonlinearities(lambda p, x: head(x @ p["w"], p["o"]), X[:1])["w"] == expected


# --- Modules and loops --------------------------------------------------------------------------------


class Sown(nn.Module):
    """Sows the squares of a layer and its mean magnitude before its nonlinearity."""

    sow_values: bool

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6)(x)
        if self.sow_values:
            _ = self.sow("intermediates", "squares", h**2)
            _ = self.sow("losses", "magnitude", jnp.mean(jnp.abs(h)))
        return nn.Dense(3)(nn.gelu(h).mean(0))


@pytest.mark.parametrize("mutable", [False, ["intermediates", "losses"]])
def test_what_a_module_sows_is_no_activation(mutable):
    params = {"params": Sown(False).init(jax.random.key(0), X)["params"]}
    plain = jaxeff.collect(params, Sown(False).apply, X)
    sown = jaxeff.collect(params, Sown(True).apply, X, mutable=mutable)
    returned = jaxeff.collect(params, lambda v, x: Sown(True).apply(v, x, mutable=mutable), X)
    for found in (sown, returned):
        for site, expected in zip(found.sites, plain.sites, strict=True):
            assert site.nonlinearity == expected.nonlinearity
            np.testing.assert_array_equal(site.post.absolute_sum, expected.post.absolute_sum)
    assert [site.nonlinearity for site in plain.sites] == ["gelu_tanh", "identity"]


def _stack(p, x):
    def layer(carry, w):
        h = carry @ w
        statistics = jnp.mean(h**2), jnp.mean(jnp.abs(h), 0)
        return jnp.tanh(h), statistics

    return lax.scan(layer, x, p["w"])


def _recurrent(p, x):
    def step(carry, row):
        h = carry @ p["w"] + row
        mean_square = jnp.mean(h**2)
        return jnp.tanh(h), mean_square

    return lax.scan(step, x, jnp.ones((5, *x.shape)))


def _repeated(p, x):
    def again(state):
        count, carry, total = state
        h = carry @ p["w"]
        total = total + jnp.mean(h**2)
        return count + 1, jnp.tanh(h), total

    return lax.while_loop(lambda state: state[0] < 3, again, (0, x, 0.0))[1:]


def _branched(p, x):
    def branch(x):
        h = x @ p["w"]
        mean_square = jnp.mean(h**2)
        return jnp.tanh(h), mean_square

    return lax.cond(x.sum() > 0, branch, lambda x: (x, 0.0), x)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(_stack, (3, 4, 4)), (_recurrent, (4, 4)), (_repeated, (4, 4)), (_branched, (4, 4))],
    ids=["scan over layers", "scan over time", "while", "cond"],
)
def test_a_statistic_that_a_loop_emits_is_no_activation(function, shape):
    statistics = jax.eval_shape(lambda w: jaxeff.collect({"w": w}, function, X), jnp.ones(shape))
    assert [site.nonlinearity for site in statistics.sites] == ["tanh"]


def test_where_nothing_but_sums_is_returned_the_first_nonlinearity_stands():
    assert (
        _first_site(lambda w, b, o, x: jnp.sum(jnp.tanh(x @ w) * b[None], -1)).activation.nonlinearity
        == "tanh"
    )
    assert _first_site(lambda w, b, o, x: jnp.mean(nn.relu(x @ w), 0)).activation.nonlinearity == "relu"
