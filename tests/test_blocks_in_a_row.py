"""Residual blocks written out one after the other: what is a block, and that a model computes the same without it."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from network import drawn, normal, tokens
from shrinkable import Residual

import jaxeff
from jaxeff import cost, prune

DEPTH, WIDTH = 4, 8


@pytest.fixture(autouse=True)
def biases_without_axes():
    with jax.numpy_rank_promotion("allow"):
        yield


# --- Models, of which `kept` are the blocks that are run -----------------------------------------------------


class Block(nn.Module):
    """Attention and a hidden layer, each added to the stream; with `post`, the norms stand behind the additions."""

    hidden: int = 12
    post: bool = False

    @nn.compact
    def __call__(self, h, memory=None):
        attend = nn.MultiHeadDotProductAttention(2, name="attend")
        up, down = nn.Dense(self.hidden, name="up"), nn.Dense(WIDTH, name="down")
        first, second = nn.LayerNorm(name="first"), nn.LayerNorm(name="second")
        if self.post:
            h = first(h + attend(h))
            return second(h + down(nn.gelu(up(h))))
        z = first(h)
        h = h + (attend(z) if memory is None else attend(z, memory))
        return h + down(nn.gelu(up(second(h))))


class GPT(nn.Module):
    kept: tuple[int, ...] = tuple(range(DEPTH))
    post: bool = False
    remat: bool = False
    hidden: tuple[int, ...] = (12,) * DEPTH

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(11, WIDTH, name="embed")
        h = embed(words) + self.param("positions", nn.initializers.normal(), (1, words.shape[1], WIDTH))
        h = nn.LayerNorm(name="norm_of_embedding")(h)
        for i in self.kept:
            h = (nn.remat(Block) if self.remat else Block)(self.hidden[i], self.post, name=f"block{i}")(h)
        return embed.attend(nn.LayerNorm(name="norm")(h))


class Decoder(nn.Module):
    kept: tuple[int, ...] = tuple(range(DEPTH))

    @nn.compact
    def __call__(self, x, words):
        memory = nn.Dense(WIDTH, name="memory")(x)
        h = nn.Embed(11, WIDTH, name="embed")(words)
        for i in self.kept:
            h = Block(name=f"layers_{i}")(h, memory)
        return nn.Dense(3, name="head")(h)


class ResNet(nn.Module):
    """Two stages of three blocks, and between them one that halves the image."""

    kept: tuple[int, ...] = tuple(range(7))

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        for i in self.kept:
            wide = 6 if i < 3 else 8
            x = Residual(5, wide, 2 if i == 3 else 1, i == 3, name=f"block{i}")(x)
        return nn.Dense(3, name="head")(jnp.mean(x, (1, 2)))


class Trained(nn.Module):
    """Blocks whose norms have running averages."""

    kept: tuple[int, ...] = (0, 1, 2)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        for i in self.kept:
            z = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
            x = x + nn.Conv(6, (3, 3), name=f"conv{i}")(nn.relu(z))
        return nn.Dense(3, name="head")(jnp.mean(x, (1, 2)))


def plain(params, x, kept=range(DEPTH)):
    for i in kept:
        block = params["blocks"][i]
        x = x + jax.nn.gelu(x @ block["up"]) @ block["down"]
    return x @ params["head"]


def damped(params, x, kept=range(DEPTH)):
    """Each block halves the stream, and without it that stays so."""
    for i, block in enumerate(params["blocks"]):
        x = 0.5 * x
        x = x + jax.nn.gelu(x @ block["up"]) @ block["down"] if i in kept else x
    return x @ params["head"]


def conditioned(params, words, mask, positions, times, kept=range(DEPTH)):
    """All blocks read a mask, an embedding of times, and angles that the first of them computes."""
    h, angles = params["embed"][words], None
    condition = jax.nn.silu(times @ params["times"])[:, None]
    for i in kept:
        block = params["layers"][i]
        angles = jnp.cos(positions[..., None] * jnp.linspace(0.1, 1, WIDTH)) if angles is None else angles
        z = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5) * block["scale"]
        weights = jax.nn.softmax((z * angles) @ z.swapaxes(-1, -2) + mask[:, None], -1)
        h = h + weights @ z @ block["out"] * condition
        h = h + jax.nn.gelu(h * (1 + block["scale"]) @ block["up"]) @ block["down"]
    return h @ params["embed"].T


def unnamed(params, x, kept=range(DEPTH)):
    """What Keras gives: a list of arrays, without the names of layers."""
    *weights, head = params
    for i in kept:
        up, bias, down, gate = weights[4 * i : 4 * i + 4]
        x = x + jax.nn.gelu(x @ up + bias) @ down
        x = x + jnp.tanh(x @ gate)
    return x @ head


class Case(NamedTuple):
    """A model, the same of some of its blocks, its params, its batch, and the names of its blocks that may go."""

    apply_fn: Any
    of_blocks: Any
    params: Any
    batch: tuple
    names: dict[str, tuple[str, ...]]


def of_module(module, *batch, names):
    def of_blocks(kept):
        return module.clone(kept=kept).apply

    return Case(module.apply, of_blocks, drawn(module, *batch), batch, names)


def of_function(function, params, names):
    def of_blocks(kept):
        return functools.partial(function, kept=kept)

    return Case(function, of_blocks, params, (normal(5, WIDTH),), names)


def numbered(pattern, numbers=range(DEPTH)):
    return {pattern: tuple(pattern.replace("*", str(i)) for i in numbers)}


@functools.cache
def case(name):
    words = tokens(2, 5, vocabulary=11)
    seeds = iter(range(100))
    w = lambda *shape: normal(*shape, seed=next(seeds)) / 3  # noqa: E731
    return {
        "GPT": lambda: of_module(GPT(), words, names=numbered("block*")),
        "remat": lambda: of_module(GPT(remat=True), words, names=numbered("block*")),
        "decoder": lambda: of_module(Decoder(), normal(2, 3, 4), words, names=numbered("layers_*")),
        "ResNet": lambda: of_module(
            ResNet(),
            normal(2, 8, 8, 3),
            names={**numbered("block*", range(3)), "block*#2": ("block4", "block5", "block6")},
        ),
        "plain": lambda: of_function(
            plain,
            {
                "blocks": [{"up": w(WIDTH, 12), "down": w(12, WIDTH)} for _ in range(DEPTH)],
                "head": w(WIDTH, 3),
            },
            numbered("blocks/*"),
        ),
        "damped": lambda: of_function(
            damped,
            {
                "blocks": [{"up": w(WIDTH, 12), "down": w(12, WIDTH)} for _ in range(DEPTH)],
                "head": w(WIDTH, 3),
            },
            numbered("blocks/*"),
        ),
        "conditioned": lambda: Case(
            conditioned,
            lambda kept: functools.partial(conditioned, kept=kept),
            {
                "embed": w(11, WIDTH),
                "times": w(3, WIDTH),
                "layers": [
                    {"scale": w(WIDTH), "out": w(WIDTH, WIDTH), "up": w(WIDTH, 12), "down": w(12, WIDTH)}
                    for _ in range(DEPTH)
                ],
            },
            (words, normal(2, 5), np.tile(np.arange(5), (2, 1)), normal(2, 3)),
            numbered("layers/*"),
        ),
        "unnamed": lambda: of_function(
            unnamed,
            [
                *(w(*s) for _ in range(DEPTH) for s in [(WIDTH, 12), (12,), (12, WIDTH), (WIDTH, WIDTH)]),
                w(WIDTH, 3),
            ],
            {"*": ("0", "4", "8", "12")},
        ),
    }[name]()


CASES = ("GPT", "remat", "decoder", "ResNet", "plain", "unnamed", "damped", "conditioned")


def groups_of(found):
    return prune.groups(found.params, found.apply_fn, found.batch)


def blocks(groups):
    return {group.name: group.names for group in groups.unlocked if group.kind == "block"}


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# --- What is a block, and that it goes ------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_found_by_name(name):
    assert blocks(groups_of(case(name))) == case(name).names


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("removed", [[0], [1], [0, 2], [1, 2]])
def test_a_model_without_blocks_computes_what_it_does_with_zeros_in_their_place(name, removed):
    found = case(name)
    plan = prune.Plan.of(groups_of(found), dict.fromkeys(found.names, removed))
    left_out = tuple(names[i] for names in found.names.values() for i in removed)
    assert plan.left_out() == left_out and all(each in str(plan) for each in left_out)
    expected = found.apply_fn(prune.apply(found.params, plan.masks(found.params)), *found.batch)
    small, small_apply = prune.compact(found.params, found.apply_fn, found.batch, plan)
    close(small_apply(small, *found.batch), expected)
    assert cost.count(small, small_apply, found.batch).macs == groups_of(found).costs(plan.sizes())["macs"]
    run = range(7 if name == "ResNet" else DEPTH)
    gone = [i + start for start in ((0, 4) if name == "ResNet" else (0,)) for i in removed]
    kept = tuple(i for i in run if i not in gone)
    close(found.of_blocks(kept)(found.params, *found.batch), expected)
    if name in ("plain", "unnamed"):
        close(found.of_blocks(range(len(kept)))(small, *found.batch), expected)
    elif name not in ("damped", "conditioned"):
        close(found.of_blocks(kept)(small, *found.batch), expected)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 12, rngs=rngs), nnx.Linear(12, WIDTH, rngs=rngs)

    def __call__(self, h):
        return h + self.down(nnx.gelu(self.up(self.norm(h))))


class NNXModel(nnx.Module):
    def __init__(self, rngs, depth=DEPTH):
        self.layers = nnx.List([NNXBlock(rngs) for _ in range(depth)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_the_state_of_an_nnx_model_is_that_of_a_model_of_fewer_layers():
    x, model = normal(5, WIDTH), NNXModel(nnx.Rngs(0))
    model.eval()
    params, apply_fn = jaxeff.functional(model)
    groups = prune.groups(params, apply_fn, x)
    assert blocks(groups) == numbered("layers/*")
    plan = prune.Plan.of(groups, {"layers/*": [0, 2]})
    small, small_apply = prune.compact(params, apply_fn, x, plan)
    rebuilt = NNXModel(nnx.Rngs(1), 2)
    rebuilt.eval()
    nnx.update(rebuilt, small, small_apply.state)
    model.layers = nnx.List([model.layers[1], model.layers[3]])
    close(rebuilt(x), model(x))
    close(small_apply(small, x), model(x))
    assert prune.block_influence(params, apply_fn, x)["layers/*"].shape == (DEPTH,)
    order = prune.order_blocks(params, apply_fn, x, loss_fn=squares, targets=model(x), count=2)
    assert sorted(order.names) == ["layers/0", "layers/2"] and order.losses[-1] < 1e-10


def squares(outputs, targets):
    return (outputs - targets) ** 2


# --- Which block goes first -----------------------------------------------------------------------------


def test_a_block_that_does_nothing_is_ranked_first_and_missed_by_no_bit():
    found = case("GPT")
    params = jax.tree.map(jnp.asarray, found.params)
    for of_output in (params["params"]["block2"]["attend"]["out"], params["params"]["block2"]["down"]):
        of_output |= jax.tree.map(jnp.zeros_like, of_output)
    whole = jax.jit(found.apply_fn)(params, *found.batch)
    influence = prune.block_influence(params, found.apply_fn, found.batch)
    assert influence["block*"][2] == 0 and np.argmin(influence["block*"]) == 2
    order = prune.order_blocks(params, found.apply_fn, found.batch, loss_fn=squares, targets=whole, count=1)
    assert order.order == (("block*", 2),) and order.losses == (order.dense,) and order.names == ("block2",)
    assert "block2" in str(order)
    groups = groups_of(found)
    for importance in (influence, order.importance):
        plan = prune.plan(groups, importance, 1 / DEPTH, kinds="block")
        assert plan.left_out() == ("block2",)
        small, small_apply = prune.compact(params, found.apply_fn, found.batch, plan)
        np.testing.assert_array_equal(small_apply(small, *found.batch), whole)
        np.testing.assert_array_equal(jax.jit(found.of_blocks((0, 1, 3)))(small, *found.batch), whole)


def test_influence_is_that_of_a_forward_pass_by_hand():
    found = case("plain")
    h, expected = np.asarray(found.batch[0], np.float64), []
    for i in range(DEPTH):
        of_block = found.of_blocks([i])
        after = np.asarray(of_block({**found.params, "head": np.eye(WIDTH, dtype=np.float32)}, h), np.float64)
        cosine = (h * after).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(after, axis=-1)
        expected.append(1 - cosine.mean())
        h = after
    influence = prune.block_influence(found.params, found.apply_fn, found.batch)["blocks/*"]
    np.testing.assert_allclose(influence, expected, rtol=1e-4)


def test_the_order_is_that_of_brute_force():
    found, targets = case("GPT"), normal(2, 5, 11)
    kept, order, losses = [*range(DEPTH)], [], []

    def loss_of(kept):
        outputs = found.of_blocks(tuple(kept))(found.params, *found.batch)
        return float(jnp.mean(squares(outputs, targets)))

    while len(kept) > 1:
        block = min(kept, key=lambda block: loss_of([other for other in kept if other != block]))
        kept.remove(block)
        order.append(block)
        losses.append(loss_of(kept))
    measured = prune.order_blocks(found.params, found.apply_fn, found.batch, loss_fn=squares, targets=targets)
    assert [block for _, block in measured.order] == order
    np.testing.assert_allclose(measured.losses, losses, rtol=1e-5)


# --- Which may not go -----------------------------------------------------------------------------------


def locks(apply_fn, params, *batch, **options):
    found = prune.groups(params, apply_fn, batch, **options)
    return {group.name: group.locked for group in found if group.kind == "block"}


def test_blocks_with_the_norm_behind_go_where_that_is_allowed():
    words = tokens(2, 5, vocabulary=11)
    module = GPT(post=True)
    params = drawn(module, words)
    assert locks(module.apply, params, words) == {"block*": "zeros in place of its weights would not skip it"}
    groups = prune.groups(params, module.apply, words, allow="depth")
    assert blocks(groups) == numbered("block*")
    plan = prune.Plan.of(groups, {"block*": [1, 3]})
    small, small_apply = prune.compact(params, module.apply, words, plan)
    expected = module.clone(kept=(0, 2)).apply(params, words)
    close(small_apply(small, words), expected)
    close(module.clone(kept=(0, 2)).apply(small, words), expected)


def test_a_block_that_changes_the_shape_stays():
    found = case("ResNet")
    assert locks(found.apply_fn, found.params, *found.batch)["block3"] == (
        "its output has another shape than its input"
    )


def test_blocks_that_share_their_weights_stay():
    def shared(params, x):
        return plain({**params, "blocks": [params["block"]] * DEPTH}, x)

    def tied(params, x):
        tied = [{**block, "down": block["down"] + params["blocks"][0]["down"]} for block in params["blocks"]]
        return plain({**params, "blocks": tied}, x)

    params, x = case("plain").params, normal(5, WIDTH)
    (reason,) = locks(shared, {"block": params["blocks"][0], "head": params["head"]}, x).values()
    assert reason == "other parts of the model use its weights too"
    assert set(locks(tied, params, x).values()) == {reason}


@pytest.mark.parametrize(
    "step",
    [
        lambda h, w: jax.nn.gelu(h @ w),
        lambda h, w: h + jnp.exp(h @ w),
        lambda h, w: h + w[0],
        lambda h, w: h * jax.nn.sigmoid(h @ w),
    ],
)
def test_models_without_residual_blocks(step):
    def model(params, x):
        for w in params:
            x = step(x, w)
        return x[:, :2]

    params, x = [normal(WIDTH, WIDTH, seed=i) for i in range(DEPTH)], normal(5, WIDTH)
    assert not locks(model, params, x)
    with pytest.raises(ValueError, match="no blocks whose influence"):
        prune.block_influence(params, model, x)


def test_what_is_returned_from_within_a_block_keeps_it():
    def returning(params, x):
        z, inside, streams = x, [], []
        for block in params["blocks"]:
            inside.append(jax.nn.gelu(z @ block["up"]))
            z = z + inside[-1] @ block["down"]
            streams.append(z)
        return z @ params["head"], inside[1], streams

    found = case("plain")
    assert locks(returning, found.params, *found.batch) == {
        "blocks/*": None,
        "blocks/1": "the model returns something from within it",
    }
    groups = prune.groups(found.params, returning, found.batch)
    assert groups["blocks/*"].names == ("blocks/0", "blocks/2", "blocks/3")
    plan = prune.Plan.of(groups, {"blocks/*": [1]})
    small, small_apply = prune.compact(found.params, returning, found.batch, plan)
    masked = returning(prune.apply(found.params, plan.masks(found.params)), *found.batch)
    jax.tree.map(close, small_apply(small, *found.batch), masked)
    within = prune.Plan.of(groups_of(found), {"blocks/*": [1]})
    with pytest.raises(ValueError, match="from within which something is returned"):
        prune.compact(found.params, returning, found.batch, within)


def test_a_model_trains_without_the_running_averages_of_what_is_left_out():
    module, x = Trained(), normal(2, 8, 8, 3)
    params = drawn(module, x)
    groups = prune.groups(params, module.apply, x)
    (group,) = [group for group in groups.unlocked if group.kind == "block"]
    small, small_apply = prune.compact(params, module.apply, x, prune.Plan.of(groups, {group.name: [1]}))
    outputs, updated = small_apply(small, x, train=True, mutable=["batch_stats"])
    expected, averages = Trained(kept=(0, 2)).apply(small, x, train=True, mutable=["batch_stats"])
    close(outputs, expected)
    assert jax.tree.structure(updated) == jax.tree.structure(averages)
    jax.tree.map(close, updated, averages)


# --- With all else that plans do ------------------------------------------------------------------------


def test_blocks_go_only_where_they_are_asked_for():
    found = case("GPT")
    groups = groups_of(found)
    scores = prune.scored(found.params)
    assert not prune.plan(groups, scores, 0.5).left_out()
    assert not prune.plan(groups, scores, target={"macs": 0.7}).left_out()
    both = prune.plan(groups, scores, 0.5, kinds=("unit", "block"))
    assert len(both.left_out()) == DEPTH // 2 and both.widths()
    again = prune.Plan.from_json(both.to_json())
    assert again.left_out() == both.left_out() and again.widths() == both.widths()
    assert not any(path.startswith(both.left_out()) for path in both.widths())


@pytest.mark.parametrize("target", [0.8, 0.5, 0.3])
def test_depth_and_widths_share_a_budget(target):
    words = tokens(2, 5, vocabulary=11)
    module = GPT(hidden=(12, 20, 12, 20))
    params = drawn(module, words)
    groups = prune.groups(params, module.apply, words)
    assert sorted(group.size for group in groups.unlocked if group.leaves) == [2, 2]
    importance = {**prune.scored(params), **prune.block_influence(params, module.apply, words)}
    plan = prune.plan(
        groups, importance, target={"macs": target}, kinds=("unit", "head", "block"), normalize="sum"
    )
    small, small_apply = prune.compact(params, module.apply, words, plan)
    close(small_apply(small, words), module.apply(prune.apply(params, plan.masks(params)), words))
    costs = groups.costs(plan.sizes(), removed=plan.removed)
    assert costs["macs"] == cost.count(small, small_apply, words).macs <= target * groups.costs()["macs"]
    assert costs["params"] == sum(leaf.size for leaf in jax.tree.leaves(small["params"]))


def test_costs_of_blocks_of_different_widths_depend_on_which_go():
    found = case("GPT")
    groups = groups_of(found)
    removed = {"block*": [1], "block1/up/kernel:1": [0, 1, 2], "block2/up/kernel:1": [4]}
    plan = prune.Plan.of(groups, removed)
    small, small_apply = prune.compact(found.params, found.apply_fn, found.batch, plan)
    counted = cost.count(small, small_apply, found.batch).macs
    assert groups.costs(plan.sizes(), removed=plan.removed)["macs"] == counted
    assert groups.costs(plan.sizes())["macs"] != counted


def test_the_optimizer_goes_on_and_the_smaller_model_is_made_smaller_again():
    found, optimizer = case("plain"), optax.adam(1e-2)
    plan = prune.Plan.of(groups_of(found), {"blocks/*": [1]})
    _, state = prune.shrink(found.params, plan, optimizer.init(found.params))
    small, small_apply = prune.compact(found.params, found.apply_fn, found.batch, plan)
    gradients = jax.grad(lambda params: jnp.sum(small_apply(params, *found.batch) ** 2))(small)
    updates, _ = optimizer.update(gradients, state, small)
    trained = optax.apply_updates(small, updates)
    groups = prune.groups(trained, small_apply, found.batch)
    assert blocks(groups) == numbered("blocks/*", range(3))
    plan = prune.Plan.of(groups, {"blocks/*": [0]})
    smaller, smaller_apply = prune.compact(trained, small_apply, found.batch, plan)
    expected = plain({**trained, "blocks": trained["blocks"][1:]}, *found.batch, range(2))
    close(smaller_apply(smaller, *found.batch), expected)


def test_the_smaller_model_runs_at_other_batches_and_types():
    found = case("GPT")
    plan = prune.Plan.of(groups_of(found), {"block*": [1]})
    small, small_apply = prune.compact(found.params, found.apply_fn, found.batch, plan)
    words, of_blocks = tokens(1, 5, vocabulary=11), found.of_blocks((0, 2, 3))
    close(small_apply(small, words), of_blocks(small, words))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    np.testing.assert_allclose(small_apply(narrow, words), of_blocks(narrow, words), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("block", "both"),
    [
        (lambda up, down: {"up": up, "down": down}, lambda p: (p["up"], p["down"])),
        (lambda up, down: (up, down), lambda p: p),
        (lambda up, down: up, lambda p: (p, p.T)),
    ],
    ids=["dict", "tuple", "leaf"],
)
def test_scores_of_params_with_the_name_of_a_block_are_not_taken_for_those_of_blocks(block, both):
    def apply_fn(params, x):
        for name in ("a", "b"):
            up, down = both(params[name])
            x = x + jnp.tanh(x @ up) @ down
        return x

    params = {name: block(normal(WIDTH, 6, seed=i), normal(6, WIDTH)) for i, name in enumerate("ab")}
    groups = prune.groups(params, apply_fn, normal(3, WIDTH))
    scores = prune.scored(params)
    scored = {group.name: group for group in groups.scored(scores)}
    assert scored["a"].kind == "block" and {group.kind for group in scored.values()} == {
        "block",
        "unit",
        "stream",
    }
    for group in (group for group in scored.values() if group.kind == "unit"):
        name = group.name[0]
        up, down = (np.abs(np.float64(leaf)) for leaf in both(params[name]))
        whole = up.sum(0) + (down.sum(1) if len(jax.tree.leaves(params[name])) > 1 else 0)
        np.testing.assert_allclose(group.importance, whole, rtol=1e-6)
    # One number for each block still is the importance of blocks.
    (own,) = (group for group in groups.scored({**scores, "a": [0.5, 0.25]}) if group.name == "a")
    np.testing.assert_array_equal(own.importance, [0.5, 0.25])
