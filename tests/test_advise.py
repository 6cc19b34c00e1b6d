"""Advice holds on the examples that it is given for: what it finds, what it states, and when it stops."""

import dataclasses
import json

import devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxeff
from jaxeff import plot, prune
from jaxeff.advice import Rise
from jaxeff.advice._allocations import by_score, lamp, uniform
from jaxeff.advice._interval import mean_and_bound, rise
from jaxeff.advice._records import LayerAdvice
from jaxeff.advice._runs import OutOfRuns, OutOfTime, Runs
from jaxeff.advice._search import Search, farthest, farthest_setting, improve
from jaxeff.advice._weights import POINTS, spread

INPUTS, USED, HIDDEN, OUTPUTS = 6, 4, 8, 3


@pytest.fixture(autouse=True)
def biases_without_axes():
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def model(params, x):
    """A residual layer that does nothing between two that do; some of the hidden units reach no output."""
    h = jax.nn.relu(x @ params["first"])
    h = h + jax.nn.relu(h @ params["idle"]["up"]) @ params["idle"]["down"]
    return h @ params["last"]


def network():
    last = normal(HIDDEN, OUTPUTS, seed=3)
    last[USED:] = 0
    return {
        "first": normal(INPUTS, HIDDEN, seed=1),
        "idle": {"up": normal(HIDDEN, 5, seed=2), "down": np.zeros((5, HIDDEN), np.float32)},
        "last": last,
    }


def squares(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets), axis=1)


PARAMS = network()
X = normal(160, INPUTS, seed=4)
TARGETS = np.asarray(model(PARAMS, X)) + 0.5 * normal(160, OUTPUTS, seed=5)
HELD_OUT = normal(90, INPUTS, seed=6)
HELD_OUT = HELD_OUT, np.asarray(model(PARAMS, HELD_OUT)) + 0.5 * normal(90, OUTPUTS, seed=7)


def advise(**changed):
    arguments = {
        "loss_fn": squares, "targets": TARGETS, "held_out": HELD_OUT, "criteria": ("magnitude", "fisher"),
        "tolerance": 0.0, "progress": False,
    }  # fmt: skip
    return jaxeff.advise(PARAMS, model, X, **{**arguments, **changed})


@pytest.fixture(scope="module")
def found():
    with jax.numpy_rank_promotion("allow"):
        return advise()


def held_out_loss(params):
    batch, targets = HELD_OUT
    return np.asarray(squares(model(params, batch), targets), np.float64)


def test_all_that_does_nothing_goes_at_no_cost(found):
    idle = HIDDEN * 5 + 5 * HIDDEN + (HIDDEN - USED) * (INPUTS + OUTPUTS)
    assert found.weights.removed >= 0.9 * idle
    assert found.weights.search_rise <= 0
    by_path = {layer.path: layer for layer in found.layers if layer.kind == "weights"}
    assert by_path["idle/down"].alone == by_path["idle/up"].alone == 0.99


