"""Recipes on the digits, and on networks of a few weights where the answer is known."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxeff
from jaxeff import demo, prune

TRAINING, TEST = demo.split(demo.digits())
ORDER = np.random.default_rng(0).permutation(len(TRAINING.labels))[: 11 * 128].reshape(11, 128)
BATCHES = [(TRAINING.images[chosen].reshape(128, -1), TRAINING.labels[chosen]) for chosen in ORDER]
X, LABELS = TEST.images.reshape(360, -1), TEST.labels


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(160)(x)))


def created(seed=0, model=Network()):  # noqa: B008
    params = model.init(jax.random.key(seed), X[:1])["params"]
    optimizer = optax.adamw(3e-3, weight_decay=0.1)
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


def loss_fn(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _step(state, batch):
    loss = lambda params: jnp.mean(loss_fn(state.apply_fn({"params": params}, batch[0]), batch[1]))  # noqa: E731
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


step = jax.jit(_step)


@jax.jit
def evaluate(state):
    return jnp.mean(jnp.argmax(state.apply_fn({"params": state.params}, X), -1) == LABELS)


def kernels(params):
    return [layer["kernel"] for layer in params.values()]


@pytest.fixture(scope="module")
def dense():
    state = created()
    for batch in 20 * BATCHES:
        state = step(state, batch)
    return state


def run(recipe, state, **options):
    """On the digits, with what most tests share."""
    shared = {"sparsity": 0.9, "rounds": 2, "steps": 11, "progress": False} | options
    with_step = shared.pop("step", step)
    return recipe(state, with_step, BATCHES, evaluate, **shared)


def removed(masks):
    return [~np.asarray(mask) for mask in jax.tree.leaves(masks) if mask.ndim]


def assert_zero_where_removed(pruned):
    for kernel, gone in zip(kernels(pruned.state.params), removed(pruned.masks), strict=True):
        np.testing.assert_array_equal(kernel == 0, gone)


def random_importance(seed):
    def importance(state):
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        return jax.tree.map(
            lambda w: jax.random.uniform(next(keys), w.shape) if w.ndim > 1 else jnp.zeros(()), state.params
        )

    return importance


# Rounds


def test_pruned_weights_are_exactly_0_and_counts_exact(dense):
    pruned = run(prune.iterative, dense, rounds=3, steps=22)
    total = sum(kernel.size for kernel in kernels(dense.params))
    for number, found in enumerate(pruned.rounds, 1):
        assert found.sparsity == pytest.approx(round((1 - 0.1 ** (number / 3)) * total) / total, abs=1e-12)
    assert sum(int(gone.sum()) for gone in removed(pruned.masks)) == round(0.9 * total)
    assert_zero_where_removed(pruned)
    assert pruned.stopped is None and int(pruned.state.step) == int(dense.step) + 66
    assert pruned.dense == float(evaluate(dense)) and pruned.rounds[-1].after == float(evaluate(pruned.state))


def test_a_tenth_of_the_weights_is_nearly_as_good_and_chosen_better_than_at_random(dense):
    smallest = run(prune.iterative_magnitude, dense, rounds=3, steps=66)
    assert smallest.rounds[-1].after > smallest.dense - 0.03
    few = {"sparsity": 0.98, "rounds": 4, "steps": 22}
    smallest = run(prune.iterative_magnitude, dense, **few)
    at_random = run(prune.iterative, dense, importance=random_importance(0), **few)
    assert smallest.rounds[-1].after > at_random.rounds[-1].after + 0.05


def test_pruned_weights_never_come_back_whatever_the_scores(dense):
    """Scores are drawn anew each round, and some weights of the first layer are 0 with no mask to say so."""
    seen, total = [], sum(kernel.size for kernel in kernels(dense.params))

    def importance(state):
        seen.append(state.params)
        return random_importance(len(seen))(state)

    pruned = run(prune.iterative, dense, importance=importance, rounds=4, steps=1, sparsity=0.8)
    for params in seen[1:]:
        for kernel, gone in zip(kernels(params), removed(pruned.masks), strict=True):
            assert not np.any(np.asarray(kernel == 0) & ~gone)
    assert sum(int(gone.sum()) for gone in removed(pruned.masks)) == round(0.8 * total)


class Weights(NamedTuple):
    params: dict[str, Any]


def of(*values, dtype=jnp.float32):
    return Weights({"w": jnp.asarray(values, dtype)})


def still(state, batch):
    return state


def left(state):
    return jnp.mean(state.params["w"] != 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weights_that_are_0_already_go_after_those_that_are_pruned(dtype):
    """Of scores alike the first go, but for what is pruned: half of all, then half of what is left."""
    order = iter([[[3.0, 3, 0, 0], [3, 3, 0, 0]], [[0.0, 0, 0, 0], [0, 0, 0, 1]]])
    importance = lambda state: {"w": jnp.asarray(next(order), dtype)}  # noqa: E731
    state = of([1, 1, 1, 1], [1, 1, 1, 1], dtype=dtype)
    found = prune.iterative(
        state, still, [0], left, sparsity=0.75, rounds=2, steps=1, importance=importance, progress=False
    )
    np.testing.assert_array_equal(found.masks["w"], [[False] * 4, [True, True, False, False]])
    assert found.state.params["w"].dtype == dtype


def test_float64(x64):
    state = of(*np.arange(1.0, 9).reshape(2, 4), dtype=jnp.float64)
    found = prune.iterative(state, still, [0], left, sparsity=0.75, rounds=2, steps=1, progress=False)
    np.testing.assert_array_equal(found.state.params["w"], [[0, 0, 0, 0], [0, 0, 7, 8]])
    assert found.state.params["w"].dtype == jnp.float64
    penalty = prune.add_entropy_gradient(1.0)
    added, _ = penalty.update(state.params, penalty.init(state.params), state.params)
    assert added["w"].dtype == jnp.float64


def test_the_round_before_the_stop_is_returned():
    state = of([1, 2, 3, 4], [5, 6, 7, 8])
    call = partial(prune.iterative, state, still, [0], left, steps=1, progress=False)
    held = call(sparsity=0.875, rounds=3, max_drop=0.8)
    assert [found.after for found in held.rounds] == [0.5, 0.25, 0.125]
    assert held.stopped == "round 3 ended at 0.1250, more than 0.8 below 1.0000"
    np.testing.assert_array_equal(held.state.params["w"], [[0, 0, 0, 0], [0, 0, 7, 8]])
    np.testing.assert_array_equal(held.masks["w"], held.state.params["w"] != 0)
    at_once = call(sparsity=0.875, rounds=3, max_drop=0.0)
    assert len(at_once.rounds) == 1 and "round 1" in str(at_once)
    np.testing.assert_array_equal(at_once.state.params["w"], state.params["w"])
    assert bool(at_once.masks["w"].all())
    assert call(sparsity=0.875, rounds=3, max_drop=0.875).stopped is None


def test_the_table():
    found = prune.Pruned(None, None, 0.98, (prune.Round(0.5, 0.7, 0.981), prune.Round(0.9, 0.1, 0.9)), "why")
    assert str(found).splitlines() == [
        "round  sparsity  before   after",
        "-------------------------------",
        "dense     0.00%          0.9800",
        "    1    50.00%  0.7000  0.9810",
        "    2    90.00%  0.1000  0.9000",
        "Stopped: why.",
    ]


def test_layers_patterns_and_fractions(dense):
    by_layer = run(prune.iterative, dense, scope="layer", steps=1)
    sizes = [kernel.size for kernel in kernels(dense.params)]
    assert [int(gone.sum()) for gone in removed(by_layer.masks)] == [round(0.9 * size) for size in sizes]
    paths = [f"Dense_{number}/kernel" for number in range(2)]
    shares = dict(zip(paths, (0.9, 0.5), strict=True))
    own = run(prune.iterative, dense, scope="layer", allocation=shares, steps=1)
    gone = [int(gone.sum()) for gone in removed(own.masks)]
    assert gone == [round(share * size) for share, size in zip(shares.values(), sizes, strict=True)]
    of_four = run(
        prune.iterative,
        dense,
        sparsity=None,
        rounds=1,
        pattern=prune.NByM(2, 4),
        steps=1,
        prunable={paths[1]: False},
    )
    assert of_four.rounds[0].sparsity == 0.5
    units = run(prune.iterative, dense, pattern=prune.Units(), sparsity=0.5, scope="layer", steps=1)
    assert all(np.all(gone == gone[:1]) for gone in removed(units.masks))


def test_two_runs_are_equal_to_the_bit(dense):
    runs = [run(prune.iterative_magnitude, dense, max_drop=1.0) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, runs[0].state, runs[1].state)
    assert runs[0].rounds == runs[1].rounds


@pytest.mark.parametrize("recipe", ["iterative", "lottery_ticket", "gradual"])
def test_a_step_may_donate_what_it_is_given(dense, recipe):
    donating = jax.jit(_step, donate_argnums=0)
    own = {
        "lottery_ticket": {"rewind": 3},
        "gradual": {"every": 4, "fine_tune": 3},
    }.get(recipe, {"max_drop": 0.0})
    rounds = {} if recipe == "gradual" else {"rounds": 2}
    before = jax.tree.map(np.array, dense)
    found = [
        getattr(prune, recipe)(
            dense, one, BATCHES, evaluate, sparsity=0.9, steps=11, progress=False, **rounds, **own
        )
        for one in (step, donating)
    ]
    jax.tree.map(np.testing.assert_array_equal, dense, before)
    jax.tree.map(np.testing.assert_array_equal, found[0].state.params, found[1].state.params)
    assert found[0].rounds == found[1].rounds


def test_nothing_compiles_twice(dense, compilations):
    _ = run(prune.iterative_magnitude, dense)
    with compilations() as found:
        _ = run(prune.iterative_magnitude, dense, rounds=5, sparsity=0.95)
    assert found.count == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Own:
    params: Any
    count: Any


def test_a_dataclass_and_a_step_that_gives_more():
    state = Own({"w": jnp.asarray([[1.0, 2.0]])}, jnp.zeros(()))
    counted = lambda state, batch: (Own(state.params, state.count + batch), "metrics")  # noqa: E731
    found = prune.iterative(state, counted, [1, 2], left, sparsity=0.5, rounds=1, steps=3, progress=False)
    assert float(found.state.count) == 4
    np.testing.assert_array_equal(found.state.params["w"], [[0, 2]])


class Trained(NamedTuple):
    params: Any
    opt_state: Any


def test_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 48, rngs=rngs), nnx.relu, nnx.Linear(48, 10, rngs=rngs))
    params, apply_fn = jaxeff.functional(model)
    optimizer = optax.adamw(3e-3, weight_decay=0.1)

    @jax.jit
    def train(state, batch):
        loss = lambda params: jnp.mean(loss_fn(apply_fn(params, batch[0]), batch[1]))  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(state.params), state.opt_state, state.params)
        return Trained(optax.apply_updates(state.params, updates), opt_state)

    score = jax.jit(lambda state: jnp.mean(jnp.argmax(apply_fn(state.params, X), -1) == LABELS))
    state = Trained(params, optimizer.init(params))
    found = prune.lottery_ticket(
        state, train, BATCHES, score, sparsity=0.5, rounds=1, steps=33, progress=False
    )
    assert found.rounds[0].after > 0.7
    zeros = sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(found.state.params) if leaf.ndim > 1)
    assert zeros == (64 + 10) * 48 // 2


# What is wrong


def broken(state, batch):
    return Weights({"w": state.params["w"][:1]})


STATE = of([1, 2], [3, 4])


class Plain:
    params = STATE.params


@dataclasses.dataclass
class Unregistered:
    params: Any


def iterated(state=STATE, step=still, batches=(0,), evaluate=left, **options):
    shared = {"sparsity": 0.5, "rounds": 2, "steps": 1, "progress": False} | options
    return prune.iterative(state, step, batches, evaluate, **shared)


def of_sparsify():
    optimizer = optax.chain(optax.clip(1.0), prune.sparsify(optax.sgd(0.1), prune.one_shot(0.5)))
    return Trained(STATE.params, optimizer.init(STATE.params))


def digits(recipe, **options):
    return run(recipe, created(), **options)


def gradual(*arguments, rounds, **options):
    return prune.gradual(*arguments, **{"every": 5, "fine_tune": 1} | options)


WRONG = {
    "params": (TypeError, lambda: iterated({"w": 1}), "`state` must have `.params`, got dict"),
    "plain": (TypeError, lambda: iterated(Plain()), "without `.replace"),
    "no pytree": (TypeError, lambda: iterated(Unregistered(STATE.params)), "which is not a pytree"),
    "sparsify": (ValueError, lambda: iterated(of_sparsify()), "of `prune.sparsify`"),
    "iterator": (TypeError, lambda: iterated(batches=iter([0])), "`batches` is a list_iterator"),
    "generator": (TypeError, lambda: iterated(batches=(b for b in [0])), "`batches` is a generator"),
    "one batch": (TypeError, lambda: iterated(batches=jnp.ones(3)), "`batches` must be an iterable"),
    "no iterable": (TypeError, lambda: iterated(batches=3), "`batches` must be an iterable .* got int"),
    "empty": (ValueError, lambda: iterated(batches=[]), "`batches` is empty"),
    "nan": (ValueError, lambda: iterated(evaluate=lambda s: jnp.nan), "`evaluate` returned nan before pruning"),
    "nan later": (ValueError, lambda: iterated(
        sparsity=0.75, evaluate=lambda s: 1 if left(s) > 0.3 else jnp.nan),
                  "`evaluate` returned nan after the pruning of round 2"),
    "array": (ValueError, lambda: iterated(evaluate=lambda s: jnp.ones(2)), r"an array of shape \(2,\)"),
    "none": (ValueError, lambda: iterated(evaluate=lambda s: None), "`evaluate` returned a NoneType"),
    "step": (TypeError, lambda: iterated(step=lambda s, b: None), "`step` returned a NoneType"),
    "step's params": (ValueError, lambda: iterated(step=broken), "`step` returned a state whose params"),
    "recalibrate": (TypeError, lambda: iterated(recalibrate=lambda s: 1), "`recalibrate` returned a int"),
    "restart": (ValueError, lambda: iterated(restart=lambda s: of([1])), "`restart` returned a state whose"),
    "importance": (ValueError, lambda: iterated(importance=lambda s: {"v": s.params["w"]}), "`importance`"),
    "its shape": (ValueError, lambda: iterated(importance=lambda s: {"w": jnp.ones(2)}), "`importance` returned"),
    "nan scores": (ValueError, lambda: iterated(importance=lambda s: {"w": s.params["w"] * jnp.nan}),
                   "`importance` of 'w' holds nan"),
    "both": (ValueError, lambda: iterated(importance=lambda s: s.params, prunable={"w": True}), "`prunable`"),
    "sparsity": (ValueError, lambda: iterated(sparsity=1.5), "`sparsity` must be in .* got 1.5"),
    "no sparsity": (ValueError, lambda: iterated(sparsity=None), "`sparsity` must be in"),
    "fractions": (ValueError, lambda: iterated(scope="layer", allocation={"w": 1.5}), "got 1.5 for 'w'"),
    "rounds": (ValueError, lambda: iterated(rounds=0), "`rounds` must be a whole number, 1 or more, got 0"),
    "steps": (ValueError, lambda: iterated(steps=1.5), "`steps` must be a whole number"),
    "n of m": (ValueError, lambda: iterated(pattern=prune.NByM(1, 2)), "`rounds` must be 1"),
    "drop": (ValueError, lambda: iterated(max_drop=-1), "`max_drop` must be"),
    "rewind": (ValueError, lambda: digits(prune.lottery_ticket, rewind=11), "`rewind` must be below `steps`"),
    "option": (TypeError, lambda: digits(prune.lottery_ticket, max_loss=1), "max_loss"),
    "every": (ValueError, lambda: digits(gradual, every=0), "`every` must be"),
    "gradual": (ValueError, lambda: digits(gradual, sparsity=1.0), "`sparsity` must be"),
    "pattern": (ValueError, lambda: digits(gradual, pattern=prune.NByM(2, 4)), "`pattern` NByM"),
    "apply_fn": (TypeError, lambda: prune.criterion("wanda", [X])(STATE), "`apply_fn` is missing"),
    "strength": (ValueError, lambda: digits(
        prune.entropy_regularized, strength=-1.0, fine_tune=1), "`strength` must be 0 or more"),
    "no number": (ValueError, lambda: prune.add_entropy_gradient(jnp.inf), "`strength` must be a number"),
    "penalized": (ValueError, lambda: prune.add_entropy_gradient(1.0, {"v": True}).init(STATE.params), "'v'"),
    "its params": (ValueError, lambda: prune.add_entropy_gradient(1.0).update(
        STATE.params, prune.add_entropy_gradient(1.0).init(STATE.params)), "`params` is missing"),
    "tx": (TypeError, lambda: prune.entropy_regularized(
        STATE, still, [0], left, strength=1.0, sparsity=0.5, steps=1, fine_tune=1), "without `tx`"),
    "tx unused": (ValueError, lambda: digits(
        prune.entropy_regularized, strength=1.0, fine_tune=1, step=lambda s, b: s), "use `state.tx`"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(kind, call, message):
    with pytest.raises(kind, match=message):
        _ = call()


# Recipes


def test_tickets_are_put_back_to_the_bit():
    """What is kept, and the optimizer's state, are those of step `rewind` at the start of every round."""
    state, given = created(), []

    def watched(state, batch):
        given.append(state)
        return step(state, batch)

    pruned = run(prune.lottery_ticket, state, step=watched, steps=12, rewind=4, rounds=2)
    assert len(given) == 12 + 8 + 8
    early = state
    for batch in BATCHES[:4]:
        early = step(early, batch)
    for first in (given[4], given[12], given[20]):
        jax.tree.map(np.testing.assert_array_equal, first.opt_state, early.opt_state)
        assert int(first.step) == 4
    for found, kernel in zip(kernels(given[20].params), kernels(early.params), strict=True):
        kept = np.asarray(found != 0)
        np.testing.assert_array_equal(found[kept], kernel[kept])
    for found, gone in zip(kernels(given[20].params), removed(pruned.masks), strict=True):
        np.testing.assert_array_equal(found == 0, gone)
    np.testing.assert_array_equal(given[20].params["Dense_0"]["bias"], early.params["Dense_0"]["bias"])
    # The first training is a plain one, its score the dense one.
    trained = state
    for batch in (BATCHES + BATCHES)[:12]:
        trained = step(trained, batch)
    assert pruned.dense == float(evaluate(trained))


