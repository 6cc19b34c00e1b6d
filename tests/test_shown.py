"""Results show themselves: in a few lines, also of deep models, and compiling nothing."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxeff
from jaxeff import cost, metrics, prune, sketch
from jaxeff.output import shown

DEPTH = 120
LOSS = optax.softmax_cross_entropy_with_integer_labels


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH):
            x = nn.Dense(4)(x)
        return x


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["w"])[0]


@functools.cache
def deep():
    x = jnp.ones((8, 4))
    params = Deep().init(jax.random.key(0), x)
    report = jaxeff.analyze(params, Deep().apply, x, criterion="magnitude")
    return params, x, jax.block_until_ready(report)


@functools.cache
def small():
    x = jax.random.normal(jax.random.key(0), (32, 6))
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
    return model.init(jax.random.key(1), x), model.apply, x


def groups():
    params, x, _ = deep()
    return prune.groups(params, Deep().apply, x)


def stacked():
    return {"w": jnp.stack([jnp.eye(3), 0 * jnp.eye(3), jnp.ones((3, 3))])}


RESULTS = {
    "report": lambda: deep()[2],
    "layer": lambda: deep()[2].rows[0],
    "activity": lambda: jaxeff.analyze(*small()).rows[0].activity,
    "model": lambda: deep()[2].model,
    "metrics": lambda: deep()[2].rows[0].metrics,
    "null": lambda: deep()[2].rows[0].null,
    "recommendation": lambda: jaxeff.analyze(*small()).recommendations()[0],
    "statistics": lambda: jaxeff.collect(*small()),
    "site": lambda: jaxeff.collect(*small()).sites[0],
    "groups": groups,
    "plan": lambda: prune.plan(groups(), prune.scored(deep()[0]), 0.5),
    "fluctuation": lambda: prune.fluctuation(deep()[0], Deep().apply, deep()[1]),
    "comparison": lambda: jaxeff.compare_criteria(
        *small(), loss_fn=LOSS, targets=jnp.zeros(32, int), criteria=("magnitude", "taylor")
    ),
    "sensitivity": lambda: prune.sensitivity(*small(), loss_fn=LOSS, targets=jnp.zeros(32, int)),
    "blocks": lambda: prune.order_blocks(
        stacked(), scanned, jnp.ones((4, 3)), loss_fn=optax.l2_loss, targets=jnp.ones((4, 3))
    ),
    "cost": lambda: cost.count(deep()[0], Deep().apply, deep()[1]),
    "floor": lambda: cost.floor(Deep().apply, *deep()[:2], chip="tpu v5e"),
    "spectra": lambda: jaxeff.spectra(deep()[0]),
    "spectrum": lambda: jaxeff.spectra(deep()[0]).rows[0],
    "pathways": lambda: jaxeff.pathways(deep()[2], groups(), prune.scored(deep()[0])),
    "sketch": lambda: sketch.count(jnp.ones(5)),
    "summary": lambda: metrics.summarize(jnp.arange(5.0)),
    "monitor": lambda: jaxeff.monitor(every=10).init(*small()),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_shows_itself_in_few_lines_and_compiles_nothing(name, compilations):
    result = jax.block_until_ready(RESULTS[name]())
    with compilations() as compiled:
        text, page = repr(result), result._repr_html_()
    assert compiled.count == 0
    assert len(text.splitlines()) <= 100 and len(text) < 20_000
    assert "array(" not in text.lower() and "object at" not in text
    assert page.strip().startswith("<")


def test_a_report_folds_its_blocks_unless_it_is_told_not_to():
    report = deep()[2]
    assert len(str(report).splitlines()) < 30 and f"Dense_0–{DEPTH - 1}/kernel" in str(report)
    assert len(report.table(blocks=True).splitlines()) > DEPTH


def test_a_text_of_many_lines_loses_its_middle():
    lines = shown.shortened("\n".join(map(str, range(1000)))).splitlines()
    assert len(lines) == shown.MOST_LINES and "lines left out" in " ".join(lines)
    assert (lines[0], lines[-1]) == ("0", "999")


def test_a_traced_result_says_so():
    texts = []

    def analyzed(params, x):
        report = jaxeff.analyze(params, small()[1], x)
        texts.extend([repr(report), repr(report.rows[0].metrics)])
        return report.numbers

    params, _, x = small()
    _ = jax.jit(analyzed)(params, x)
    assert all("Tracer" in text and len(text) < 100 for text in texts)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "?"),
        (jnp.array([1.0, jnp.nan]), "[2], 1 to 1, 1 not finite"),
        (jnp.array([jnp.nan]), "[1], none finite"),
        (jnp.zeros((0, 3)), "[0, 3] float32"),
        (jnp.array([True, False]), "[2], 1 True"),
        (jnp.ones(3, jnp.bfloat16), "[3], 1 to 1"),
        (jax.random.key(0), "key<fry>"),
        ({"a": 1, "b": 2}, "a, b"),
        ((1, 2), "1, 2"),
        (tuple(range(9)), "9 int"),
    ],
)
def test_values_in_a_few_words(value, text):
    assert shown.described(value).endswith(text)


def test_blocks_that_are_alike_share_a_row_in_every_table():
    def model(params, h):
        for block in params:
            h = h + jax.nn.relu(h @ block["up"]) @ block["down"]
        return h

    params = [{"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))} for _ in range(24)]
    params[5] = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
    x = jnp.ones((2, 4))
    groups = prune.groups(params, model, x)
    plan = prune.plan(groups, jax.tree.map(jnp.abs, params), 0.5)
    others = "0–4,6–23"
    for table, label in (
        (groups, f"{others}/up:1"),
        (plan, f"{others}/down:0"),
        (prune.layout(params, model, x), f"{others}/up"),
        (jaxeff.collect(params, model, x), "0–23/up"),
        (jaxeff.cost.count(params, model, x), f"{others}/up"),
    ):
        lines = str(table).splitlines()
        assert len(lines) < 24, str(table)
        assert any(line.startswith(label) for line in lines), str(table)
    cost = jaxeff.cost.count(params, model, x)
    assert "5/up " in str(cost) and "1.47k" in str(cost)  # 23 blocks of 64
    assert all(path in cost.layers for path in ("0/up", "23/down"))