def test_units_that_do_nothing_go_at_no_cost(found):
    idle = {"first:1": HIDDEN - USED, "idle/up:1": 4}
    sizes = {"first:1": HIDDEN, "idle/up:1": 5}
    assert {name: sizes[name] - size for name, size in found.plan.sizes().items()} == idle
    assert (found.units.rise.low, found.units.rise.mean, found.units.rise.high) == (0, 0, 0)
    small, small_apply = prune.compact(PARAMS, model, X, found.plan)
    np.testing.assert_allclose(small_apply(small, X), model(PARAMS, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tolerance", [0.05, 0.5])
def test_masks_and_plan_have_the_loss_that_is_stated(tolerance):
    found = advise(tolerance=tolerance)
    dense = held_out_loss(PARAMS)
    masked = prune.apply(PARAMS, found.masks)
    smaller = prune.apply(PARAMS, found.plan.masks(PARAMS))
    for removal, params in ((found.weights, masked), (found.units, smaller)):
        measured = held_out_loss(params).mean() / dense.mean() - 1
        assert removal.rise.mean == pytest.approx(measured, rel=1e-4, abs=1e-6)
        assert removal.rise.low <= measured + 1e-6 and measured - 1e-6 <= removal.rise.high
        assert removal.search_rise <= tolerance
    assert (
        sum(int(np.sum(~np.asarray(mask))) for mask in jax.tree.leaves(found.masks)) == found.weights.removed
    )


def test_the_joint_allocation_is_never_worse_than_a_start():
    found = advise(tolerance=0.2)
    assert found.weights.fraction >= max(found.weights.starts.values())
    assert set(found.weights.starts) == {"uniform", "global", "erk", "lamp", "sensitivity"}
    assert found.reached["random"] <= max(found.reached.values())


@pytest.mark.filterwarnings("ignore:nothing of")
def test_masks_are_those_of_prune_masks():
    found = advise(tolerance=0.2)
    shares = {layer.path: layer.jointly for layer in found.layers if layer.kind == "weights"}
    criterion = {"criterion": found.weights.criterion, "loss_fn": squares}
    statistics = jaxeff.collect(PARAMS, model, X, targets=TARGETS, **criterion)
    expected = prune.masks(
        prune.scored(PARAMS, statistics, found.weights.criterion), 0.5, allocation=_below_one(shares)
    )
    whole = {path for path, share in shares.items() if share == 1}
    for path, mask in (("first", found.masks["first"]), ("last", found.masks["last"])):
        if path not in whole:
            np.testing.assert_array_equal(mask, expected[path])


def _below_one(shares):
    return {path: min(share, 0.999) for path, share in shares.items()}


def test_a_second_call_compiles_next_to_nothing(compilations):
    _ = advise(tolerance=0.3)
    with compilations() as again:
        _ = advise(tolerance=0.3)
    # What is left compiles the networks to time them.
    assert again.count <= 12


def test_costs_at_most_300_forward_passes(found):
    assert 0 < found.forwards <= 300


class Stop:
    """A measure that is interrupted after so many runs."""

    def __init__(self, runs):
        self.left = runs

    def __call__(self, params, apply_fn):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return -held_out_loss(params)


def test_an_interrupted_search_returns_what_it_has():
    found = advise(held_out=None, evaluate=Stop(30), tolerance=0.1)
    assert found.interrupted == "by the keyboard"
    assert found.weights.fraction > 0 and found.units is None
    assert "Interrupted by the keyboard" in str(found)


def test_what_the_search_did_not_get_to_is_not_compared():
    found = advise(held_out=None, evaluate=Stop(5), tolerance=0.5)
    assert found.weights.fraction > 0 and not found.weights.starts
    assert "The same fraction of each layer" not in str(found)


def test_time_that_is_up_ends_the_search():
    found = advise(budget_s=1e-9)
    assert found.interrupted == "after `budget_s` of 1e-09 s"
    assert found.weights is None and found.masks is None and found.plan is None
    assert "Nothing was measured" in str(found)


def test_a_deep_network_is_advised_on_with_the_fewest_runs():
    """Its layers alone take them all, and none is left for the units."""
    params = {f"layer{number:02}": normal(4, 4, seed=number) / 2 for number in range(24)}

    def deep(params, x):
        for weight in params.values():
            x = jax.nn.relu(x @ weight) + 0.5
        return x

    x = normal(16, 4)
    found = jaxeff.advise(
        params,
        deep,
        x,
        loss_fn=squares,
        targets=deep(params, x) + 0.1,
        criteria=("magnitude",),
        max_runs=100,
        progress=False,
    )
    assert found.forwards <= 100 and found.interrupted is None
    assert found.weights is not None and len(found.layers) >= 24


def test_scores_take_an_absolute_tolerance():
    found = advise(held_out=None, evaluate=lambda params, apply_fn: -held_out_loss(params), tolerance=0.05)
    assert found.by_score and found.held_out == len(HELD_OUT[1]) // 4
    assert found.weights.search_rise <= 0.05
    assert "score" in found.headline() and "%" not in found.headline().split("score")[1].split(")")[0]


def test_one_score_for_all_examples_has_no_interval():
    evaluate = lambda params, apply_fn: -float(held_out_loss(params).mean())  # noqa: E731
    found = advise(held_out=None, evaluate=evaluate, tolerance=0.05)
    assert found.weights.rise.low is None and found.held_out == 0
    assert "no interval" in str(found)


def cosines(params, apply_fn):
    """What a score compares with the dense network: nothing goes at 1, where no loss would have a gradient."""
    # A one beside the outputs, some of which are 0.
    pruned, dense = (
        np.insert(np.asarray(each, np.float64), 0, 1, axis=1)
        for each in (apply_fn(params, X), model(PARAMS, X))
    )
    return np.sum(pruned * dense, 1) / np.linalg.norm(pruned, axis=1) / np.linalg.norm(dense, axis=1)


@pytest.fixture(scope="module")
def by_cosine():
    with jax.numpy_rank_promotion("allow"):
        return jaxeff.advise(PARAMS, model, X, evaluate=cosines, tolerance=0.05, progress=False)


def test_a_score_needs_no_loss(by_cosine):
    assert set(by_cosine.reached) == {"magnitude", "wanda", "random"}
    assert by_cosine.dense == pytest.approx(-1)
    lower = 1 - np.mean(cosines(prune.apply(PARAMS, by_cosine.masks), model))
    assert 0 < lower < 0.06
    searched, held = by_cosine.searched, by_cosine.held_out
    assert searched + held == len(X)
    parts = by_cosine.weights.search_rise * searched + by_cosine.weights.rise.mean * held
    assert parts / len(X) == pytest.approx(lower, abs=1e-6)


def test_with_a_loss_a_score_has_the_criteria_of_gradients():
    found = jaxeff.advise(
        PARAMS, model, X, loss_fn=squares, targets=TARGETS, evaluate=cosines, tolerance=0.05, max_runs=100,
        progress=False,
    )  # fmt: skip
    assert set(found.reached) == {"magnitude", "wanda", "fisher", "random"}
    # Nothing is left for units, which is said.
    assert found.units is None and "no forward passes were left for them" in str(found)


@pytest.mark.parametrize(
    ("rise", "said"),
    [
        (Rise(0.0123, 0.01, 0.02, False, 40), "score lower by 0.0123 (0.0100 to 0.0200)"),
        (Rise(-0.002, -0.004, 0.001, False, 40), "score higher by 0.0020 (-0.0010 to 0.0040)"),
    ],
)
def test_changes_of_a_score_are_no_scores(by_cosine, rise, said):
    removal = dataclasses.replace(by_cosine.weights, rise=rise)
    text = str(dataclasses.replace(by_cosine, weights=removal))
    assert said in " ".join(text.split())
    assert "0.05 below the dense score" in " ".join(text.split())
    assert "loss" not in text


def test_a_score_that_fell_by_more_than_the_tolerance_is_said(by_cosine):
    removal = dataclasses.replace(by_cosine.weights, rise=Rise(0.3, 0.2, 0.4, False, 40))
    text = " ".join(str(dataclasses.replace(by_cosine, weights=removal)).split())
    assert "at 0 stayed within 0.05 below the dense score on 120 examples, but did not on others" in text
    assert "Without these weights the score falls by more than the tolerance" in text


@pytest.mark.parametrize(
    ("rise", "said"),
    [
        (Rise(0.04, 0.01, 0.2, False, 40), "can be zeroed at once: "),
        (Rise(0.06, 0.01, 0.2, False, 40), "examples, but may not on others: "),
        (Rise(0.2, 0.06, 0.3, False, 40), "examples, but did not on others: "),
        (Rise(0.05, None, None, False, 1), "can be zeroed at once: "),
    ],
)
def test_the_headline_promises_what_held_on_other_examples(by_cosine, rise, said):
    removal = dataclasses.replace(by_cosine.weights, rise=rise)
    assert said in dataclasses.replace(by_cosine, weights=removal, units=None).headline()


@pytest.mark.parametrize(
    ("reached", "chance"),
    [
        ({"magnitude": 0.3, "wanda": 0.5, "random": 0.2}, False),
        ({"magnitude": 0.3, "wanda": 0.5, "random": 0.5}, True),
        ({"magnitude": 0.3, "wanda": 0.1, "random": 0.98}, True),
    ],
)
def test_criteria_that_go_no_further_than_chance_are_said_to(found, reached, chance):
    advice = dataclasses.replace(found, reached=reached)
    (of_order,) = [each for each in advice.recommendations() if each.rule == "criterion"]
    assert ("No criterion goes further than chance" in of_order.message) == chance


def test_a_model_that_takes_no_batch_of_one_is_searched_by_other_criteria():
    def of_several(params, x):
        if len(x) < 2:
            raise ValueError("too few examples.")
        return model(params, x)

    found = jaxeff.advise(
        PARAMS, of_several, X, loss_fn=squares, targets=TARGETS, tolerance=0.5, max_runs=100, progress=False
    )
    assert set(found.reached) == {"magnitude", "wanda", "random"}
    (note,) = [note for note in found.notes if note.startswith("Without fisher")]
    assert "It raised ValueError: too few examples." in note and not note.endswith("..")


def looks_up(params, tokens):
    return jax.nn.relu(params["table"][tokens] @ params["up"]) @ params["down"]


def test_tables_that_are_only_looked_up_stay_whole():
    params = {"table": normal(50, 6), "up": normal(6, 12), "down": normal(12, 4)}
    tokens = np.random.default_rng(0).integers(5, size=64)
    targets = np.asarray(looks_up(params, tokens)) + normal(64, 4)
    found = jaxeff.advise(
        params,
        looks_up,
        tokens,
        loss_fn=squares,
        targets=targets,
        tolerance=0.5,
        max_runs=120,
        progress=False,
    )
    assert found.weights.total == 6 * 12 + 12 * 4
    assert np.all(found.masks["table"])
    assert any("No single weights of table go: it is only looked up" in note for note in found.notes)


def test_tables_that_are_also_multiplied_may_lose_weights():
    params = {"table": normal(20, 6)}
    tied = lambda params, tokens: params["table"][tokens] @ params["table"].T  # noqa: E731
    tokens = np.random.default_rng(0).integers(5, size=64)
    targets = np.asarray(tied(params, tokens)) + normal(64, 20)
    found = jaxeff.advise(
        params, tied, tokens, loss_fn=squares, targets=targets, tolerance=0.5, max_runs=100, progress=False
    )
    assert found.weights.total == 20 * 6 and not np.all(found.masks["table"])


def test_units_that_no_criterion_scores_stay_whole():
    params = {"position": normal(9, 6), "up": normal(6, 12), "down": normal(12, 4)}

    def positioned(params, x):
        return jax.nn.relu((x + params["position"][:4]) @ params["up"]) @ params["down"]

    x = normal(64, 4, 6)
    (beyond,) = [group for group in prune.groups(params, positioned, x).unlocked if "position" in group.name]
    targets = np.asarray(positioned(params, x)) + 20 * normal(64, 4, 4)
    losses = lambda outputs, targets: jnp.mean(jnp.square(outputs - targets), axis=(1, 2))  # noqa: E731
    found = jaxeff.advise(
        params, positioned, x, loss_fn=losses, targets=targets, tolerance=0.5, progress=False
    )
    assert found.units.total == 12 and found.units.removed
    assert beyond.name not in {layer.path for layer in found.layers}
    assert f"{beyond.name} stays whole: no criterion scores it." in found.notes


def test_few_held_out_examples_are_said_to_tell_little():
    found = jaxeff.advise(
        PARAMS, model, X[:32], loss_fn=squares, targets=TARGETS[:32], tolerance=0.5, progress=False
    )
    assert found.held_out == 8 and found.searched == 24
    assert "wide on 8 held-out examples" in str(found)


def test_one_class_is_said_to_tell_little():
    targets = np.zeros(160, np.int32)
    found = advise(
        loss_fn=lambda outputs, targets: jnp.mean(outputs**2, axis=1) + 0 * targets,
        targets=targets,
        held_out=None,
    )
    assert "All targets are 0" in str(found)


def test_nothing_within_the_tolerance_is_said():
    params = {"w": np.eye(4, dtype=np.float32)}
    x = 1 + np.abs(normal(64, 4, seed=8))
    found = jaxeff.advise(
        params, lambda p, x: x @ p["w"] * 100, x, loss_fn=squares, targets=100 * x + 0.01, tolerance=0.0,
        criteria=("fisher",), progress=False,
    )  # fmt: skip
    # All that may go at no cost are the zeros of the identity.
    assert found.weights is None or found.weights.removed <= 12
    dense = {"w": 1 + np.abs(normal(4, 4))}
    found = jaxeff.advise(
        dense, lambda p, x: x @ p["w"], x, loss_fn=squares, targets=x @ dense["w"] + 1e-3, tolerance=0.0,
        criteria=("magnitude",), progress=False,
    )  # fmt: skip
    assert found.weights is None
    assert found.headline().startswith("No weights can be zeroed at once within the tolerance of 0 %")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tolerance": -0.1}, "`tolerance`"),
        ({"tolerance": float("nan")}, "`tolerance`"),
        ({"budget_s": 0}, "`budget_s`"),
        ({"budget_s": -1.0}, "`budget_s`"),
        ({"max_runs": 10}, "`max_runs`"),
        ({"criteria": ("random",)}, "`criteria`"),
        (
            {"loss_fn": lambda outputs, targets: jnp.mean((outputs - targets) ** 2)},
            "one loss for each example",
        ),
        ({"loss_fn": lambda outputs, targets: squares(outputs, targets) * jnp.nan}, "the loss is nan"),
        ({"targets": TARGETS * np.nan}, "`targets` is not finite"),
        ({"held_out": (HELD_OUT[0][:1], HELD_OUT[1][:1])}, "`held_out` has 1 example"),
        ({"evaluate": lambda params, apply_fn: 1.0}, "`held_out` is for the loss"),
    ],
)
def test_what_cannot_be_is_named(changed, named):
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        _ = advise(**changed)


