"""A loss that trains a pruned network on what the dense one emits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from jaxeff.numerics.precision import widened


def distillation(logits: Array, teacher_logits: Array, temperature: float | Array = 2.0) -> Array:
    """Return the divergence of a student's predictions from its teacher's, at a temperature.

    With p = softmax(teacher_logits / T) and q = softmax(logits / T), it is T^2 KL(p || q) = T^2 sum p log(p / q), and
    its gradient in the logits is T (q - p). Without the factor T^2 the gradient would shrink as 1 / T^2, and the
    balance between this loss and that of the labels would depend on T. No gradient flows to the teacher's logits.

    Train a network under masks, or a smaller one, to match the dense network with it, alone or added to the loss of
    the labels. Like any `loss_fn` it takes outputs and targets, in this order.

    Args:
        logits: of the student, [..., classes].
        teacher_logits: of the same shape.
        temperature: T, a positive number, which may be traced. The larger it is, the more the improbable classes count.

    Returns:
        [...], one loss per example or position, in float32 at least. Take its mean.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531

    >>> teacher = jnp.log(jnp.array([0.8, 0.2]))
    >>> float(distillation(jnp.zeros(2), teacher, temperature=1))  # 0.8 log(0.8 / 0.5) + 0.2 log(0.2 / 0.5)
    0.1927
    """
    if jnp.shape(logits) != jnp.shape(teacher_logits) or not jnp.ndim(logits):
        raise ValueError(
            f"`logits` and `teacher_logits` must have one shape [..., classes], got {jnp.shape(logits)} and "
            f"{jnp.shape(teacher_logits)}"
        )
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}")
    student, teacher = (
        jax.nn.log_softmax(widened(each) / temperature)
        for each in (logits, lax.stop_gradient(teacher_logits))
    )
    # A class that the teacher rules out, with a logit of -inf, adds nothing.
    ratios = jnp.where(jnp.isneginf(teacher), 0, teacher - student)
    return temperature**2 * jnp.sum(jnp.exp(teacher) * ratios, -1)
