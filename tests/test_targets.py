"""Plans for a target meet it, remove no more than that takes, and lose as little importance as any."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrinkable import NETWORKS
from test_structure import large

from jaxeff import cost, prune
from jaxeff.graph.coupling_kinds import GROUP_KINDS
from jaxeff.prune import _targets


def scores_of(groups, seed=0):
    """Importance of every element, by group."""
    draw = np.random.default_rng(seed)
    return {group.name: draw.gamma(1.0, size=(*group.blocks, group.size)) for group in groups.unlocked}


def lost(plan, scores):
    return sum(
        float(np.take_along_axis(scores[name], np.asarray(removed), -1).sum())
        for name, removed in plan.removed.items()
    )


def shares(groups, sizes, target):
    full, found = groups.costs(), groups.costs(sizes)
    return {key: found[key] / full[key] / fraction for key, fraction in target.items()}


def meets(groups, sizes, target):
    return max(shares(groups, sizes, target).values()) <= 1


def check_minimal(groups, plan, target, round_to=1):
    """It meets the target, and with the next larger size of any one group it would not."""
    sizes = plan.sizes()
    assert meets(groups, sizes, target)
    for name, size in sizes.items():
        larger = min(groups[name].size, (size // round_to + 1) * round_to)
        assert not meets(groups, {**sizes, name: larger}, target), name


TARGETS = [{"macs": 0.7}, {"params": 0.5}, {"bytes": 0.8, "macs": 0.6}]


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_meets_its_target_and_no_step_of_it_could_be_undone(name, searched, monkeypatch):
    if searched:
        monkeypatch.setattr(_targets, "MOST", 0)
    groups, tried = large(name)[2], 0
    for target in TARGETS:
        try:
            plan = prune.plan(groups, scores_of(groups), target=target, kinds=GROUP_KINDS, normalize="none")
        except ValueError as error:
            assert "out of reach" in str(error)
            continue
        check_minimal(groups, plan, target)
        tried += 1
    assert tried


def smallest_loss(groups, scores, target, options):
    """By trying all combinations of sizes."""
    best = math.inf
    for sizes in itertools.product(*options.values()):
        chosen = dict(zip(options, sizes, strict=True))
        if meets(groups, chosen, target):
            loss = sum(
                np.sort(scores[name], axis=-1)[..., : groups[name].size - size].sum()
                for name, size in chosen.items()
            )
            best = min(best, loss)
    return best


SMALL = ["mlp", "mobilenet", "grouped convolution", "gpt", "shuffled"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SMALL)
def test_the_choice_is_that_of_brute_force(name, seed):
    groups = large(name)[2]
    scores = scores_of(groups, seed)
    options = {group.name: range(1, group.size + 1) for group in groups.unlocked}
    for target in TARGETS:
        best = smallest_loss(groups, scores, target, options)
        if best < math.inf:
            plan = prune.plan(groups, scores, target=target, kinds=GROUP_KINDS, normalize="none")
            assert lost(plan, scores) == pytest.approx(best)


@pytest.mark.parametrize("name", SMALL)
def test_a_search_comes_near(name, monkeypatch):
    groups = large(name)[2]
    ratios = []
    for seed, target in itertools.product(range(10), TARGETS):
        scores = scores_of(groups, seed)
        try:
            plans = []
            for most in (20_000, 0):
                monkeypatch.setattr(_targets, "MOST", most)
                plans.append(prune.plan(groups, scores, target=target, kinds=GROUP_KINDS, normalize="none"))
        except ValueError as error:
            assert "out of reach" in str(error)
            continue
        best, found = (lost(plan, scores) for plan in plans)
        assert found >= best - 1e-9
        ratios.append(found / best)
    assert np.mean(ratios) < 1.05


def test_sizes_stay_within_what_is_asked():
    network, variables, groups = large("cnn with flatten")
    first, second = (group.name for group in groups.unlocked)
    scores, target = scores_of(groups), {"macs": 0.7}
    options = {"normalize": "none", "target": target}
    plan = prune.plan(groups, scores, round_to=4, **options)
    check_minimal(groups, plan, target, round_to=4)
    assert {size % 4 for size in plan.sizes().values()} <= {0, groups[first].size % 4}
    assert plan.removed == prune.plan(groups, scores, round_to={"channel": 4, "unit": 3}, **options).removed
    plan = prune.plan(groups, scores, minimum={first: 5}, max_sparsity={second: 0.5}, **options)
    assert plan.sizes().get(first, 6) >= 5 and plan.sizes().get(second, 8) >= 4
    # What is left is what was promised.
    _, small_apply = small = prune.compact(variables, network.module.apply, network.batch, plan)
    left = cost.count(*small, network.batch).macs
    assert left <= 0.7 * cost.count(variables, network.module.apply, network.batch).macs
    assert left == groups.costs(plan.sizes())["macs"]


def test_many_groups_of_few_sizes():
    params = {f"w{layer}": np.ones((4, 4), np.float32) for layer in range(70)}

    def model(params, x):
        for layer in range(70):
            x = jnp.tanh(x @ params[f"w{layer}"])
        return x

    groups = prune.groups(jax.tree.map(jnp.asarray, params), model, jnp.ones((2, 4)))
    assert len(groups.unlocked) == 69
    scores, few = scores_of(groups), groups.unlocked[:3]
    others = {group.name: 0.0 for group in groups.unlocked[3:]}
    plan = prune.plan(groups, scores, target={"params": 0.97}, max_sparsity=others, normalize="none")
    check_minimal(groups, plan, {"params": 0.97})
    # Two sizes of three groups, one of each other: NumPy has no array of 69 axes.
    plan = prune.plan(
        groups,
        scores,
        target={"params": 0.98},
        round_to=2,
        minimum={group.name: 2 for group in few} | dict.fromkeys(others, 3),
    )
    assert plan.sizes().keys() <= {group.name for group in few}
    check_minimal(groups, plan, {"params": 0.98}, round_to=2)


def test_widths_heads_and_depth_share_a_budget():
    network, variables, groups = large("scanned transformer")
    kinds = {group.name: group.kind for group in groups.unlocked}
    scores = scores_of(groups)
    for cheap in ("block", "unit"):
        own = {name: each * (1e-3 if kinds[name] == cheap else 1) for name, each in scores.items()}
        plan = prune.plan(groups, own, target={"macs": 0.6}, kinds=("block", "head", "unit"))
        free = {name: kind for name, kind in kinds.items() if kind != "head_size"}
        assert plan.removed.keys() <= free.keys()
        check_minimal(groups, plan, {"macs": 0.6})


def test_scores_of_weights_and_of_blocks_go_together():
    network, variables, groups = large("scanned transformer")
    influence = prune.block_influence(variables, network.module.apply, network.batch)
    layout = prune.layout(variables, network.module.apply, network.batch)
    importance = {**prune.scored(variables, prunable=layout), **influence}
    target, kinds = {"macs": 0.5}, ("block", "head", "unit")
    plan = prune.plan(groups, importance, target=target, kinds=kinds, normalize="sum")
    check_minimal(groups, plan, target)
    (blocks,) = influence
    least = prune.plan(groups, importance, target={"macs": 0.7}, kinds="block")
    assert least.removed == {blocks: (int(np.argmin(influence[blocks])),)}


def test_a_smaller_cache_takes_fewer_heads():
    groups = large("gpt")[2]
    plan = prune.plan(groups, scores_of(groups), target={"kv_cache": 0.7})
    assert {groups[name].kind: size for name, size in plan.sizes().items()} == {"kv_head": 2}


@pytest.mark.parametrize("searched", [False, True])
def test_the_plan_that_a_function_likes_best_is_taken(searched, monkeypatch):
    if searched:
        monkeypatch.setattr(_targets, "MOST", 0)
    groups = large("vit")[2]
    scores, options = (
        scores_of(groups, 1),
        {"target": {"macs": 0.7}, "normalize": "none", "kinds": GROUP_KINDS},
    )
    tried = []

    def evaluate(plan):
        check_minimal(groups, plan, options["target"])
        tried.append(plan)
        return math.nan if len(tried) == 1 else -len(tried)

    best = prune.plan(groups, scores, evaluate=evaluate, candidates=3, **options)
    assert len(tried) == 3 and best is tried[-1]
    assert tried[0].removed == prune.plan(groups, scores, **options).removed
    losses = [lost(plan, scores) for plan in tried]
    assert losses == sorted(losses)
    assert len({str(plan.removed) for plan in tried}) == len(tried)
    with pytest.raises(ValueError, match="`evaluate` gave nan for each of 2 plans"):
        prune.plan(groups, scores, evaluate=lambda plan: math.nan, candidates=2, **options)


ERRORS = [
    ({}, "pass either `sparsity` or `target`, got neither"),
    ({"sparsity": 0.5, "target": {"macs": 0.5}}, "pass either `sparsity` or `target`, got both"),
    ({"target": {"flops": 0.5}}, "`target` may hold 'params', 'bytes', 'macs', 'kv_cache', got 'flops'"),
    ({"target": {"kv_cache": 0.5}}, "`target` holds 'kv_cache', and the model has no attention"),
    (
        {"target": {"macs": 1.0}},
        r"`target` must be in \(0, 1\), the fraction of the 'macs' that may stay, got 1.0",
    ),
    ({"target": {}}, "`target` must be a mapping such as {'macs': 0.5}, got {}"),
    ({"target": 0.5}, "`target` must be a mapping such as {'macs': 0.5}, got 0.5"),
    (
        {"target": {"params": 0.2}, "minimum": 4},
        r"`target` of 0.2 of the 'params' is out of reach: 0.3987 is the least that these `kinds`, `minimum`",
    ),
    ({"target": {"macs": 0.5}, "candidates": 0, "evaluate": id}, "`candidates` must be at least 1, got 0"),
    (
        {"target": {"macs": 0.5}, "round_to": {"units": 4}},
        "`round_to` may be by kind, 'unit', .*, got 'units'",
    ),
    (
        {"target": {"macs": 0.5}, "round_to": {"unit": 1.5}},
        "`round_to` must be whole and at least 1, got 1.5",
    ),
    ({"sparsity": 0.5, "evaluate": id}, "`evaluate` chooses among plans for a `target`, and there is none"),
    ({"target": {"macs": 0.5}, "kinds": "head"}, "those that may are of kind 'unit': pass `kinds`$"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors(arguments, message):
    groups = large("mlp")[2]
    with pytest.raises(ValueError, match=message):
        prune.plan(groups, scores_of(groups), **arguments)


def test_what_is_out_of_reach_says_what_is_not():
    groups = large("mlp")[2]
    least = groups.costs({group.name: 4 for group in groups.unlocked})["params"] / groups.costs()["params"]
    assert least == pytest.approx(0.3987, abs=1e-4)
    for fraction in (0.3987, 0.45):
        plan = prune.plan(groups, scores_of(groups), target={"params": fraction}, minimum=4)
        assert meets(groups, plan.sizes(), {"params": fraction})
