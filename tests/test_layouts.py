"""What counts as a layer, a unit and a weight where pruning is concerned: against NumPy, block by block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from network import normal

import jaxeff
from jaxeff import prune
from jaxeff.prune._allocation import erk, lamp

BLOCKS, WIDTH, HEADS = 3, 8, 2


def array(*shape, seed):
    # Later blocks are larger, so that an order over the whole stack would empty the first.
    drawn = normal(*shape, seed=seed).astype(np.float32)
    return drawn * (10.0 ** np.arange(shape[0])).reshape(-1, *(1,) * (len(shape) - 1)).astype(np.float32)


PARAMS = {
    "blocks": {
        "norm": np.abs(array(BLOCKS, WIDTH, seed=1)) + 1,
        "b": array(BLOCKS, WIDTH, seed=2),
        "q": array(BLOCKS, WIDTH, HEADS, 4, seed=3),
        "out": array(BLOCKS, WIDTH, WIDTH, seed=4),
    },
    "head": 100 * normal(WIDTH, 5, seed=5).astype(np.float32),
}
X = normal(16, WIDTH, seed=6).astype(np.float32)
NAMES = {name: [f"blocks/{name}[{i}]" for i in range(BLOCKS)] for name in ("q", "out")}


def model(params, x):
    def step(x, block):
        z = jnp.einsum("nd,dhk->nhk", x * block["norm"][None], block["q"]).reshape(x.shape)
        return jnp.tanh(jax.nn.relu(z + block["b"][None]) @ block["out"]), None

    return jax.lax.scan(step, x, params["blocks"])[0] @ params["head"]


STATISTICS = jaxeff.collect(PARAMS, model, X, criterion="wanda")
SCORES = prune.scored(PARAMS, STATISTICS, "wanda")
LAYOUT = prune.layout(PARAMS, model, X)


def lowest(scores, count):
    """Which of an array are the `count` lowest: a stable sort."""
    removed = np.zeros(scores.size, bool)
    removed[np.argsort(scores.ravel(), kind="stable")[:count]] = True
    return removed.reshape(scores.shape)


def by_block(scores, counts):
    return np.stack([~lowest(block, count) for block, count in zip(scores, counts, strict=True)])


def test_a_layer_is_one_block_of_a_stack_as_in_a_report():
    report = jaxeff.analyze(PARAMS, model, X)
    assert {"blocks/q[2]", "blocks/out[0]"} < report.layers.keys()
    masks = prune.masks(SCORES, 0.5)
    for name, size in (("q", WIDTH * WIDTH), ("out", WIDTH * WIDTH)):
        expected = by_block(np.asarray(SCORES["blocks"][name]), [size // 2] * BLOCKS)
        np.testing.assert_array_equal(masks["blocks"][name], expected)
    assert masks["blocks"]["norm"].shape == masks["blocks"]["b"].shape == ()
    np.testing.assert_array_equal(masks["head"], ~lowest(np.asarray(SCORES["head"]), 20))


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "in jit"])
def test_a_unit_is_one_output_whatever_the_layout(traced):
    masks = (jax.jit if traced else lambda f: f)(lambda scores: prune.masks(scores, 0.25, scope="unit"))(
        SCORES
    )
    q, out, head = (np.asarray(s) for s in (SCORES["blocks"]["q"], SCORES["blocks"]["out"], SCORES["head"]))
    for block in range(BLOCKS):
        for h in range(HEADS):
            for k in range(4):
                np.testing.assert_array_equal(
                    masks["blocks"]["q"][block, :, h, k], ~lowest(q[block, :, h, k], 2)
                )
        for unit in range(WIDTH):
            np.testing.assert_array_equal(
                masks["blocks"]["out"][block, :, unit], ~lowest(out[block, :, unit], 2)
            )
    for unit in range(5):
        np.testing.assert_array_equal(masks["head"][:, unit], ~lowest(head[:, unit], 2))


def test_units_of_weights_that_lie_outputs_first():
    params = {"w": normal(6, 8).astype(np.float32)}
    statistics = jaxeff.collect(params, lambda p, x: x @ p["w"].T, X, criterion="wanda")
    scores = prune.scored(params, statistics, "wanda")
    masks = prune.masks(scores, 0.5, scope="unit")
    np.testing.assert_array_equal(masks["w"], by_block(np.asarray(scores["w"]), [4] * 6))


def test_layers_that_are_stacked_along_another_axis():
    stack = np.moveaxis(PARAMS["blocks"]["out"], 0, 1)

    def along_1(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.moveaxis(params["w"], 1, 0))[0]

    params = {"w": stack}
    scores = prune.scored(params, prunable=prune.layout(params, along_1, X))
    assert scores["w"].axes == prune.Axes(inputs=(0,), units=(2,), layers=(1,))
    masks = prune.masks(scores, 0.5, max_sparsity={"w[2]": 0.25})
    expected = by_block(np.abs(PARAMS["blocks"]["out"]), [32, 32, 16])
    np.testing.assert_array_equal(np.moveaxis(masks["w"], 1, 0), expected)


def test_fractions_of_single_blocks_go_before_those_of_all():
    allocation = {"blocks/q": 0.5, "blocks/q[1]": 0.25, "blocks/out": 0.0, "head": 0.5}
    masks = prune.masks(SCORES, 0.5, allocation=allocation, max_sparsity={"blocks/q[2]": 0.125})
    kept = np.asarray(masks["blocks"]["q"]).reshape(BLOCKS, -1).sum(1)
    np.testing.assert_array_equal(kept, [32, 48, 56])
    assert bool(masks["blocks"]["out"].all())


def test_a_block_keeps_what_it_must_in_one_order_over_all():
    limits = {"blocks/q": 0.9, "blocks/q[0]": 0.25, "blocks/out": 0.75, "head": 0.9}
    masks = prune.masks(SCORES, 0.5, scope="global", max_sparsity=limits)
    arrays = [np.asarray(s) for s in (SCORES["blocks"]["out"], SCORES["blocks"]["q"], SCORES["head"])]
    # What must stay is infinite; then one stable sort over all.
    out = np.where(~by_block(arrays[0], [48] * BLOCKS), arrays[0], np.inf)
    q = np.where(~by_block(arrays[1], [16, 58, 58]), arrays[1], np.inf)
    head = np.where(lowest(arrays[2], 36), arrays[2], np.inf)
    flat = np.concatenate([part.ravel() for part in (out, q, head)])
    kept = ~lowest(flat, round(0.5 * flat.size))
    found = [masks["blocks"]["out"], masks["blocks"]["q"], masks["head"]]
    np.testing.assert_array_equal(np.concatenate([np.ravel(mask) for mask in found]), kept)


def test_a_block_that_vanishes_is_named():
    with pytest.warns(UserWarning, match=r"nothing of 'blocks/out\[0\]' is left"):
        _ = prune.masks({"blocks": {"out": SCORES["blocks"]["out"]}}, 0.4, scope="global")


def test_erk_and_lamp_see_blocks():
    shapes = {"head": (WIDTH, 5)} | dict.fromkeys(NAMES["q"], (WIDTH, HEADS, 4))
    shapes |= dict.fromkeys(NAMES["out"], (WIDTH, WIDTH))
    shares = erk(shapes, 0.6)
    masks = prune.masks(SCORES, 0.6, allocation="erk")
    for name in NAMES:
        removed = (~np.asarray(masks["blocks"][name])).reshape(BLOCKS, -1).sum(1)
        expected = [round(float(shares[block]) * WIDTH * WIDTH) for block in NAMES[name]]
        np.testing.assert_array_equal(removed, expected)
    alone = {
        name: [np.asarray(lamp(block)) for block in np.asarray(SCORES["blocks"][name])] for name in NAMES
    }
    flat = np.concatenate([*map(np.ravel, alone["out"] + alone["q"]), np.ravel(lamp(SCORES["head"].value))])
    masks = prune.masks(SCORES, 0.6, scope="global", allocation="lamp")
    found = np.concatenate(
        [np.ravel(m) for m in (masks["blocks"]["out"], masks["blocks"]["q"], masks["head"])]
    )
    np.testing.assert_array_equal(found, ~lowest(flat, round(0.6 * flat.size)))


def _outlier_ratios(multiple):
    """By layer the ratio of its block, and its own size."""
    ratios, sizes = {}, {}
    blocks = [
        {f"blocks/{name}[{i}]": SCORES["blocks"][name][i] for name in ("q", "out")} for i in range(BLOCKS)
    ]
    for block in (*blocks, {"head": SCORES["head"]}):
        arrays = {name: np.asarray(array, np.float64) for name, array in block.items()}
        whole = np.concatenate([array.ravel() for array in arrays.values()])
        ratios |= dict.fromkeys(arrays, np.mean(whole > multiple * whole.mean()))
        sizes |= {name: array.size for name, array in arrays.items()}
    return ratios, sizes


@pytest.mark.parametrize(("multiple", "spread"), [(2.0, 0.08), (3.0, 0.2)])
def test_owl_is_its_definition(multiple, spread):
    ratios, sizes = _outlier_ratios(multiple)
    found = prune.owl(SCORES, 0.6, multiple=multiple, spread=spread)
    assert found.keys() == ratios.keys()
    mean = sum(ratios[name] * sizes[name] for name in ratios) / sum(sizes.values())
    largest = max(abs(ratio - mean) for ratio in ratios.values())
    for name, ratio in ratios.items():
        assert found[name] == pytest.approx(0.6 - spread * (ratio - mean) / largest, rel=1e-5)


def test_owl_removes_as_much_in_all_and_less_where_outliers_are():
    ratios, sizes = _outlier_ratios(2.0)
    found = prune.owl(SCORES, 0.6, multiple=2.0)
    assert sum(found[name] * sizes[name] for name in found) == pytest.approx(0.6 * sum(sizes.values()))
    assert max(abs(share - 0.6) for share in found.values()) == pytest.approx(0.08)
    by_ratio = sorted(found, key=lambda name: ratios[name])
    assert [found[name] for name in by_ratio] == sorted(found.values(), reverse=True)
    masks = prune.masks(SCORES, 0.6, allocation=found)
    for i, name in enumerate(NAMES["q"]):
        assert np.sum(~masks["blocks"]["q"][i]) == round(found[name] * sizes[name])


def test_owl_of_listed_blocks_is_that_of_stacked_ones():
    listed = {
        f"layers_{i}": {"mixer": {"q": SCORES["blocks"]["q"][i]}, "out": SCORES["blocks"]["out"][i]}
        for i in range(BLOCKS)
    }
    found = prune.owl({"net": listed | {"head": SCORES["head"]}}, 0.6, multiple=2.0)
    expected = prune.owl(SCORES, 0.6, multiple=2.0)
    for i in range(BLOCKS):
        assert found[f"net/layers_{i}/mixer/q"] == pytest.approx(expected[f"blocks/q[{i}]"])
        assert found[f"net/layers_{i}/out"] == pytest.approx(expected[f"blocks/out[{i}]"])
    assert found["net/head"] == pytest.approx(expected["head"])


@pytest.mark.parametrize(
    "tree",
    [
        lambda q, out: {"q": q, "out": out},
        lambda q, out: {"blocks": {"q": q, "out": out}},
        lambda q, out: {"blocks": {"q": q, "out": out}, "embedding": jnp.zeros(())},
        lambda q, out: {
            "net": {"blocks": {"Dense_0": {"kernel": q}, "Dense_1": {"kernel": out}}, "b": jnp.zeros(())}
        },
    ],
    ids=["alone", "in a dict", "beside an embedding", "modules with numbers"],
)
def test_owl_takes_what_a_step_of_a_scan_reads_as_one_block(tree):
    """Also where nothing beside the blocks has scores, as in a language model whose embedding stays whole."""
    q, out = (SCORES["blocks"][name] for name in ("q", "out"))
    both = [np.concatenate([np.ravel(q[i]), np.ravel(out[i])]) for i in range(BLOCKS)]
    ratios = np.array([np.mean(each > 2 * each.mean()) for each in both])
    expected = 0.6 - 0.08 * (ratios - ratios.mean()) / np.abs(ratios - ratios.mean()).max()
    found = prune.owl(tree(q, out), 0.6, multiple=2.0)
    for i in range(BLOCKS):
        own = [share for name, share in found.items() if name.endswith(f"[{i}]")]
        np.testing.assert_allclose(own, [expected[i]] * 2, rtol=1e-5)


def test_owl_of_names_with_points_is_that_of_names_with_slashes():
    flat = {
        f"model.layers.{i}.{name}.weight": SCORES["blocks"][name][i]
        for i in range(BLOCKS)
        for name in ("q", "out")
    }
    nested = {
        f"layers_{i}": {name: SCORES["blocks"][name][i] for name in ("q", "out")} for i in range(BLOCKS)
    }
    found, expected = (prune.owl(scores, 0.6, multiple=2.0) for scores in (flat, nested))
    for i in range(BLOCKS):
        for name in ("q", "out"):
            assert found[f"model.layers.{i}.{name}.weight"] == expected[f"layers_{i}/{name}"]


def test_owl_of_layers_alike_is_uniform():
    scores = {"a": jnp.ones((3, 4)), "b": jnp.ones((5, 4))}
    assert prune.owl(scores, 0.3) == {"a": 0.3, "b": 0.3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.05}, "`spread` 0.08 must leave"),
        ({"sparsity": 0.95}, "`spread` 0.08 must leave"),
        ({"sparsity": 0.5, "spread": -0.1}, "`spread` -0.1 must leave"),
        ({"sparsity": 0.5, "multiple": 0}, "`multiple` must be positive, got 0"),
        ({"sparsity": 0.5, "multiple": float("nan")}, "`multiple` must be positive, got nan"),
        ({"sparsity": 0.5, "scores": {"b": jnp.array([[1.0, jnp.nan]])}}, "`scores` hold nan or infinity"),
        ({"sparsity": 0.5, "scores": {"b": jnp.zeros(())}}, "`scores` holds no scores"),
    ],
)
def test_what_is_wrong_for_owl_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune.owl(**{"scores": SCORES, **arguments})


def test_units_blocks_and_n_of_m_stay_within_a_block():
    units = prune.masks(SCORES, 0.5, pattern=prune.Units())
    sums = np.asarray(SCORES["blocks"]["out"]).sum(1)
    expected = np.broadcast_to(by_block(sums, [4] * BLOCKS)[:, None], (BLOCKS, WIDTH, WIDTH))
    np.testing.assert_array_equal(units["blocks"]["out"], expected)
    tiles = prune.masks({"w": SCORES["blocks"]["out"]}, 0.5, pattern=prune.Block((2, 4)))["w"]
    sums = np.asarray(SCORES["blocks"]["out"]).reshape(BLOCKS, 4, 2, 2, 4).sum((2, 4))
    kept = np.kron(by_block(sums, [4] * BLOCKS), np.ones((1, 2, 4), bool))
    np.testing.assert_array_equal(tiles, kept)


# What may be pruned


def test_the_program_decides_what_is_a_weight():
    assert [(leaf.path, leaf.role) for leaf in LAYOUT.leaves if not leaf.prunable] == [
        ("blocks/b", "bias"), ("blocks/norm", "scale"),
    ]  # fmt: skip
    assert LAYOUT["blocks/q"].axes == prune.Axes((1,), (2, 3), (0,))
    scores = prune.scored(PARAMS, prunable=LAYOUT)
    assert scores["blocks"]["norm"].shape == scores["blocks"]["b"].shape == ()
    np.testing.assert_array_equal(scores["blocks"]["q"], np.abs(PARAMS["blocks"]["q"]))
    except_for = prune.layout(PARAMS, model, X, prunable={"head": False})
    assert prune.scored(PARAMS, prunable=except_for)["head"].shape == ()


def test_without_a_program_what_each_leaf_was_taken_for_is_said():
    with pytest.warns(
        UserWarning, match=r"(?s)under 'blocks' look like stacked layers.*one axis in each of 3"
    ):
        scores = prune.scored(PARAMS)
    assert scores["blocks"]["norm"].shape == scores["blocks"]["b"].shape == ()
    masks = prune.masks(scores, 0.5)
    expected = by_block(np.abs(PARAMS["blocks"]["q"]), [WIDTH * WIDTH // 2] * BLOCKS)
    np.testing.assert_array_equal(masks["blocks"]["q"], expected)
    table = str(prune.layout(PARAMS))
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(LAYOUT)
    assert "3 layers stacked" in table


UNSTACKED = {
    "a dense layer": {"kernel": (8, 4), "bias": (4,)},
    "attention": {"query": {"kernel": (8, 2, 4), "bias": (2, 4)}, "out": {"kernel": (2, 4, 8), "bias": (8,)}},
    "attention without biases": {name: {"kernel": (8, 2, 4)} for name in ("query", "key", "value")},
    "convolutions": {"a": {"kernel": (3, 3, 1, 8)}, "b": {"kernel": (3, 3, 8, 8)}},
    "matrices of one height": {"up": (8, 16), "gate": (8, 16)},
}


@pytest.mark.parametrize("shapes", UNSTACKED.values(), ids=UNSTACKED)
def test_what_is_not_stacked_is_not_taken_for_it(shapes):
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple))
    layout = prune.layout(params)
    assert layout.stacked == ()
    assert all(leaf.prunable for leaf in layout.leaves if not leaf.path.endswith("bias"))


def test_weights_whose_activations_cannot_be_read_are_named():
    """Blocks that are cut out of their stack one by one, in place of a scan."""
    params = {"stack": jnp.ones((2, 3, 3)), "head": jnp.ones((3, 2))}

    def cut(params, x):
        return x @ params["stack"][0] @ params["stack"][1] @ params["head"]

    statistics = jaxeff.collect(params, cut, jnp.ones((4, 3)), criterion="wanda")
    with pytest.warns(UserWarning, match="'stack' scored by magnitude, since criterion 'wanda' .* sliced"):
        scores = prune.scored(params, statistics, "wanda")
    np.testing.assert_array_equal(scores["stack"], np.ones((2, 3, 3)))
    for options in ({"criterion": "wanda", "prunable": {"stack": False}}, {"criterion": "magnitude"}):
        _ = prune.scored(params, statistics, **options)


TIED_TO = {"w": jnp.ones((4, 3))}
TIED = prune.scored(
    TIED_TO,
    prunable=prune.layout(TIED_TO, lambda params, x: x @ params["w"] @ params["w"].T, jnp.ones((2, 4))),
)
WRONG = {
    "unit": (lambda: prune.masks({"w": jnp.ones((4, 2, 2))}, 0.5, scope="unit"), "the units of 'w'"),
    "units of a tied weight": (lambda: prune.masks(TIED, 0.5, scope="unit"), "'w', .* has different outputs"),
    "no such block": (lambda: prune.masks(SCORES, 0.5, max_sparsity={"blocks/q[3]": 0.5}), r"q\[0\] to"),
    "a block is missing": (
        lambda: prune.masks(SCORES, 0.5, allocation={"head": 0.5, "blocks/q": 0.5, "blocks/out[0]": 0.5}),
        r"must name each layer that is pruned, and no other: see 'blocks/out\[1\]'",
    ),
    "pattern": (lambda: prune.masks(SCORES, 0.5, scope="unit", pattern=prune.Units()), "'unit' ranks"),
    "layout": (lambda: prune.scored({"head": jnp.ones((2, 2))}, prunable=LAYOUT), "layout for other params"),
    "exception": (lambda: prune.layout(PARAMS, model, X, prunable={"v": True}), "`prunable` names 'v'"),
    "batch": (lambda: prune.layout(PARAMS, model), "`batch` is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Whoever else goes layer by layer


def test_sensitivity_prunes_one_block_at_a_time():
    y = np.zeros((16, 5), np.float32)
    loss = lambda outputs, targets: jnp.mean(jnp.square(outputs - targets))  # noqa: E731
    found = prune.sensitivity(PARAMS, model, X, targets=y, loss_fn=loss, sparsities=(0.5,))
    assert found.paths == (*NAMES["out"], *NAMES["q"], "head") and found.sizes == (64,) * 6 + (40,)
    for path, measured in zip(found.paths, found.losses[:, 0], strict=True):
        keys, _, block = path.removesuffix("]").partition("[")
        pruned = jax.tree.map(np.copy, PARAMS)
        weight = pruned["head"] if keys == "head" else pruned["blocks"][keys.split("/")[1]][int(block)]
        weight[lowest(np.abs(weight), weight.size // 2)] = 0
        assert float(measured) == pytest.approx(float(loss(model(pruned, X), y)), rel=1e-5)
    allocation = found.allocation(0.25)
    masks = prune.masks(prune.scored(PARAMS, prunable=LAYOUT), 0.25, allocation=found)
    for name in NAMES:
        removed = (~np.asarray(masks["blocks"][name])).reshape(BLOCKS, -1).sum(1)
        np.testing.assert_array_equal(removed, [round(64 * allocation[block]) for block in NAMES[name]])


OPTIMIZERS = {
    "sparsify": lambda how: prune.sparsify(optax.sgd(1e-3), prune.one_shot(0.5), **how),
    "rigl": lambda how: prune.rigl(
        optax.sgd(1e-3), 0.5, key=jax.random.key(0), end=9, every=1, allocation="uniform", **how
    ),
    "sparse evolution": lambda how: prune.sparse_evolution(
        optax.sgd(1e-3), 0.5, key=jax.random.key(0), end=9, every=1, allocation="uniform", **how
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_prune_each_block_alike(make):
    optimizer = make({"prunable": LAYOUT})
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    assert jax.tree.structure(state.masks) == jax.tree.structure(params)
    update = jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    for name in NAMES:
        mask = np.asarray(state.masks["blocks"][name])
        np.testing.assert_array_equal(mask.reshape(BLOCKS, -1).sum(1), [32] * BLOCKS)
        assert not np.asarray(params["blocks"][name])[~mask].any()
    assert bool((params["blocks"]["norm"] != 0).all())


class Trained(NamedTuple):
    params: dict


@pytest.mark.parametrize("by", ["magnitude", "statistics"])
def test_rounds_prune_each_block_alike(by):
    how = (
        {"prunable": LAYOUT}
        if by == "magnitude"
        else {"importance": lambda state: prune.scored(state.params, STATISTICS, "wanda")}
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    found = prune.iterative(
        Trained(params), lambda state, batch: state, [0], lambda state: 0.0,
        sparsity=0.75, rounds=2, steps=1, scope="layer", progress=False, **how,
    )  # fmt: skip
    for name in NAMES:
        kept = np.asarray(found.masks["blocks"][name]).reshape(BLOCKS, -1).sum(1)
        np.testing.assert_array_equal(kept, [16] * BLOCKS)


def test_the_penalty_on_entropy_is_that_of_each_block():
    params = {"blocks": {"out": jnp.asarray(PARAMS["blocks"]["out"])}}
    layout = prune.layout(
        params, lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["blocks"]["out"])[0], X
    )
    penalty = prune.add_entropy_gradient(1.0, layout)
    alone = prune.add_entropy_gradient(1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = penalty.update(zeros, penalty.init(params), params)
    for block, found in zip(params["blocks"]["out"], updates["blocks"]["out"], strict=True):
        expected, _ = alone.update({"w": jnp.zeros_like(block)}, alone.init({"w": block}), {"w": block})
        np.testing.assert_allclose(found, expected["w"], rtol=1e-5)


def test_scores_read_as_the_array_they_hold():
    scores = SCORES["blocks"]["q"]
    assert (scores.shape, scores.ndim, scores.size) == ((3, 8, 2, 4), 4, 192)
    np.testing.assert_array_equal(jnp.sum(scores), jnp.sum(scores.value))
    np.testing.assert_array_equal(scores[1], np.asarray(scores)[1])
    squared = jax.tree.map(jnp.square, SCORES)
    assert squared["blocks"]["q"].axes == scores.axes
