"""What is drawn, read back from the axes: the numbers of the report, and nothing shown."""

import csv
import dataclasses
import functools
import inspect
import itertools
import math
import re
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_report import layer, report_of

import jaxeff
from jaxeff import importance, plot, prune
from jaxeff._compare_criteria import Comparison
from jaxeff._pathways import Pathways, Route, pathways
from jaxeff.advice import Tried
from jaxeff.metrics._curve import CELLS, EDGES, Distribution
from jaxeff.prune._before_and_after import MeasuredNetwork

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


def test_dots_are_the_metric_and_marks_its_null(axes):
    assert plot.layers(_report(), "utilization", axes) is axes
    marks, dots = axes.lines
    assert dots.get_xdata() == pytest.approx([0.6, 0.4]) and list(dots.get_ydata()) == [0, 1]
    assert marks.get_xdata() == pytest.approx([0.73, 0.73])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a/kernel", "b/kernel"]
    low, high = axes.get_ylim()
    assert low > high
    # The axis is limited to the numbers from 0.4 to 0.73, and does not begin at 0.
    assert 0.35 < axes.get_xlim()[0] < 0.4 and 0.73 < axes.get_xlim()[1] < 0.78
    plot.layers(_report(), "mean", other := Figure().subplots())
    assert len(other.lines) == 1 and other.get_legend() is None


def test_depth_is_a_line_for_each_kind_of_layer(axes):
    rows = [
        layer(f"block{block}/{name}", gini=gini + block / 100)
        for block in (0, 1, 2, 3)
        for name, gini in (("query", 0.2), ("up", 0.5))
    ]
    assert plot.depth(report_of(layer("embedding"), *rows), "gini", axes) is axes
    drawn = {line.get_label(): np.array(line.get_data()) for line in axes.lines}
    assert drawn.keys() == {"block*/query", "block*/up"}
    assert drawn["block*/up"].T == pytest.approx(np.array([(block, 0.5 + block / 100) for block in range(4)]))
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    with pytest.raises(ValueError, match="must be one of"):
        plot.depth(_report(), "beauty")


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


def test_history_reads_what_a_monitor_logged(axes, tmp_path):
    rows = [
        {"step": 10, "gradients/norm": 2.0, "updates/ratio/a": 0.5, "updates/ratio/b": 0.25},
        {"step": 20, "gradients/norm": 1.5, "updates/ratio/a": 0.125, "updates/ratio/b": ""},
    ]
    with (tmp_path / "scalars.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for source in (rows, tmp_path / "scalars.csv", str(tmp_path / "scalars.csv")):
        drawn = plot.history(source, "gradients/norm", Figure().subplots())
        (line,) = drawn.lines
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 20], [2.0, 1.5])
        assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("step", "gradients/norm")
    a, b = plot.history(tmp_path / "scalars.csv", "updates/ratio/*", axes).lines
    assert list(a.get_ydata()) == [0.5, 0.125]
    assert b.get_ydata()[0] == 0.25 and np.isnan(b.get_ydata()[1])
    with pytest.raises(ValueError, match="`metric` must be a column.*gradients/norm"):
        plot.history(rows, "params/norm")
    (tmp_path / "empty.csv").write_text("step,params/norm\n")
    with pytest.raises(ValueError, match="without rows"):
        plot.history(tmp_path / "empty.csv", "params/norm")


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


def _advised(tried):
    return jaxeff.Advice(
        None, None, (), None, {}, tried, 1.0, 0.01, False, 3, 1, 4, 1.0, "by the keyboard", (), None, None, report_of
    )  # fmt: skip


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
    advised = _advised(())
    every = {name: [(report_of(),), (lost,)] for name in ("layers", "depth", "importances", "cumulative")}
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
    for given in _without_numbers()[name]:
        axes = getattr(plot, name)(*given, ax=Figure().subplots())
        (sentence,) = axes.texts
        assert re.fullmatch("(No|There is no) .+[.]", sentence.get_text().replace("\n", " "))
        assert not axes.lines and not axes.patches and not axes.images and axes.get_legend() is None


# What every picture has, at the widths that a journal prints: a column and a page.


KINDS = (
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/out",
    "mlp/gate",
    "mlp/up",
    "mlp/down",
)
BLOCKS = 30


@functools.cache
def _deep():
    """A transformer of many blocks with long names, whose numbers differ."""
    draws = np.random.default_rng(0)
    rows = [
        layer(
            f"transformer/decoder/layers_{block}/{kind}_projection/kernel",
            utilization=draws.uniform(0.4, 0.7),
            units=draws.random(96).astype(np.float32),
            shape=(32, 96),
            distribution=_even(0.25 * draws.random()),
        )
        for block in range(BLOCKS)
        for kind in KINDS
    ]
    return report_of(*rows)


def _long_paths():
    return tuple(_deep())


