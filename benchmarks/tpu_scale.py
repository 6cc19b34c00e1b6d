"""What a language model of 1, 7 or 70 billion weights needs of each TPU chip with jaxeff: compiled, not run.

    pip install libtpu
    python benchmarks/tpu_scale.py [--models 1B 7B 70B] [--programs forward collect ...] [--timeout 1800]

The blocks of Llama are run by a scan, with weights and Adam's moments sharded over both axes of the mesh, and the
batch over the first: 16 chips of v5e for 1B and 7B, and 256 for 70B. bfloat16 weights, float32 moments, and one
window of 2,048 tokens on each row of the mesh. Attention is a plain product, so that the scores of one block exist
at a time. Training recomputes each block in its backward pass. Each program is compiled in a process of its own.
"times plain" compares scratch and results with those of the program that a row contains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

# No chip is looked for, and several processes may load the library.
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# As on a pod, where a process has several devices: what may be sharded is not put into one loop.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import timing  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AbstractMesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jaxeff  # noqa: E402
from jaxeff import cost, prune  # noqa: E402

WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a Llama, and the chips that it is sharded over."""

    blocks: int
    width: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    vocabulary: int
    topology: str
    mesh: dict[str, int]

    @property
    def shapes(self) -> Any:
        def one(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        def stack(*shape: int) -> jax.ShapeDtypeStruct:
            return one(self.blocks, *shape)

        width, queries, keys = self.width, self.heads * self.head, self.kv_heads * self.head
        blocks = {
            **{"query": stack(width, queries), "key": stack(width, keys), "value": stack(width, keys)},
            **{
                "out": stack(queries, width),
                "gate": stack(width, self.hidden),
                "up": stack(width, self.hidden),
            },
            **{"down": stack(self.hidden, width), "attention_norm": stack(width), "mlp_norm": stack(width)},
        }
        return {
            **{"embedding": one(self.vocabulary, width), "blocks": blocks, "norm": one(width)},
            "head": one(width, self.vocabulary),
        }

    @property
    def specs(self) -> Any:
        """As MaxText shards: the width over the data axis, and heads and hidden units over the other."""
        into, back = P(None, "data", "model"), P(None, "model", "data")
        blocks = dict.fromkeys(("query", "key", "value", "gate", "up"), into) | dict.fromkeys(
            ("out", "down"), back
        )
        norms = {"attention_norm": P(), "mlp_norm": P()}
        return {
            "embedding": P("model", "data"),
            "blocks": blocks | norms,
            "norm": P(),
            "head": P("data", "model"),
        }

    @property
    def tokens(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.mesh["data"], WINDOW), jnp.int32)

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """[windows, length] -> [windows, length, vocabulary]."""

        mesh = AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))
        on_rows = NamedSharding(mesh, P("data", None, None))

        @jax.checkpoint
        def block(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            x = lax.with_sharding_constraint(x, on_rows)
            x = x + self._attention(p, _normalized(x, p["attention_norm"]))
            h = _normalized(x, p["mlp_norm"])
            return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

        x, _ = lax.scan(block, params["embedding"][tokens], params["blocks"])
        return _normalized(x, params["norm"]) @ params["head"]

    def _attention(self, p: Any, x: jax.Array) -> jax.Array:
        n, length, _ = x.shape
        shared = self.heads // self.kv_heads
        query = (x @ p["query"]).reshape(n, length, self.kv_heads, shared, self.head)
        key = (x @ p["key"]).reshape(n, length, self.kv_heads, self.head)
        value = (x @ p["value"]).reshape(n, length, self.kv_heads, self.head)
        scores = jnp.einsum("nsgrd,ntgd->ngrst", query, key) / self.head**0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30).astype(jnp.float32)).astype(x.dtype)
        return jnp.einsum("ngrst,ntgd->nsgrd", weights, value).reshape(n, length, -1) @ p["out"]


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


_16, _256 = ("v5e:4x4", {"data": 4, "model": 4}), ("v5e:16x16", {"data": 16, "model": 16})
MODELS = {
    "1B": Model(16, 2048, 32, 8, 64, 8192, 128256, *_16),
    "7B": Model(32, 4096, 32, 32, 128, 11008, 32000, *_16),
    "70B": Model(80, 8192, 64, 8, 128, 28672, 32000, *_256),
}
"""Llama 3.2 1B with an output layer of its own, Llama 2 7B and Llama 2 70B."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
        specs: of its arguments.
        donated: numbers of the arguments whose memory the results take.
    """

    function: Callable
    arguments: tuple[Any, ...]
    specs: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def forward(model: Model) -> Case:
    return _of_batch(model, model.logits)


def collect(model: Model) -> Case:
    return _of_batch(
        model, lambda params, batch: jaxeff.collect(params, model.logits, batch, criterion="wanda")
    )


def analyze(model: Model) -> Case:
    return _of_batch(model, lambda params, batch: jaxeff.analyze(params, model.logits, batch))


def _of_batch(model: Model, function: Callable) -> Case:
    return Case(function, (model.shapes, model.tokens), (model.specs, P("data")))


def analyze_weights(model: Model) -> Case:
    return Case(jaxeff.analyze, (model.shapes,), (model.specs,))


def masks(model: Model) -> Case:
    def by_magnitude(params: Any) -> Any:
        return prune.masks(prune.scored(params), 0.5, scope="global")

    return Case(by_magnitude, (model.shapes,), (model.specs,))


