"""The first call of `jaxeff.analyze`, compilation included, beside the plain forward pass's own first call.

    python benchmarks/first_call.py [--vocabulary 50257] [--batch 2] [--length 128]

Each is measured once in its own process, since a first call is first only once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import jax
import timing
from transformer import Transformer

import jaxeff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    _ = parser.add_argument("--layers", type=int, default=12)
    _ = parser.add_argument("--width", type=int, default=768)
    _ = parser.add_argument("--vocabulary", type=int, default=50257)
    _ = parser.add_argument("--batch", type=int, default=8)
    _ = parser.add_argument("--length", type=int, default=128)
    _ = parser.add_argument("--repeats", type=int, default=3)
    _ = parser.add_argument("--only", choices=("forward", "collect", "analyze"))
    chosen = parser.parse_args()
    if chosen.only:
        print(_seconds(chosen))
        return
    print(timing.machine())
    seconds = {name: [] for name in ("forward", "collect", "analyze")}
    for _ in range(chosen.repeats):
        for name, found in seconds.items():
            command = [sys.executable, *sys.argv, "--only", name]
            first, second = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            found.append(float(first))
            print(f"{name}: first call {first} s, second {second} s")
    for name in ("collect", "analyze"):
        print(f"first call, {name} / forward: {timing.spread(timing.ratios(seconds, name, 'forward'))}")


def _seconds(chosen: argparse.Namespace) -> str:
    model = Transformer(layers=chosen.layers, width=chosen.width, vocabulary=chosen.vocabulary)
    tokens = jax.random.randint(jax.random.key(1), (chosen.batch, chosen.length), 0, chosen.vocabulary)
    variables = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0), tokens))
    forward = jax.jit(model.apply)
    calls = {
        "forward": lambda: forward(variables, tokens),
        "collect": lambda: jaxeff.collect(variables, model.apply, tokens),
        "analyze": lambda: jaxeff.analyze(variables, model.apply, tokens),
    }
    found = []
    for _ in range(2):
        start = time.perf_counter()
        _ = jax.block_until_ready(calls[chosen.only]())
        found.append(f"{time.perf_counter() - start:.2f}")
    return " ".join(found)


if __name__ == "__main__":
    main()
