"""What jaxeff compiles to for TPUs: seconds, scratch, and what chips send each other. Needs none.

    pip install "jax[tpu]"
    python benchmarks/tpu_compile.py [--kinds v5e v6e] [--chips 1 4x4] [--programs forward collect ...]

PyPI's libtpu compiles ahead of time for chips that nobody has to own, on the CPU of any Linux machine. Each
program is compiled in a process of its own, for one chip and for 4 x 4 of them, where weights are sharded
over both axes of the mesh and the batch over the first. Fails where one does not compile, or gathers more
than the plain program that it contains, if any: that would be weights.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

# No chip is looked for, and several processes may load the library.
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import timing  # noqa: E402
from jax.sharding import AbstractMesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from lenet import LeNet300100  # noqa: E402
from transformer import Transformer  # noqa: E402

import jaxeff  # noqa: E402
from jaxeff import cost, metrics, prune, sketch  # noqa: E402

MESH = AbstractMesh((4, 4), ("data", "model"))
KINDS = {"v5e": "v5e:4x4", "v6e": "v6e:4x4"}
UNITS = 1 << 14
"""A gather of up to so many numbers is one of units; weights are more."""

Place = Callable[[Any, bool], Any]
"""place(tree, batch): shapes that say where they lie, of a batch or of weights."""

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def place_on(sharded: bool) -> Place:
    def spec(shape: tuple[int, ...], batch: bool) -> P:
        if batch:
            return P("data", *[None] * (len(shape) - 1))
        if len(shape) < 2:
            return P()
        # The two largest axes that the mesh divides; a layer of ten outputs stays whole along them.
        names = iter(("data", "model"))
        return P(*(next(names, None) if size % 4 == 0 and size >= 64 else None for size in shape))

    def one(leaf: Any, batch: bool) -> jax.ShapeDtypeStruct:
        where = NamedSharding(MESH, spec(leaf.shape, batch) if leaf.shape else P()) if sharded else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return lambda tree, batch: jax.tree.map(lambda leaf: one(leaf, batch), tree)


def transformer(place: Place) -> tuple[Any, Any, Any]:
    """Two blocks of width 1024 on 32 x 512 tokens."""
    model = Transformer(layers=2, width=1024, heads=16, vocabulary=8192)
    return _shapes(place, model, jax.ShapeDtypeStruct((32, 512), jnp.int32))


def lenet(place: Place) -> tuple[Any, Any, Any]:
    return _shapes(place, LeNet300100(), jax.ShapeDtypeStruct((128, 784), jnp.float32))


def _shapes(place: Place, model: Any, batch: Any) -> tuple[Any, Any, Any]:
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    return model, place(variables, False), place(batch, True)


def forward(place: Place) -> Case:
    model, *arguments = transformer(place)
    return model.apply, tuple(arguments)


def forward_lenet(place: Place) -> Case:
    model, *arguments = lenet(place)
    return model.apply, tuple(arguments)


def collect(place: Place) -> Case:
    model, *arguments = transformer(place)
    return lambda variables, batch: jaxeff.collect(variables, model.apply, batch), tuple(arguments)


def analyze_lenet(place: Place) -> Case:
    model, *arguments = lenet(place)
    return lambda variables, batch: jaxeff.analyze(variables, model.apply, batch), tuple(arguments)


def analyze_transformer(place: Place) -> Case:
    model, *arguments = transformer(place)
    return lambda variables, batch: jaxeff.analyze(variables, model.apply, batch), tuple(arguments)


def summarize(place: Place) -> Case:
    return metrics.summarize, (_weight(place),)


def count(place: Place) -> Case:
    return sketch.count, (_weight(place),)


def summarize_sketch(place: Place) -> Case:
    whole = jax.eval_shape(sketch.count, jax.ShapeDtypeStruct((8,), jnp.float32))
    # Every chip has the whole table, as `count` gives it.
    on_all = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)
    return sketch.summarize, (_everywhere(place, on_all),)


def masks(place: Place) -> Case:
    _, variables, _ = transformer(place)
    kernels = {str(path): leaf for path, leaf in jax.tree.leaves_with_path(variables) if len(leaf.shape) > 1}
    return lambda scores: prune.masks(scores, 0.9), (kernels,)


def training_step(place: Place, monitor: Any = None) -> Case:
    model, variables, batch = lenet(place)
    optimizer = optax.adamw(1e-3)

    def start(variables: Any, batch: Any) -> tuple[Any, Any]:
        watched = monitor.init(variables, model.apply, batch) if monitor else None
        return optimizer.init(variables), watched

    def step(variables: Any, state: Any, watched: Any, batch: Any) -> tuple[Any, Any, Any]:
        def loss(variables: Any) -> jax.Array:
            return optax.l2_loss(model.apply(variables, batch)).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state, variables)
        variables = optax.apply_updates(variables, updates)
        if monitor:
            watched = monitor.update(watched, variables, model.apply, batch)
        return variables, state, watched

    state, watched = jax.eval_shape(start, variables, batch)
    return step, (variables, place(state, False), _everywhere(place, watched), batch)


def monitored_step(place: Place) -> Case:
    return training_step(place, jaxeff.monitor(every=100))


def _weight(place: Place) -> Any:
    return place(jax.ShapeDtypeStruct((8192, 8192), jnp.float32), False)


def _everywhere(place: Place, tree: Any) -> Any:
    """Whole on every chip, as what has no axes is placed."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        where = place(jax.ShapeDtypeStruct((), jnp.float32), False).sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(one, tree)


