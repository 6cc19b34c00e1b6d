"""The sizes of a model in a Hugging Face `config.json`, by the shapes of its arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxeff.checkpoints._stored import CheckpointError, quoted

Shapes = Mapping[str, Sequence[int]]

_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks)\.(\d+)\.")
_WIDTHS = {
    # Llama, Mistral, Qwen, Gemma; BERT and ViT: units are the first axis.
    "intermediate_size": ("mlp.gate_proj.weight", "mlp.up_proj.weight", "intermediate.dense.weight"),
}
_HEADS = {
    "num_attention_heads": (
        "self_attn.q_proj.weight", "attention.self.query.weight", "attention.attention.query.weight"
    ),
    "num_key_value_heads": ("self_attn.k_proj.weight",),
}  # fmt: skip


def resized(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Return a config with the number of blocks, hidden units and heads that the arrays have.

    They are read from the names of Llama, Mistral, Qwen, Gemma, BERT and ViT. Where heads were removed, `head_dim` is
    written, because hidden_size / num_attention_heads no longer gives their size.

    Args:
        config: of the model before it was made smaller.
        shapes: of its arrays now, by name, units first.

    Raises:
        CheckpointError: blocks differ in a size, for which a config has one number; or heads were cut through.

    >>> shapes = {f"model.layers.{i}.mlp.up_proj.weight": (96, 64) for i in range(2)}
    >>> resized({"num_hidden_layers": 3, "intermediate_size": 128}, shapes)
    {'num_hidden_layers': 2, 'intermediate_size': 96}
    """
    found = dict(config)
    blocks = {match[1] for name in shapes if (match := _BLOCK.search(name))}
    if blocks and "num_hidden_layers" in config:
        found["num_hidden_layers"] = len(blocks)
    for key, names in _WIDTHS.items():
        if key in config and (width := _units(shapes, names, key)) is not None:
            found[key] = width
    heads = config.get("num_attention_heads")
    size = config.get("head_dim") or (
        config["hidden_size"] // heads if heads and "hidden_size" in config else None
    )
    for key, names in _HEADS.items():
        if size and key in config and (width := _units(shapes, names, key)) is not None:
            if width % size:
                raise CheckpointError(
                    f"`arrays` has {width} units for `{key}`, which is not a multiple of the head size {size}"
                )
            found[key] = width // size
    if found.get("num_attention_heads") != heads:
        found["head_dim"] = size
    return found


def _units(shapes: Shapes, names: Sequence[str], key: str) -> int | None:
    """The units of all arrays whose names end so; None if there are none."""
    found = {shape[0] for name, shape in shapes.items() if name.endswith(tuple(names))}
    if len(found) > 1:
        raise CheckpointError(
            f"`arrays` has {quoted(sorted(found))} units in different blocks, and `{key}` is one number for all: "
            "remove equally many from each"
        )
    return found.pop() if found else None


def renumbered(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays by name, with the blocks that are left numbered from 0.

    >>> renumbered({"model.layers.0.w": 1, "model.layers.3.w": 2, "model.norm.weight": 3})
    {'model.layers.0.w': 1, 'model.layers.1.w': 2, 'model.norm.weight': 3}
    """
    places = {name: _BLOCK.search(name) for name in arrays}
    kept = sorted({int(match[1]) for match in places.values() if match})
    number = {old: str(new) for new, old in enumerate(kept)}
    return {
        name
        if match is None
        else name[: match.start(1)] + number[int(match[1])] + name[match.end(1) :]: arrays[name]
        for name, match in places.items()
    }