@pytest.mark.parametrize(
    "given", [{"targets": TARGETS}, {"targets": TARGETS, "evaluate": cosines}, {"loss_fn": 1}, {}]
)
def test_a_loss_that_is_no_function_is_refused(given):
    with pytest.raises(TypeError, match="`loss_fn` must be a function .* got (None|1)"):
        _ = jaxeff.advise(PARAMS, model, X, **given)


def test_too_few_scores_are_refused():
    with pytest.raises(ValueError, match="`evaluate` returned scores of 3 examples"):
        _ = jaxeff.advise(PARAMS, model, X, evaluate=lambda params, apply_fn: np.ones(3), progress=False)


def test_a_score_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="`evaluate` must be a function .* got 0.9"):
        _ = jaxeff.advise(PARAMS, model, X, evaluate=0.9)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"loss_fn": squares}, "`targets` is missing"),
        ({"evaluate": cosines, "criteria": "fisher"}, "`loss_fn` is missing: criterion 'fisher'"),
    ],
)
def test_what_a_loss_needs_is_named(given, named):
    with pytest.raises(ValueError, match=named):
        _ = jaxeff.advise(PARAMS, model, X, **given)


def test_a_batch_with_too_few_examples_is_refused():
    with pytest.raises(ValueError, match="`batch` has 7 examples"):
        _ = jaxeff.advise(PARAMS, model, X[:7], loss_fn=squares, targets=TARGETS[:7])


