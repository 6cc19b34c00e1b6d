"""What is drawn, read back from the axes: the numbers of the report, and nothing shown."""

import inspect
import itertools
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_report import layer, report_of

import jaxeff
from jaxeff import importance, plot, prune
from jaxeff._compare_criteria import Comparison
from jaxeff._pathways import Pathways, Route, pathways
from jaxeff.metrics._curve import CELLS, EDGES, Distribution

matplotlib.use("agg")


@pytest.fixture
def axes():
    return Figure().subplots()


def _even(below=0.0):
    weights = np.full(CELLS, (1 - below) / (CELLS - 2), np.float32)
    weights[[0, -1]] = below, 0
    return Distribution(
        weights, (weights * np.arange(CELLS) / (weights @ np.arange(CELLS))).astype(np.float32)
    )


def _report():
    units = np.arange(32, dtype=np.float32)
    return report_of(
        layer("a/kernel", utilization=0.6, gini=0.3, units=units, distribution=_even()),
        layer("b/kernel", utilization=0.4, distribution=_even(0.25)),
    )


def _labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_bars_are_the_metric_and_marks_its_null(axes):
    assert plot.layers(_report(), "utilization", axes) is axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.6, 0.4])
    assert axes.lines[0].get_xdata() == pytest.approx([0.73, 0.73])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a/kernel", "b/kernel"]
    low, high = axes.get_ylim()
    assert low > high
    plot.layers(_report(), "mean", other := Figure().subplots())
    assert not other.lines


def test_histograms_have_the_area_of_the_weights_in_their_cells(axes):
    assert plot.importances(_report(), ax=axes) is axes
    for drawn, spread in zip(axes.patches, (_even(), _even(0.25)), strict=True):
        values, edges, _ = drawn.get_data()
        assert edges == pytest.approx(EDGES)
        assert values @ np.diff(np.log2(edges)) == pytest.approx(spread.weights[1:-1].sum())
    assert _labels(axes) == ["a/kernel", "b/kernel (25% below)"]


def test_the_lorenz_curve_passes_its_coverages_units_and_null(axes):
    assert plot.lorenz(_report(), "a/kernel", axes) is axes
    drawn = {line.get_label(): np.array(line.get_data()) for line in axes.lines}
    assert drawn["weights"][:, 0].tolist() == [0, 0] and drawn["weights"][:, -1] == pytest.approx([1, 1])
    assert drawn["noise"].T == pytest.approx(np.array([[0.8, 0.5], [0.5, 0.2], [0.4, 0.1]]))
    # Of units 0, 1, ..., 31, the faintest k hold k (k - 1) / (32 * 31).
    k = np.arange(33)
    assert drawn["units"][1] == pytest.approx(k * (k - 1) / (32 * 31), abs=1e-6)


def test_without_curves_lorenz_has_points_and_histograms_say_how_to_get_them(axes):
    report = report_of(layer("a"))
    assert "weights" in [line.get_label() for line in plot.lorenz(report, "a", axes).lines]
    for draw in (plot.importances, plot.cumulative):
        with pytest.raises(ValueError, match="curves=True"):
            draw(report)


def test_cumulative_is_lorenz_from_the_other_end(axes):
    plot.cumulative(_report(), ["b/kernel"], axes)
    (line,) = axes.lines
    x, y = line.get_data()
    assert (x[0], y[0]) == (0, 0) and (np.diff(x) >= 0).all() and (y >= x - 1e-6).all()
    assert _labels(axes) == ["b/kernel"]


def test_the_radar_has_six_numbers_of_each_layer():
    axes = plot.radar(_report(), ax=Figure().subplots(subplot_kw={"projection": "polar"}))
    values = axes.lines[0].get_ydata()
    assert values == pytest.approx([0.6, 0.96, 0.7, 0.9, 0.5, 0.9, 0.6])
    assert len(axes.get_xticklabels()) == 6
    with pytest.raises(ValueError, match="polar"):
        plot.radar(_report(), ax=Figure().subplots())


def test_unit_maps_are_over_the_mean_and_leave_no_unit_out(axes):
    plot.units(_report(), "a/kernel", axes, columns=10)
    shown = axes.images[0].get_array()
    assert shown.shape == (4, 10) and np.ma.masked_invalid(shown).count() == 32
    assert np.nansum(np.asarray(shown.filled(np.nan))) == pytest.approx(32)
    heads = layer("q", (8, 2, 4), unit_axes=(1, 2), units=np.ones((2, 4), np.float32))
    assert plot.units(report_of(heads), "q", Figure().subplots()).images[0].get_array().shape == (2, 4)


