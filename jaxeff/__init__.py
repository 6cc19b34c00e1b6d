"""Which weights of a JAX network earn their keep, what they cost, and what can be removed.

>>> import flax.linen as nn, jax, jax.numpy as jnp, jaxeff
>>> model = nn.Dense(4)
>>> batch = jnp.ones((8, 3))
>>> variables = model.init(jax.random.key(0), batch)
>>> report = jaxeff.analyze(variables, model.apply, batch)
>>> list(report.layers)
['kernel']
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxeff import checkpoints as checkpoints
    from jaxeff import cost as cost
    from jaxeff import importance as importance
    from jaxeff import metrics as metrics
    from jaxeff import plot as plot
    from jaxeff import prune as prune
    from jaxeff import sketch as sketch
    from jaxeff._advise import advise as advise
    from jaxeff._analyze import analyze as analyze
    from jaxeff._calibrate import calibrate as calibrate
    from jaxeff._collect import collect as collect
    from jaxeff._compare_criteria import Comparison as Comparison
    from jaxeff._compare_criteria import compare_criteria as compare_criteria
    from jaxeff._monitor import Monitor as Monitor
    from jaxeff._monitor import MonitorState as MonitorState
    from jaxeff._monitor import monitor as monitor
    from jaxeff._pathways import Pathways as Pathways
    from jaxeff._pathways import pathways as pathways
    from jaxeff.advice import Advice as Advice
    from jaxeff.model.adapters import functional as functional
    from jaxeff.model.adapters import restore as restore
    from jaxeff.monitoring import Event as Event
    from jaxeff.quantization import Outliers as Outliers
    from jaxeff.quantization import outliers as outliers
    from jaxeff.report import Activity as Activity
    from jaxeff.report import LayerReport as LayerReport
    from jaxeff.report import ModelReport as ModelReport
    from jaxeff.report import Recommendation as Recommendation
    from jaxeff.report import Report as Report
    from jaxeff.spectral import Spectra as Spectra
    from jaxeff.spectral import spectra as spectra
    from jaxeff.statistics import Statistics as Statistics
    from jaxeff.statistics import merge as merge

    __version__: str

# Imported at first use, so that the command line reads checkpoints without Flax and Optax.
_MODULES = ("checkpoints", "cost", "importance", "metrics", "plot", "prune", "sketch")
_NAMES = {
    "_advise": ("advise",),
    "_analyze": ("analyze",),
    "_calibrate": ("calibrate",),
    "_collect": ("collect",),
    "_compare_criteria": ("Comparison", "compare_criteria"),
    "_monitor": ("Monitor", "MonitorState", "monitor"),
    "_pathways": ("Pathways", "pathways"),
    "advice": ("Advice",),
    "model.adapters": ("functional", "restore"),
    "monitoring": ("Event",),
    "quantization": ("Outliers", "outliers"),
    "report": ("Activity", "LayerReport", "ModelReport", "Recommendation", "Report"),
    "spectral": ("Spectra", "spectra"),
    "statistics": ("Statistics", "merge"),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jaxeff")
    if name not in (*_MODULES, *_PLACES):
        raise AttributeError(f"module 'jaxeff' has no attribute {name!r}")
    if name != "checkpoints":
        # Saving has to be registered before a caller gets anything to save.
        _ = importlib.import_module("jaxeff._saving")
    if name in _MODULES:
        return importlib.import_module(f"jaxeff.{name}")
    found = getattr(importlib.import_module(f"jaxeff.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_PLACES, "__version__"])