def test_shows_itself(found):
    assert repr(found) == str(found)
    assert len(str(found).splitlines()) < 60
    assert all(len(line) <= 110 for line in str(found).splitlines())
    assert len(found.recommendations()) <= 7
    assert "<table>" in found._repr_html_()
    assert json.loads(found.to_json())["weights"]["removed"] == found.weights.removed
    records = found.to_records()
    assert len({tuple(record) for record in records}) == 1 and len(records) == len(found.layers)
    assert list(found.report) and found.report.criterion == found.weights.criterion


def test_the_nodes_of_a_graph_are_not_set_aside_by_themselves():
    graph = {"edges": np.arange(24) % 12, "nodes": normal(12, 6), "positions": normal(1, 6)}
    targets = normal(12, 4)

    def messages(params, graph):
        x = jax.ops.segment_sum(graph["nodes"][graph["edges"]], np.arange(24) // 2, num_segments=12)
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    def search(**held_out):
        return jaxeff.advise(
            {"up": normal(6, 12), "down": normal(12, 4)},
            messages,
            graph,
            loss_fn=squares,
            targets=targets,
            criteria="magnitude",
            tolerance=0.5,
            max_runs=100,
            progress=False,
            **held_out,
        )

    with pytest.raises(ValueError, match="24 integers.*`held_out=.batch, targets.`"):
        search()
    assert search(held_out=(graph, targets)).weights.rise.examples == 12


@pytest.mark.parametrize(
    "shared",
    [
        np.tril(np.ones((5, 5), np.float32)),
        np.tril(np.ones((5, 5), np.int32)),
        np.arange(5),
        np.arange(5)[None].repeat(5, 0),
        np.array([40, 7, 9, 33, 99]),
        jax.random.PRNGKey(7),
    ],
    ids=["mask", "integer mask", "positions", "positions of positions", "classes", "raw key"],
)
def test_arrays_that_all_examples_share_stay_whole(shared):
    """Also where they come first in the batch."""

    def averages(params, batch):
        return (
            params["embedding"][batch["tokens"]].mean(1) @ params["head"]
            + batch["shared"].astype(float).mean()
        )

    found = jaxeff.advise(
        {"embedding": normal(8, 6), "head": normal(6, 4)},
        averages,
        {"shared": shared, "tokens": np.arange(32 * 5).reshape(32, 5) % 8},
        loss_fn=squares,
        targets=normal(32, 4),
        criteria="magnitude",
        tolerance=0.5,
        max_runs=100,
        progress=False,
    )
    assert found.weights.rise.examples == 8


def test_listed_and_scanned_blocks_share_a_row(found):
    listed = [LayerAdvice(f"block{i}/up", "weights", 64, "wanda", 0.5, i / 40) for i in range(20)]
    scanned = [LayerAdvice(f"blocks/down[{i}]", "weights", 32, "wanda", None, 0.25) for i in range(20)]
    shown = str(dataclasses.replace(found, layers=(*listed, *scanned)))
    row = next(line for line in shown.splitlines() if line.startswith("block0–19/up"))
    assert row.split()[1:] == ["weights", "1.28k", "wanda", "50%", "0.0–47.5%"]
    assert "blocks/down[0–19]" in shown and "block7/up" not in shown
    assert "[layer] block0–19/up: 24 % goes in the joint allocation, 16 % of all weights" in shown


def test_is_drawn(found):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    axes = plot.advice(found)
    assert axes.get_xlabel() and axes.get_ylabel()
    pyplot.close(axes.figure)


def test_batch_norm_is_removed_with_its_statistics():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)(x)
            return nn.Dense(2)(nn.relu(x))

    module, x = Normalized(), normal(64, 4, seed=9)
    variables = module.init(jax.random.key(0), x)
    stats = variables["batch_stats"]["BatchNorm_0"]
    variables = {**variables, "batch_stats": {"BatchNorm_0": {**stats, "mean": stats["mean"] - 1.0}}}
    targets = module.apply(variables, x) + 1
    found = jaxeff.advise(
        variables, module.apply, x, loss_fn=squares, targets=targets, tolerance=0.3, progress=False
    )
    if found.plan is not None:
        small, small_apply = prune.compact(variables, module.apply, x, found.plan)
        masked = prune.apply(variables, found.plan.masks(variables))
        np.testing.assert_allclose(small_apply(small, x), module.apply(masked, x), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(found.masks) == jax.tree.structure(variables)


def test_a_block_of_a_scan_that_does_nothing_goes():
    blocks = {"up": normal(4, 6, 5, seed=1), "down": normal(4, 5, 6, seed=2)}
    blocks["down"][2] = 0

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None), x, params)[0]

    x = normal(80, 6, seed=3)
    found = jaxeff.advise(
        blocks, scanned, x, loss_fn=squares, targets=scanned(blocks, x) + normal(80, 6, seed=4),
        tolerance=0.0, progress=False,
    )  # fmt: skip
    assert found.units.kinds["block"] == (1, 4)
    assert [elements for elements in found.plan.removed.values()] == [(2,)]
    assert found.units.rise.high == 0
    assert "1 of 4 blocks can be removed" in found.headline()
    assert "down[3]" in str(found)


