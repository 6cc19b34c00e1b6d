"""What jaxeff costs a process that calls it for the first time, in CPU seconds, beside its budget.

    python benchmarks/first_call.py [--repeats 3] [--rows lenet cnn ...]
    python benchmarks/first_call.py --programs analyze-lenet

Every measurement is a process of its own, without JAX's persistent cache, since a first call is first only
once; imports are left out. `--programs` shows where the time of one goes: what JAX traced, lowered and
compiled. Checkpoints are measured by `checkpoint.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import metrics
import monitor
import optax
import timing
from lenet import LeNet300100
from transformer import Transformer

import jaxeff


class CNN(nn.Module):
    """Images [n, 28, 28, 1] to logits [n, 10]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.reshape(len(x), -1))))


class Deeper(nn.Module):
    """Images [n, 784] to logits [n, 10], with no layer of LeNet-300-100's shapes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (256, 160, 96):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Network(NamedTuple):
    """A model with its variables and a batch."""

    model: nn.Module
    variables: Any
    batch: jax.Array


def lenet() -> Network:
    return _network(LeNet300100(), jax.random.normal(jax.random.key(0), (128, 784)))


def cnn() -> Network:
    return _network(CNN(), jax.random.normal(jax.random.key(0), (128, 28, 28, 1)))


def deeper() -> Network:
    return _network(Deeper(), jax.random.normal(jax.random.key(0), (128, 784)))


def gpt2() -> Network:
    tokens = jax.random.randint(jax.random.key(0), (8, 128), 0, 50257)
    return _network(Transformer(vocabulary=50257), tokens)


def _network(model: nn.Module, batch: jax.Array) -> Network:
    return Network(model, jax.block_until_ready(jax.jit(model.init)(jax.random.key(1), batch)), batch)


# Measurements: each makes ready what is not measured, and returns what is.

Call = Callable[[], Any]


def training(network: Callable[[], Network]) -> Call:
    """The gradient of the loss and a step of Adam."""
    model, variables, batch = network()
    labels, optimizer = jnp.zeros(len(batch), jnp.int32), optax.adam(1e-3)
    state = jax.block_until_ready(jax.jit(optimizer.init)(variables))

    def loss(variables: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, batch), labels).mean()

    @jax.jit
    def step(variables: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    return lambda: step(variables, state)


def forward(network: Callable[[], Network]) -> Call:
    model, variables, batch = network()
    return lambda: jax.jit(model.apply)(variables, batch)


def collect(network: Callable[[], Network]) -> Call:
    model, variables, batch = network()
    return functools.partial(jaxeff.collect, variables, model.apply, batch)


def analyze(network: Callable[[], Network]) -> Call:
    model, variables, batch = network()
    return functools.partial(jaxeff.analyze, variables, model.apply, batch)


def advise(network: Callable[[], Network]) -> Call:
    """All of it: compilation, and the runs of the search."""
    model, variables, batch = network()
    labels = jnp.arange(len(batch)) % 10
    loss_fn = optax.softmax_cross_entropy_with_integer_labels
    return functools.partial(
        jaxeff.advise, variables, model.apply, batch, loss_fn=loss_fn, targets=labels, progress=False
    )


def advise_second(network: Callable[[], Network]) -> Call:
    """The runs of the search, once all is compiled."""
    call = advise(network)
    _ = call()
    return call


def analyze_second(network: Callable[[], Network]) -> Call:
    """After LeNet-300-100 was analyzed, and the network's own forward pass traced and compiled."""
    _ = jax.block_until_ready((analyze(lenet)(), collect(network)()))
    return analyze(network)


def weights_second(network: Callable[[], Network]) -> Call:
    """By the weights alone, after those of LeNet-300-100."""
    _ = jax.block_until_ready(jaxeff.analyze(lenet().variables))
    variables = network().variables
    return functools.partial(jaxeff.analyze, variables)


def rendering() -> Call:
    report = jax.block_until_ready(analyze(lenet)())
    return lambda: str(report)


def monitored(with_monitor: bool) -> Call:
    """A training step, with a monitor or without."""
    return functools.partial(monitor.prepare("lenet-300-100", every=100).step, with_monitor)


MEASUREMENTS: dict[str, Callable[[], Call]] = {
    "training-lenet": lambda: training(lenet),
    "collect-lenet": lambda: collect(lenet),
    "analyze-lenet": lambda: analyze(lenet),
    "training-cnn": lambda: training(cnn),
    "collect-cnn": lambda: collect(cnn),
    "analyze-cnn": lambda: analyze(cnn),
    "advise-cnn": lambda: advise(cnn),
    "advise-cnn-again": lambda: advise_second(cnn),
    "second-deeper": lambda: analyze_second(deeper),
    "second-cnn": lambda: analyze_second(cnn),
    "weights-deeper": lambda: weights_second(deeper),
    "weights-cnn": lambda: weights_second(cnn),
    "forward-gpt2": lambda: forward(gpt2),
    "collect-gpt2": lambda: collect(gpt2),
    "analyze-gpt2": lambda: analyze(gpt2),
    "str": rendering,
    "plain-step": lambda: monitored(False),
    "monitored-step": lambda: monitored(True),
}


def measure(name: str) -> float:
    """CPU seconds of a first call."""
    call = MEASUREMENTS[name]()
    start = time.process_time()
    _ = jax.block_until_ready(call())
    return time.process_time() - start


