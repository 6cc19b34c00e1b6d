"""A derivative rule of its own changes nothing of what a function computes, nor of what is found in it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops
from network import normal

import jaxeff
from jaxeff import graph

X, W = normal(8, 4), normal(4, 6, seed=1)


def _straight_through(function):
    """The function under `custom_vjp`, with the gradient of the identity."""
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda x: (function(x), None), lambda _, gradient: (gradient,))
    return wrapped


def _custom_jvp(function):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wrapped


def _custom_vjp(function):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *x: jax.vjp(function, *x), lambda pull, gradient: pull(gradient))
    return wrapped


WRAPPERS = [_custom_jvp, _custom_vjp, lambda function: _custom_jvp(_custom_vjp(function))]


def _quantized(w):
    scale = jnp.max(jnp.abs(w), 0, keepdims=True) / 127
    return jnp.clip(jnp.round(w / scale), -127, 127) * scale


# What a function does with a weight, and how its result is applied to x.
OF_A_WEIGHT = {
    "divided by its maximum": (lambda w: w / jnp.max(jnp.abs(w)), lambda x, w: x @ w),
    "fake-quantized by units": (_quantized, lambda x, w: x @ w),
    "one sign and one scale": (lambda w: jnp.sign(w) * jnp.mean(jnp.abs(w)), lambda x, w: x @ w),
    "rounded to 8 bits": (lambda w: w.astype(jnp.float8_e4m3fn).astype(w.dtype), lambda x, w: x @ w),
    "transposed": (lambda w: w.T, lambda x, w: x @ w.T),
    "reshaped": (lambda w: w.reshape(4, 2, 3), lambda x, w: jnp.einsum("bi,ihd->bhd", x, w)),
    "passed on": (lambda w: w, lambda x, w: x @ w),
    "two results": (lambda w: (jnp.abs(w), jnp.sign(w)), lambda x, w: x @ (w[0] * w[1])),
    "one result twice": (lambda w: (2 * w, 2 * w), lambda x, w: x @ (w[0] + w[1])),
    "a result unused": (lambda w: (w.T, jnp.max(w)), lambda x, w: x @ w[0].T),
}


def _sites(function, w=W):
    """What is found of `w` in `function(w, x)`."""
    program = graph.flatten(jax.make_jaxpr(function)(w, X))
    found = graph.build(program, [graph.Leaf("w", w.shape, w.dtype)], batch=program.inputs[1:])
    return [
        (site.kind, site.unit_axes, site.input_axes, site.activation.nonlinearity, site.activation.pre_dims)
        for site in found.sites
    ]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["jvp", "vjp", "nested"])
@pytest.mark.parametrize(("of_weight", "apply"), OF_A_WEIGHT.values(), ids=OF_A_WEIGHT)
def test_a_weight_keeps_its_activations_in_a_custom_derivative(of_weight, apply, wrap):
    wrapped = wrap(of_weight)
    found = _sites(lambda w, x: nn.relu(apply(x, wrapped(w))))
    assert found == _sites(lambda w, x: nn.relu(apply(x, of_weight(w))))
    assert [(kind, units, name) for kind, units, _, name, _ in found] == [("dense", {1}, "relu")]


# Of a layer's output.
OF_DATA = {
    "a nonlinearity": (nn.softplus, "softplus"),
    "a nonlinearity and moves": (lambda h: nn.silu(h.reshape(8, 2, 3)).transpose(1, 2, 0), "silu"),
    "moves in front of a nonlinearity": (lambda h: nn.relu(h.reshape(8, 2, 3)), "relu"),
    "a scale for each unit": (lambda h: jnp.tanh(h * jnp.arange(1.0, 7.0)[None]), "tanh"),
    "BatchNorm": (lambda h: nn.relu(h - h.mean(0, keepdims=True)), "relu"),
    "a normalization": (lambda h: nn.relu(h / jnp.linalg.norm(h, axis=1, keepdims=True)), "identity"),
    "a split": (lambda h: nn.silu(h[:, :3]) * h[:, 3:], "silu/identity"),
}


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["jvp", "vjp", "nested"])
@pytest.mark.parametrize(("function", "expected"), OF_DATA.values(), ids=OF_DATA)
def test_a_nonlinearity_is_found_in_a_custom_derivative(function, expected, wrap):
    found = _sites(lambda w, x: wrap(function)(x @ w))
    assert [site[3] for site in found] == [expected]


def test_axes_are_followed_through_a_custom_derivative_in_a_scan():
    stack = normal(3, 4, 4)
    quantize = _straight_through(_quantized)

    def function(w, x):
        return jax.lax.scan(lambda x, w: (nn.relu(x @ quantize(w)), None), x, w)[0]

    assert [site[1:4] for site in _sites(function, stack)] == [({2}, {1}, "relu")]


# --- The rule is kept when the program is run ---------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (4, 4)], ids=["a function", "the identity"])
def test_a_program_has_the_gradients_of_its_rules(shape):
    # The identity passes its operand on: its rule, a gradient reversed, must not get lost.
    quantize = _straight_through(_quantized)
    reverse = jax.custom_vjp(lambda w: w)
    reverse.defvjp(lambda w: (w, None), lambda _, gradient: (-gradient,))
    double = jax.custom_vjp(lambda x, w: x @ w)
    double.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda saved, gradient: (gradient @ saved[1].T, 2 * saved[0].T @ gradient),
    )

    def loss(w):
        chosen = quantize(w) if shape == (4, 6) else reverse(w)
        return jnp.sum(jnp.tanh(double(X, chosen)) ** 2)

    w = normal(*shape, seed=1)
    program = graph.flatten(jax.make_jaxpr(loss)(w))
    hooks = graph.Hooks({program.operations[-1].outputs[0]: lambda array: array})

    def run(w):
        return graph.evaluate(program, [w], hooks)[0][0]

    value, gradient = jax.value_and_grad(run)(w)
    expected_value, expected = jax.value_and_grad(loss)(w)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_an_observer_may_look_inside_a_custom_derivative():
    function = _custom_vjp(lambda x: jnp.tanh(2 * x) + 1)
    program = graph.flatten(jax.make_jaxpr(function)(X))
    assert [operation.name for operation in program.operations] == ["mul", "tanh", "add"]
    inside = program.operations[1].outputs[0]
    for value, expected in ((inside, np.tanh(2 * X)), (program.outputs[0], np.tanh(2 * X) + 1)):
        (output,), observed = graph.evaluate(program, [X], graph.Hooks({value: lambda array: array}))
        np.testing.assert_allclose(output, np.tanh(2 * X) + 1, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(observed[value], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", ["weight", "product"])
def test_gradients_of_examples_follow_the_rule_of_a_custom_derivative(where):
    """Taken one by one by `jax.grad`: the rule trebles the gradient, which taps of the product do not see."""

    def trebled(function):
        wrapped = jax.custom_vjp(function)
        wrapped.defvjp(
            lambda *x: jax.vjp(function, *x),
            lambda pull, gradient: tuple(3 * part for part in pull(gradient)),
        )
        return wrapped

    of_weight = trebled(lambda w: w.T)
    product = trebled(lambda x, w: x @ w)

    def apply(p, x):
        return jnp.tanh(x @ of_weight(p["w"]).T if where == "weight" else product(x, p["w"]))

    def losses(outputs, targets):
        return jnp.sum((outputs - targets) ** 2, -1)

    targets = normal(8, 6, seed=3)
    statistics = jaxeff.collect({"w": W}, apply, X, criterion="fisher", loss_fn=losses, targets=targets)
    each = [
        jax.grad(lambda p, i=i: losses(apply(p, X[i : i + 1]), targets[i : i + 1])[0])({"w": W})["w"]
        for i in range(len(X))
    ]
    found = statistics.derivatives["w"].example_gradient.mean_square
    np.testing.assert_allclose(found, np.mean(np.square(each), 0), rtol=1e-4)


# --- Flax's FP8 operations ----------------------------------------------------------------------------

FP8 = [
    getattr(fp8_ops, name)
    for name in ("Fp8DirectDotGeneralOp", "Fp8DotGeneral", "NANOOFp8DotGeneralOp")
    if hasattr(fp8_ops, name)
]


class Einsum(nn.Module):
    """A product by Flax's FP8 einsum."""

    @nn.compact
    def __call__(self, x, kernel, numbers, precision=None, preferred_element_type=None):
        return fp8_ops.Fp8Einsum()("bi,io->bo", x, kernel)


if hasattr(fp8_ops, "Fp8Einsum"):
    FP8.append(Einsum)


class Dense(nn.Module):
    product: type[nn.Module] | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, dot_general_cls=self.product)(x))
        return nn.Dense(3, dot_general_cls=self.product)(x)


@pytest.mark.parametrize("product", FP8)
def test_weights_keep_their_activations_in_fp8(product):
    variables = Dense(product).init(jax.random.key(0), X)
    found = jaxeff.collect(variables, Dense(product).apply, X)
    plain = jaxeff.collect({"params": variables["params"]}, Dense().apply, X)
    assert [(s.path, s.kind, s.unit_axes, s.nonlinearity) for s in found.sites] == [
        ("Dense_0/kernel", "dense", (1,), "relu"),
        ("Dense_1/kernel", "dense", (1,), "identity"),
    ]
    assert all(place.reason is None for place in found.params)
    for ours, theirs in zip(found.sites, plain.sites, strict=True):
        # Three bits of mantissa round by up to 2^-4, inputs and weights alike.
        np.testing.assert_allclose(ours.post.absolute_sum, theirs.post.absolute_sum, rtol=0.15, atol=0.3)