# The parts.


@pytest.mark.parametrize("number", range(1, 9))
def test_fractions_of_a_layer_alone_ascend_and_are_not_the_least_where_they_are_few(number):
    points = spread(number)
    assert len(points) == number and list(points) == sorted(set(points)) and set(points) <= set(POINTS)
    assert number > 4 or points[0] > POINTS[0]
    assert number < 8 or points == POINTS


def test_where_no_setting_reaches_anything_the_one_that_costs_less_is_the_best():
    losses = {"a": 3.0, "b": 2.0, "c": np.nan}
    search = Search(
        lambda counts, setting: (losses[setting],) * 2, *[np.ones(2) * 8, np.ones(2), np.ones(2) * 8],
        allowed=1.0, dense=0.0,
    )  # fmt: skip
    for setting in losses:
        assert farthest(search, uniform(search.sizes), "uniform", 3, setting) is None
    assert farthest_setting(search, dict.fromkeys(losses, 0.0)) == "b"
    assert farthest_setting(search, {"a": 0.1, "b": 0.0}) == "a"


def test_a_rise_that_is_noise_is_no_gain():
    rng = np.random.default_rng(0)
    dense = np.ones(100)
    noisy = dense + rng.normal(size=100)
    for relative in (True, False):
        mean, bound = mean_and_bound(dense, noisy, relative=relative)
        assert bound - mean == pytest.approx(noisy.std(ddof=1) / 10)
        assert mean_and_bound(dense, dense, relative=relative) == (1, 1)
    # A loss that grows by a fraction of itself rises by that fraction, without error.
    skewed = rng.lognormal(size=100)
    mean, bound = mean_and_bound(skewed, 1.1 * skewed, relative=True)
    assert bound == pytest.approx(mean) == pytest.approx(1.1 * skewed.mean())


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        dense = rng.lognormal(sigma=1, size=100)
        pruned = dense + rng.lognormal(sigma=1, size=100) * 0.2
        found = rise(dense, pruned, relative=True, seed=seed)
        covered += found.low <= 0.2 <= found.high
    assert covered >= 180