def linear(variables, x):
    layer = variables.get("params", variables)["layer"]
    return x @ layer["kernel"] + jnp.broadcast_to(layer["bias"], (len(x), 10))


@pytest.mark.parametrize(("criterion", "recipe"), [
    ("taylor", prune.iterative_taylor), ("obd", prune.iterative_obd)
])  # fmt: skip
def test_criteria_choose_what_they_score_lowest(criterion, recipe):
    state = created(model=nn.Dense(10))
    state = state.replace(params={"layer": state.params}, apply_fn=linear)
    # Twice each: other signs estimate the Hessian.
    halves = 2 * [(TRAINING.images[i::2].reshape(-1, 64), TRAINING.labels[i::2]) for i in range(2)]
    found = run(recipe, state, loss_fn=loss_fn, calibration=halves, sparsity=0.6, rounds=1, steps=0)
    statistics = jaxeff.calibrate(
        state.params, linear, halves, criterion=criterion, loss_fn=loss_fn, progress=False
    )
    expected = prune.masks(prune.scored(state.params, statistics, criterion), 0.6, scope="global")
    jax.tree.map(np.testing.assert_array_equal, found.masks, expected)
    np.testing.assert_array_equal(found.rounds[0].before, found.rounds[0].after)


def test_gradual_follows_its_schedule():
    counts = []

    def watched(state, batch):
        counts.append(sum(int((kernel == 0).sum()) for kernel in kernels(state.params)))
        return step(state, batch)

    state = created()
    found = run(gradual, state, every=5, fine_tune=6, steps=13, step=watched)
    total = sum(kernel.size for kernel in kernels(state.params))
    shares = [0.9 - 0.9 * (1 - at / 13) ** 3 for at in (0, 5, 10, 13)]
    expected = [round(share * total) for share in shares]
    assert counts == 5 * expected[:1] + 5 * expected[1:2] + 3 * expected[2:3] + 6 * expected[3:]
    assert_zero_where_removed(found)
    assert len(found.rounds) == 1 and int(found.state.step) == 19


