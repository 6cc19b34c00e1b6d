"""Published architectures as Flax modules, for their costs: traced from shapes, never allocated."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class Bottleneck(nn.Module):
    """He et al. 2016, with the stride in the 3 x 3 convolution, as torchvision and others have it."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def conv(features, size, stride, name):
            return nn.Conv(features, (size, size), stride, use_bias=False, name=name)

        def norm(x):
            return nn.BatchNorm(use_running_average=True)(x)

        y = nn.relu(norm(conv(self.width, 1, 1, "reduce")(x)))
        y = nn.relu(norm(conv(self.width, 3, self.stride, "spatial")(y)))
        y = norm(conv(4 * self.width, 1, 1, "expand")(y))
        if x.shape != y.shape:
            x = norm(conv(4 * self.width, 1, self.stride, "project")(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(64 * 2**stage, stride, name=f"stage{stage}_{block}")(x)
        return nn.Dense(1000)(jnp.mean(x, axis=(1, 2)))


class Block(nn.Module):
    """A pre-norm transformer block: GPT-2's, and ViT's."""

    heads: int

    @nn.compact
    def __call__(self, x, mask=None):
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(y)


class GPT2(nn.Module):
    """GPT-2 small (Radford et al. 2019); the output layer is the token embedding."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 50257

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        positions = nn.Embed(1024, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        x = embed(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for layer in range(self.layers):
            x = Block(self.width // 64, name=f"block_{layer}")(x, mask)
        return embed.attend(nn.LayerNorm()(x))


class ViT(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2021)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(768, (16, 16), (16, 16), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, 768)
        token = self.param("class", nn.initializers.zeros, (1, 1, 768))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 768)), x], axis=1)
        x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], 768))
        for layer in range(12):
            x = Block(12, name=f"block_{layer}")(x)
        return nn.Dense(1000, name="head")(nn.LayerNorm()(x)[:, 0])


def shapes(module: nn.Module, *batch: jax.ShapeDtypeStruct) -> dict:
    return jax.eval_shape(module.init, jax.random.key(0), *batch)


def images(batch: int = 1) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)


def text(batch: int = 1, length: int = 1024) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)
