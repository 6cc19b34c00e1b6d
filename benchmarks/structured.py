"""Networks made smaller: what is left of accuracy, of the multiply-accumulates and of the time.

    sh benchmarks/fetch_mnist.sh DIR
    python benchmarks/structured.py resnet --data DIR
    python benchmarks/structured.py vit --data DIR
    sh benchmarks/fetch_shakespeare.sh FILE
    python benchmarks/structured.py characters --data FILE
    python benchmarks/structured.py groups

Each criterion removes so much of every group of a trained network, which is then trained for as many steps as
those of the other criteria, on the same examples. The sizes are those of the ratio alone, so each ratio is
timed once, in turn with the dense network. `groups` times finding the groups of a network of GPT-2's size.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import characters
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import mnist
import optax
import residual
import timing
from transformer import Sizes, Transformer, VisionTransformer, sizes_of

from jaxeff import calibrate, prune

CRITERIA = ("l2", "taylor", "activation", "random")
BATCH_SIZES = (1, 32)
Examples = tuple[jax.Array, jax.Array]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Task(NamedTuple):
    """A network and its data.

    Attributes:
        module: the large network.
        of_params: params -> the module that they are of.
        draw: key -> a training batch, inputs and targets.
        tested: batches to score on.
        score: its name, and (logits, targets) -> its mean over a batch.
        removable: the groups that lose elements, by name; all that may unless given.
    """

    module: nn.Module
    of_params: Callable[[Any], nn.Module]
    draw: Callable[[jax.Array], Examples]
    tested: Sequence[Examples]
    score: tuple[str, Callable[[jax.Array, jax.Array], jax.Array]]
    removable: tuple[str, ...] = ()


def train(task: Task, module: nn.Module, variables: Any, steps: int, rate: float, key: jax.Array) -> Any:
    """Variables after so many steps of AdamW, the rate rising for a tenth of them and falling to 0.

    Steps are not put into one scan, inside which XLA's convolutions are slow on a CPU.
    """
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-4)
    training = module.clone(train=True) if "batch_stats" in variables else module

    @jax.jit
    def step(variables: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        inputs, targets = task.draw(key)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = {**variables, "params": params}
            logits, updated = training.apply(given, inputs, mutable=["batch_stats"])
            return cross_entropy(logits, targets).mean(), updated

        gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, state

    state = optimizer.init(variables["params"])
    for number in range(steps):
        variables, state = step(variables, state, jax.random.fold_in(key, number))
    return variables


def scored(task: Task, variables: Any, apply_fn: Callable) -> dict[str, float]:
    """The mean score over the tested batches, which are of one size."""
    name, score = task.score

    @jax.jit
    def one(inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return score(apply_fn(variables, inputs), targets)

    values = [one(*batch) for batch in task.tested]
    return {name: float(jnp.mean(jnp.stack(values)))}


def importance(task: Task, variables: Any, criterion: str) -> Any:
    """From 16 training batches where the criterion reads any."""
    if criterion == "l2":
        return jax.tree.map(jnp.square, prune.scored(variables))
    batches = [task.draw(jax.random.key(1000 + number)) for number in range(16)]
    apply_fn = task.module.apply
    found = calibrate(
        variables, apply_fn, batches, criterion=criterion, loss_fn=cross_entropy, progress=False
    )
    return prune.scored(variables, found, criterion)


# --- The tasks -----------------------------------------------------------------------------------------


def images(digits: mnist.Digits) -> Examples:
    return digits.images[..., None].astype(jnp.float32) / 255, digits.labels


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return 100 * jnp.mean(jnp.argmax(logits, -1) == labels)


def of_digits(folder: Path, module: nn.Module, of_params: Any, removable: tuple[str, ...] = ()) -> Task:
    training, test = (mnist.read_digits(folder, name) for name in ("train", "t10k"))

    def draw(key: jax.Array) -> Examples:
        which, shift = jax.random.split(key)
        chosen = jax.random.randint(which, (64,), 0, len(training.labels))
        shifted = mnist.shifted(training.images[chosen], shift)
        return images(mnist.Digits(shifted, training.labels[chosen]))

    parts = [jax.tree.map(lambda x, i=i: x[i : i + 500], test) for i in range(0, len(test.labels), 500)]
    return Task(module, of_params, draw, [*map(images, parts)], ("test accuracy, %", correct), removable)


def heads_and_hidden(layers: int) -> tuple[str, ...]:
    """Heads lose all of their numbers, so that the others keep the size that the module gives all of them."""
    members = ("attention/query/kernel:1", "up/kernel:1")
    return tuple(f"block_{i}/{member}" for i in range(layers) for member in members)


def vit_of(params: Any, layers: int) -> nn.Module:
    blocks = tuple(sizes_of(params[f"block_{i}"]) for i in range(layers))
    return VisionTransformer(params["positions"].shape[1], blocks)


def of_text(path: Path) -> Task:
    training, held_out, vocabulary = characters.read_text(path)
    layers = 2
    module = Transformer(layers, 128, 4, vocabulary, characters.CONTEXT)

    def draw(key: jax.Array) -> Examples:
        last = len(training) - characters.CONTEXT
        return characters.windows(training, jax.random.randint(key, (characters.BATCH,), 0, last))

    def of_params(params: Any) -> nn.Module:
        return module.clone(blocks=tuple(sizes_of(params[f"block_{i}"]) for i in range(layers)))

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(logits, targets).mean()

    starts = jnp.linspace(0, len(held_out) - characters.CONTEXT - 1, characters.HELD_OUT).astype(jnp.int32)
    tested = [characters.windows(held_out, part) for part in starts.reshape(-1, 64)]
    return Task(module, of_params, draw, tested, ("held-out loss, nats", loss), heads_and_hidden(layers))


def task_of(chosen: argparse.Namespace) -> Task:
    if chosen.network == "characters":
        return of_text(chosen.data)
    if chosen.network == "vit":
        layers = 3
        module = VisionTransformer(64, layers * (Sizes(8, 8, 256),))
        of_params = functools.partial(vit_of, layers=layers)
        return of_digits(chosen.data, module, of_params, heads_and_hidden(layers))
    return of_digits(chosen.data, residual.resnet_20(chosen.width), residual.of_params)


# --- What is measured ----------------------------------------------------------------------------------


def dense_variables(task: Task, chosen: argparse.Namespace) -> Any:
    """The trained large network; from a file where `--keep` names one that is there."""
    sample, _ = task.draw(jax.random.key(0))
    variables = jax.jit(task.module.init)(jax.random.key(chosen.seed), sample)
    if chosen.keep is not None and chosen.keep.is_file():
        return flax.serialization.from_bytes(variables, chosen.keep.read_bytes())
    key = jax.random.key(chosen.seed + 1)
    variables = train(task, task.module, variables, chosen.steps, chosen.rate, key)
    if chosen.keep is not None:
        _ = chosen.keep.write_bytes(flax.serialization.to_bytes(variables))
    return variables


def smaller(task: Task, variables: Any, groups: prune.Groups, scores: Any, ratio: float) -> Any:
    names = [groups[name].name for name in task.removable] or [group.name for group in groups.unlocked]
    return prune.shrink(variables, prune.plan(groups, scores, dict.fromkeys(names, ratio)))


def measured(task: Task, chosen: argparse.Namespace) -> None:
    """Of each ratio the time, then of each criterion the score at once and after training."""
    begin = time.perf_counter()

    def tell(text: str) -> None:
        print(f"{time.perf_counter() - begin:.0f} s: {text}", flush=True)

    variables = dense_variables(task, chosen)
    score = functools.partial(scored, task)
    ((name, dense),) = score(variables, task.module.apply).items()
    tell(f"dense, {name} {dense:.3f}")
    sample, _ = task.draw(jax.random.key(0))
    groups = prune.groups(variables, task.module.apply, sample)
    batches = [jnp.concatenate([sample] * 16)[:size] for size in BATCH_SIZES]
    found: dict[tuple[str, float], tuple[float, float]] = {}
    for criterion in chosen.criteria:
        scores = importance(task, variables, criterion)
        for ratio in chosen.ratios:
            small = smaller(task, variables, groups, scores, ratio)
            module = task.of_params(small["params"])
            if criterion == chosen.criteria[0]:
                pair = (variables, task.module.apply), (small, module.apply)
                print(f"\n{100 * ratio:g} % of every group removed\n")
                print(prune.before_and_after(*pair, batches, repeats=chosen.repeats), flush=True)
            at_once = score(small, module.apply)[name]
            key = jax.random.key(chosen.seed + 2)
            small = train(task, module, small, chosen.tune_steps, chosen.rate / 2, key)
            found[criterion, ratio] = at_once, score(small, module.apply)[name]
            tell("{} {:g}: {:.3f}, trained {:.3f}".format(criterion, ratio, *found[criterion, ratio]))
    print(f"\nDense {dense:.3f} ({name}) after {chosen.steps} steps.")
    headers = " | ".join(f"{100 * ratio:g} %" for ratio in chosen.ratios)
    for title, part in (("at once", 0), (f"after {chosen.tune_steps} steps", 1)):
        print(f"\n| {title} | {headers} |\n|---|{'---|' * len(chosen.ratios)}")
        for criterion in chosen.criteria:
            cells = " | ".join(f"{found[criterion, ratio][part]:.3f}" for ratio in chosen.ratios)
            print(f"| {criterion} | {cells} |")


def grouping(repeats: int) -> None:
    """How long the groups of a network of GPT-2's size take, over tracing it; nothing is allocated."""
    module = Transformer(vocabulary=50_257)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)

    def trace() -> object:
        jax.clear_caches()
        return jax.make_jaxpr(module.apply)(variables, tokens)

    def group() -> object:
        jax.clear_caches()
        return prune.groups(variables, module.apply, tokens)

    seconds = timing.interleaved({"trace": trace, "groups": group}, repeats)
    for name, values in seconds.items():
        print(f"{name}: {timing.spread(values, ' s')}")
    print(f"groups over trace: {timing.spread(timing.ratios(seconds, 'groups', 'trace'))}")


