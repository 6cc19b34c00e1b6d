"""LeNets on MNIST: test accuracy by criterion and sparsity, mean and standard deviation over seeds.

    sh benchmarks/fetch_mnist.sh DIR
    python benchmarks/mnist.py --data DIR --network lenet-300-100
    python benchmarks/mnist.py --data DIR --network lenet-5

Each seed trains a dense network. Each criterion prunes that network from one sparsity to the next, over all
layers in one order, and trains what is left, the learning rate anew from its start to 0. The last 5,000
training images are for validation; the test images are for the table alone.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from flax.training.train_state import TrainState
from lenet import LeNet300100

from jaxeff import calibrate, prune

BATCH = 128
VALIDATION = 5_000
REACH = 1
"""Pixels by which training images are shifted at random, along both axes."""


class Digits(NamedTuple):
    """Images uint8 [n, 28, 28] and labels int32 [n]."""

    images: jax.Array
    labels: jax.Array


def read_idx(path: Path) -> np.ndarray:
    """The bytes of one IDX file, gzipped or not, in their shape."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    zeros, kind, rank = content[:2], content[2:3], content[3] if len(content) > 3 else 0
    if zeros != b"\0\0" or kind != b"\x08" or len(content) < 4 + 4 * rank:
        raise ValueError(f"{path} is no IDX file of bytes: it begins with {content[:4].hex(' ')}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", rank, 4))
    if len(content) != 4 + 4 * rank + math.prod(shape):
        raise ValueError(f"{path} holds {len(content) - 4 - 4 * rank} bytes where its header says {shape}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_digits(folder: Path, name: str) -> Digits:
    """The images and labels of `name`, 'train' or 't10k'."""
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        paths = [folder / f"{name}-{kind}{suffix}" for suffix in ("", ".gz")]
        present = [path for path in paths if path.is_file()]
        if not present:
            raise FileNotFoundError(f"`--data` has no {paths[0].name}, gzipped or not: {folder}")
        found.append(read_idx(present[0]))
    images, labels = found
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(f"`--data` has {name} images of shape {images.shape}, labels {labels.shape}")
    return Digits(jnp.asarray(images), jnp.asarray(labels, jnp.int32))


def patches_product(images: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """A convolution without padding or strides, as a product: inside a scan, XLA's own is ten times slower
    on a CPU."""
    height, width, inputs, outputs = kernel.shape
    rows, columns = images.shape[1] - height + 1, images.shape[2] - width + 1
    shifted = [images[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(height * width * inputs, outputs)


def halved(images: jax.Array) -> jax.Array:
    """The largest of every 2 x 2 pixels."""
    n, height, width, channels = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


class LeNet5(nn.Module):
    """Caffe's LeNet-5, 430,500 weights: images [n, 784] to logits [n, 10]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(
            nn.Conv, kernel_size=(5, 5), padding="VALID", conv_general_dilated=patches_product
        )
        x = halved(conv(20)(x.reshape(-1, 28, 28, 1)))
        x = halved(conv(50)(x))
        x = nn.relu(nn.Dense(500, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="output")(x)


class Setting(NamedTuple):
    """Of a network: its defaults, the layers that stay denser, and test accuracies of the literature.

    Han et al. 2015, arXiv:1506.02626; Guo et al. 2016 (dynamic network surgery), arXiv:1608.04493.
    """

    model: nn.Module
    rate: float
    dense_epochs: int
    epochs: int
    sparsities: tuple[float, ...]
    criteria: tuple[str, ...]
    limits: Mapping[str, float]
    literature: str


SETTINGS = {
    "lenet-300-100": Setting(
        LeNet300100(),
        3e-3,
        20,
        10,
        (0.92, 0.95, 0.97, 0.982, 0.99),
        ("magnitude", "activation", "wanda", "taylor", "obd", "random"),
        {"Dense_1/kernel": 0.9},
        "Han et al. 98.36 dense, 98.41 at 12x; Guo et al. 98.01 at 56x",
    ),
    "lenet-5": Setting(
        LeNet5(),
        2e-3,
        3,
        4,
        (0.92, 0.99),
        ("magnitude", "wanda"),
        {"Conv_0/kernel": 0.8, "output/kernel": 0.9},
        "Han et al. 99.20 dense, 99.23 at 12x; Guo et al. 99.09 at 108x",
    ),
}


def inputs(images: jax.Array) -> jax.Array:
    return images.reshape(len(images), -1).astype(jnp.float32) / 255


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each by up to `REACH` pixels of its own."""
    padded = jnp.pad(images, ((0, 0), (REACH, REACH), (REACH, REACH)))
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * REACH + 1)
    return jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, start, (28, 28)))(padded, starts)


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@jax.jit
def train_epoch(state: TrainState, data: Digits, key: jax.Array) -> TrainState:
    """One pass over the data in random order, in one program."""
    order, shifts = jax.random.split(key)
    steps = len(data.labels) // BATCH
    chosen = jax.random.permutation(order, len(data.labels))[: steps * BATCH].reshape(steps, BATCH)

    def step(state: TrainState, one: tuple[jax.Array, jax.Array]) -> tuple[TrainState, None]:
        index, key = one
        x, labels = inputs(shifted(data.images[index], key)), data.labels[index]

        def loss(params: Any) -> jax.Array:
            return cross_entropy(state.apply_fn({"params": params}, x), labels).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

    return jax.lax.scan(step, state, (chosen, jax.random.split(shifts, steps)))[0]


@jax.jit
def error(state: TrainState, data: Digits) -> jax.Array:
    """The share of images that the network names wrongly, in percent, []."""

    def wrong(part: Digits) -> jax.Array:
        logits = state.apply_fn({"params": state.params}, inputs(part.images))
        return jnp.sum(jnp.argmax(logits, -1) != part.labels)

    parts = jax.tree.map(lambda x: x.reshape(-1, 500, *x.shape[1:]), data)
    return 100 * jnp.sum(jax.lax.map(wrong, parts)) / len(data.labels)


def optimizer(epochs: int, rate: float, examples: int) -> optax.GradientTransformation:
    """AdamW, its rate falling to 0 over the epochs, that keeps to the masks in its state."""
    cosine = optax.cosine_decay_schedule(rate, epochs * (examples // BATCH))
    return prune.sparsify(optax.adamw(cosine, weight_decay=1e-4), lambda step: (jnp.float32(0), False))


def masked(state: TrainState, masks: Any) -> TrainState:
    return state.replace(opt_state=state.opt_state._replace(masks=masks))


def importance(state: TrainState, data: Digits, criterion: str, batches: int = 16) -> Any:
    """Scores of the network as it is, from some training images where the criterion reads any."""
    if criterion == "magnitude":
        return prune.scored(state.params)
    parts = [slice(i * 256, (i + 1) * 256) for i in range(batches)]
    found = calibrate(
        state.params,
        apply_params(state.apply_fn),
        [(inputs(data.images[part]), data.labels[part]) for part in parts],
        criterion=criterion,
        loss_fn=cross_entropy,
        progress=False,
    )
    return prune.scored(state.params, found, criterion)


@functools.cache
def apply_params(apply_fn: Callable) -> Callable:
    """One function for one network, so that its programs are found again."""
    return lambda params, x: apply_fn({"params": params}, x)


def pruned(
    state: TrainState,
    data: Digits,
    key: jax.Array,
    criterion: str,
    sparsities: tuple[float, ...],
    tx: optax.GradientTransformation,
    epochs: int,
    limits: Mapping[str, float],
) -> Iterator[TrainState]:
    """The network at each sparsity in turn. Masks are made before each of the first half of the epochs."""
    masks, before = jax.tree.map(lambda leaf: jnp.asarray(True), state.params), 0.0
    for number, target in enumerate(sparsities):
        state = TrainState.create(apply_fn=state.apply_fn, params=state.params, tx=tx)
        ramp = prune.cubic(target, 0, epochs // 2, 1, initial=before)
        for epoch in range(epochs):
            if epoch < max(epochs // 2, 1):
                scores = prune.apply(importance(state, data, criterion), masks)
                sparsity = float(ramp(epoch + 1).sparsity)
                masks = prune.masks(scores, sparsity, scope="global", max_sparsity=limits)
            state = train_epoch(masked(state, masks), data, jax.random.fold_in(key, number * epochs + epoch))
        before = target
        yield state


class Errors(NamedTuple):
    """In percent, of one network."""

    validation: float
    test: float


def run(setting: Setting, seed: int, data: Mapping[str, Digits], chosen: argparse.Namespace) -> Iterator[Any]:
    """`(criterion, sparsity, errors)` of one seed, the dense network first as `('dense', 0, errors)`."""

    def errors(state: TrainState) -> Errors:
        return Errors(float(error(state, data["validation"])), float(error(state, data["test"])))

    start, order, again = jax.random.split(jax.random.key(seed), 3)
    training, apply_fn = data["training"], setting.model.apply
    params = setting.model.init(start, jnp.zeros((1, 784)))["params"]
    dense = TrainState.create(apply_fn=apply_fn, params=params, tx=chosen.dense_optimizer)
    for epoch in range(chosen.dense_epochs):
        dense = train_epoch(dense, training, jax.random.fold_in(order, epoch))
    yield "dense", 0.0, errors(dense)
    how = (chosen.sparsities, chosen.optimizer, chosen.epochs, setting.limits)
    for criterion in chosen.criteria:
        states = pruned(dense, training, again, criterion, *how)
        for sparsity, state in zip(chosen.sparsities, states, strict=True):
            yield criterion, sparsity, errors(state)


def cell(values: list[float]) -> str:
    deviation = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def report(found: Mapping[tuple[str, float], list[Errors]], chosen: argparse.Namespace) -> None:
    """The table, and how far each criterion goes at no more than 0.3 points."""
    accuracy = {key: cell([100 - each.test for each in errors]) for key, errors in found.items()}
    validation = {key: statistics.mean(each.validation for each in errors) for key, errors in found.items()}
    print(f"\nTest accuracy in percent, mean (standard deviation) of {chosen.seeds} seeds.\n")
    headers = [f"{100 * s:g} % ({1 / (1 - s):.3g}x)" for s in chosen.sparsities]
    print(f"| | dense | {' | '.join(headers)} |\n|---|---|{'---|' * len(headers)}")
    for criterion in chosen.criteria:
        cells = [accuracy["dense", 0.0], *(accuracy[criterion, s] for s in chosen.sparsities)]
        print(f"| {criterion} | {' | '.join(cells)} |")
    print(f"\nThe literature: {SETTINGS[chosen.network].literature}.")
    for criterion in chosen.criteria:
        limit = validation["dense", 0.0] + 0.3
        held = [s for s in chosen.sparsities if validation[criterion, s] <= limit]
        farthest = f"up to {100 * max(held):g} %" if held else "nowhere"
        print(f"{criterion}: validation error at most 0.3 points above dense: {farthest}")


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--data", type=Path, required=True, help="directory of the four IDX files")
    _ = parser.add_argument("--network", choices=SETTINGS, default="lenet-300-100")
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--sparsities", type=numbers, help="rising, such as 0.92,0.99")
    _ = parser.add_argument("--criteria", type=lambda text: tuple(text.split(",")))
    _ = parser.add_argument("--epochs", type=int, help="at each sparsity")
    _ = parser.add_argument("--dense-epochs", type=int)
    chosen = parser.parse_args()
    setting = SETTINGS[chosen.network]
    for name in ("sparsities", "criteria", "epochs", "dense_epochs"):
        if getattr(chosen, name) is None:
            setattr(chosen, name, getattr(setting, name))
    everything = read_digits(chosen.data, "train")
    data = {
        "training": jax.tree.map(lambda x: x[:-VALIDATION], everything),
        "validation": jax.tree.map(lambda x: x[-VALIDATION:], everything),
        "test": read_digits(chosen.data, "t10k"),
    }
    examples = len(data["training"].labels)
    chosen.dense_optimizer = optimizer(chosen.dense_epochs, setting.rate, examples)
    chosen.optimizer = optimizer(chosen.epochs, setting.rate, examples)
    print(timing.machine(), flush=True)
    found: dict[tuple[str, float], list[Errors]] = {}
    begin = time.perf_counter()
    for seed in range(chosen.seeds):
        for criterion, sparsity, errors in run(setting, seed, data, chosen):
            found.setdefault((criterion, sparsity), []).append(errors)
            passed = f"{time.perf_counter() - begin:.0f} s"
            print(
                f"{passed}: seed {seed}, {criterion} {sparsity:g}: validation {errors.validation:.2f} %, "
                f"test {errors.test:.2f} %",
                flush=True,
            )
    report(found, chosen)


if __name__ == "__main__":
    main()