def test_history_takes_lists_and_stacks(axes):
    reports = [report_of(layer("a", gini=g), layer("b", gini=g / 2)) for g in (0.2, 0.4, 0.8)]
    plot.history(reports, "gini", axes, steps=(0, 10, 20))
    assert axes.lines[1].get_xdata().tolist() == [0, 10, 20]
    assert axes.lines[1].get_ydata() == pytest.approx([0.1, 0.2, 0.4])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)
    other = plot.history(stacked, "gini", Figure().subplots())
    assert other.lines[0].get_ydata() == pytest.approx([0.2, 0.4, 0.8])
    for wrong, said in (
        ((reports, "beauty"), "must be one of"),
        (([],), "empty"),
        ((reports[0],), "list"),
        (([reports[0], report_of(layer("c"))],), "the same layers"),
    ):
        with pytest.raises(ValueError, match=said):
            plot.history(*wrong)
    with pytest.raises(ValueError, match="3 reports"):
        plot.history(reports, steps=(1, 2))


def test_criteria_are_lines_before_random_ones(axes):
    losses = np.array([[0.1, 0.2, 0.9], [0.1, 0.5, 0.9]])
    random = np.full((5, 3), 0.7)
    compared = Comparison(
        ("wanda", "magnitude"), "layer", np.array([0, 0.5, 1]), losses, random, None, None, None
    )
    plot.criteria(compared, axes)
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert drawn["wanda"].tolist() == losses[0].tolist() and "magnitude" in drawn
    assert len(axes.lines) == 7 and _labels(axes) == ["random", "wanda", "magnitude"]


def test_axes_are_made_and_nothing_is_shown(monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("shown"))
    made = plot.radar(_report())
    assert made.name == "polar" and plot.layers(_report()) is not made
    pyplot.close("all")


FUNCTIONS = sorted(name for name in vars(plot) if callable(getattr(plot, name)))
WRONG = (None, {"dense": {"kernel": np.ones((2, 2))}}, np.ones(3), [np.ones(3)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_of_its_kind_is_refused_by_name(name, axes):
    draw = getattr(plot, name)
    first, *others = inspect.signature(draw).parameters.values()
    rest = ["a/kernel" for other in others if other.default is other.empty]
    for wrong in WRONG:
        with pytest.raises(TypeError, match=rf"^`{first.name}.*` must be an? \w+, from `.*`; got \w+$"):
            draw(wrong, *rest, ax=axes)
    if first.name == "report":
        with pytest.raises(ValueError, match="2 models or steps: take one first"):
            draw(jax.tree.map(lambda *leaves: np.stack(leaves), *[_report()] * 2), *rest, ax=axes)
        with pytest.raises(TypeError, match="`ax` must be an Axes, from `pyplot"):
            draw(_report(), *rest, ax=Figure().subplots(2))
    if "paths" in [other.name for other in others]:
        with pytest.raises(TypeError, match="`paths` must be a list of paths, such as .*kernel.*; got str"):
            draw(_report(), "a/kernel")


def _without_numbers():
    """For each function, what it may be given that has nothing to draw: without layers, and all nan."""
    nan = dict.fromkeys(("utilization", "gini", "coverage_50", "coverage_80", "coverage_90"), math.nan)
    spread = Distribution(*np.full((2, CELLS), np.nan, np.float32))
    lost = report_of(layer("a", units=np.full(32, np.nan, np.float32), distribution=spread, **nan))
    losses = np.full((1, 2), np.nan, np.float32)
    measured = prune.Sensitivity(
        ("a",), (8,), (0.5, 0.9), "magnitude", prune.Unstructured(), losses, losses[0, 0]
    )
    compared = Comparison(("wanda",), "layer", np.array([0, 0.5]), losses, losses, None, None, None)
    advised = jaxeff.Advice(
        None,
        None,
        (),
        None,
        {},
        (),
        1.0,
        0.01,
        False,
        3,
        1,
        4,
        1.0,
        "by the keyboard",
        (),
        None,
        None,
        report_of,
    )
    every = {name: [(report_of(),), (lost,)] for name in ("layers", "importances", "cumulative", "radar")}
    one = {name: [(lost, "a")] for name in ("lorenz", "units")}
    return every | one | {
        "history": [([report_of()] * 2,), ([lost] * 2,)],
        "criteria": [(compared,)],
        "sensitivity": [(measured,)],
        "pathways": [(Pathways((), (), (), ()),)],
        "advice": [(advised,)],
    }  # fmt: skip


# `speedups` refuses what is empty, and measured times are finite.
@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {"speedups"}))
def test_what_has_nothing_to_draw_says_why(name):
    polar = {"projection": "polar"} if name == "radar" else {}
    for given in _without_numbers()[name]:
        axes = getattr(plot, name)(*given, ax=Figure().subplots(subplot_kw=polar))
        (sentence,) = axes.texts
        assert re.fullmatch("(No|There is no) .+[.]", sentence.get_text())
        assert not axes.lines and not axes.patches and not axes.images and axes.get_legend() is None