DEFAULTS = {
    "resnet": {"steps": 1500, "tune_steps": 600, "rate": 2e-3},
    "vit": {"steps": 1500, "tune_steps": 300, "rate": 1e-3},
    "characters": {"steps": 2000, "tune_steps": 200, "rate": 2e-3},
    "groups": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("network", choices=DEFAULTS)
    _ = parser.add_argument("--data", type=Path, help="directory of the four IDX files, or a text")
    _ = parser.add_argument("--width", type=int, default=32, help="of the ResNet's first stage")
    _ = parser.add_argument("--steps", type=int, help="of training the dense network")
    _ = parser.add_argument("--tune-steps", type=int, help="of training each smaller one")
    _ = parser.add_argument("--rate", type=float, help="of AdamW; half of it for the smaller ones")
    _ = parser.add_argument("--ratios", type=mnist.numbers, default=(0.25, 0.5, 0.75))
    _ = parser.add_argument("--criteria", type=lambda text: tuple(text.split(",")), default=CRITERIA)
    _ = parser.add_argument("--repeats", type=int, default=30)
    _ = parser.add_argument("--seed", type=int, default=0)
    _ = parser.add_argument(
        "--keep", type=Path, help="file of the dense network: read if there, else written"
    )
    parser.set_defaults(**DEFAULTS[parser.parse_args().network])
    chosen = parser.parse_args()
    print(timing.machine(), flush=True)
    if chosen.network == "groups":
        return grouping(chosen.repeats)
    if chosen.data is None:
        parser.error("--data is required for this network")
    measured(task_of(chosen), chosen)


if __name__ == "__main__":
    main()
