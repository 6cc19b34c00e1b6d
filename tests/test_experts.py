"""Experts behind a router: the smaller model is the large one with the logits of what was removed at -inf."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxeff
from jaxeff import prune

TOKENS, WIDTH, HIDDEN, EXPERTS, BLOCKS = 10, 4, 6, 5, 3


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32) / 2


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
    return (
        logits if unchosen is None else jnp.where(jnp.broadcast_to(unchosen, logits.shape), -jnp.inf, logits)
    )


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
    gates = jax.nn.sigmoid(logits_of(w, x, unchosen) / 0.5)
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


def with_capacity(w, x, unchosen=None, capacity=4):
    """Two experts for each token of a sequence, as MaxText dispatches them."""
    x = x.reshape(2, -1, WIDTH)
    logits = logits_of(w, x, unchosen)
    experts = logits.shape[-1]
    best, chosen = jax.lax.top_k(logits, 2)
    places = jnp.arange(len(x))[:, None, None], jnp.arange(x.shape[1])[:, None], chosen
    gates = jnp.zeros(logits.shape).at[places].set(jax.nn.softmax(best))
    mask = jax.nn.one_hot(chosen, experts, dtype=jnp.int32)
    fused = mask.reshape(len(x), -1, experts)
    count = jnp.cumsum(fused, axis=1)
    within = jnp.sum(mask * (count.reshape(mask.shape) <= capacity), axis=2)
    place = jnp.sum((fused * count).reshape(mask.shape), axis=2) * within
    combine = (gates * within)[..., None] * jax.nn.one_hot(place, capacity + 1, dtype=jnp.int32)
    combine = combine[..., 1:]
    inside = jnp.einsum("bsd,bsec->ebcd", x, combine.astype(bool))
    hidden = nn.silu(jnp.einsum("ebcd,edf->ebcf", inside, w["up"]))
    outside = jnp.einsum("ebcf,efd->ebcd", hidden, w["down"])
    return jnp.einsum("ebcd,bsec->bsd", outside, combine).reshape(-1, WIDTH)


def token_by_token(w, x, unchosen=None):
    """A function of one token, mapped."""

    def one(x):
        logits = logits_of(w, x, unchosen)
        best, chosen = jax.lax.top_k(logits, 2)
        gates = jax.nn.one_hot(chosen, len(logits)).T @ jax.nn.softmax(best)
        return gates @ jax.vmap(lambda up, down: jax.nn.gelu(x @ up) @ down)(w["up"], w["down"])

    return jax.vmap(one)(x)


def second_choice(w, x, unchosen=None):
    """The largest probability, and then the largest of the others, as in GShard."""
    gates = jax.nn.softmax(logits_of(w, x, unchosen))
    first = jax.nn.one_hot(jnp.argmax(gates, -1), gates.shape[-1])
    second = jax.nn.one_hot(jnp.argmax(gates * (1 - first), -1), gates.shape[-1])
    gates = gates * (first + second)
    return jnp.einsum("te,etd->td", gates / gates.sum(-1, keepdims=True), outputs_of(w, x))


def second_choice_by_where(w, x, unchosen=None):
    gates = jax.nn.softmax(logits_of(w, x, unchosen))
    first = jax.nn.one_hot(jnp.argmax(gates, -1), gates.shape[-1], dtype=bool)
    second = jax.nn.one_hot(jnp.argmax(jnp.where(first, -jnp.inf, gates), -1), gates.shape[-1], dtype=bool)
    gates = jnp.where(first | second, gates, 0)
    return jnp.einsum("te,etd->td", gates / gates.sum(-1, keepdims=True), outputs_of(w, x))


def corrected(w, x, unchosen=None):
    """Sigmoid scores, chosen by their sum with a bias, as in DeepSeek-V3."""
    scores = jax.nn.sigmoid(logits_of(w, x, unchosen))
    bias = w["bias"] if unchosen is None else jnp.where(unchosen, -jnp.inf, w["bias"])
    _, chosen = jax.lax.top_k(scores + bias[None], 2)
    best = jnp.take_along_axis(scores, chosen, axis=-1)
    gates = jnp.einsum("tk,tke->te", best, jax.nn.one_hot(chosen, scores.shape[-1]))
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


WAYS = {
    way.__name__: way
    for way in (
        dense, summed, sigmoids, top_k, top_k_of_softmax, scattered, dispatched, second_choice, second_choice_by_where,
        with_capacity, token_by_token,
    )
}  # fmt: skip
OF_ONE = (dense, summed, sigmoids, dispatched)


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
    assert group.routed == (1 if way in OF_ONE else 2)
    plan = prune.Plan.of(groups, {group.name: gone})
    assert {path: width for path, width in plan.widths().items()}["up"][0] == EXPERTS - len(gone)
    unchosen = np.isin(np.arange(EXPERTS), gone)
    expected = way(params, x, unchosen)
    np.testing.assert_allclose(way(prune.shrink(params, plan), x), expected, rtol=1e-5, atol=1e-5)
    small, small_apply = prune.compact(params, way, x, plan)
    np.testing.assert_allclose(small_apply(small, x), expected, rtol=1e-5, atol=1e-5)


def in_blocks(way):
    """The same with weights of all blocks stacked, which a scan goes through."""

    def model(params, x, unchosen=None):
        def block(h, w):
            w, unchosen = w
            return h + way(w, h, unchosen), None

        return jax.lax.scan(block, x, (params, unchosen))[0]

    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", [dense, top_k, dispatched], ids=lambda way: way.__name__)
def test_each_block_loses_experts_and_units_of_its_own(way, seed):
    params, x, model = weights(BLOCKS), normal(TOKENS, WIDTH, seed=9), in_blocks(way)
    groups = prune.groups(params, model, x)
    group = experts_of(groups)
    assert group.blocks == (BLOCKS,)
    draw, removed = np.random.default_rng(seed), {}
    for each in groups.unlocked:
        if each.kind in ("expert", "unit"):
            every = np.broadcast_to(np.arange(each.size), (*each.blocks, each.size))
            removed[each.name] = draw.permuted(every, axis=-1)[..., :2]
    assert len(removed) == 2
    plan = prune.Plan.from_json(prune.Plan.of(groups, removed).to_json())
    unchosen = (removed.pop(group.name)[..., None] == np.arange(EXPERTS)).any(axis=1)
    masks = prune.Plan.of(groups, removed).masks(params)
    expected = model(prune.apply(params, masks), x, unchosen)
    np.testing.assert_allclose(model(prune.shrink(params, plan), x), expected, rtol=1e-5, atol=1e-5)
    small, small_apply = prune.compact(params, model, x, plan)
    np.testing.assert_allclose(small_apply(small, x), expected, rtol=1e-5, atol=1e-5)


class Mixture(nn.Module):
    """Between two dense layers, with a router that has a bias; sizes are written into the code."""

    experts: int = EXPERTS

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(WIDTH, name="embed")(x))
        logits = nn.Dense(self.experts, name="router")(x)
        best, chosen = jax.lax.top_k(30 * jnp.tanh(logits / 30), 2)
        gates = jnp.einsum("tk,tke->te", nn.softmax(best), jax.nn.one_hot(chosen, self.experts))
        up = self.param("up", nn.initializers.lecun_normal(), (self.experts, WIDTH, HIDDEN))
        bias = self.param("bias", nn.initializers.normal(1.0), (self.experts, WIDTH))
        down = self.param("down", nn.initializers.lecun_normal(), (self.experts, HIDDEN, WIDTH))
        hidden = nn.silu(jnp.einsum("td,edf->tef", x, up))
        outputs = jnp.einsum("tef,efd->ted", hidden, down) + bias[None]
        return nn.Dense(3, name="head")(jnp.einsum("ted,te->td", outputs, gates))


def test_a_module_is_rebuilt_with_fewer_experts_and_compacted_without():
    model, x = Mixture(), normal(TOKENS, WIDTH, seed=9)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * normal(*leaf.shape), model.init(jax.random.key(0), x))
    groups = prune.groups(variables, model.apply, x)
    group = experts_of(groups)
    assert {member.name for member in group.members} == {
        "router/kernel:1", "router/bias:0", "up:0", "bias:0", "down:0"
    }  # fmt: skip
    plan = prune.Plan.of(groups, {group.name: [1, 2]})
    # With this bias, tanh does not keep a logit from being the lowest by far.
    barred = variables["params"]["router"]["bias"].at[jnp.array([1, 2])].set(-1e9)
    params = {**variables["params"], "router": {**variables["params"]["router"], "bias": barred}}
    expected = model.apply({"params": params}, x)
    rebuilt = Mixture(EXPERTS - 2).apply(prune.shrink(variables, plan), x)
    np.testing.assert_allclose(rebuilt, expected, rtol=1e-5, atol=1e-5)
    small, small_apply = prune.compact(variables, model.apply, x, plan)
    np.testing.assert_allclose(small_apply(small, x), expected, rtol=1e-5, atol=1e-5)


@jax.custom_jvp
def softmax(x):
    return jax.nn.softmax(x)


@softmax.defjvp
def _(primals, tangents):
    y = softmax(*primals)
    return y, y * (tangents[0] - jnp.sum(y * tangents[0], -1, keepdims=True))


@jax.custom_vjp
def pulled_softmax(x):
    return jax.nn.softmax(x)


def _forward(x):
    return (y := jax.nn.softmax(x)), y


pulled_softmax.defvjp(_forward, lambda y, pulled: (y * (pulled - jnp.sum(y * pulled, -1, keepdims=True)),))


def pulled(w, x, unchosen=None):
    return jnp.einsum("te,etd->td", pulled_softmax(logits_of(w, x, unchosen)), outputs_of(w, x))


def own_derivative(w, x, unchosen=None):
    return jnp.einsum("te,etd->td", softmax(logits_of(w, x, unchosen)), outputs_of(w, x))


@pytest.mark.parametrize(
    "way",
    [top_k, top_k_of_softmax, dispatched, own_derivative, pulled, jax.checkpoint(dense)],
    ids=lambda way: way.__name__,
)
def test_the_compacted_model_trains_as_the_rebuilt_one(way):
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    groups = prune.groups(params, way, x)
    plan = prune.Plan.of(groups, {experts_of(groups).name: [0, 2]})
    small, small_apply = prune.compact(params, way, x, plan)

    def gradient(apply_fn):
        return jax.jit(jax.grad(lambda params: jnp.mean(apply_fn(params, x) ** 2)))(small)

    expected = gradient(way)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradient(small_apply), expected
    )


# --- What stays locked -----------------------------------------------------------------------------------


def no_experts(w, x):
    """A softmax over units, of which no others are stacked along it."""
    return jax.nn.softmax(x @ w["router"]) @ w["down"][:, 0]


def chosen_by_their_outputs(w, x):
    outputs = outputs_of(w, x)
    best, chosen = jax.lax.top_k(jnp.linalg.norm(outputs, axis=-1).T, 2)
    gates = jnp.einsum("tk,tke->te", best, jax.nn.one_hot(chosen, EXPERTS))
    return jnp.einsum("etd,te->td", outputs, gates)


def never_zero(w, x):
    return jnp.einsum("te,etd->td", 1 + jax.nn.softmax(x @ w["router"]), outputs_of(w, x))


def never_zero_of_relu(w, x):
    hidden = nn.relu(jnp.einsum("td,edf->tef", x, w["up"]))
    return jnp.einsum("tef,efd,te->td", hidden, w["down"], 1 + jax.nn.softmax(x @ w["router"]))


def added_where_it_was_chosen(w, x):
    """Each expert takes two tokens, and what it makes of them is written over theirs."""
    _, tokens = jax.lax.top_k(jax.nn.softmax(x @ w["router"]).T, 2)
    hidden = nn.relu(jnp.einsum("ekd,edf->ekf", x[tokens], w["up"]))
    return x.at[tokens].set(jnp.einsum("ekf,efd->ekd", hidden, w["down"]))


def norm_over_experts(w, x):
    outputs = outputs_of(w, x)
    outputs = outputs / jnp.linalg.norm(outputs, axis=0, keepdims=True)
    return jnp.einsum("te,etd->td", jax.nn.softmax(x @ w["router"]), outputs)


def number_of_the_chosen(w, x):
    best, chosen = jax.lax.top_k(x @ w["router"], 2)
    gates = jnp.einsum("tk,tke->te", best * chosen, jax.nn.one_hot(chosen, w["router"].shape[-1]))
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


def chosen_returned(w, x):
    return top_k(w, x), jax.lax.top_k(x @ w["router"], 2)[1]


def chosen_and_the_next(w, x):
    """The probability of the chosen expert and that of its neighbor."""
    probabilities = jax.nn.softmax(x @ w["router"])
    chosen = jnp.argmax(probabilities, -1)
    both = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (2,)))(probabilities, chosen)
    gates = both.sum(-1, keepdims=True) * jax.nn.one_hot(chosen, w["router"].shape[-1])
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


def number_as_a_bool(w, x):
    """The first expert, or else the second."""
    probabilities = jax.nn.softmax(x @ w["router"])
    chosen = jax.lax.convert_element_type(jnp.argmax(probabilities, -1), bool).astype(jnp.int32)
    gates = probabilities * jax.nn.one_hot(chosen, w["router"].shape[-1])
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


def bias_by_number(w, x):
    numbers = jnp.arange(w["router"].shape[-1], dtype=jnp.float32)
    return jnp.einsum("te,etd->td", jax.nn.softmax(x @ w["router"] + numbers[None]), outputs_of(w, x))


def smallest(w, x):
    """The experts with the lowest logits."""
    best, chosen = jax.lax.top_k(-jax.nn.softmax(x @ w["router"]), 2)
    gates = jnp.einsum("tk,tke->te", best, jax.nn.one_hot(chosen, w["router"].shape[-1]))
    return jnp.einsum("etd,te->td", outputs_of(w, x), gates)


def turned(w, x):
    """The lower the logit, the larger the gate."""
    return jnp.einsum("te,etd->td", jax.nn.sigmoid(-2.0 * (x @ w["router"])), outputs_of(w, x))


def noisy(w, x):
    logits = x @ w["router"] + jax.random.normal(jax.random.key(0), (len(x), w["router"].shape[-1]))
    return jnp.einsum("te,etd->td", jax.nn.softmax(logits), outputs_of(w, x))


def sorted_tokens(w, x):
    """One expert for each token, and products of ragged groups of tokens."""
    chosen = jnp.argmax(x @ w["router"], -1)
    order = jnp.argsort(chosen)
    counts = jnp.bincount(chosen, length=w["router"].shape[-1])
    hidden = nn.relu(jax.lax.ragged_dot(x[order], w["up"], counts))
    return jax.lax.ragged_dot(hidden, w["down"], counts)[jnp.argsort(order)]


LOCKED = {
    no_experts: "reduce_max over it",
    chosen_by_their_outputs: "top_k along it",
    never_zero: "neither side is 0",
    never_zero_of_relu: "neither side is 0",
    added_where_it_was_chosen: "written to by a scatter",
    norm_over_experts: "reduce_sum over it",
    number_of_the_chosen: "numbered by its position",
    chosen_returned: "output of the model",
    bias_by_number: "numbered by its position",
    chosen_and_the_next: "looked up by a gather",
    number_as_a_bool: "numbered by its position",
    smallest: "top_k along it",
    turned: "neither side is 0",
    noisy: "random numbers",
    sorted_tokens: "",
}


@pytest.mark.parametrize("model", LOCKED, ids=lambda model: model.__name__)
def test_what_the_router_does_besides_keeps_its_experts(model):
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    groups = prune.groups(params, model, x)
    holding = [
        group for group in groups if any(one.path == "down" and one.axis == 0 for one in group.members)
    ]
    assert all(group.locked and LOCKED[model] in group.locked for group in holding), groups
    with pytest.raises(ValueError, match="no experts that a router chooses among"):
        prune.expert_importance(params, model, x)


def test_as_many_stay_as_the_router_chooses():
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    groups = prune.groups(params, top_k, x)
    name = experts_of(groups).name
    scores = jax.tree.map(jnp.abs, params)
    with pytest.raises(ValueError, match="1 experts of .* would be left, and the router chooses 2"):
        prune.Plan.of(groups, {name: [0, 1, 2, 3]})
    plan = prune.plan(groups, scores, 0.9, kinds="expert")
    assert plan.sizes() == {name: 2}
    edited = plan.to_json().replace(
        f'"removed": {{"{name}": {list(plan.removed[name])}', f'"removed": {{"{name}": [0, 1, 2, 3]'
    )
    assert edited != plan.to_json()
    with pytest.raises(ValueError, match="would be left"):
        prune.Plan.from_json(edited)
    few = {"router": params["router"][:, :2], "up": params["up"][:2], "down": params["down"][:2]}
    (group,) = (group for group in prune.groups(few, top_k, x) if group.size == 2)
    assert group.locked == "the router chooses 2 of them for each token"


def test_experts_go_only_where_they_are_asked_for_and_no_mask_says_it():
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    groups = prune.groups(params, top_k, x)
    name, scores = experts_of(groups).name, jax.tree.map(jnp.abs, params)
    assert name not in prune.plan(groups, scores, 0.5).removed
    assert f"Whole in a plan unless named or their kind is: {name}" in str(groups)
    assert prune.plan(groups, scores, {name: 0.4}).sizes() == {name: 3}
    with pytest.raises(ValueError, match=f"experts of '{name}', and no mask"):
        prune.plan(groups, scores, 0.4, kinds=("expert",)).masks(params)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_targets_and_costs(way):
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    groups = prune.groups(params, way, x)
    importance = prune.expert_importance(params, way, x).importance
    plan = prune.plan(groups, importance, target={"params": 0.5}, kinds="expert")
    assert plan.sizes() == {experts_of(groups).name: 2}
    costs = groups.costs(plan.sizes())
    small, small_apply = prune.compact(params, way, x, plan)
    assert costs["params"] == sum(map(jnp.size, jax.tree.leaves(small))) <= 0.5 * groups.costs()["params"]
    assert costs["macs"] == jaxeff.cost.count(small, small_apply, x).macs


# --- Importance ------------------------------------------------------------------------------------------


def gates_of(way, w, x):
    """[tokens, experts], in NumPy."""
    logits = x @ w["router"]
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-logits, axis=-1)
    best = np.zeros_like(logits)
    np.put_along_axis(best, order[:, :2], 1, axis=-1)
    one = np.zeros_like(logits)
    np.put_along_axis(one, order[:, :1], 1, axis=-1)
    sigmoid = 1 / (1 + np.exp(-2 * logits))
    top_2 = soft * best / (soft * best).sum(-1, keepdims=True)
    return {
        dense: soft,
        summed: soft,
        sigmoids: sigmoid / sigmoid.sum(-1, keepdims=True),
        top_k: top_2,
        top_k_of_softmax: top_2,
        scattered: top_2,
        second_choice: top_2,
        second_choice_by_where: top_2,
        token_by_token: top_2,
        with_capacity: top_2 * (_counts(best) <= 4),
        # Tokens beyond the capacity do not reach their expert.
        dispatched: soft * one * (np.cumsum(one, axis=0) <= 3),
    }[way]


def _counts(best):
    """[tokens, experts]: which of the tokens of its half that each is for the expert, from 1 on."""
    return np.concatenate([np.cumsum(half, axis=0) for half in np.split(best, 2)])


def reap(way, w, x):
    gates = gates_of(way, w, x)
    activation = {dense: nn.relu, dispatched: nn.relu, with_capacity: nn.silu}.get(way, jax.nn.gelu)
    hidden = activation(np.einsum("td,edf->etf", x, w["up"]))
    norms = np.linalg.norm(np.einsum("etf,efd->etd", hidden, w["down"]), axis=-1)
    tokens = (gates > 0).sum(0)
    return (gates * norms.T).sum(0) / np.maximum(tokens, 1), tokens


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_importance_is_that_of_a_forward_pass_by_hand(way):
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    name = experts_of(prune.groups(params, way, x)).name
    found = prune.expert_importance(params, way, x)
    importance, tokens = reap(way, params, x)
    np.testing.assert_allclose(found.importance[name], importance, rtol=1e-5)
    np.testing.assert_array_equal(found.tokens[name], tokens)


@pytest.mark.parametrize("way", [dense, top_k, dispatched], ids=lambda way: way.__name__)
def test_importance_in_blocks(way):
    params, h, model = weights(BLOCKS), normal(TOKENS, WIDTH, seed=9), in_blocks(way)
    found = prune.expert_importance(params, model, h)
    (name,) = found.importance
    for block in range(BLOCKS):
        w = {name: leaf[block] for name, leaf in params.items()}
        importance, tokens = reap(way, w, h)
        np.testing.assert_allclose(found.importance[name][block], importance, rtol=1e-4)
        np.testing.assert_array_equal(found.tokens[name][block], tokens)
        h = h + np.asarray(way(w, h))
    groups = prune.groups(params, model, normal(TOKENS, WIDTH, seed=9))
    removed = prune.plan(groups, found.importance, 0.4, kinds="expert").removed[name]
    np.testing.assert_array_equal(
        removed, np.sort(np.argsort(found.importance[name], axis=-1)[:, :2], axis=-1)
    )


def test_a_sequence_of_tokens_is_many_tokens():
    """[batch, position, width], flattened for the router or not."""

    def apart(w, x):
        best, chosen = jax.lax.top_k(x @ w["router"], 2)
        gates = jnp.einsum(
            "btk,btke->bte", jax.nn.softmax(best), jax.nn.one_hot(chosen, w["router"].shape[-1])
        )
        hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, w["up"]))
        return jnp.einsum("btef,efd,bte->btd", hidden, w["down"], gates)

    def flattened(w, x):
        return top_k(w, x.reshape(-1, WIDTH)).reshape(x.shape)

    params, x = weights(), normal(2, TOKENS // 2, WIDTH, seed=9)
    importance, tokens = reap(top_k, params, x.reshape(-1, WIDTH))
    for model in (apart, flattened):
        found = prune.expert_importance(params, model, x)
        np.testing.assert_allclose(*found.importance.values(), importance, rtol=1e-5)
        np.testing.assert_array_equal(*found.tokens.values(), tokens)


def test_experts_that_no_token_reached_are_listed():
    params, x, model = weights(BLOCKS), np.abs(normal(TOKENS, WIDTH, seed=9)), in_blocks(top_k)
    params["router"][0][:, 1:3] = -9
    found = prune.expert_importance(params, model, x)
    (name,) = found.importance
    assert {(0, 1), (0, 2)} <= set(found.unreached[name])
    for *block, expert in found.unreached[name]:
        assert found.importance[name][(*block, expert)] == found.tokens[name][(*block, expert)] == 0
    assert found.tokens[name].sum(-1).tolist() == [2 * TOKENS] * BLOCKS
    one = prune.ExpertImportance({"a:0": np.zeros(3)}, {"a:0": np.array([0, 4, 0])})
    assert "No token reached experts 0 and 2 of a:0." in str(one)
    assert f"No token reached experts 1 and 2 of {name}, block 0." in str(found)


def test_gates_that_are_not_found_say_so():
    """Two sums, one for each half of what the experts put out."""

    def halves(w, x):
        gates, outputs = jax.nn.softmax(x @ w["router"]), outputs_of(w, x)
        return jnp.einsum("te,etd->td", gates, outputs) + jnp.einsum("te,etd->td", gates, jnp.tanh(outputs))

    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    with pytest.raises(ValueError, match="2 sums over the experts' outputs"):
        prune.expert_importance(params, halves, x)


def test_no_expert_is_called_dead_and_none_is_masked():
    """A router's column of 0 chooses as well as any other."""
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    params["router"][:, 1] = 0
    groups = prune.groups(params, dense, x)
    assert experts_of(groups).name not in prune.Plan.dead(groups, jaxeff.analyze(params, dense, x)).removed


def test_experts_in_residual_blocks_that_are_written_out():
    """Whole blocks are groups of their own there, behind those of the experts."""
    params = {name: weights(seed=10 * i) for i, name in enumerate(("block0", "block1", "block2"))}
    x = normal(TOKENS, WIDTH, seed=9)

    def model(params, h):
        for name in sorted(params):
            h = h + top_k(params[name], h)
        return h

    assert "block" in {group.kind for group in prune.groups(params, model, x)}
    found = prune.expert_importance(params, model, x)
    h = x
    for name in sorted(params):
        alone = prune.expert_importance(params[name], top_k, h)
        np.testing.assert_allclose(
            found.importance[f"{name}/router:1"], alone.importance["router:1"], rtol=1e-5
        )
        h = h + top_k(params[name], h)


def test_a_result_in_place_of_its_importance():
    params, x = weights(), normal(TOKENS, WIDTH, seed=9)
    groups, found = prune.groups(params, dense, x), prune.expert_importance(params, dense, x)
    with pytest.raises(TypeError, match=r"`importance` came as ExpertImportance: pass its `\.importance`"):
        prune.plan(groups, found, 0.4, kinds="expert")
