"""Reports as they are printed, stored and acted on; most are built by hand, field by field."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

import jaxeff
from jaxeff.metrics import Metrics
from jaxeff.metrics._curve import Distribution
from jaxeff.metrics._half_normal import Null
from jaxeff.output.stacks import stacks
from jaxeff.output.text import shorten
from jaxeff.report import Activity, LayerReport, ModuleReport, OtherReport, Report
from jaxeff.report import _table as table
from jaxeff.report import _totals as totals
from jaxeff.report._limits import LIMITS, interpret_gini, interpret_redundancy, interpret_utilization
from jaxeff.report._recommendations import grouped, recommend
from jaxeff.report._scalars import USUAL
from jaxeff.statistics import UnitStatistics


def _scalar(value):
    return np.asarray(value, np.int32 if isinstance(value, int) else np.float32)


def _sums(each):
    """Units that emit 1, or nothing where `each` is 0, over 100 values."""
    each = each[None]
    return UnitStatistics(100 * each, 100 * each, each, 100 * (1 - each), _scalar(100.0))


def layer(path="dense/kernel", shape=(64, 32), **changes):
    """A layer with nothing to say about it, but for `changes` of its fields or of its metrics."""
    units, size = shape[-1], math.prod(shape)
    numbers = {
        "entropy": 7.0, "normalized_entropy": 0.96, "effective_params": 0.7 * size, "utilization": 0.7,
        "redundancy": 0.04, "gini": 0.5, "coverage_50": 0.2, "coverage_80": 0.5, "coverage_90": 0.6,
        "sparsity_1e2": 0.1, "sparsity_1e3": 0.0, "relative_sparsity_1e2": 0.1,
        "relative_sparsity_1e3": 0.0, "mean": 0.1, "std": 0.1, "max": 0.5, "zeros": 0, "nonfinite": 0,
        "size": size,
    }  # fmt: skip
    numbers = {name: changes.pop(name, value) for name, value in numbers.items()}
    null, dead = changes.pop("null", 0.73), changes.pop("dead", 0)
    each = (np.arange(units) >= dead).astype(np.float32)
    fields = {
        "path": path,
        "kind": "dense",
        "shape": shape,
        "dtype": "float32",
        "nonlinearity": "relu",
        "scored": "post",
        "reason": None,
        "uses": 1,
        "unit_axes": (len(shape) - 1,),
        "macs": size,
        "metrics": Metrics(**{name: _scalar(value) for name, value in numbers.items()}),
        "null": None if null is None else Null(*map(_scalar, (null, 0.45, 0.2, 0.5, 0.6))),
        "units": each,
        "effective_units": _scalar(0.9 * units),
        "effective_fan_in": _scalar(0.7 / 0.9 * size / units),
        "activity": Activity((units,), 2, _sums(each)),
        "nonfinite_weights": _scalar(0),
        "largest_weight": _scalar(1.0),
        "evidence_finite": np.asarray(True),
    }
    return LayerReport(**{**fields, **changes})


def report_of(*rows, **model):
    bias = OtherReport("dense/bias", "bias", (32,), *map(_scalar, (0.1, 0.2, 0.5, 3, 0)))
    module = ModuleReport("dense", rows[0].activity) if rows and rows[0].activity else None
    report = Report.assemble("activation", rows, (bias,), (module,) if module else (), (), None)
    numbers = totals.model(report.structure, report.numbers, sum(row.size for row in rows) + bias.size)
    numbers = dataclasses.replace(numbers, **{name: _scalar(value) for name, value in model.items()})
    return dataclasses.replace(report, model=numbers)


def _stacked(*reports):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)


# Printing


LONG = "/".join(f"encoder_layer_{index}" for index in range(30)) + "/attention/query/kernel"
TABLES = {
    "one layer": [layer()],
    "no layer": [],
    "a long path": [layer(LONG), layer("a" * 300)],
    "a long path with a long note": [layer(LONG, reason="x" * 200, activity=None, scored="magnitude")],
    "300 layers": [layer(f"block_{index}/dense/kernel") for index in range(300)],
    "large shapes": [layer("embedding", (2**16, 2**14), nonlinearity="hard_sigmoid", dead=3000)],
    "many axes": [layer(LONG, (512, 16, 16, 16, 4, 2, 2, 16), nonlinearity="hard_sigmoid")],
    "all nan": [layer(utilization=math.nan, gini=math.nan, effective_params=math.nan, nonfinite=2048)],
    "advice": [layer(LONG, dead=7, utilization=0.01, redundancy=0.9, relative_sparsity_1e2=0.9)],
}  # fmt: skip


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_a_printed_report_fits_100_columns(rows):
    assert max(map(len, str(report_of(*rows)).splitlines())) <= 100


@pytest.mark.parametrize("width", [40, 60, 80, 150])
@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_a_table_fits_the_width_it_is_given(rows, width):
    lines = table.render(report_of(*rows).snapshot(), width=width).splitlines()
    assert max(map(len, lines)) <= width
    if rows:
        assert {"layer", "utilization", "null"} <= set(lines[0].split())


def test_a_table_says_which_columns_it_left_out():
    printed = " ".join(table.render(report_of(layer()).snapshot(), width=40).split())
    header = printed.split("---")[0].split()
    assert "columns left out for want of width" in printed
    left_out = printed.split("width: ")[1].split(")")[0].split(", ")
    assert sorted([*header, *left_out]) == sorted({*table.HEADER} - {"depth"})


def test_columns_that_are_empty_throughout_are_not_there_and_not_counted_as_left_out():
    row = layer("encoder/attention/query/kernel", macs=None, activity=None)
    shown = [name for name in table.HEADER if name not in ("MACs", "depth", "dead")]
    header, rule, *_ = printed = table.render(report_of(row).snapshot(), width=150).splitlines()
    assert header.split() == shown and "left out" not in " ".join(printed)
    assert table.render(report_of(row).snapshot(), width=len(rule)).splitlines()[:3] == printed[:3]
    printed = " ".join(table.render(report_of(row).snapshot(), width=40).split())
    left_out = printed.split("width: ")[1].split(")")[0].split(", ")
    assert sorted([*printed.split("---")[0].split(), *left_out]) == sorted(shown)
    # One row with a number brings the column back.
    assert "MACs" in table.render(report_of(row, layer("b")).snapshot(), width=150).split("\n")[0]


def test_names_lose_what_all_begin_and_end_with_before_they_lose_a_middle():
    names = [
        f"encoder/block_{index}/attention/{name}/kernel" for index in range(12) for name in ("query", "key")
    ]
    assert shorten(names, 100) == names
    assert shorten(names, 33)[:2] == [
        "…block_0/attention/query/kernel",
        "…block_0/attention/key/kernel",
    ]
    assert shorten(names, 25)[:2] == ["…block_0/attention/query…", "…block_0/attention/key…"]


@pytest.mark.parametrize("width", [18, 24, 40])
def test_shortened_names_stay_apart_and_fit(width):
    names = [
        f"model.layers.{i}.{part}.weight" for i in range(32) for part in ("mlp.up_proj", "self_attn.q_proj")
    ]
    shortened = shorten([*names, "lm_head.weight"], width)
    assert len(set(shortened)) == 65 and max(map(len, shortened)) <= width
    assert len(shorten(["a" * 50], width)[0]) == width


def test_layers_are_printed_in_forward_order_one_line_each():
    rows = [layer(f"{name}/kernel") for name in ("z", "m", "a", "q")]
    lines = str(report_of(*rows)).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == [row.path for row in rows]
    assert lines[6] == ""


def test_a_row_shows_the_layers_numbers():
    row = layer("dense/kernel", (64, 32), utilization=0.612, gini=0.487, null=0.734, dead=5)
    header, _, line = str(report_of(row)).splitlines()[:3]
    shown = dict(zip(header.split(), line.split(), strict=True))
    assert shown["layer"] == "dense/kernel" and shown["shape"] == "64x32" and shown["emits"] == "relu"
    assert (shown["utilization"], shown["null"], shown["gini"]) == ("61.2%", "73.4%", "0.487")
    assert (shown["units"], shown["dead"]) == ("28.8/32", "5")
    assert (shown["weights"], shown["bytes"], shown["MACs"]) == ("2.05k", "8.19k", "2.05k")


def test_long_paths_stay_apart_by_both_their_ends():
    rows = [layer(f"{first}/{'middle/' * 30}{last}") for first in "ab" for last in ("query", "value")]
    shown = [line.split()[0] for line in str(report_of(*rows)).splitlines()[2:6]]
    assert len(set(shown)) == 4


def test_the_headline_states_the_share_of_parameters_analyzed():
    unread = layer("cell/kernel", reason="inside scan", activity=None, scored="magnitude", nonlinearity=None)
    report = report_of(layer(shape=(96, 32)), dataclasses.replace(unread, shape=(32, 31)))
    printed = " ".join(str(report).split())
    # 3072, 992 and the 32 of the bias.
    shares = "75.0% analyzed with activations, 24.2% by magnitude only, 0.8% not weights"
    assert f"4,096 in all; {shares}" in printed
    assert report.unpaired == {"cell/kernel": "inside scan"} and report.analyzed_params == 3072


def test_notes_are_printed_with_their_layer_and_marked_in_the_table():
    report = report_of(layer("good"), layer("bad", nonfinite_weights=_scalar(3)))
    assert report["good"].note == "" and report["bad"].note == "3 weights are nan or infinite"
    assert "- bad: 3 weights are nan or infinite." in str(report)
    assert "\nbad* " in str(report) and "\ngood " in str(report)


def test_unknown_numbers_are_printed_as_unknown():
    line = str(report_of(layer("a", gini=math.nan, macs=None), layer("b"))).splitlines()[2].split()
    assert (line[5], line[8]) == ("–", "?")


def test_a_report_of_several_models_says_how_to_take_one():
    many = _stacked(report_of(layer()), report_of(layer()), report_of(layer()))
    assert "3 models" in str(many) and "jax.tree.map" in str(many)
    assert str(jax.tree.map(lambda leaf: leaf[1], many)) == str(report_of(layer()))


# Stacks of blocks


def _blocks(count, *names):
    return [layer(f"block_{index}/{name}") for index in range(count) for name in names]


def _paths(found):
    return [(stack.path, list(stack.members)) for stack in found]


def test_layers_that_differ_in_one_number_are_a_stack():
    rows = _blocks(3, "Dense_0/kernel", "Dense_1/kernel")
    assert _paths(stacks(rows)) == [
        ("block_*/Dense_0/kernel", [0, 2, 4]),
        ("block_*/Dense_1/kernel", [1, 3, 5]),
    ]
    scanned = [layer(f"blocks/q[{index}]") for index in (10, 9, 2)]
    (stack,) = stacks(scanned)
    assert (stack.label, stack.members, stack.numbers) == ("blocks/q[2–10]", (2, 1, 0), (2, 9, 10))


@pytest.mark.parametrize(
    "rows",
    [
        _blocks(2, *"abcdefghijkl"),
        [layer(f"a{index}", (index + 1, 4)) for index in range(5)],
        [layer(f"a{index}", nonlinearity=("relu", "tanh")[index % 2]) for index in range(4)],
        [layer(name) for name in "abc"],
        [],
    ],
    ids=["two blocks", "shapes", "nonlinearities", "no numbers", "nothing"],
)
def test_what_is_not_alike_three_times_is_no_stack(rows):
    assert stacks(rows) == []


def test_blocks_share_a_row_with_what_they_range_over():
    rows = [
        layer(f"block_{index}/kernel", (64, 32), utilization=0.4 + index / 100, gini=0.5, dead=index % 2)
        for index in range(30)
    ]
    report = report_of(layer("embedding", (10, 64)), *rows)
    header, _, _, line = report.table().splitlines()[:4]
    shown = dict(zip(header.split(), line.split(), strict=True))
    assert shown["layer"] == "block_0–29/kernel" and shown["utilization"] == "40.0–69.0%"
    assert (shown["gini"], shown["dead"], shown["MACs"]) == ("0.500", "15", "61.4k")
    assert shown["depth"] == "▁▂▃▄▅▆▇█"
    assert "1 row holds 30 layers" in report.table() and str(report) == report.table()
    lines = report.table(blocks=True).splitlines()
    assert [each.split()[0] for each in lines[2:33]] == list(report) and "row holds" not in "".join(lines)
    # The notes and sums below are the same.
    assert report.table().split("\n\n", 1)[1] == report.table(blocks=True).split("\n\n", 1)[1]


def test_a_table_that_fits_a_screen_is_not_folded():
    report = report_of(*_blocks(20, "kernel"))
    assert report.table() == report.table(blocks=True)
    assert report.table() != report_of(*_blocks(21, "kernel")).table()


def test_a_note_on_one_block_marks_the_row_of_all():
    rows = _blocks(30, "kernel")
    rows[7] = dataclasses.replace(rows[7], nonfinite_weights=_scalar(3))
    printed = str(report_of(*rows))
    assert "\nblock_0–29/kernel* " in printed and "- block_7/kernel: 3 weights" in printed


def test_a_table_of_some_layers():
    report = report_of(*_blocks(30, "key", "query"), layer("head"))
    printed = report.table("*/query", blocks=True)
    assert printed.count("/query ") == 30 and "/key " not in printed
    assert "31 of 61 layers left out" in printed and "Parameters:" in printed
    assert report.table("block_?/key").splitlines()[2].startswith("block_0/key")
    with pytest.raises(ValueError, match=r"no layer matches 'query'.*block_0/key"):
        report.table("query")
    with pytest.raises(TypeError, match="string"):
        report.table(["head"])


# Reading


def test_layers_are_found_by_path():
    report = report_of(layer("a/kernel"), layer("b/kernel"))
    assert report["b/kernel"].path == report.rows[1].path == "b/kernel"
    assert list(report.layers) == ["a/kernel", "b/kernel"]


@pytest.mark.parametrize("path", ["b", "b/Kernel", "kernel", "", "zzz"])
def test_a_path_that_is_none_names_those_there_are(path):
    report = report_of(layer("a/kernel"), layer("b/kernel"))
    with pytest.raises(KeyError, match="b/kernel") as raised:
        report[path]
    assert repr(path) in str(raised.value) or path == ""


def test_order_survives_the_transformations_of_a_pytree():
    report = report_of(*(layer(f"{name}/kernel") for name in "zma"))
    assert list(jax.jit(lambda r: r)(report).layers) == ["z/kernel", "m/kernel", "a/kernel"]


def test_scalars_are_floats_under_flat_names():
    report = report_of(layer("a/kernel", dead=2), layer("b/kernel", activity=None))
    scalars = report.scalars("*")
    assert all(type(value) is float for value in scalars.values())
    assert scalars["layers/a/kernel/gini"] == 0.5 and scalars["layers/a/kernel/dead_units"] == 2
    assert scalars["layers/a/kernel/null_utilization"] == pytest.approx(0.73)
    assert scalars["model/total_params"] == 2 * 2048 + 32
    assert "layers/b/kernel/dead_units" not in scalars and "layers/b/kernel/gini" in scalars
    assert "layers/a/kernel/null_utilization" not in report_of(layer("a/kernel", null=None)).scalars("*")


def test_the_usual_scalars_are_a_dozen_however_many_layers_there_are():
    rows = [layer("a", dead=2, gini=0.2, utilization=0.6), layer("b", (64, 96), gini=0.6, zeros=5, dead=1)]
    usual = report_of(*rows).scalars()
    assert 10 <= len(usual) <= 14 and all(name.startswith("model/") for name in usual)
    assert usual["model/dead_units"] == 3 and usual["model/zeros"] == 5
    assert usual["model/mean_gini"] == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert usual["model/lowest_utilization"] == pytest.approx(0.6)
    assert usual.keys() == report_of(*rows * 9).scalars().keys()
    assert usual.items() <= report_of(*rows).scalars("*").items()
    assert "model/dead_units" not in report_of(layer("a", activity=None)).scalars()


def test_the_usual_scalars_are_documented():
    text = (Path(__file__).parents[1] / "docs" / "monitor.md").read_text(encoding="utf-8")
    named = re.findall(r"`(model/\w+)`", text)
    assert sorted(named) == sorted(USUAL)


def test_scalars_are_chosen_by_patterns():
    report = report_of(layer("a/q[0]"), layer("a/q[1]"))
    assert list(report.scalars("*/utilization")) == [
        "model/utilization", "layers/a/q[0]/utilization", "layers/a/q[1]/utilization",
    ]  # fmt: skip
    assert list(report.scalars("layers/a/q[1]/gini", "model/weights")) == [
        "model/weights",
        "layers/a/q[1]/gini",
    ]
    with pytest.raises(ValueError, match=r"no scalar matches '\*/beauty'.*model/total_params"):
        report.scalars("model/*", "*/beauty")
    with pytest.raises(TypeError, match="string"):
        report.scalars(("*/gini",))


# In notebooks and tables


def test_a_notebook_leaves_out_columns_that_are_empty_throughout():
    shown = report_of(layer(activity=None, macs=None))._repr_html_()
    assert ">MACs<" not in shown and ">dead<" not in shown and ">utilization<" in shown
    assert ">MACs<" in report_of(layer())._repr_html_()


def test_a_notebook_shows_the_table_without_scripts_or_colors():
    rows = [layer("<script>alert(1)</script>", dead=2, reason="<b>&")]
    rows += [layer(name, utilization=0.1) for name in "ab" * 40]
    shown = report_of(*rows)._repr_html_()
    assert "<script" not in shown and "<b>" not in shown
    # What is long scrolls; colors are those of the notebook, dark or light.
    styles = ";".join(re.findall(r'style="(.*?)"', shown))
    assert {style.split(":")[0].strip() for style in styles.split(";")} == {
        "max-height", "overflow", "text-align", "font-weight",
    }  # fmt: skip
    assert shown.count("<tr>") == 61 and "21 more rows:" in shown
    for part in ("&lt;script&gt;alert(1)&lt;/script&gt;", "73.0%", '<th scope="col">gini</th>'):
        assert part in shown
    assert "<summary>Recommendations (" in shown and "more layers." in shown
    short = report_of(layer(dead=2))._repr_html_()
    assert "<details open><summary>Recommendations (1)" in short and "dead units" in short
    both = _stacked(report_of(layer("<i>")), report_of(layer("<i>")))
    assert "2 models" in both._repr_html_() and "<i>" not in both._repr_html_()


def test_treescope_shows_a_report_as_a_tree():
    treescope = pytest.importorskip("treescope")
    shown = treescope.render_to_text(report_of(layer("a/kernel")))
    assert shown.startswith("Report(") and "LayerNumbers" in shown and "a/kernel" in shown


def test_records_are_flat_and_make_a_data_frame():
    report = report_of(layer("a", gini=math.nan, dead=3), layer("b", macs=None, activity=None, gini=0.25))
    records = report.to_records()
    kinds = {type(value) for record in records for value in record.values()}
    assert kinds <= {str, int, float, type(None)} and records[0].keys() == records[1].keys()
    assert records[1]["gini"] == 0.25 and math.isnan(records[0]["gini"]) and records[1]["macs"] is None
    assert records[0]["null_utilization"] == pytest.approx(0.73) and records[1]["dead_units"] is None
    assert report_of(layer(null=None)).to_records()[0]["null_utilization"] is None
    frame = pandas.DataFrame(records).set_index("path")
    assert frame.loc["a", "dead_units"] == 3 and frame["gini"].isna().tolist() == [True, False]
    assert frame["size"].sum() == 2 * 2048
    assert report_of().to_records() == []


# Storing


def _assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype != bool)


STORED = {
    "plain": [layer()],
    "nothing": [],
    "unread": [layer(reason="unused", activity=None, macs=None, nonlinearity=None, scored="magnitude")],
    "no null": [layer(null=None, scored="user")],
    "nan and infinity": [layer(entropy=math.nan, gini=math.nan, max=math.inf, mean=-math.inf)],
    "several unit axes": [layer("query", (8, 2, 4), unit_axes=(1, 2), units=np.ones((2, 4), np.float32))],
    "with a distribution": [
        layer(distribution=Distribution(np.ones(66, np.float32), np.ones(66, np.float32)))
    ],
    "a conv": [layer(kind="conv", shape=(3, 3, 4, 8)), layer("other", dead=3)],
}


@pytest.mark.parametrize("rows", STORED.values(), ids=STORED)
def test_json_gives_back_the_report(rows):
    report = report_of(*rows)
    text = report.to_json()
    # NaN and Infinity as bare words are no JSON.
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))
    _assert_same(Report.from_json(text), report)
    assert str(Report.from_json(text)) == str(report)


def test_json_of_an_older_and_a_newer_minor_version_opens():
    report = report_of(layer())
    data = report.to_dict()
    older = {key: value for key, value in data.items() if key != "schema_minor"}
    older["layers"] = [
        {key: value for key, value in row.items() if key != "distribution"} for row in data["layers"]
    ]
    newer = {**data, "schema_minor": 99, "weather": "fine"}
    newer["layers"] = [{**row, "color": "blue"} for row in data["layers"]]
    for changed in (older, newer):
        _assert_same(Report.from_json(json.dumps(changed)), report)


def test_a_dict_holds_plain_data_and_the_recommendations():
    data = report_of(layer(dead=2)).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["recommendations"][0]["rule"] == "dead units" and data["layers"][0]["shape"] == [64, 32]


def _text(**changes):
    return json.dumps({**report_of(layer()).to_dict(), **changes})


def _layer_text(**changes):
    (row,) = report_of(layer(dead=2)).to_dict()["layers"]
    return _text(layers=[{**row, **changes}])


BAD_JSON = {
    "no JSON": "{",
    "empty": "",
    "a list": "[1, 2]",
    "another object": '{"a": 1}',
    "another schema": _text(schema=999),
    "layers are a number": _text(layers=3),
    "layers are incomplete": _text(layers=[{"path": "a"}]),
    "no model": _text(model=None),
    "a word for a number": _text(model={**report_of(layer()).to_dict()["model"], "utilization": "much"}),
    "fewer axes than the units have": _layer_text(shape=[]),
    "an axis before the first": _layer_text(unit_axes=[-1]),
    "a layer without weights": _layer_text(shape=[0, 32]),
    "infinitely many weights": _layer_text(nonfinite_weights="Infinity"),
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_no_report_is_a_value_error_that_says_so(text):
    with pytest.raises(ValueError, match="report"):
        Report.from_json(text)


# Recommending

_OVERSIZED = {"utilization": 0.29, "effective_params": 0.29 * 2048}

# rule -> numbers at which it speaks, and their neighbors at which it does not.
RULES = {
    "dead units": ({"dead": 1}, {"dead": 0}),
    # 0.73 - 0.05, and three standard deviations of 2,048 weights: 0.0172.
    "below null": ({"utilization": 0.662}, {"utilization": 0.664}),
    "concentration": ({"utilization": 0.662}, {"utilization": 0.664}),
    "layer redundancy": ({"redundancy": 0.61}, {"redundancy": 0.59}),
    "model utilization": (_OVERSIZED, {"effective_params": 0.31 * 2048}),
    "model sparsity": ({"relative_sparsity_1e2": 0.51}, {"relative_sparsity_1e2": 0.49}),
    "at null": ({"utilization": 0.715}, {"utilization": 0.705}),
}  # fmt: skip


def test_small_layers_of_noise_are_called_noise():
    """Forty layers of 60 normal weights: utilization is off its null by 0.03, one standard deviation, by chance."""
    rng = np.random.default_rng(0)
    params = {f"layer{i}": rng.normal(size=(6, 10)).astype(np.float32) for i in range(40)}
    x = rng.normal(size=(256, 6)).astype(np.float32)
    report = jaxeff.analyze(params, lambda p, x: {name: x @ w for name, w in p.items()}, x)
    (advice,) = (each for each in report.recommendations() if each.rule == "at null")
    differ = [abs(float(row.metrics.utilization - row.null.utilization)) > 0.02 for row in report.rows]
    assert sum(differ) > 10 and advice.evidence["layers"] >= 39
    verb = "differs" if advice.evidence["layers"] == 39 else "differ"
    assert f"({40 - advice.evidence['layers']} of 40 layers {verb} from noise)" in str(report).replace(
        "\n", " "
    )


FIXED = {"layer redundancy", "model utilization", "model sparsity"}


@pytest.mark.parametrize(("rule", "speaks", "silent"), [(r, *v) for r, v in RULES.items()], ids=RULES)
def test_a_rule_speaks_at_its_threshold_and_not_beside_it(rule, speaks, silent):
    spoken = {advice.rule: advice for advice in report_of(layer(**speaks)).recommendations()}
    assert rule in spoken
    assert rule not in {advice.rule for advice in report_of(layer(**silent)).recommendations()}
    advice = spoken[rule]
    of_model = rule.startswith("model") or rule in ("concentration", "at null")
    assert advice.path == (None if of_model else "dense/kernel")
    assert advice.evidence and all(math.isfinite(number) for number in advice.evidence.values())


def test_every_rule_is_tested():
    rows = [layer(dead=1, utilization=0.1, effective_params=204.0, redundancy=0.9, relative_sparsity_1e2=0.9)]
    rows += [layer("other/kernel", (2, 2), utilization=0.73)]
    assert {advice.rule for advice in report_of(*rows).recommendations()} == RULES.keys()


def test_evidence_is_what_the_report_says():
    report = report_of(layer(utilization=0.5, dead=4))
    evidence = {advice.rule: advice.evidence for advice in report.recommendations()}
    assert evidence["dead units"] == {"dead_units": 4, "units": 32, "values": 100}
    assert evidence["below null"]["utilization"] == float(report["dense/kernel"].metrics.utilization)
    assert evidence["below null"]["null_utilization"] == float(report["dense/kernel"].null.utilization)


def test_below_null_says_where_the_chain_rule_puts_it():
    wide = layer(utilization=0.3, effective_units=_scalar(10.0), effective_fan_in=_scalar(61.0))
    sparse = layer(utilization=0.3, effective_units=_scalar(31.0), effective_fan_in=_scalar(20.0))
    for row, advice in ((wide, "fewer units"), (sparse, "masks on single weights")):
        (found,) = [found for found in report_of(row).recommendations() if found.rule == "below null"]
        assert advice in found.message


def test_a_layer_that_cannot_be_trusted_gets_no_advice_of_its_own():
    nan = dict.fromkeys(("utilization", "gini", "effective_params", "redundancy"), math.nan)
    zero = {"utilization": 0.0, "redundancy": 1.0, "max": 0.0, "effective_params": 0.0}
    for numbers in (nan, zero):
        report = report_of(layer(), layer("bad", **numbers))
        assert [advice for advice in report.recommendations() if advice.path == "bad"] == []


def test_units_that_emit_zeros_without_a_nonlinearity_are_not_called_dead():
    report = report_of(layer(nonlinearity="identity", dead=3))
    assert "dead units" not in {advice.rule for advice in report.recommendations()}


@pytest.mark.parametrize(("scored", "fires"), [("post", True), ("input", True), ("gradient", False)])
def test_the_fixed_thresholds_are_for_scores_that_grow_with_the_weight(scored, fires):
    numbers = {"utilization": 0.1, "effective_params": 204.0, "redundancy": 0.9, "relative_sparsity_1e2": 0.9}
    spoken = {advice.rule for advice in report_of(layer(scored=scored, dead=1, **numbers)).recommendations()}
    assert (spoken & FIXED == FIXED) is fires and (not spoken & FIXED) is not fires
    assert {"dead units", "below null"} <= spoken


def test_limits_may_be_ones_own():
    strict = dataclasses.replace(LIMITS, layer_redundancy=0.01)
    rules = {advice.rule for advice in recommend(report_of(layer()).snapshot(), strict)}
    assert "layer redundancy" in rules and report_of(layer()).recommendations() == ()


def test_recommendations_rank_by_what_they_would_save():
    rows = [
        layer("cheap/kernel", (64, 32), dead=8, macs=2048),
        layer("dear/kernel", (64, 32), dead=1, macs=500_000),
        layer("unknown/kernel", (64, 32), dead=1, macs=None),
    ]
    oversized = {"effective_params": 100.0, "utilization": 0.05}
    report = report_of(*rows, layer("low/kernel", (640, 32), macs=1, **oversized))
    advice = report.recommendations()
    dead = [found for found in advice if found.rule == "dead units"]
    assert [found.path for found in dead] == ["dear/kernel", "cheap/kernel", "unknown/kernel"]
    # A unit is 64 weights of 4 bytes, and 1 of the 32 parts of the layer's MACs.
    assert [(found.saved_macs, found.saved_bytes) for found in dead] == [
        (15625, 256), (512, 2048), (None, 256)
    ]  # fmt: skip
    ranks = [(found.saved_macs or 0, found.saved_bytes or 0) for found in advice if found.path]
    assert ranks == sorted(ranks, reverse=True)
    (concentrated,) = [found for found in advice if found.rule == "below null"]
    assert concentrated.saved_bytes == round((1 - 0.05 / 0.73) * 640 * 32 * 4)
    assert advice[-1].path is None


def test_recommendations_are_printed():
    report = report_of(layer("z/kernel", dead=1), layer("a/kernel", dead=2))
    advice = report.recommendations()
    assert "Worth at most 128 MACs an example and 512 bytes." in str(advice[0])
    printed = " ".join(str(report).split())
    assert all(str(found) in printed for found in advice)


@pytest.mark.parametrize(
    ("interpret", "value", "band"),
    [
        (interpret_utilization, 0.71, "high"),
        (interpret_utilization, 0.7, "medium"),
        (interpret_utilization, 0.3, "medium"),
        (interpret_utilization, 0.29, "low"),
        (interpret_utilization, math.nan, "unknown"),
        (interpret_gini, 0.61, "high"),
        (interpret_gini, 0.6, "medium"),
        (interpret_gini, 0.4, "medium"),
        (interpret_gini, 0.39, "low"),
        (interpret_gini, math.nan, "unknown"),
        (interpret_redundancy, 0.71, "severe"),
        (interpret_redundancy, 0.7, "redundant"),
        (interpret_redundancy, 0.6, "none"),
        (interpret_redundancy, math.nan, "unknown"),
    ],
)
def test_bands_are_those_of_the_methodology(interpret, value, band):
    assert interpret(value) == band


def test_what_fell_back_on_magnitudes_counts_as_that_everywhere():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]  # noqa: E731
    batch = jnp.ones((5, 3))
    for x, fallen in ((batch, 0), (batch.at[0, 0].set(jnp.nan), 2)):
        report = jaxeff.analyze(params, model, x)
        assert len(report.unpaired) == fallen == report.scalars()["model/unpaired_layers"]
        assert report.analyzed_params == (20 if not fallen else 0)
        assert f"{100 if fallen else 0:.1f}% by magnitude only" in " ".join(str(report).split())
    assert all("not finite" in reason or "nan" in reason for reason in report.unpaired.values())


def test_a_report_holds_paths():
    report = report_of(layer())
    (path,) = report
    assert path in report and "elsewhere" not in report and report[path].path == path
    with pytest.raises(TypeError, match="by its path, got 0"):
        _ = report[0]


def test_layers_that_are_not_finite_are_not_among_the_weights_used():
    params = {"a": jnp.full((3, 4), jnp.nan), "b": jnp.ones((5, 2))}
    assert "effective of 10 weights)" in str(jaxeff.analyze(params))


def test_what_is_shown_is_grouped_by_stack_and_worth_something():
    rows = [layer(f"blocks_{number}/kernel", dead=4) for number in range(20)]
    rows += [layer("large/kernel", (6400, 320), dead=1), layer("small/kernel", dead=1)]
    snapshot = report_of(*rows).snapshot()
    shown = grouped(recommend(snapshot), snapshot)
    dead = [each for each in shown if each.rule == "dead units"]
    # One line for the twenty blocks, and none for a unit of 256 bytes.
    assert {each.path for each in dead} == {"large/kernel", "blocks_0/kernel"}
    (blocks,) = [each for each in dead if each.path == "blocks_0/kernel"]
    assert "The same holds for 19 more layers." in blocks.message and blocks.saved_bytes == 20 * 4 * 256
    assert len(shown) <= 7


def test_layers_that_are_joined_twice_are_counted_once():
    """Stacks are joined first, and kinds where more than seven lines are left."""
    rows = [layer(f"blocks_{i}/{name}", dead=4) for name in "abcdefgh" for i in range(3)]
    snapshot = report_of(*rows).snapshot()
    (dead,) = [each for each in grouped(recommend(snapshot), snapshot) if each.rule == "dead units"]
    assert dead.message.count("The same") == 1 and dead.message.endswith(" holds for 23 more layers.")


def test_many_recommendations_are_shown_in_seven_lines():
    rows = [layer(f"{name}/kernel", dead=4) for name in "abcdefghijkl"]
    snapshot = report_of(*rows).snapshot()
    assert len(recommend(snapshot)) == 12 and len(grouped(recommend(snapshot), snapshot)) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda report: report.table(),
        lambda report: report.scalars(),
        lambda report: report.recommendations(),
        lambda report: report.to_json(),
        lambda report: report.to_records(),
        lambda report: report.to_html("report.html"),
    ],
)
def test_a_report_of_traced_numbers_is_read_outside(read):
    params, x = {"w": np.ones((4, 3), np.float32)}, np.ones((5, 4), np.float32)

    @jax.jit
    def traced(params):
        report = jaxeff.analyze(params, lambda p, x: x @ p["w"], x)
        assert str(report).startswith("Report of traced numbers") and "traced" in report._repr_html_()
        with pytest.raises(ValueError, match="traced numbers"):
            read(report)
        return report.model.utilization

    assert traced(params) == pytest.approx(1)
