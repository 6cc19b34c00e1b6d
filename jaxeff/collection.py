"""params, apply_fn, batch -> Statistics. Imports `models`, `observation`, `statistics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxeff import leaves, models
from jaxeff.observation import observe
from jaxeff.statistics import Statistics


def collect(
    params: Any, apply_fn: Callable, batch: Any, *, rngs: Any = None, **apply_kwargs: Any
) -> Statistics:
    """Run the model once and sum what its units emit.

    Args:
        params: the variables dict, its `params` collection, or what `jaxeff.from_nnx` gives.
        apply_fn: a Linen `apply`, `TrainState.apply_fn`, what `jaxeff.from_nnx` gives, or
            `f(params, *batch)`.
        batch: the model's input; a tuple is several positional inputs.
        rngs: passed to `apply_fn` as `rngs`, for dropout.
        **apply_kwargs: passed to `apply_fn`; arrays among them may change without recompiling.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or `apply_fn` does not accept them.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Dense(2, use_bias=False)
    >>> params = {"params": {"kernel": jnp.array([[1.0, -1.0]])}}
    >>> (site,) = collect(params, model.apply, jnp.array([[2.0], [4.0]])).sites
    >>> site.post.mean_absolute
    Array([[3., 3.]], dtype=float32)
    """
    named = leaves.named_leaves(leaves.split_variables(params)[0])
    model = models.from_apply(params, apply_fn, batch, rngs, apply_kwargs)
    return observe(model.function, tuple(named), model.origins, model.batch_size, model.params, model.inputs)
