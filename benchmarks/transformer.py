"""A GPT-like transformer in Flax Linen, the model that the benchmarks measure on."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Pre-norm attention and a four times wider MLP."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(hidden)


class Transformer(nn.Module):
    """Tokens [batch, length] to logits [batch, length, vocabulary], embedding tied."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 512
    context: int = 1024

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        positions = nn.Embed(self.context, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        x = embed(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x, mask)
        return embed.attend(nn.LayerNorm()(x))