def test_the_gallery_shows_every_plot():
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "plots.md").read_text()
    for name in (name for name in vars(plot) if callable(getattr(plot, name))):
        assert f"plot.{name}(" in text and (docs / "images" / f"{name}.png").stat().st_size < 60_000


# Pathways


class _Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(3, (3, 3))(x)).reshape(len(x), -1)
        return nn.Dense(2)(nn.relu(nn.Dense(5)(x)))


def _connected(module, batch):
    variables = module.init(jax.random.key(0), batch)
    statistics = jaxeff.collect(variables, module.apply, batch)
    report = jaxeff.analyze(variables, statistics=statistics)
    scores = importance.scores(variables, statistics, "magnitude")
    return report, prune.groups(variables, module.apply, batch), scores


def test_routes_are_the_strongest_of_all():
    batch = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))
    report, groups, scores = _connected(_Stack(), batch)
    w = [np.asarray(scores[path], np.float64) for path in list(report.layers)]
    between = [w[0].sum((0, 1)), w[1].sum((0, 1)), w[2].reshape(16, 3, 5).sum(0), w[3]]
    parts = [matrix / matrix.sum(0) for matrix in between]
    every = {
        units: math.prod(parts[i][units[i], units[i + 1]] for i in range(4))
        for units in itertools.product(*map(range, (2, 4, 3, 5, 2)))
    }
    assert sum(every.values()) == pytest.approx(2)
    found = pathways(report, groups, scores, count=15)
    truth = sorted(every.items(), key=lambda pair: -pair[1])[:15]
    # Weights are summed in float64 from float32 scores, in two orders.
    assert [route.strength for route in found.routes] == pytest.approx([s for _, s in truth], rel=1e-6)
    assert [tuple(unit for _, unit in route.units) for route in found.routes] == [u for u, _ in truth]
    assert found.sizes == (2, 4, 3, 5, 2) and found.left_out == ()
    assert len(pathways(report, groups, scores, count=10_000).routes) == len(every)


def test_weights_that_lead_back_are_left_out_and_named():
    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="into")(x)
            x = x + nn.Dense(4, name="back")(nn.relu(nn.Dense(6, name="up")(x)))
            return nn.Dense(2, name="out")(x)

    found = pathways(*_connected(Residual(), jnp.ones((3, 5))))
    assert found.left_out == ("back/kernel",)
    assert {len(route.units) for route in found.routes} == {3}


def test_pathways_refuse_what_they_cannot_follow():
    report, groups, scores = _connected(_Stack(), jnp.ones((2, 4, 4, 2)))
    with pytest.raises(ValueError, match="at least 1"):
        pathways(report, groups, scores, 0)
    with pytest.raises(ValueError, match="no route"):
        pathways(report, groups, {"other": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match="in this order"):
        pathways(groups, report, scores)
    signed, thinner = (
        jax.tree.map(change, dict(scores)) for change in (lambda x: -x - 1, lambda x: x[..., :1])
    )
    with pytest.raises(ValueError, match="negative or not finite"):
        pathways(report, groups, signed)
    with pytest.raises(ValueError, match="pass scores of the same model"):
        pathways(report, groups, thinner)


def test_routes_are_drawn_from_left_to_right(axes):
    routes = (Route(((0, 1), (1, 0)), 0.6), Route(((0, 0), (1, 1)), 0.3))
    plot.pathways(Pathways(("a:0", "a:1"), (2, 4), routes, ()), axes)
    weakest, strongest = axes.lines
    assert list(strongest.get_xdata()) == [0, 1] and list(strongest.get_ydata()) == pytest.approx(
        [0.25, 0.875]
    )
    assert strongest.get_linewidth() > weakest.get_linewidth()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a:0\n2 units", "a:1\n4 units"]