def test_the_entropy_gradient_is_the_slope_of_the_penalty():
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((5, 4))
    weight[0, :2] = 0

    def penalty(w):
        p = np.abs(w[w != 0]) / np.abs(w).sum()
        return -np.sum(p * np.log(p)) / np.log(w.size)

    expected = np.zeros_like(weight)
    for index in zip(*np.nonzero(weight), strict=True):
        shift = np.zeros_like(weight)
        shift[index] = 1e-6
        expected[index] = (penalty(weight + shift) - penalty(weight - shift)) / 2e-6
    params = {"w": jnp.asarray(weight, jnp.float32), "bias": jnp.ones((3,)), "still": jnp.zeros((2, 2))}
    gradients = jax.tree.map(jnp.ones_like, params)
    transformation = prune.add_entropy_gradient(2.0)
    found, state = jax.jit(transformation.update)(gradients, transformation.init(params), params)
    np.testing.assert_allclose(found["w"], 1 + 2 * expected, rtol=1e-4)
    np.testing.assert_array_equal(found["bias"], 1)
    np.testing.assert_array_equal(found["still"], 1)
    assert int(state.step) == 1
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (gradients, params))
    assert transformation.update(half[0], state, half[1])[0]["w"].dtype == jnp.bfloat16


def test_the_penalty_concentrates_and_is_gone_in_the_end():
    state = created()
    plain, drawn = (
        run(prune.entropy_regularized, state, strength=strength, steps=66, fine_tune=1, rounds=1)
        for strength in (0.0, 1.0)
    )
    # What magnitude removes is worth less after it.
    assert drawn.rounds[0].before > plain.rounds[0].before
    assert jax.tree.structure(drawn.state) == jax.tree.structure(state)
    assert_zero_where_removed(drawn)
    unpenalized = state
    for batch in 6 * BATCHES:
        unpenalized = step(unpenalized, batch)
    assert plain.dense == float(evaluate(unpenalized))


