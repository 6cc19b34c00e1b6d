"""A program compiled for TPUs that are not here, by the real compiler: does it fit, and what do the chips exchange.

In: a function, arguments or shapes, and the name of a topology. Out: `CompiledFor`. Nothing runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxeff.cost._chips import tpu_chip
from jaxeff.cost._compiling import Compiled, compile
from jaxeff.output import text


@dataclasses.dataclass(frozen=True)
class Collective:
    """Operations of one kind by which chips exchange data.

    Attributes:
        count: in the program; a loop's body counts once.
        largest: elements of the largest array among their results, on one chip.
    """

    count: int
    largest: int


@dataclasses.dataclass(frozen=True)
class CompiledFor:
    """What the TPU compiler made of a program.

    Attributes:
        topology: its name.
        chips: the devices that the program is compiled for. What JAX shows as one device counts as one chip.
        memory_bytes: of a chip, as JAX knows it; None where it does not know the chip.
        figures: of one chip: seconds to compile, bytes of arguments, results and scratch. None where the compiler
            refused.
        collectives: by kind, those that the program has.
        refusal: what the compiler said of a program that does not fit; None where it fits.
    """

    topology: str
    chips: int
    memory_bytes: float | None
    figures: Compiled | None
    collectives: Mapping[str, Collective]
    refusal: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it in the chip's memory."""
        return self.refusal is None

    def __str__(self) -> str:
        return _render(self)

    def to_dict(self) -> dict[str, Any]:
        figures = None if self.figures is None else self.figures.to_dict()
        return {**dataclasses.asdict(self), "figures": figures, "fits": self.fits}


def compile_for(
    function: Callable,
    *arguments: Any,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    shardings: Sequence[Any] | None = None,
) -> CompiledFor:
    """Compile a function for TPUs that need not be here, by the compiler that they use; nothing runs.

    The compiler is in PyPI's libtpu (`pip install libtpu`, Linux only). Where there is no TPU, start Python
    with `JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1`, so that none is looked for. Large programs can take minutes, and a
    crash of the compiler ends the process: compile what matters in one of its own.

    Args:
        function: of arrays, or a result of `jax.jit`, whose options such as `donate_argnums` then apply.
        *arguments: arrays or `jax.ShapeDtypeStruct`. Where they lie now makes no difference.
        topology: what libtpu calls it: 'v5e:2x2', 'v5e:4x4', 'v5p:2x2x1', 'v6e:16x16'.
        mesh: the names of its axes and their sizes, whose product is the number of chips; None for one of the chips.
        shardings: with a mesh, one for each argument: a `PartitionSpec`, a tree of them like the argument or the
            beginning of one, or None for what every chip has whole. By default all arguments are whole.

    Raises:
        ImportError: libtpu is not installed.
        ValueError: libtpu does not know the topology, or `mesh` or `shardings` do not fit.

    For example, a product on 16 chips, a weight sharded over one axis of the mesh and a batch over the other:

        compile_for(jnp.dot, batch, weight, topology="v5e:4x4", mesh={"data": 4, "model": 4},
                    shardings=(PartitionSpec("data"), PartitionSpec(None, "model")))
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("`compile_for` needs the compiler in libtpu: pip install libtpu")
    devices, layout = _layout(topology, mesh)
    if shardings is None:
        shardings = [None] * len(arguments)
    elif mesh is None:
        raise ValueError("`shardings` names axes of a mesh: pass `mesh` too, such as {'data': 4, 'model': 4}")
    if len(shardings) != len(arguments):
        raise ValueError(
            f"`shardings` must have one entry for each of {len(arguments)} arguments, got {len(shardings)}"
        )
    placed = [_placed(layout, spec, argument) for spec, argument in zip(shardings, arguments, strict=True)]
    generation, _, _ = topology.partition(":")
    chip = tpu_chip(generation.removeprefix("tpu"), getattr(devices[0], "num_cores", 1))
    chips = 1 if mesh is None else len(devices)
    memory = None if chip is None else chip.memory_bytes
    try:
        with warnings.catch_warnings():
            # JAX stores the program in its cache, cannot load it without a chip, says so, and compiles it anew.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache", UserWarning)
            done = compile(function, tuple(placed), {})
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return CompiledFor(topology, chips, memory, None, {}, str(error))
    return CompiledFor(topology, chips, memory, done.figures, collectives_in(done.program.as_text() or ""))


Layout = Callable[[PartitionSpec], Sharding]


def _layout(topology: str, mesh: Mapping[str, int] | None) -> tuple[Sequence[Any], Layout]:
    """The devices of a topology, and what lays an array out over them."""
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"`topology` must be one that libtpu knows, such as 'v5e:2x2', got {topology!r}: {error}"
        ) from error
    if mesh is None:
        return found.devices, lambda spec: SingleDeviceSharding(found.devices[0])
    if math.prod(mesh.values()) != len(found.devices):
        raise ValueError(
            f"`mesh` must have {len(found.devices)} devices, as {topology!r} has, got {dict(mesh)}"
        )
    over = topologies.make_mesh(found, tuple(mesh.values()), tuple(mesh))
    return found.devices, lambda spec: NamedSharding(over, spec)


def _placed(layout: Layout, spec: Any, argument: Any) -> Any:
    """The shapes of an argument, with where they are to lie."""

    def one(spec: PartitionSpec | None, tree: Any) -> Any:
        sharding = layout(PartitionSpec() if spec is None else spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.numpy.result_type(leaf), sharding=sharding),
            tree,
        )

    return jax.tree.map(
        one, spec, argument, is_leaf=lambda each: each is None or isinstance(each, PartitionSpec)
    )


_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")


def collectives_in(program: str) -> dict[str, Collective]:
    """The collectives in the text of a compiled program, by kind.

    >>> collectives_in("%a = (f32[8,4]{1,0}, f32[2]{0}) all-reduce(%b, %c), channel_id=1")
    {'all-reduce': Collective(count=1, largest=32)}
    """
    found: dict[str, Collective] = {}
    for shapes, kind in _INSTRUCTION.findall(program):
        sizes = [math.prod(int(size) for size in axes.split(",") if size) for axes in _ARRAY.findall(shapes)]
        known = found.get(kind, Collective(0, 0))
        found[kind] = Collective(known.count + 1, max(known.largest, *sizes))
    return dict(sorted(found.items()))


def _render(found: CompiledFor) -> str:
    memory = "" if found.memory_bytes is None else f" of {text.number(found.memory_bytes)}B each"
    where = f"{found.chips} chip{'s' if found.chips > 1 else ''}{memory} ({found.topology})"
    if found.figures is None:
        return f"Does not fit {where}: {found.refusal}"
    figures = found.figures
    width = text.terminal_width()
    rows = [("of one chip", "bytes")]
    for name, value in (
        ("arguments", figures.argument_bytes),
        ("results", figures.output_bytes),
        ("scratch", figures.scratch_bytes),
        ("at one time", figures.peak_bytes),
    ):
        rows.append((name, "-" if value is None else text.number(value)))
    head = f"Fits {where}. Compiled in {text.duration(figures.lower_seconds + figures.compile_seconds)}."
    lines = [*text.wrapped(head, width), "", *text.aligned(rows, left=("of one chip",), gap=2)]
    sent = "; ".join(
        f"{each.count} {kind}, up to {each.largest:,}" for kind, each in found.collectives.items()
    )
    return "\n".join(
        [
            *lines,
            "",
            *text.wrapped(f"Collectives, with the elements of the largest: {sent or 'none'}.", width),
        ]
    )
