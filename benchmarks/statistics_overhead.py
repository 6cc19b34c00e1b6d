"""What reading the activations costs beside the plain forward pass: time, memory, compilation.

python benchmarks/statistics_overhead.py [--layers 12] [--width 768] [--repeats 7]
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import timing
from transformer import Transformer

import jaxeff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    _ = parser.add_argument("--layers", type=int, default=12)
    _ = parser.add_argument("--width", type=int, default=768)
    _ = parser.add_argument("--vocabulary", type=int, default=512)
    _ = parser.add_argument("--batch", type=int, default=8)
    _ = parser.add_argument("--length", type=int, default=128)
    _ = parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    model = Transformer(layers=chosen.layers, width=chosen.width, vocabulary=chosen.vocabulary)
    tokens = jax.random.randint(jax.random.key(1), (chosen.batch, chosen.length), 0, chosen.vocabulary)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    size = sum(leaf.size for leaf in jax.tree.leaves(variables))
    print(timing.machine())
    print(f"{size / 1e6:.1f} M parameters, {chosen.batch} x {chosen.length} tokens")

    forward = jax.jit(model.apply)
    collect = jax.jit(lambda variables, tokens: jaxeff.collect(variables, model.apply, tokens))
    compiled = {
        "forward": _compile("forward", forward, variables, tokens),
        "collect": _compile("collect", collect, variables, tokens),
    }
    runs = {name: functools.partial(program, variables, tokens) for name, program in compiled.items()}
    seconds = timing.interleaved(runs, chosen.repeats)
    for name in compiled:
        print(f"{name}: {timing.spread(seconds[name], ' s')}")
    print(f"time, collect / forward: {timing.spread(timing.ratios(seconds, 'collect', 'forward'))}")


def _compile(name, function, variables, tokens):
    start = time.perf_counter()
    lowered = function.lower(variables, tokens)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    print(
        f"{name}: scratch {memory.temp_size_in_bytes / 2**20:.1f} MiB, "
        f"output {memory.output_size_in_bytes / 2**20:.2f} MiB, "
        f"trace and lower {traced - start:.2f} s, compile {done - traced:.2f} s"
    )
    return compiled


if __name__ == "__main__":
    main()
