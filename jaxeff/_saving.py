"""Registration of jaxeff's results with `flax.serialization`.

It is separate from the dataclasses, which the command line uses without Flax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import serialization

from jaxeff.metrics import Metrics, sketch
from jaxeff.report import Report
from jaxeff.statistics import Statistics

Kind = TypeVar("Kind")


def saved_by_flax(kind: type[Kind]) -> type[Kind]:
    """Let `flax.serialization` save the arrays of a registered dataclass, by their keys.

    As with `flax.struct`, static fields are not saved; they come from the target of `from_bytes`.
    """

    def to_state(tree: Any) -> dict[str, Any]:
        return {jax.tree_util.keystr(keys): leaf for keys, leaf in _with_keys(tree)}

    def from_state(target: Any, state: Mapping[str, Any]) -> Any:
        names = [jax.tree_util.keystr(keys) for keys, _ in _with_keys(target)]
        if different := sorted(state.keys() ^ set(names)):
            raise ValueError(
                f"the saved {kind.__name__} and the target differ: only one of them has {different[0]!r}. "
                "Pass a target made from the model that was saved"
            )
        return jax.tree.unflatten(jax.tree.structure(target), [state[name] for name in names])

    serialization.register_serialization_state(kind, to_state, from_state)
    return kind


def _with_keys(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


for _kind in (Metrics, sketch.Sketch, Report, Statistics):
    _ = saved_by_flax(_kind)
