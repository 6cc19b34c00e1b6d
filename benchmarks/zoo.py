"""The zoo: models of other people, as they come from their packages, through every part of jaxeff.

    KERAS_BACKEND=jax python benchmarks/zoo.py                          # what is installed and not large; resumes
    KERAS_BACKEND=jax python benchmarks/zoo.py --models 'keras/*'       # these, the large ones too
    python benchmarks/zoo.py --page docs/zoo.md                         # the table of all results so far

The models of each package run in a process of their own under a time limit, so that a crash is a row. Rows are kept in
a JSON file, and a model that has one is not run again without `--again`. What the models need:

    pip install keras keras-hub equinox penzai dm-haiku flaxmodels jax-resnet equimo pdequinox

Weights are random. A row says whether every leaf is accounted for, what share of the weights is scored by activations,
which matrices are not paired with an operation and why, how many multiply-accumulates are counted beside the published
figure, how many groups may shrink, and whether the model without half of every group computes what the masked one does.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import importlib.metadata
import json
import multiprocessing
import pathlib
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from zoo_models import ZOO, Built, Entry

import jaxeff
from jaxeff import cost, prune
from jaxeff.model.params import named_leaves

TOLERANCE = 1e-5
"""Largest difference between the smaller model and the masked one, relative to the largest output."""

BEGIN, END = "<!-- begin: python benchmarks/zoo.py --page -->", "<!-- end -->"


@dataclasses.dataclass
class Row:
    """What jaxeff made of a model.

    Attributes:
        failure: the error that ended the run, in one line; None if there was none.
        leaves: leaves of the params, and how many of them the report has with a role and, if they are
            weights, with a site or a reason.
        analyzed: share of the elements of the weights that was scored by activations.
        matrices: weights of two axes or more.
        unpaired: those that were not paired with an operation, and the reason.
        unused: those that the model does not read.
        macs: multiply-accumulates in millions of one example at the published size, and as published; None if unknown.
        uncounted: operations that the count leaves out.
        groups: how many there are, and how many may shrink.
        left: share of the parameters that is left.
        error: largest difference of the smaller model from the masked one, relative to the largest output.
        seconds: of each step, compilation included.
    """

    failure: str | None = None
    params: int = 0
    leaves: tuple[int, int] = (0, 0)
    analyzed: float = 0.0
    matrices: int = 0
    unpaired: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)
    macs: tuple[float, float | None] | None = None
    uncounted: dict[str, int] = dataclasses.field(default_factory=dict)
    groups: tuple[int, int] = (0, 0)
    left: float = 1.0
    error: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """What must not be so, in words."""
        said = [] if self.failure is None else [self.failure]
        if self.failure is None and self.leaves[0] != self.leaves[1]:
            said.append(f"{self.leaves[0] - self.leaves[1]} leaves not accounted for")
        if self.unpaired:
            said.append(f"{len(self.unpaired)} of {self.matrices} matrices not paired")
        if self.error is not None and not self.error < TOLERANCE:
            said.append(f"the smaller model differs from the masked one by {self.error:.1e}")
        return said


# One model


def run(entry: Entry) -> Row:
    """Take a model through analysis, groups, a smaller model, and the count of its published size."""
    row = Row()
    try:
        _run(entry, row)
    except Exception as error:  # Whatever another package's model raises is its row in the table.
        row.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    return row


def _run(entry: Entry, row: Row) -> None:
    def timed(step: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        row.seconds[step] = round(time.perf_counter() - start, 1)
        return result

    model = timed("build", entry.build)
    given = model.params, model.apply_fn, model.batch
    statistics = timed("collect", lambda: jaxeff.collect(*given, **model.keywords))
    accounted(row, model, statistics)
    groups = timed("groups", lambda: prune.groups(*given, **model.keywords))
    row.groups = len(groups), len(groups.unlocked)
    plan = half(groups)
    if plan.removed:
        row.error, row.left = timed("compact", lambda: compared(model, plan))
    if (build := entry.published_build) is not None:
        row.macs = timed("count", lambda: counted(row, build())), entry.published


def accounted(row: Row, model: Built, statistics: Any) -> None:
    """Count the leaves that have a role and, if they are weights, a site or a reason."""
    leaves = named_leaves(own(model.params))
    read = {site.path for site in statistics.sites}
    infos = {info.path: info for info in statistics.params}
    told = [
        path
        for path, leaf in leaves.items()
        if (info := infos.get(path)) is not None
        and info.shape == jnp.shape(leaf)
        and (info.role != "weight" or (path in read) != (info.reason is not None))
    ]
    weights = {path: info for path, info in infos.items() if info.role == "weight"}
    sizes = {path: int(np.prod(info.shape)) for path, info in weights.items()}
    row.params = sum(int(np.prod(jnp.shape(leaf))) for leaf in leaves.values())
    row.leaves = len(leaves), len(told)
    row.analyzed = sum(sizes[path] for path in read & sizes.keys()) / max(sum(sizes.values()), 1)
    row.matrices = len(weights)
    unpaired = {path: info.reason for path, info in weights.items() if info.reason is not None}
    row.unused = [path for path, reason in unpaired.items() if reason == "unused"]
    row.unpaired = {path: reason for path, reason in unpaired.items() if reason != "unused"}


def own(params: Any) -> Any:
    """Return the trained arrays of params that hold other collections beside them."""
    return params["params"] if isinstance(params, Mapping) and "params" in params else params


def half(groups: prune.Groups, seed: int = 0) -> prune.Plan:
    """Return the plan that removes half of every group at random, but leaves blocks, experts and heads' sizes whole."""
    draw = np.random.default_rng(seed)
    removed = {}
    for group in groups.unlocked:
        if group.size < 2 or group.kind in ("head_size", "expert", "block"):
            continue
        # Stacked blocks lose elements of their own.
        each = np.broadcast_to(np.arange(group.size), (*group.blocks, group.size))
        removed[group.name] = draw.permuted(each, axis=-1)[..., : group.size // 2].tolist()
    return prune.Plan.of(groups, removed)


def compared(model: Built, plan: prune.Plan) -> tuple[float, float]:
    """Return the smaller model's largest difference from the masked one, and the share of parameters left."""
    params, apply_fn, keywords = model.params, model.apply_fn, model.keywords
    small, small_apply = prune.compact(params, apply_fn, model.batch, plan, **keywords)
    masked = prune.apply(params, plan.masks(params))
    if jax.tree.leaves(getattr(apply_fn, "state", None)):
        state = apply_fn.state
        apply_fn = apply_fn.with_state(prune.apply(state, plan.masks(state)))
    batch = model.batch if isinstance(model.batch, tuple) else (model.batch,)
    expected = jax.jit(lambda params, batch: apply_fn(params, *batch, **keywords))(masked, batch)
    found = small_apply(small, *batch, **keywords)
    return difference(found, expected), size(small) / size(params)


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference of two trees of arrays, relative to the largest number of each array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    worst = 0.0
    for a, b in ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs):
        if not b.size:
            continue
        if not np.isfinite(b).all():
            return float("nan")
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def counted(row: Row, model: Built) -> float:
    found = cost.count(model.params, model.apply_fn, model.batch, **model.keywords)
    row.uncounted = dict(found.uncounted)
    assert found.per_example is not None
    return found.per_example.macs / 1e6