def training(model: Model, sparse: bool = False, monitor: Any = None) -> Case:
    adam = optax.adamw(1e-4, mu_dtype=jnp.float32)
    optimizer = prune.sparsify(adam, prune.cubic(0.5, 1000, 10000, every=100)) if sparse else adam
    shapes, specs = model.shapes, model.specs

    def start(params: Any, batch: Any) -> tuple[Any, Any]:
        return optimizer.init(params), monitor.init(params, model.logits, batch) if monitor else None

    def step(params: Any, state: Any, watched: Any, batch: Any) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> jax.Array:
            outputs = model.logits(params, batch)[:, :-1].astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, batch[:, 1:]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        if monitor:
            watched = monitor.update(watched, params, model.logits, batch)
        return params, state, watched

    state, watched = jax.eval_shape(start, shapes, model.tokens)
    whole = jax.tree.map(lambda _: P(), watched)
    arguments = shapes, state, watched, model.tokens
    return Case(step, arguments, (specs, _like(shapes, specs, state), whole, P("data")), donated=(0, 1, 2))


def _like(shapes: Any, specs: Any, state: Any) -> Any:
    """Specs for the optimizer's state: moments and masks, with paths and shapes of weights, lie as those do."""
    known = zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(specs), strict=True)
    by_path = {(jax.tree_util.keystr(path), leaf.shape): spec for (path, leaf), spec in known}

    def one(path: Any, leaf: Any) -> P:
        ends = (jax.tree_util.keystr(path[at:]) for at in range(len(path)))
        return next((by_path[end, leaf.shape] for end in ends if (end, leaf.shape) in by_path), P())

    return jax.tree.map_with_path(one, state)


PROGRAMS: dict[str, Callable[[Model], Case]] = {
    "forward": forward,
    "collect": collect,
    "analyze, with the batch": analyze,
    "analyze(params)": analyze_weights,
    "masks": masks,
    "training step": training,
    "training step, sparsify": lambda model: training(model, sparse=True),
    "training step, monitor": lambda model: training(model, monitor=jaxeff.monitor(every=100)),
}
PLAIN = {
    "collect": "forward",
    "analyze, with the batch": "forward",
    "training step, sparsify": "training step",
    "training step, monitor": "training step",
}
"""The program that each of some contains."""


def compiled(model: Model, name: str) -> dict[str, Any]:
    case = PROGRAMS[name](model)
    start = time.process_time()
    found = cost.compile_for(
        jax.jit(case.function, donate_argnums=case.donated),
        *case.arguments, topology=model.topology, mesh=model.mesh, shardings=case.specs,
    )  # fmt: skip
    figures = found.figures
    return {
        "seconds": time.process_time() - start,
        "refusal": found.refusal,
        **({} if figures is None else {"bytes": _bytes(figures)}),
        "collectives": {
            kind: (each.count, each.largest) for kind, each in found.collectives.items() if each.count
        },
    }


def _bytes(figures: Any) -> dict[str, int]:
    return {
        "arguments": figures.argument_bytes,
        "results": figures.output_bytes,
        "scratch": figures.scratch_bytes,
    }


def in_process(model: str, program: str, timeout: float) -> dict[str, Any]:
    """What was compiled, or why it was not."""
    command = [sys.executable, __file__, "--only", model, program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {timeout:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": f"exit status {done.returncode}: {lines[-1][:300] if lines else ''}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    _ = parser.add_argument("--programs", nargs="*", choices=PROGRAMS, default=list(PROGRAMS))
    _ = parser.add_argument("--timeout", type=float, default=1800, help="seconds for each program")
    _ = parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        # Programs of many chips have overflowed the compiler's stack.
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
        name, program = chosen.only
        print(json.dumps(compiled(MODELS[name], program)))
        return
    print(timing.machine(), flush=True)
    print(
        "| model | program | arguments | scratch | times plain | gathers, the largest | reductions | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in chosen.models:
        plain: dict[str, Any] = {}
        for program in chosen.programs:
            found = in_process(name, program, chosen.timeout)
            plain[program] = found
            print(row(name, program, found, plain.get(PLAIN.get(program, ""))), flush=True)


def row(model: str, program: str, found: dict[str, Any], plain: dict[str, Any] | None) -> str:
    if why := found.get("error") or found.get("refusal"):
        return f"| {model} | {program} | NOT COMPILED: {why} |"
    used = found["bytes"]
    times = f"{_transient(found) / _transient(plain):.2f}" if plain and "bytes" in plain else ""
    gathers = [found["collectives"].get(kind, (0, 0)) for kind in ("all-gather", "all-to-all")]
    count, largest = sum(each[0] for each in gathers), max(each[1] for each in gathers)
    reductions, _ = found["collectives"].get("all-reduce", (0, 0))
    scattered, _ = found["collectives"].get("reduce-scatter", (0, 0))
    return (
        f"| {model} | {program} | {used['arguments'] / 1e9:.2f} GB | {used['scratch'] / 1e9:.2f} GB | {times} "
        f"| {count}, {largest / 1e6:.3g} M | {reductions + scattered} | {found['seconds']:.0f} |"
    )


def _transient(found: dict[str, Any]) -> float:
    """Scratch and results: the space of results serves as scratch until they are made."""
    return found["bytes"]["scratch"] + found["bytes"]["results"]


if __name__ == "__main__":
    main()