def test_equal_losses_have_an_interval_of_zero():
    losses = np.arange(1.0, 9.0)
    found = rise(losses, losses, relative=True, seed=0)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def additive(costs, sizes, values=None):
    """A search whose loss is a sum over parts, quadratic in what goes."""
    sizes = np.array(sizes, float)
    values = np.ones(len(sizes)) if values is None else np.array(values, float)
    loss = lambda counts, _: (float(np.sum(costs * (counts / sizes) ** 2)),) * 2  # noqa: E731
    return Search(loss, sizes, values, sizes, allowed=1.0, dense=0.0)


def test_bisection_reaches_the_tolerance():
    search = additive(np.array([4.0]), [1000])
    point = farthest(search, uniform(search.sizes), "uniform", 10)
    assert point.fraction == pytest.approx(0.5, abs=0.002)


def test_the_search_moves_sparsity_to_where_it_costs_least():
    costs = np.array([100.0, 0.5, 0.5])
    search = additive(costs, [100, 100, 100])
    start = farthest(search, uniform(search.sizes), "uniform", 7)
    improve(search, np.random.default_rng(0))
    # The optimum of the quadratic: all of two layers, and nothing of the first.
    assert start.fraction < 0.12 and search.best.fraction > 0.6
    assert search.best.loss <= 1


