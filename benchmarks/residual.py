"""ResNet-20 (He et al., 2016, arXiv:1512.03385) with projection shortcuts, as a function of its widths."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax


class Stage(NamedTuple):
    """Channels of a stage's residual stream, and within each of its blocks."""

    stream: int
    blocks: tuple[int, ...]


class Block(nn.Module):
    inner: int
    outer: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train, momentum=0.9)
        y = nn.relu(norm(name="norm0")(conv(self.inner, (3, 3), strides=self.strides, name="conv0")(x)))
        y = norm(name="norm1")(conv(self.outer, (3, 3), name="conv1")(y))
        if self.strides > 1:
            x = norm(name="norm")(conv(self.outer, (1, 1), strides=self.strides, name="project")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images [n, 28, 28, 1] to logits [n, 10]. Unlike the original's, the first convolution strides."""

    stages: tuple[Stage, ...]
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, name="norm")
        x = nn.relu(norm(nn.Conv(self.stages[0].stream, (3, 3), strides=2, use_bias=False, name="stem")(x)))
        for i, stage in enumerate(self.stages):
            for j, inner in enumerate(stage.blocks):
                strides = 2 if i and not j else 1
                x = Block(inner, stage.stream, strides, self.train, name=f"block_{i}_{j}")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def resnet_20(width: int) -> ResNet:
    """Three stages of three blocks, of `width`, twice and four times as many channels."""
    return ResNet(tuple(Stage(times * width, 3 * (times * width,)) for times in (1, 2, 4)))


def of_params(params: Any) -> ResNet:
    """The ResNet that these are the parameters of."""

    def stage(i: int) -> Stage:
        blocks = [params[f"block_{i}_{j}"] for j in range(3)]
        inner = tuple(block["conv0"]["kernel"].shape[-1] for block in blocks)
        return Stage(blocks[0]["conv1"]["kernel"].shape[-1], inner)

    return ResNet(tuple(stage(i) for i in range(3)))