def by_program(name: str) -> None:
    """Prints the CPU seconds of a first call by what was traced, lowered or compiled in them."""
    call = MEASUREMENTS[name]()
    spent: dict[tuple[str, str], float] = {}
    last = start = time.process_time()

    def listen(event: str, _: float, fun_name: str = "", **rest: Any) -> None:
        # Events are told as they end: each is given all since the one before.
        nonlocal last
        now = time.process_time()
        kind = event.rpartition("/")[2].removesuffix("_duration")
        spent[kind, fun_name] = spent.get((kind, fun_name), 0) + now - last
        last = now

    jax.monitoring.register_event_duration_secs_listener(listen)
    _ = jax.block_until_ready(call())
    spent["after the last of them", ""] = time.process_time() - last
    print(f"{name}: {time.process_time() - start:.2f} CPU seconds")
    for (kind, function), seconds in sorted(spent.items(), key=lambda item: -item[1]):
        if seconds >= 0.01:
            print(f"{seconds:8.3f}  {kind} {function}")


def leaves() -> float:
    """GPT-2 small's 148 leaves, warm: CPU nanoseconds a weight, the median of five."""
    params = metrics.gpt2_leaves()
    size = sum(leaf.size for leaf in params.values())
    seconds = timing.interleaved({"analyze": lambda: jaxeff.analyze(params)}, 5, timing.seconds)
    return 1e9 * statistics.median(seconds["analyze"]) / size


def share() -> float:
    """What a monitor adds to LeNet-300-100's steps, in percent of them."""
    return 100 * monitor.share(monitor.prepare("lenet-300-100", every=100), repeats=15)


def lines() -> float:
    files = Path(jaxeff.metrics.__file__).parent.glob("*.py")
    return sum(len(path.read_text().splitlines()) for path in files)


FIGURES: dict[str, Callable[[], float]] = {"leaves": leaves, "share": share, "lines": lines}


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        measured: a measurement, or a figure.
        over: the measurement that it is a multiple of.
        budget: None where there is none.
    """

    text: str
    measured: str
    over: str | None
    unit: str
    budget: float | None


ROWS = {
    "lenet": Row("first `analyze`, LeNet-300-100 / training", "analyze-lenet", "training-lenet", "", 2.0),
    "lenet-collect": Row("of which `collect`", "collect-lenet", "training-lenet", "", None),
    "cnn": Row("first `analyze`, a small CNN / training", "analyze-cnn", "training-cnn", "", 1.2),
    "cnn-collect": Row("of which `collect`", "collect-cnn", "training-cnn", "", None),
    "advise": Row("first `advise`, a small CNN / training", "advise-cnn", "training-cnn", "", None),
    "advise-again": Row("the same, once compiled", "advise-cnn-again", "training-cnn", "", None),
    "second": Row("second model, beyond its own forward: an MLP", "second-deeper", None, " s", 0.5),
    "second-cnn": Row("the same: a small CNN", "second-cnn", None, " s", 0.5),
    "weights": Row("`analyze(params)` of a second model: an MLP", "weights-deeper", None, " s", 0.3),
    "weights-cnn": Row("the same: a small CNN", "weights-cnn", None, " s", 0.3),
    "gpt2": Row("first `analyze`, GPT-2 small's size / forward", "analyze-gpt2", "forward-gpt2", "", 3.0),
    "gpt2-collect": Row("of which `collect`", "collect-gpt2", "forward-gpt2", "", 2.0),
    "str": Row("first `str(report)`", "str", None, " s", 0.02),
    "leaves": Row("GPT-2 small's 148 leaves, warm, a weight", "leaves", None, " ns", 2.5),
    "monitor": Row("`monitor(every=100)` on LeNet-300-100", "share", None, " %", 1.0),
    "monitor-first": Row("first step with a monitor / without", "monitored-step", "plain-step", "", None),
    "lines": Row("lines of jaxeff/metrics", "lines", None, "", 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--repeats", type=int, default=3)
    _ = parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    _ = parser.add_argument("--programs", choices=MEASUREMENTS)
    _ = parser.add_argument("--only", choices=[*MEASUREMENTS, *FIGURES], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        print(json.dumps(measure(chosen.only) if chosen.only in MEASUREMENTS else FIGURES[chosen.only]()))
    elif chosen.programs:
        jax.config.update("jax_enable_compilation_cache", False)
        by_program(chosen.programs)
    else:
        print(timing.machine(), flush=True)
        _report([ROWS[name] for name in chosen.rows], chosen.repeats)


def _report(rows: Sequence[Row], repeats: int) -> None:
    names = dict.fromkeys(name for row in rows for name in (row.over, row.measured) if name)
    found: dict[str, list[float]] = {name: [] for name in names}
    # In turn, so that drift hits all alike.
    for at in range(repeats):
        for name, values in found.items():
            if at == 0 or name != "lines":
                values.append(_in_process(name))
                print(f"{name}: {values[-1]:.3g}", file=sys.stderr, flush=True)
    print("| | CPU seconds | found | budget | |\n|---|---|---|---|---|")
    for row in rows:
        seconds = ""
        if row.measured in MEASUREMENTS and row.over:
            pair = (statistics.median(found[name]) for name in (row.measured, row.over))
            seconds = " / ".join(f"{median:.3g}" for median in pair)
        figures = timing.ratios(found, row.measured, row.over) if row.over else found[row.measured]
        verdict = ""
        if row.budget is not None:
            verdict = "holds" if statistics.median(figures) <= row.budget else "FALLS SHORT"
        budget = "" if row.budget is None else f"{row.budget:g}{row.unit}"
        print(f"| {row.text} | {seconds} | {timing.spread(figures, row.unit)} | {budget} | {verdict} |")


def _in_process(name: str) -> float:
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, "--only", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return float(json.loads(done.stdout))


if __name__ == "__main__":
    main()