def test_one_order_over_all_takes_the_lowest_scores():
    curves = np.array([np.linspace(0, 1, 101), np.linspace(1, 2, 101)])
    family = by_score(np.array([1000.0, 1000.0]), np.ones(2), curves)
    np.testing.assert_allclose(family(0.25), (500, 0), atol=10)
    np.testing.assert_allclose(family(0.75), (1000, 500), atol=20)


def test_lamp_keeps_the_largest_of_each_layer():
    scores = lamp(np.array([[0.1, 0.2, 0.3], [10.0, 20.0, 30.0]]))
    np.testing.assert_allclose(scores[0], scores[1])
    assert (scores[:, -1] == 1).all()


def test_runs_end_a_stage_and_time_ends_all():
    runs = Runs(10, None)
    with runs.at_most(3):
        for _ in range(5):
            runs.spend()
    assert runs.count == 3
    with runs.keeping(5):
        for _ in range(9):
            runs.spend()
    assert runs.count == 5
    with pytest.raises(OutOfRuns):
        runs.spend(6)
    runs.spend(6, always=True)
    assert runs.count == 11
    late = Runs(10, 1e-9)
    with pytest.raises(OutOfTime):
        late.spend()


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jaxeff
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

for mode in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(mode,) * 2)
    random = np.random.default_rng(0)
    put = lambda array, *spec: jax.device_put(array.astype(np.float32), NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        up, down = random.normal(size=(3, 8, 16)), random.normal(size=(3, 16, 8))
        down[1] = 0
        params = {"up": put(up, None, None, "model"), "down": put(down, None, "model", None)}
        x, noise = (put(random.normal(size=(64, 8)), "data", None) for _ in range(2))
        out = {"out_sharding": P("data", None)} if mode == AxisType.Explicit else {}

        def model(params, x):
            step = lambda h, w: (h + jnp.matmul(jax.nn.relu(h @ w["up"]), w["down"], **out), None)
            return jax.lax.scan(step, x, params)[0]

        found = jaxeff.advise(
            params, model, x, loss_fn=lambda outputs, targets: jnp.mean((outputs - targets) ** 2, axis=1),
            targets=model(params, x) + noise, tolerance=0.0, criteria=("magnitude",),
        )
        assert found.units.kinds["block"] == (1, 3), found
        assert found.weights.fraction > 0.3, found
        print("held", mode)
"""


@pytest.mark.slow
def test_sharded_params_and_batches():
    assert devices.run(_SHARDED, 4).count("held") == 2
