"""Masks that hold while Keras trains."""

from __future__ import annotations

from typing import Any

from jaxeff.model.adapters import functional, restore
from jaxeff.model.keras_models import keras_on_jax
from jaxeff.prune._masking import apply


def keras_callback(masks: Any) -> Any:
    """Return a Keras callback that keeps pruned weights at 0 during `fit`.

    It sets them to 0 before the first step and after each, whatever the optimizer. Needs Keras on the JAX backend,
    which the extra `keras` installs.

    Args:
        masks: from `prune.masks`, for the params of `jaxeff.functional(model)`.

    Raises:
        ImportError: Keras, or the backend that it is set to, is not installed.
        ValueError: Keras runs on another backend. From `fit`: the masks are of another model.
    """
    keras = keras_on_jax()

    class Masks(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self._apply()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            # Keras trains copies of the variables, and writes them back when asked to.
            assert self.model is not None
            self.model.jax_state_sync()
            self._apply()

        def _apply(self) -> None:
            params, _ = functional(self.model)
            _ = restore(self.model, apply(params, masks))

    return Masks()
