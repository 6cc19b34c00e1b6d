"""LeNet-300-100 (LeCun et al., 1998): the small dense network of several benchmarks."""

import flax.linen as nn
import jax


class LeNet300100(nn.Module):
    """Images [n, 784] to logits [n, 10]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(300)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(100)(x)))
