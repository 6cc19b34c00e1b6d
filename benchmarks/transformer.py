"""Transformers in Flax Linen that the benchmarks measure on: GPT-like, and of images."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Sizes(NamedTuple):
    """Of a block: attention heads, numbers in each, and units of the MLP."""

    heads: int
    head: int
    hidden: int


class Block(nn.Module):
    """Pre-norm attention and an MLP."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width, (heads, head, hidden) = x.shape[-1], self.sizes
        attention = nn.MultiHeadDotProductAttention(
            heads, qkv_features=heads * head, out_features=width, name="attention"
        )
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(width, name="down")(nn.gelu(nn.Dense(hidden, name="up")(nn.LayerNorm()(x))))


def sizes_of(block: Any) -> Sizes:
    """The sizes of the block that these are the parameters of."""
    _, heads, head = block["attention"]["query"]["kernel"].shape
    return Sizes(heads, head, block["up"]["kernel"].shape[1])


class Transformer(nn.Module):
    """Tokens [batch, length] to logits [batch, length, vocabulary], embedding tied.

    All blocks have `heads`, and an MLP four times wider, unless `blocks` gives the sizes of each.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 512
    context: int = 1024
    blocks: tuple[Sizes, ...] | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        positions = nn.Embed(self.context, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        x = embed(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        alike = self.layers * (Sizes(self.heads, self.width // self.heads, 4 * self.width),)
        for i, sizes in enumerate(self.blocks or alike):
            x = Block(sizes, name=f"block_{i}")(x, mask)
        return embed.attend(nn.LayerNorm()(x))


class VisionTransformer(nn.Module):
    """Images [n, 28, 28, 1], in 16 patches, to logits [n, 10]."""

    width: int
    blocks: tuple[Sizes, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), strides=7, name="patches")(x).reshape(len(x), 16, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (16, self.width))
        for i, sizes in enumerate(self.blocks):
            x = Block(sizes, name=f"block_{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(1))
