"""How evenly importance is spread over the weights of one layer: an array in, numbers out.

    summarize(x)             every metric at once
    gini(x), entropy(x) ...  one of them

Every function flattens a non-negative array of importances x, of any shape and real dtype, and gives a
scalar. Definitions and conventions are those of `jaxeff.exact`, which sorts; `summarize` may count bit
patterns instead (`jaxeff.sketch`). All of it runs under `jit`, `vmap`, `grad` and `scan`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxeff import exact, sketch
from jaxeff.exact import Metrics as Metrics
from jaxeff.exact import coverage as coverage
from jaxeff.exact import effective_params as effective_params
from jaxeff.exact import entropy as entropy
from jaxeff.exact import gini as gini
from jaxeff.exact import normalized_entropy as normalized_entropy
from jaxeff.exact import redundancy as redundancy
from jaxeff.exact import relative_sparsity as relative_sparsity
from jaxeff.exact import sparsity as sparsity
from jaxeff.exact import utilization as utilization
from jaxeff.leaves import saved_by_flax

# Here, since `exact` and `sketch` know nothing of Flax.
_SAVED = saved_by_flax(Metrics), saved_by_flax(sketch.Sketch)

_SKETCHED = 1 << 22
"""From so many weights on a sketch on a CPU makes up for compiling it, in one call."""


def summarize(x: ArrayLike, *, method: str | None = None) -> Metrics:
    """All metrics of x [...] at once.

    Args:
        x: importances, non-negative.
        method: 'exact' sorts: 100 ns a weight on a CPU, to 1e-6 relative. 'sketch' counts bit patterns: 2 to
            5 ns a weight, to the bounds that `jaxeff.sketch.summarize_array` certifies, 3e-6 from 10^5
            weights on; it takes x as float32. Without one, 'sketch' for 4 million weights and more of at most
            32 bits on a CPU, else 'exact'. Derivatives are those of 'exact', whichever it is.

    Raises:
        ValueError: x is empty, or `method` is no method.
        TypeError: x is an array of booleans or complex numbers.

    >>> summarize(jnp.array([4.0, 3.0, 2.0, 1.0])).coverage_90
    Array(0.75, dtype=float32)
    """
    if method not in (None, "exact", "sketch"):
        raise ValueError(f"`method` must be 'exact', 'sketch' or None, got {method!r}")
    if (method or _method(x)) == "exact":
        return exact.summarize(x)
    return _sketched(x)


def _method(x: ArrayLike) -> str:
    # What is no array at all is for the exact form to refuse.
    large = getattr(x, "size", 0) >= _SKETCHED and getattr(x, "dtype", None) != jnp.float64
    return "sketch" if large and jax.default_backend() == "cpu" else "exact"


@jax.custom_jvp
def _sketched(x: ArrayLike) -> Metrics:
    return sketch.summarize_array(x)[0]


@_sketched.defjvp
def _(primals: tuple[ArrayLike], tangents: tuple[ArrayLike]) -> tuple[Metrics, Metrics]:
    return jax.jvp(exact.summarize, primals, tangents)
