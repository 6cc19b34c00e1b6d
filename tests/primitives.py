"""Prints the names of all primitives of the installed JAX: every `Primitive` that its public modules make.

A program of its own: in the process of the tests, other libraries have primitives too. `jax.experimental`
is left out, where primitives come and go, and stand in kernels rather than in models.
"""

import gc
import importlib
import pkgutil
import warnings

import jax
from jax.extend.core import Primitive


def public(package):
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        name = found.name.rpartition(".")[2]
        # `collect_profile` is a script, and wants TensorFlow.
        if not name.startswith("_") and name not in {"experimental", "tools", "collect_profile"}:
            module = importlib.import_module(found.name)
            if found.ispkg:
                public(module)


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    public(jax)
    names = {found.name for found in gc.get_objects() if isinstance(found, Primitive)}
    print(*sorted(names), sep="\n")
