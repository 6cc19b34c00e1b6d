"""Experts behind a router go as if it never chose them: the smaller model is the large one with their logits at -inf."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import prune

TOKENS, WIDTH, HIDDEN, EXPERTS, BLOCKS = 10, 4, 6, 5, 3


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def weights(*stacked, seed=0):
    """Of experts, with blocks or without."""
    return {
        "router": normal(*stacked, WIDTH, EXPERTS, seed=seed),
        "up": normal(*stacked, EXPERTS, WIDTH, HIDDEN, seed=seed + 1),
        "down": normal(*stacked, EXPERTS, HIDDEN, WIDTH, seed=seed + 2),
    }


def logits_of(w, x, unchosen=None):
    """The router's logits, of which those of some experts, [experts], are -inf."""
    logits = x @ w["router"]
    return logits if unchosen is None else jnp.where(unchosen[None], -jnp.inf, logits)


def outputs_of(w, x):
    """[experts, tokens, width]."""
    return jnp.einsum("etf,efd->etd", jax.nn.gelu(jnp.einsum("td,edf->etf", x, w["up"])), w["down"])


# --- Ways of routing: each adapts to the shapes of its weights. ------------------------------------------


def dense(w, x, unchosen=None):
    gates = jax.nn.softmax(logits_of(w, x, unchosen))
    hidden = nn.relu(jnp.einsum("td,edf->tef", x, w["up"]))
    return jnp.einsum("tef,efd,te->td", hidden, w["down"], gates)


def summed(w, x, unchosen=None):
    """The outputs times their gates, and then a sum."""
    gates = jax.nn.softmax(logits_of(w, x, unchosen))
    return (gates.T[..., None] * outputs_of(w, x)).sum(0)


def sigmoids(w, x, unchosen=None):
    gates = jax.nn.sigmoid(logits_of(w, x, unchosen))
    gates = gates / gates.sum(-1, keepdims=True)
    return jnp.einsum("te,etd->td", gates, outputs_of(w, x))


def top_k(w, x, unchosen=None):
    """Softmax over the two largest logits, as in Mixtral."""
    best, chosen = jax.lax.top_k(logits_of(w, x, unchosen), 2)
    one_hot = jax.nn.one_hot(chosen, w["router"].shape[-1])
    gates = jnp.einsum("tk,tke->te", jax.nn.softmax(best), one_hot)
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


def top_k_of_softmax(w, x, unchosen=None):
    """The two largest probabilities, scaled to a sum of 1."""
    probabilities = jax.nn.softmax(logits_of(w, x, unchosen))
    _, chosen = jax.lax.top_k(probabilities, 2)
    best = jnp.take_along_axis(probabilities, chosen, axis=-1)
    best = best / best.sum(-1, keepdims=True)
    gates = (best[..., None] * jax.nn.one_hot(chosen, w["router"].shape[-1])).sum(-2)
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


def scattered(w, x, unchosen=None):
    best, chosen = jax.lax.top_k(logits_of(w, x, unchosen), 2)
    rows = jnp.arange(len(x))[:, None]
    gates = jnp.zeros((len(x), w["router"].shape[-1])).at[rows, chosen].set(jax.nn.softmax(best))
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


def dispatched(w, x, unchosen=None, capacity=3):
    """One expert for each token, at most `capacity` tokens for each, as in Switch; the others pass."""
    gates = jax.nn.softmax(logits_of(w, x, unchosen))
    chosen = jax.nn.one_hot(jnp.argmax(gates, -1), gates.shape[-1])
    place = (jnp.cumsum(chosen, axis=0) * chosen - 1).astype(jnp.int32)
    dispatch = chosen[..., None] * jax.nn.one_hot(place, capacity)
    combine = dispatch * gates[..., None]
    inside = jnp.einsum("tec,td->ecd", dispatch, x)
    outside = jnp.einsum("ecf,efd->ecd", nn.relu(jnp.einsum("ecd,edf->ecf", inside, w["up"])), w["down"])
    return jnp.einsum("tec,ecd->td", combine, outside)


def corrected(w, x, unchosen=None):
    """Sigmoid scores, chosen by their sum with a bias, as in DeepSeek-V3."""
    scores = jax.nn.sigmoid(logits_of(w, x, unchosen))
    bias = w["bias"] if unchosen is None else jnp.where(unchosen, -jnp.inf, w["bias"])
    _, chosen = jax.lax.top_k(scores + bias[None], 2)
    best = jnp.take_along_axis(scores, chosen, axis=-1)
    gates = jnp.einsum("tk,tke->te", best, jax.nn.one_hot(chosen, scores.shape[-1]))
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


WAYS = {way.__name__: way for way in (dense, summed, sigmoids, top_k, top_k_of_softmax, scattered, dispatched)}
LEAST = {"top_k": 2, "top_k_of_softmax": 2, "scattered": 2, "corrected": 2}


def params_of(way):
    return {**weights(), **({"bias": normal(EXPERTS, seed=7)} if way is corrected else {})}


def experts_of(groups):
    (group,) = (group for group in groups.unlocked if group.kind == "expert")
    return group


WAY = pytest.mark.parametrize("way", [*WAYS.values(), corrected], ids=lambda way: way.__name__)


@WAY
@pytest.mark.parametrize("gone", [[1], [0, 3], [0, 1, 4]])
def test_the_smaller_model_is_the_one_that_never_chooses_them(way, gone):
    params, x = params_of(way), normal(TOKENS, WIDTH, seed=9)
    groups = prune.groups(params, way, x)
    group = experts_of(groups)
    assert group.routed == LEAST.get(way.__name__, 1)
    plan = prune.Plan.of(groups, {group.name: gone})
    assert {path: width for path, width in plan.widths().items()}["up"][0] == EXPERTS - len(gone)
    unchosen = np.isin(np.arange(EXPERTS), gone)
    expected = way(params, x, unchosen)
    np.testing.assert_allclose(way(prune.shrink(params, plan), x), expected, rtol=1e-5, atol=1e-5)
    small, small_apply = prune.compact(params, way, x, plan)
    np.testing.assert_allclose(small_apply(small, x), expected, rtol=1e-5, atol=1e-5)
