"""The fixtures themselves: a counter that cannot count would let every other test pass."""

import jax
import jax.numpy as jnp


def test_a_new_function_compiles_once_and_not_again(compilations):
    x = jnp.arange(7.0)
    double = jax.jit(lambda x: 2.0 * x)
    with compilations() as first:
        double(x)
    with compilations() as again:
        double(x)
    assert (first.count, again.count) == (1, 0)


def test_counters_nest(compilations):
    x = jnp.arange(7.0)
    with compilations() as outer:
        jax.jit(lambda x: x - 3.0)(x)
        with compilations() as inner:
            jax.jit(lambda x: x - 4.0)(x)
    assert (outer.count, inner.count) == (2, 1)


def test_x64_gives_float64(x64):
    assert jnp.ones(1).dtype == jnp.float64