def size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# All of them


def run_all(names: Iterable[str], results: pathlib.Path, limit: float, processes: int) -> None:
    """Run the models of each package in a process of their own, which is replaced when it ends or takes too long."""
    rows, lock = read(results), threading.Lock()

    def keep(name: str, row: Row) -> None:
        with lock:
            rows[name] = row
            text = json.dumps({key: dataclasses.asdict(kept) for key, kept in rows.items()}, indent=1)
            _ = results.write_text(text + "\n")
            print(
                f"{name:40} {'; '.join(row.faults) or 'right'}  {sum(row.seconds.values()):.0f} s", flush=True
            )

    packages: dict[str, list[str]] = {}
    for name in names:
        packages.setdefault(ZOO[name].package, []).append(name)
    with ThreadPoolExecutor(processes) as pool:
        for done in [pool.submit(run_package, listed, limit, keep) for listed in packages.values()]:
            done.result()


def run_package(names: list[str], limit: float, keep: Callable[[str, Row], None]) -> None:
    context = multiprocessing.get_context("spawn")
    process = None
    for name in names:
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,))
            process.start()
            theirs.close()
        try:
            ours.send(name)
            row = ours.recv() if ours.poll(limit) else Row(failure=f"not done within {limit:.0f} s")
            lost = row.failure is not None and not row.seconds
        except (EOFError, ConnectionError):
            process.join()
            row, lost = Row(failure=f"the process ended with {process.exitcode}"), True
        if lost:
            process.kill()
            process = None
        keep(name, row)
    if process is not None:
        process.kill()