PROGRAMS: dict[str, Callable[[Place], Case]] = {
    "forward LeNet-300-100": forward_lenet,
    "analyze LeNet-300-100": analyze_lenet,
    "training step": training_step,
    "training step with monitor": monitored_step,
    "metrics.summarize": summarize,
    "sketch.count": count,
    "sketch.summarize": summarize_sketch,
    "prune.masks": masks,
    "forward transformer": forward,
    "collect transformer": collect,
    "analyze transformer": analyze_transformer,
}
PLAIN = {
    "analyze LeNet-300-100": "forward LeNet-300-100",
    "training step with monitor": "training step",
    "collect transformer": "forward transformer",
    "analyze transformer": "forward transformer",
}
"""The program that each of some contains."""


def compiled(name: str, kind: str, sharded: bool) -> dict[str, Any]:
    function, arguments = PROGRAMS[name](place_on(sharded))
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments) if sharded else None
    start = time.perf_counter(), time.process_time()
    mesh = dict(MESH.shape) if sharded else None
    found = cost.compile_for(function, *arguments, topology=KINDS[kind], mesh=mesh, shardings=specs)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    if found.figures is None:
        raise MemoryError(found.refusal)
    sent = [each.largest for kind, each in found.collectives.items() if kind in ("all-gather", "all-to-all")]
    return {
        "seconds": seconds,
        "scratch": found.figures.scratch_bytes,
        "outputs": found.figures.output_bytes,
        "collectives": {kind: each.count for kind, each in found.collectives.items()},
        "gathered": max(sent, default=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    _ = parser.add_argument("--chips", nargs="*", choices=("1", "4x4"), default=["1", "4x4"])
    _ = parser.add_argument("--programs", nargs="*", choices=PROGRAMS, default=list(PROGRAMS))
    _ = parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        name, kind, chips = chosen.only
        print(json.dumps(compiled(name, kind, chips == "4x4")))
        return
    print(timing.machine(), flush=True)
    print("| program | chips | seconds (CPU) | scratch + outputs of a chip | collectives | largest gather |")
    print("|---|---|---|---|---|---|")
    rows = itertools.product(chosen.kinds, chosen.chips, chosen.programs)
    fine = [_row(name, kind, chips) for kind, chips, name in rows]
    sys.exit(int(not all(fine)))


def _error(text: str) -> str:
    """The last line that names an exception."""
    found = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
    return found[-1] if found else ""


@functools.cache
def _in_process(name: str, kind: str, chips: str) -> dict[str, Any] | str:
    """What was compiled, or why it was not."""
    command = [sys.executable, __file__, "--only", name, kind, chips]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return _error(done.stderr) or f"exit status {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, kind: str, chips: str) -> bool:
    """Prints one; whether it compiles, and gathers no weight."""
    found = _in_process(name, kind, chips)
    plain = _in_process(PLAIN[name], kind, chips) if name in PLAIN else None
    if isinstance(found, str) or isinstance(plain, str):
        why = found if isinstance(found, str) else plain
        print(f"| {name} | {kind} {chips} | DOES NOT COMPILE: {why} |", flush=True)
        return False
    wall, cpu = found["seconds"]
    memory = f"{found['scratch'] / 1e6:.1f} + {found['outputs'] / 1e6:.1f} MB"
    if plain is not None and plain["scratch"] + plain["outputs"] >= 1e6:
        # The space of outputs serves as scratch until they are made.
        ratio = (found["scratch"] + found["outputs"]) / (plain["scratch"] + plain["outputs"])
        memory += f", {ratio:.2f} times the plain one's"
    sent = ", ".join(f"{number} {kind}" for kind, number in found["collectives"].items() if number) or "none"
    fine = name in PLAIN.values() or found["gathered"] <= max(UNITS, plain["gathered"] if plain else 0)
    gathered = f"{found['gathered']:,}{'' if fine else ' TOO MANY'}"
    taken = f"{wall:.1f} ({cpu:.1f}) | {memory}"
    print(f"| {name} | {kind} {chips} | {taken} | {sent} | {gathered} |", flush=True)
    return fine


if __name__ == "__main__":
    main()
