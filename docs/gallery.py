"""Draws the pictures of plots.md, of the network that `jaxeff demo` trains, and of a deeper one.

    python docs/gallery.py

Two or three minutes on two cores. The files are docs/images/*.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState
from matplotlib import pyplot
from PIL import Image

import jaxeff
from jaxeff import demo, importance, plot, prune

IMAGES = Path(__file__).parent / "images"
EPOCHS = (1, 2, 4, 8, 12, 16, 20)
ANALYZED = 512
BLOCKS = 12


class Transformer(nn.Module):
    """The eight rows of a digit as tokens, through twelve blocks of attention and a perceptron."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Dense(64, name="embedding")(images[..., 0])
        for index in range(BLOCKS):
            x = Block(name=f"block_{index}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(axis=1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(256, name="up")(nn.LayerNorm()(x))))


def main() -> None:
    training, _ = demo.split(demo.digits())
    images, labels = training.images[:ANALYZED], training.labels[:ANALYZED]
    states = [demo.train(epochs=epochs)[0] for epochs in EPOCHS]
    reports = [_report(state, images) for state in states]
    report, model = reports[-1], ({"params": states[-1].params}, states[-1].apply_fn)
    statistics = jaxeff.collect(*model, images)
    routes = jaxeff.pathways(
        report, prune.groups(*model, images), importance.scores(model[0], statistics), count=25
    )
    compared = jaxeff.compare_criteria(
        *model,
        images,
        targets=labels,
        loss_fn=optax.softmax_cross_entropy_with_integer_labels,
        criteria=("magnitude", "activation", "wanda"),
    )
    measured = prune.sensitivity(
        *model,
        images,
        targets=labels,
        loss_fn=lambda *pair: optax.softmax_cross_entropy_with_integer_labels(*pair).mean(),
    )
    _, test = demo.split(demo.digits())
    advice = jaxeff.advise(
        *model,
        test.images,
        targets=test.labels,
        loss_fn=optax.softmax_cross_entropy_with_integer_labels,
        tolerance=0.1,
    )
    smaller = {removed: _smaller(model, images, removed) for removed in (0.25, 0.5, 0.75)}
    deep = _report(_deep(images), images)
    dense = "Dense_0/kernel"
    pictures = {
        "layers": lambda: plot.layers(report),
        "depth": lambda: plot.depth(deep),
        "importances": lambda: plot.importances(report),
        "lorenz": lambda: plot.lorenz(report, dense),
        "cumulative": lambda: plot.cumulative(report),
        "units": lambda: plot.units(report, dense),
        "pathways": lambda: plot.pathways(routes),
        "history": lambda: plot.history(reports, "gini", steps=EPOCHS),
        "criteria": lambda: plot.criteria(compared),
        "sensitivity": lambda: plot.sensitivity(measured),
        "advice": lambda: plot.advice(advice),
        "speedups": lambda: plot.speedups(smaller),
    }
    IMAGES.mkdir(exist_ok=True)
    pyplot.rcParams["figure.figsize"] = 6.4, 3.8
    for name, draw in pictures.items():
        file = IMAGES / f"{name}.png"
        axes = draw()
        axes.figure.savefig(file)
        pyplot.close(axes.figure)
        Image.open(file).convert("RGB").quantize(256, kmeans=1).save(file, optimize=True)


def _deep(images) -> TrainState:
    model = Transformer()
    params = model.init(jax.random.key(0), images[:1])["params"]
    untrained = TrainState.create(apply_fn=model.apply, params=params, tx=optax.identity())
    return demo.train_further(untrained, epochs=10)[0]


def _report(state: TrainState, images) -> jaxeff.Report:
    return jaxeff.analyze(state.params, state.apply_fn, images, curves=True)


def _smaller(model, images, removed: float) -> prune.BeforeAndAfter:
    """The network beside one with fewer units, without training after the removal."""
    variables, apply_fn = model
    plan = prune.plan(prune.groups(variables, apply_fn, images), prune.scored(variables), removed)
    small = prune.shrink(variables, plan)
    params = small["params"]
    widths = tuple(params[name]["kernel"].shape[-1] for name in ("Conv_0", "Conv_1", "Dense_0"))
    after = small, demo.DigitsCNN(widths).apply
    return prune.before_and_after((variables, apply_fn), after, [images[:1], images[:64]])


if __name__ == "__main__":
    main()