def serve(connection: Any) -> None:
    warnings.simplefilter("ignore")
    # The values count here, and not the time they take.
    jax.config.update("jax_disable_most_optimizations", True)
    while True:
        connection.send(run(ZOO[connection.recv()]))
        jax.clear_caches()


def read(results: pathlib.Path) -> dict[str, Row]:
    if not results.exists():
        return {}
    rows = {}
    for name, fields in json.loads(results.read_text()).items():
        tuples = {
            key: tuple(value) if isinstance(value, list) and key != "unused" else value
            for key, value in fields.items()
        }
        rows[name] = Row(**tuples)
    return rows


# The page


def page(rows: Mapping[str, Row]) -> str:
    """The table of all results, with what failed by name."""
    shown = {name: rows[name] for name in ZOO if name in rows}
    right = [name for name, row in shown.items() if not row.faults]
    ran = {name: row for name, row in shown.items() if row.failure is None}
    smaller = [row for row in ran.values() if row.error is not None]
    lines = [
        f"{datetime.date.today():%B %-d, %Y}; {versions()}. {machine()}",
        "",
        "| of the models that were tried | |",
        "|---|---|",
        f"| nothing to object to | {len(right)} of {len(shown)} |",
        f"| ran to the end | {len(ran)} of {len(shown)} |",
        f"| every leaf accounted for | {_count(row.leaves[0] == row.leaves[1] for row in ran.values())} |",
        f"| every matrix paired with an operation | {_count(not row.unpaired for row in ran.values())} |",
        f"| smaller model = masked model, to {TOLERANCE:.0e} | {_count(r.error < TOLERANCE for r in smaller)} |",
        f"| some group may shrink | {_count(row.error is not None for row in ran.values())} |",
        "",
        "| model | parameters | leaves | analyzed | MACs, millions | published | groups that may shrink | "
        "parameters left | small - masked | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(name, row) for name, row in shown.items()),
        "",
        "### What failed",
        "",
        *(
            [f"- `{name}`: {'; '.join(_said(row))}." for name, row in shown.items() if row.faults]
            or ["Nothing."]
        ),
        "",
        "### Not tried",
        "",
        ", ".join(f"`{name}`" for name in ZOO if name not in rows) or "None.",
    ]
    return "\n".join(lines)


def _count(truths: Iterable[bool]) -> str:
    listed = list(truths)
    return f"{sum(listed)} of {len(listed)}"


def _line(name: str, row: Row) -> str:
    if row.failure is not None:
        return f"| {name} | failed | | | | | | | | |"
    macs, published = ("", "") if row.macs is None else map(_number, row.macs)
    error, left = ("", "") if row.error is None else (f"{row.error:.0e}", f"{row.left:.2f}")
    return (
        f"| {name} | {row.params:,} | {row.leaves[1]} of {row.leaves[0]} | {100 * row.analyzed:.4g} % | {macs} | "
        f"{published} | {row.groups[1]} of {row.groups[0]} | {left} | {error} | {sum(row.seconds.values()):.0f} |"
    )


def _number(number: float | None) -> str:
    return "unknown" if number is None else f"{number:,.4g}"


def _said(row: Row) -> list[str]:
    reasons = [f"{path}: {reason}" for path, reason in list(row.unpaired.items())[:3]]
    return [*row.faults, *reasons]


def versions() -> str:
    packages = dict.fromkeys(["jax", "flax", *(entry.package for entry in ZOO.values())])
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    return f"Python {platform.python_version()} on two shared CPU cores, {platform.machine()}."


def write_page(path: pathlib.Path, rows: Mapping[str, Row]) -> None:
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}, between which the table goes")
    _ = path.write_text(f"{before}{BEGIN}\n{page(rows)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("--models", nargs="+", help="patterns of names, such as 'keras/ResNet*'")
    _ = parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("zoo.json"))
    _ = parser.add_argument("--again", action="store_true", help="run those that have a row once more")
    _ = parser.add_argument("--limit", type=float, default=300, help="seconds that a model may take")
    _ = parser.add_argument("--processes", type=int, default=1)
    _ = parser.add_argument(
        "--page", type=pathlib.Path, help="write the table into this file, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.page:
        write_page(arguments.page, read(arguments.results))
    else:
        known = {} if arguments.again else read(arguments.results)
        run_all(
            [
                name
                for name, entry in ZOO.items()
                if name not in known and chosen(name, entry, arguments.models)
            ],
            arguments.results,
            arguments.limit,
            arguments.processes,
        )


def chosen(name: str, entry: Entry, patterns: list[str] | None) -> bool:
    if patterns is None:
        return not entry.large
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    main()