def _sensitivity():
    sparsities = (0.5, 0.7, 0.9)
    losses = 2 + np.exp(np.random.default_rng(0).uniform(-4, 3, (len(_long_paths()), 3))).cumsum(axis=1)
    sizes = (1000,) * len(_long_paths())
    return prune.Sensitivity(
        _long_paths(), sizes, sparsities, "magnitude", prune.Unstructured(), losses, np.float32(2)
    )


def _criteria():
    names = ("magnitude", "wanda", "taylor", "fisher", "activation")
    fractions = np.linspace(0, 0.9, 10)
    losses = 1 + fractions**2 * np.arange(1, 6)[:, None]
    return Comparison(names, "layer", fractions, losses, 1 + np.ones((5, 1)) * fractions, None, None, None)


def _routes():
    groups = (*(f"layers_{block}/mlp/up_projection/kernel:1" for block in range(12)), "head/kernel:1")
    draws = np.random.default_rng(0)
    routes = [
        Route(tuple((group, int(draws.integers(64))) for group in range(13)), 1 / n) for n in range(1, 21)
    ]
    return Pathways(groups, (64,) * 13, tuple(routes), ())


def _speedups():
    def measured(seconds, macs):
        latency = types.SimpleNamespace(
            seconds=np.array([1.0, 1.1, 1.2]) * seconds, cost=types.SimpleNamespace(macs=macs)
        )
        return MeasuredNetwork(10, 40, {}, (latency, latency))

    return {
        removed: prune.BeforeAndAfter(measured(1.0, 1000), measured(1 - removed, 900), (1, 64), "a device")
        for removed in (0.25, 0.5, 0.75)
    }


def _advice():
    tried = [
        Tried("weights", start, "wanda", fraction, 1 + fraction**2 * rate, 0.0, False)
        for rate, start in enumerate(("uniform", "global", "erk", "lamp", "sensitivity"))
        for fraction in (0.25, 0.5, 0.75, 0.9)
    ]
    return _advised(tuple(tried))


def _history():
    return [jax.tree.map(lambda leaf, t=t: leaf * (1 - t / 10), _deep()) for t in range(3)]


def _logged():
    """Rows as a monitor gives them to a CSV file."""
    return [
        {"step": step}
        | {f"updates/ratio/{path}": 1e-3 * (step + at) for at, path in enumerate(_long_paths()[:20])}
        for step in range(0, 500, 100)
    ]


PICTURES = {
    "layers": lambda ax: plot.layers(_deep(), ax=ax),
    "layers of a small network": lambda ax: plot.layers(_report(), ax=ax),
    "depth": lambda ax: plot.depth(_deep(), ax=ax),
    "importances": lambda ax: plot.importances(_deep(), ax=ax),
    "importances of some layers": lambda ax: plot.importances(_deep(), _long_paths()[:5], ax=ax),
    "cumulative": lambda ax: plot.cumulative(_deep(), ax=ax),
    "cumulative of some layers": lambda ax: plot.cumulative(_deep(), _long_paths()[:5], ax=ax),
    "lorenz": lambda ax: plot.lorenz(_deep(), _long_paths()[100], ax=ax),
    "units": lambda ax: plot.units(_deep(), _long_paths()[100], ax=ax),
    "units of heads": lambda ax: plot.units(report_of(HEADS), "q", ax=ax),
    "history": lambda ax: plot.history(_history(), "gini", ax=ax),
    "history of a small network": lambda ax: plot.history([_report()] * 2, "gini", ax=ax),
    "history of columns": lambda ax: plot.history(_logged(), "updates/ratio/*", ax=ax),
    "sensitivity": lambda ax: plot.sensitivity(_sensitivity(), ax=ax),
    "criteria": lambda ax: plot.criteria(_criteria(), ax=ax),
    "pathways": lambda ax: plot.pathways(_routes(), ax=ax),
    "speedups": lambda ax: plot.speedups(_speedups(), ax=ax),
    "advice": lambda ax: plot.advice(_advice(), ax=ax),
}  # fmt: skip
COUNTS = {  # axes that count
    "layers": "y", "depth": "x", "units": "xy", "units of heads": "xy", "history": "x",
    "history of a small network": "x", "history of columns": "x",
}  # fmt: skip
HEADS = layer("q", (8, 2, 4), unit_axes=(1, 2), units=np.ones((2, 4), np.float32))
SIZES = {"a column": (3.3, 2.6), "a page": (6.8, 3.8)}


@functools.cache
def _laid_out(name, size):
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = PICTURES[name](figure.subplots())
    FigureCanvasAgg(figure).draw()
    return figure, axes


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def picture(request):
    """Draws on the axes of a figure of one of the sizes, and lays it out."""
    return functools.partial(_laid_out, size=request.param)


def test_every_plot_has_a_picture():
    assert {name.split(" ")[0] for name in PICTURES} == {*FUNCTIONS}


@pytest.mark.parametrize("name", PICTURES)
def test_given_axes_are_drawn_on_and_no_figure_is_made(name, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("shown"))
    before, axes = pyplot.get_fignums(), Figure().subplots()
    assert PICTURES[name](axes) is axes and axes.has_data()
    assert pyplot.get_fignums() == before and axes.figure.axes == [axes]