# BatchNorm


class Normalized(nn.Module):
    momentum: float = 0.99
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(nn.BatchNorm, momentum=self.momentum)
        x = nn.relu(norm(use_running_average=not train)(nn.Dense(12)(x)))
        if self.frozen:
            x = norm(use_running_average=True, name="frozen")(x)
        return norm(use_running_average=not train)(nn.Dense(5)(x))


def normalized(**options):
    model, rng = Normalized(**options), np.random.default_rng(4)
    batches = [jnp.asarray(3 + 20 * rng.standard_normal((n, 6)), jnp.float32) for n in (32, 32, 17)]
    variables = model.init(jax.random.key(0), batches[0])
    if model.frozen:
        variables["batch_stats"]["frozen"] = {"mean": jnp.full(12, 0.3), "var": jnp.full(12, 2.0)}
    return model, variables, batches


def by_hand(variables, batches, frozen):
    """Both norms' statistics in float64, each batch normalized by itself on the way."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    dense = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    normal = lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)  # noqa: E731
    first = [dense(np.asarray(batch, np.float64), "Dense_0") for batch in batches]
    hidden = [np.maximum(normal(x), 0) for x in first]
    if frozen:
        hidden = [(x - 0.3) / np.sqrt(2 + 1e-5) for x in hidden]
    second = [dense(x, "Dense_1") for x in hidden]
    return [np.concatenate(parts) for parts in (first, second)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.999])
def test_batch_norm_over_all_batches(momentum, frozen):
    model, variables, batches = normalized(momentum=momentum, frozen=frozen)
    found = prune.recalibrate(variables, model.apply, batches, train=True)
    names = ("BatchNorm_0", "BatchNorm_1")
    for name, values in zip(names, by_hand(variables, batches, frozen), strict=True):
        scale = values.std(0)
        np.testing.assert_allclose(found[name]["mean"] / scale, values.mean(0) / scale, atol=1e-4)
        np.testing.assert_allclose(found[name]["var"], values.var(0), rtol=2e-4)
    if frozen:
        np.testing.assert_array_equal(found["frozen"]["mean"], variables["batch_stats"]["frozen"]["mean"])
    assert jax.tree.structure(found) == jax.tree.structure(variables["batch_stats"])


def test_what_cannot_be_recalibrated_is_named():
    model, variables, batches = normalized()
    with pytest.raises(ValueError, match="does not change the means and variances"):
        _ = prune.recalibrate(variables, model.apply, batches)
    with pytest.raises(ValueError, match="`variables` must have"):
        _ = prune.recalibrate(variables["params"], model.apply, batches)
    with pytest.raises(ValueError, match="`batches` is empty"):
        _ = prune.recalibrate(variables, model.apply, [], train=True)
    with pytest.raises(ValueError, match="`apply_fn` failed on"):
        _ = prune.recalibrate(variables, model.apply, [X], train=True)


class NormalizedState(TrainState):
    batch_stats: Any


def test_a_recipe_recalibrates_before_it_evaluates(compilations):
    model, variables, batches = normalized()
    state = NormalizedState.create(apply_fn=model.apply, tx=optax.sgd(0.01), **variables)

    def recalibrated(state):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return state.replace(batch_stats=prune.recalibrate(variables, model.apply, batches, train=True))

    seen = []

    def score(state):
        seen.append(state)
        return 1.0

    call = partial(
        prune.iterative, state, lambda state, batch: state, batches, score, sparsity=0.5, steps=1,
        recalibrate=recalibrated, progress=False,
    )  # fmt: skip
    found = call(rounds=2)
    jax.tree.map(np.testing.assert_array_equal, seen[0].batch_stats, state.batch_stats)
    for one in seen[1:]:
        first, _ = by_hand({"params": one.params}, batches, False)
        np.testing.assert_allclose(one.batch_stats["BatchNorm_0"]["var"], first.var(0), rtol=1e-4)
    assert_zero_where_removed_in(found)
    with compilations() as compiled:
        _ = call(rounds=3)
    assert compiled.count == 0
    importance = prune.criterion(
        "taylor",
        2 * [(batches[0], jnp.ones((32, 5)))],
        loss_fn=lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
    )
    assert importance(found.state)["Dense_0"]["kernel"].shape == (6, 12)


def assert_zero_where_removed_in(found):
    for name in ("Dense_0", "Dense_1"):
        np.testing.assert_array_equal(found.state.params[name]["kernel"] == 0, ~found.masks[name]["kernel"])
