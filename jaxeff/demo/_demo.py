"""Train a small convolutional network on scanned digits, analyze it, prune it, and ask for advice.

The digits come with the package, so nothing is downloaded. The hidden Dense layer is deliberately wider than
the task needs, and the report should say so. The demo takes about 55 CPU seconds, half a minute to a minute on
two cores.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import Progress, TextColumn

from jaxeff import prune
from jaxeff._advise import advise
from jaxeff._analyze import analyze
from jaxeff.output.progress import ONE_LINE, Part, counted, elapsed, fitted

SEED = 0
EPOCHS = 20
BATCH_SIZE = 64
TEST_SIZE = 360
ANALYZED = 512
SPARSITY = 0.9
TOLERANCE = 0.05


class Examples(NamedTuple):
    """Images of digits [n, 8, 8, 1], and their labels [n]."""

    images: jax.Array
    labels: jax.Array


class Epoch(NamedTuple):
    """One pass over the training digits: its number from 1, and the mean loss and accuracy during it."""

    number: int
    loss: float
    accuracy: float


def digits() -> Examples:
    """Return all 1,797 digits: images float32 in [0, 1], labels int32.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998, doi:10.24432/C50P49, CC BY 4.0

    >>> images, labels = digits()
    >>> images.shape, float(images.max()), labels.shape
    ((1797, 8, 8, 1), 1.0, (1797,))
    """
    archive = files("jaxeff.demo") / "data" / "digits.npz"
    with archive.open("rb") as file, np.load(file, allow_pickle=False) as data:
        images, labels = data["images"], data["labels"]
    return Examples(jnp.asarray(images[..., None] / np.float32(16)), jnp.asarray(labels, jnp.int32))


def split(examples: Examples) -> tuple[Examples, Examples]:
    """Split into training and test examples; the same 360 are held out whatever the training seed.

    >>> training, test = split(digits())
    >>> len(training.labels), len(test.labels)
    (1437, 360)
    """
    # The file is ordered by writer, so its tail would hold only a few of them.
    order = np.random.default_rng(0).permutation(len(examples.labels))
    training, test = order[:-TEST_SIZE], order[-TEST_SIZE:]
    return jax.tree.map(lambda x: x[training], examples), jax.tree.map(lambda x: x[test], examples)


class DigitsCNN(nn.Module):
    """Two convolutions and two dense layers: images [n, 8, 8, 1] to logits [n, 10].

    `widths` are the channels of the convolutions and the units of the hidden layer.
    """

    widths: tuple[int, int, int] = (16, 32, 512)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.widths[0], (3, 3))(images))
        x = nn.relu(nn.Conv(self.widths[1], (3, 3), strides=(2, 2))(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.widths[2])(x))
        return nn.Dense(10)(x)


def create_state(key: jax.Array) -> TrainState:
    """Return a newly initialized network and its optimizer."""
    params = _init(key, jnp.zeros((1, 8, 8, 1)))["params"]
    return TrainState.create(apply_fn=_MODEL.apply, params=params, tx=_OPTIMIZER)


# Made once, so that networks of all seeds share their compiled programs.
_MODEL = DigitsCNN()
_OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-2)
_init = jax.jit(_MODEL.init)


@jax.jit
def accuracy(state: TrainState, examples: Examples) -> jax.Array:
    """Return the share of `examples` that the network classifies correctly, []."""
    logits = state.apply_fn({"params": state.params}, examples.images)
    return jnp.mean(jnp.argmax(logits, axis=-1) == examples.labels)


def train(
    seed: int = SEED, epochs: int = EPOCHS, progress: Callable[[Epoch], None] = lambda epoch: None
) -> tuple[TrainState, tuple[Epoch, ...]]:
    """Train a new network with AdamW; `progress` is called after each epoch.

    The seed determines the initial weights and the order of the batches, so equal seeds give equal networks on one
    machine.
    """
    initial, order = jax.random.split(jax.random.key(seed))
    return _train(create_state(initial), order, epochs, progress)


def train_pruned(
    state: TrainState,
    seed: int = SEED,
    epochs: int = EPOCHS,
    progress: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[TrainState, tuple[Epoch, ...]]:
    """Train on while the smallest weights of all layers are removed: 90 % of them by half of the epochs."""
    steps = epochs * _steps(split(digits())[0])
    schedule = prune.cubic(SPARSITY, begin=0, end=steps // 2, every=10)
    optimizer = prune.sparsify(_OPTIMIZER, schedule, scope="global")
    return train_further(state, seed, epochs, progress, optimizer)


def train_further(
    state: TrainState,
    seed: int = SEED,
    epochs: int = EPOCHS,
    progress: Callable[[Epoch], None] = lambda epoch: None,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[TrainState, tuple[Epoch, ...]]:
    """Train on with a new optimizer, AdamW by default, for comparison with `train_pruned`."""
    state = TrainState.create(apply_fn=state.apply_fn, params=state.params, tx=optimizer or _OPTIMIZER)
    return _train(state, jax.random.fold_in(jax.random.key(seed), 1), epochs, progress)


def _train(
    state: TrainState, order: jax.Array, epochs: int, progress: Callable[[Epoch], None]
) -> tuple[TrainState, tuple[Epoch, ...]]:
    training, _ = split(digits())
    history = []
    for number in range(1, epochs + 1):
        state, loss, correct = _train_epoch(state, training, jax.random.fold_in(order, number))
        history.append(Epoch(number, float(loss), float(correct)))
        progress(history[-1])
    return state, tuple(history)


def _steps(training: Examples) -> int:
    """Return the number of batches of an epoch."""
    return len(training.labels) // BATCH_SIZE


@jax.jit
def _train_epoch(
    state: TrainState, training: Examples, key: jax.Array
) -> tuple[TrainState, jax.Array, jax.Array]:
    steps = _steps(training)
    order = jax.random.permutation(key, len(training.labels))[: steps * BATCH_SIZE]

    def step(state: TrainState, chosen: jax.Array) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        return _train_step(state, Examples(training.images[chosen], training.labels[chosen]))

    state, (losses, correct) = jax.lax.scan(step, state, order.reshape(steps, BATCH_SIZE))
    return state, jnp.mean(losses), jnp.mean(correct)


def _train_step(state: TrainState, batch: Examples) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
    def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.mean(losses), jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)

    (value, correct), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients), (value, correct)


def run(seed: int = SEED, epochs: int = EPOCHS) -> None:
    """Train, analyze, prune and print: progress to standard error, results to standard output."""
    training, test = split(digits())
    with _shown_progress("Training", epochs) as progress:
        state, _ = train(seed, epochs, progress)
    share = float(accuracy(state, test))
    correct = f"{round(share * TEST_SIZE)} of {TEST_SIZE}"
    print(f"Test accuracy: {100 * share:.1f} % ({correct} digits)\n", flush=True)
    print(analyze(state.params, state.apply_fn, training.images[:ANALYZED]), flush=True)
    with _shown_progress("Pruning", epochs) as progress:
        pruned, _ = train_pruned(state, seed, epochs, progress)
    with _shown_progress("Without pruning", epochs) as progress:
        whole, _ = train_further(state, seed, epochs, progress)
    shares = f"{100 * SPARSITY:.0f} % of the weights pruned on the way, and with none"
    print(f"\nAfter {epochs} more epochs, with {shares}:\n")
    print(_table(state, pruned, whole, test))
    print("\nA step takes the same time in all three: zeros in a dense array cost as much as other numbers.")
    print(
        f"\nWithout training, at most {100 * TOLERANCE:.0f} % more loss, by `jaxeff.advise` on the test digits:\n"
    )
    advice = advise(
        {"params": state.params},
        state.apply_fn,
        test.images,
        loss_fn=optax.softmax_cross_entropy_with_integer_labels,
        targets=test.labels,
        tolerance=TOLERANCE,
    )
    print(advice)


def _table(before: TrainState, pruned: TrainState, whole: TrainState, test: Examples) -> str:
    states = (before, pruned, whole)
    rows = (
        ("", "before", "pruned", "not pruned"),
        ("test accuracy", *(f"{100 * float(accuracy(state, test)):.1f} %" for state in states)),
        ("nonzero parameters", *(f"{_nonzero(state):,}" for state in states)),
        ("bytes, dense", *(f"{_bytes(state):,}" for state in states)),
        ("bytes, packed", f"{_bytes(before):,}", f"{_packed_bytes(pruned):,}", f"{_bytes(whole):,}"),
    )
    return "\n".join(f"{row[0]:<19}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


def _nonzero(state: TrainState) -> int:
    return sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(state.params))


def _bytes(state: TrainState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))


def _packed_bytes(state: TrainState) -> int:
    """Return the bytes of a file that holds the kept parameters, and which they are."""
    opt_state: Any = state.opt_state
    masks = opt_state.masks
    kept = [leaf.nbytes * float(jnp.mean(mask)) for leaf, mask in _pairs(state.params, masks)]
    return round(sum(kept)) + sum(leaf.nbytes for leaf in jax.tree.leaves(prune.pack(masks)))


def _pairs(params: Any, masks: Any) -> Iterator[tuple[jax.Array, jax.Array]]:
    return zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)


@contextmanager
def _shown_progress(task: str, epochs: int) -> Iterator[Callable[[Epoch], None]]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda epoch: print(f"{task} {epoch.number}/{epochs}  {_numbers(epoch)}", file=sys.stderr)
        return
    numbers = TextColumn("{task.fields[numbers]}", table_column=ONE_LINE)
    told = Part(numbers, len(_numbers(Epoch(1, 1.0, 1.0))))
    columns = fitted(console.width, task, counted(epochs), told, elapsed())
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(task, total=epochs, numbers="compiling")
        yield lambda epoch: bar.update(shown, completed=epoch.number, numbers=_numbers(epoch))


def _numbers(epoch: Epoch) -> str:
    return f"loss {epoch.loss:.3f}  training accuracy {100 * epoch.accuracy:.1f} %"