@pytest.mark.parametrize("name", PICTURES)
def test_a_new_figure_is_sharp_and_saved_as_it_is(name, tmp_path):
    from matplotlib import pyplot

    axes = PICTURES[name](None)
    assert pyplot.get_fignums()[-1:] == [axes.figure.number] and axes.figure.dpi >= 150
    axes.figure.savefig(tmp_path / "picture.png")
    height, width, _ = pyplot.imread(tmp_path / "picture.png").shape
    assert (width, height) >= tuple(150 * axes.figure.get_size_inches())
    pyplot.close(axes.figure)


@pytest.mark.parametrize("name", PICTURES)
def test_every_axis_has_a_label_and_color_bars_are_as_tall_as_their_map(name, picture):
    _, axes = picture(name)
    assert axes.get_xlabel() and axes.get_ylabel()
    for bar in axes.child_axes:
        assert bar.get_ylabel() or bar.get_xlabel()
        assert bar.get_window_extent().height == pytest.approx(axes.get_window_extent().height, abs=1)


@pytest.mark.parametrize("name", COUNTS)
def test_ticks_are_at_what_can_be_counted(name, picture):
    _, axes = picture(name)
    for which in COUNTS[name]:
        ticks = getattr(axes, f"get_{which}ticks")()
        assert len(ticks) and all(float(tick).is_integer() for tick in ticks)


def _boxes(texts):
    return [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_is_cut_or_covers_another(name, picture):
    figure, axes = picture(name)
    width, height = figure.bbox.size
    legend = axes.get_legend()
    texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *(legend.get_texts() if legend else ())]
    for one in (axes, *axes.child_axes):
        texts += [one.yaxis.label, *_inside(one.yaxis), *_inside(one.xaxis)]
    for box in _boxes(texts):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    for axis in (axes.xaxis, axes.yaxis):
        labels = _inside(axis)
        # Boxes of what is turned overlap where letters do not.
        if not any(label.get_rotation() for label in labels):
            boxes = _boxes(labels)
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def _inside(axis):
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    return [label for tick, label in ticks if low <= tick <= high]


@pytest.mark.parametrize("name", PICTURES)
def test_lines_have_names_or_colors_in_order(name, picture):
    """More than ten names would cover a picture, and nobody can tell as many colors apart."""
    _, axes = picture(name)
    legend = axes.get_legend()
    assert legend is None or len(legend.get_texts()) <= 12
    if len(axes.lines) > 20 and not name.startswith("pathways"):
        assert len(axes.child_axes) == 1


def test_losses_that_are_far_off_do_not_flatten_those_that_are_near(axes):
    losses = np.array([[2.1, 2.2, 1e6], [2.1, 2.3, 9e3], [2.05, 2.1, 2.2]], np.float32)
    measured = prune.Sensitivity(
        tuple("abc"), (8,) * 3, (0.5, 0.7, 0.9), "magnitude", prune.Unstructured(), losses, np.float32(2)
    )
    low, high = plot.sensitivity(measured, axes).get_ylim()
    assert 1.8 < low < 2 and 2.3 < high < 5
    # A logarithmic axis, which cannot begin below 0, shows as much.
    tiny = dataclasses.replace(measured, losses=losses - np.float32(1.99), dense=np.float32(0.01))
    assert plot.sensitivity(tiny, Figure().subplots()).get_ylim()[0] > 0
    near = dataclasses.replace(measured, losses=losses.clip(max=2.5))
    assert plot.sensitivity(near, Figure().subplots()).get_ylim()[1] == pytest.approx(2.525)


def test_advice_ends_where_the_losses_leave_the_picture(axes):
    tried = tuple(
        Tried("weights", "uniform", "wanda", fraction, loss, 0.0, False)
        for fraction, loss in ((0.25, 1.001), (0.5, 1.02), (0.75, 3.0), (0.9, 9.0))
    )
    plot.advice(_advised(tried), axes)
    assert axes.get_xlim() == pytest.approx((0, 0.55)) and axes.get_ylim()[1] < 1.1


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


def test_steps_are_as_wide_as_the_share_of_the_routes_that_take_them(axes):
    routes = (
        Route(((0, 1), (1, 0)), 0.5),
        Route(((0, 1), (1, 0), (2, 0)), 0.1),
        Route(((0, 0), (1, 1)), 0.3),
    )
    plot.pathways(Pathways(("a:0", "a:1", "b:1"), (2, 4, 1), routes, ()), axes)
    *_, middle, widest = axes.lines
    assert list(widest.get_xdata()) == [0, 1] and list(widest.get_ydata()) == pytest.approx([0.25, 0.875])
    assert middle.get_linewidth() / widest.get_linewidth() == pytest.approx(0.3 / 0.6)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a:0 (2)", "a:1 (4)", "b:1 (1)"]
