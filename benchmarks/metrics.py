"""What the metrics of an array cost, and how far off they are, beside NumPy and jax.numpy.

    python benchmarks/metrics.py [--weights 10000000] [--repeats 7] [--curves]

NumPy and jax.numpy compute entropy, sparsity, Gini and coverage as one would write them down, in float32: two
sorts. Then the 148 leaves of a GPT-2 small (124 M weights): all metrics of each, first call and warm. Times
are in CPU seconds of all threads, and on an accelerator in those that pass.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing

import jaxeff
from jaxeff import metrics, sketch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference  # noqa: E402

SHOWN = ("entropy", "gini", "coverage_80", "relative_sparsity_1e2")


def plain(xp, x):
    """Entropy, Gini, coverage and sparsity in plain array code, with `numpy` or `jax.numpy`."""
    p = x / xp.sum(x)
    entropy = -xp.sum(p * xp.log(p + 1e-12))
    ascending = xp.sort(x)
    gini = 2 * xp.sum(xp.arange(1, x.size + 1) * ascending) / (x.size * xp.sum(x)) - (x.size + 1) / x.size
    reached = xp.cumsum(xp.sort(x)[::-1]) >= 0.8 * xp.sum(x)
    faint = xp.mean(x < 1e-2 * xp.mean(x))
    return entropy, gini, (xp.argmax(reached) + 1) / x.size, faint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--weights", type=int, default=10**7)
    _ = parser.add_argument("--repeats", type=int, default=7)
    _ = parser.add_argument("--leaves", action=argparse.BooleanOptionalAction, default=True)
    _ = parser.add_argument("--curves", action="store_true", help="count distributions in analyze as well")
    chosen = parser.parse_args()
    print(timing.machine())
    one_array(chosen.weights, chosen.repeats)
    if chosen.leaves:
        gpt2(chosen.repeats, chosen.curves)


def one_array(size: int, repeats: int) -> None:
    host = np.abs(np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    x = jnp.asarray(host)
    read = jax.jit(jnp.max)
    programs = {
        "sketch": jax.jit(lambda x: sketch.summarize(sketch.count(x))[0]),
        "metrics.summarize": jax.jit(metrics.summarize),
        "jax.numpy": jax.jit(functools.partial(plain, jnp)),
    }
    compiled, scratch, spent = {}, {}, {}
    for name, program in programs.items():
        start = timing.seconds()
        compiled[name] = program.lower(x).compile()
        spent[name] = timing.seconds() - start
        scratch[name] = compiled[name].memory_analysis().temp_size_in_bytes / x.nbytes
    runs = {name: functools.partial(program, x) for name, program in compiled.items()}
    runs |= {"NumPy": lambda: plain(np, host), "one reading pass": lambda: read(x)}
    seconds = timing.interleaved(runs, repeats, timing.seconds)
    truth = reference.metrics(host)
    print(f"\n{size:,} normal weights, float32; CPU seconds of all threads\n")
    print("| | ns a weight | NumPy's time over it | scratch / input | compile | " + " | ".join(SHOWN) + " |")
    print("|---|---|---|---|---|" + "---|" * len(SHOWN))
    for name in runs:
        per_weight = timing.spread([1e9 * each / size for each in seconds[name]])
        faster = timing.spread(timing.ratios(seconds, "NumPy", name))
        cost = f"{scratch[name]:.2f} | {spent[name]:.1f} s" if name in compiled else " | "
        errors = " | ".join(_errors(runs[name](), truth))
        print(f"| {name} | {per_weight} | {faster} | {cost} | {errors} |")


def _errors(found, truth) -> list[str]:
    """Relative, of each metric shown."""
    if isinstance(found, jax.Array):
        return [""] * len(SHOWN)
    values = found if isinstance(found, tuple) else [getattr(found, name) for name in SHOWN]
    return [f"{abs(float(v) / truth[name] - 1):.0e}" for name, v in zip(SHOWN, values, strict=True)]


def gpt2_leaves() -> dict[str, jax.Array]:
    """Normal weights in the shapes of GPT-2 small's 148 leaves."""
    shapes = [(50257, 768), (1024, 768)]
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,)]
    shapes += 12 * [*block, (3072, 768), (768,)] + [(768,), (768,)]
    draw = np.random.default_rng(0).standard_normal
    return {f"{i:03}": jnp.asarray(draw(shape, np.float32)) for i, shape in enumerate(shapes)}


def gpt2(repeats: int, curves: bool) -> None:
    params = gpt2_leaves()
    host = [np.abs(np.asarray(leaf)).ravel() for leaf in params.values()]
    size = sum(leaf.size for leaf in host)

    def analyze() -> jaxeff.Report:
        return jaxeff.analyze(params, curves=curves)

    def numpy_run():
        return [plain(np, leaf) for leaf in host]

    start = timing.seconds()
    _ = numpy_run()
    plain_seconds = timing.seconds() - start
    start = timing.seconds()
    _ = jax.block_until_ready(analyze())
    first = timing.seconds() - start
    functions = {"NumPy": numpy_run, "analyze": analyze}
    seconds = timing.interleaved(functions, max(repeats // 2, 3), timing.seconds)
    each = [1e9 * spent / size for spent in seconds["analyze"]]
    print(f"\nGPT-2 small: {len(params)} leaves, {size / 1e6:.1f} M weights, `jaxeff.analyze(params)`\n")
    print("CPU seconds of all threads")
    print(f"first call, compiling included: {first:.2f} s, NumPy {plain_seconds / first:.1f} times as long")
    print(f"warm, a weight: {timing.spread(each, ' ns')}; the budget is 2.5")
    print(f"warm: {timing.spread(seconds['analyze'], ' s')}, NumPy {timing.spread(seconds['NumPy'], ' s')}")
    print(f"time, NumPy / analyze, warm: {timing.spread(timing.ratios(seconds, 'NumPy', 'analyze'))}")


if __name__ == "__main__":
    main()
