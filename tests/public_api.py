"""The public names of jaxeff and how they are called, one line each.

python tests/public_api.py    # writes tests/public_api.txt after a change that is meant
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    *("jaxeff", "jaxeff.metrics", "jaxeff.sketch", "jaxeff.importance", "jaxeff.prune"),
    *("jaxeff.cost", "jaxeff.plot", "jaxeff.checkpoints"),
)
SNAPSHOT = Path(__file__).with_suffix(".txt")


def lines() -> Iterator[str]:
    for module in map(importlib.import_module, MODULES):
        for name in sorted(public(module)):
            found = getattr(module, name)
            if not inspect.ismodule(found):
                yield from described(f"{module.__name__}.{name}", found)


def public(owner: Any) -> list[str]:
    names = dir(owner) if not hasattr(owner, "__all__") else owner.__all__
    return [name for name in names if not name.startswith("_") and not _foreign(getattr(owner, name))]


def _foreign(found: Any) -> bool:
    """Whether a module has it only because it was imported there."""
    module = getattr(found, "__module__", None)
    return isinstance(module, str) and not module.startswith("jaxeff")


def described(path: str, found: Any) -> Iterator[str]:
    if inspect.isclass(found):
        yield f"{path}{signature(found)}"
        for name, member in sorted(vars(found).items()):
            if name.startswith("_"):
                continue
            if isinstance(member, (classmethod, staticmethod)):
                yield f"{path}.{name}{signature(getattr(found, name))}"
            elif inspect.isfunction(member):
                yield f"{path}.{name}{signature(member)}"
            else:
                yield f"{path}.{name}"
    elif callable(found):
        yield f"{path}{signature(found)}"
    else:
        yield path


def signature(found: Any) -> str:
    """Names, kinds and defaults of the parameters; types are not a promise."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (ValueError, TypeError):  # an exception type without an initializer of its own
        return "(...)"
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature([each.replace(default=_stable(each.default)) for each in plain]))


def _stable(default: Any) -> Any:
    """A default that prints alike in every process."""
    if default is inspect.Parameter.empty or not (callable(default) or "0x" in repr(default)):
        return default
    return _Named(getattr(default, "__name__", type(default).__name__))


class _Named:
    def __init__(self, name: str):
        self._name = name

    def __repr__(self) -> str:
        return self._name


if __name__ == "__main__":
    _ = SNAPSHOT.write_text("\n".join(lines()) + "\n")
