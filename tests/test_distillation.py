"""The distillation loss: against NumPy in float64, its gradient, and what a student learns by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import normal

import jaxeff
from jaxeff import prune

STUDENT, TEACHER = (3 * normal(4, 5, 7, seed=seed) for seed in (1, 2))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_scaled_divergence(temperature):
    p, q = (softmax(np.float64(each) / temperature) for each in (TEACHER, STUDENT))
    expected = temperature**2 * np.sum(p * np.log(p / q), -1)
    found = prune.distillation(STUDENT, TEACHER, temperature)
    assert found.shape == (4, 5)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_the_difference_of_the_predictions_times_the_temperature(temperature):
    def loss(logits, teacher):
        return jnp.sum(prune.distillation(logits, teacher, temperature))

    student, teacher = jax.grad(loss, (0, 1))(jnp.asarray(STUDENT), jnp.asarray(TEACHER))
    p, q = (softmax(np.float64(each) / temperature) for each in (TEACHER, STUDENT))
    np.testing.assert_allclose(student, temperature * (q - p), rtol=1e-4, atol=1e-5)
    assert not teacher.any()


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    def loss(logits):
        return jnp.sum(prune.distillation(logits, TEACHER, 3.0))

    # Logits are known up to a number that all classes share.
    np.testing.assert_allclose(loss(TEACHER + 5), 0, atol=1e-4)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(TEACHER)), 0, atol=1e-6)


def test_classes_that_are_ruled_out_and_low_precision():
    teacher, student = (jnp.asarray([[1.0, 2.0, -jnp.inf]]) * scale for scale in (1, 2))
    loss, gradient = jax.value_and_grad(lambda x: prune.distillation(x, teacher).sum())(student)
    whole = prune.distillation(student[:, :2], teacher[:, :2])
    np.testing.assert_allclose(loss, whole.sum(), rtol=1e-6)
    assert np.isfinite(gradient).all()
    small = prune.distillation(jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16))
    assert small.dtype == jnp.float32


def test_a_pruned_network_trained_on_the_dense_one_agrees_with_it_again():
    x, params = normal(64, 6), {"up": normal(6, 16, seed=1), "down": normal(16, 5, seed=2)}

    def model(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    teacher = model(params, x)
    masks = prune.masks(prune.scored(params), 0.5)
    optimizer = prune.sparsify(optax.adam(1e-2), masks=masks)

    def loss(params):
        return jnp.mean(prune.distillation(model(params, x), teacher))

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    pruned = prune.apply(params, masks)
    (found, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 200))(
        (pruned, optimizer.init(pruned))
    )
    assert losses[-1] < losses[0] / 4
    assert all(
        (leaf[~mask] == 0).all() for leaf, mask in zip(*map(jax.tree.leaves, (found, masks)), strict=True)
    )


def test_it_is_a_loss_of_outputs_and_targets():
    x, params = normal(8, 6), {"w": normal(6, 5, seed=1)}

    def model(params, x):
        return x @ params["w"]

    loss_fn = functools.partial(prune.distillation, temperature=1.0)
    statistics = jaxeff.collect(
        params, model, x, criterion="gradient", loss_fn=loss_fn, targets=model({"w": params["w"] * 2}, x)
    )
    expected = jax.grad(lambda p: loss_fn(model(p, x), 2 * model(params, x)).mean())(params)["w"]
    np.testing.assert_allclose(
        statistics.derivatives["w"].gradient.mean_absolute, np.abs(expected), rtol=1e-4, atol=1e-6
    )


def test_the_temperature_may_be_traced():
    found = jax.jit(prune.distillation)(STUDENT, TEACHER, 3.0)
    np.testing.assert_allclose(found, prune.distillation(STUDENT, TEACHER, 3.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("one shape", (STUDENT, TEACHER[:1])),
        ("one shape", (1.0, 1.0)),
        ("`temperature` must be positive", (STUDENT, TEACHER, 0.0)),
    ],
)
def test_what_is_refused(message, arguments):
    with pytest.raises(ValueError, match=message):
        _ = prune.distillation(*arguments)
