"""Spectra of a pretrained model, of the demo's network before and after training, and of noise.

    python benchmarks/spectra.py --model model.safetensors

CPU seconds and medians of value / null over the matrices of a safetensors file, those of the digits network, and what
WeightWatcher's alpha gives for matrices of normal noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import timing

import jaxeff
from jaxeff import demo
from jaxeff.checkpoints import open_checkpoint

RATIOS = ("utilization_ratio", "effective_rank_ratio", "stable_rank_ratio")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("--model", help="a safetensors file")
    chosen = parser.parse_args()
    print(timing.machine())
    if chosen.model:
        params = _params(chosen.model)
        began, wall = time.process_time(), time.perf_counter()
        spectra = jaxeff.spectra(params)
        spent = time.process_time() - began, time.perf_counter() - wall
        print(
            f"{len(spectra)} matrices: {spent[0]:.1f} CPU s, {spent[1]:.1f} s\n\n{spectra.table(alpha=True)}\n"
        )
        print(f"median value / null: {_medians(spectra.rows)}")
        print(f"median alpha: {np.nanmedian([row.alpha for row in spectra.rows]):.2f}\n")
    training, _ = demo.split(demo.digits())
    before = demo.create_state(jax.random.key(demo.SEED))
    after = demo.train()[0]
    for name, state in (("before", before), ("after", after)):
        rows = jaxeff.spectra(state.params, state.apply_fn, training.images[:256]).rows
        print(f"digits, {name} training: {_medians(rows)}; verdicts {[row.law for row in rows]}")
        print(f"  output ranks: {[(row.output_rank, min(row.rows, row.columns)) for row in rows]}")
    generator = np.random.default_rng(0)
    for shape in ((64, 64), (384, 384), (384, 1536)):
        noise = {str(index): {"kernel": generator.standard_normal(shape)} for index in range(20)}
        alphas = [row.alpha for row in jaxeff.spectra(noise).rows]
        print(f"alpha of normal noise, {shape}: {min(alphas):.1f} to {max(alphas):.1f}")


def _params(path: str) -> dict[str, Any]:
    found = {}
    for name, array in open_checkpoint(path).arrays.items():
        with array.open() as read:
            found[name] = read(0, array.size).reshape(array.shape)
    return found


def _medians(rows: Iterable[Any]) -> str:
    return ", ".join(f"{name} {np.median([getattr(row, name) for row in rows]):.2f}" for name in RATIOS)


if __name__ == "__main__":
    main()
