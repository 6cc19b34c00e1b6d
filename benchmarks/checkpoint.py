"""CPU seconds and peak memory of `jaxeff analyze` and `jaxeff compare` as whole commands.

    python benchmarks/checkpoint.py [--model FILE] [--small 36000] [--weights 2e9] [--directory DIR]

1. A model of MiniLM's shapes (or `--model FILE`, a safetensors file in float32) beside `plain`, twenty lines
   of float64 NumPy that print four metrics of each tensor.
2. Many small tensors, as of a mixture of experts, beside as many bytes in a few tensors: what a tensor costs.
3. A bfloat16 checkpoint in shards: rate and peak memory.

Commands take turns, each in a process of its own. The files are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
SHARD = 1 << 29  # weights
BLOCK = 1 << 22
JAXEFF = [sys.executable, "-m", "jaxeff"]


def plain(path: str) -> None:
    """The comparison: utilization, Gini, the share of weights that hold 90 %, effective units."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or len(entry["shape"]) < 2 or entry["dtype"] != "F32":
                continue
            begin, end = entry["data_offsets"]
            _ = file.seek(8 + length + begin)
            x = np.abs(np.frombuffer(file.read(end - begin), np.float32).astype(np.float64))
            units = x.reshape(entry["shape"][0], -1).sum(axis=1)
            x = np.sort(x)
            total, count = x.sum(), x.size
            p, q = x[x > 0] / total, units[units > 0] / total
            utilization = np.exp(-(p * np.log(p)).sum()) / count
            gini = 2 * (np.arange(1, count + 1) * x).sum() / (count * total) - (count + 1) / count
            coverage = (np.searchsorted(np.cumsum(x[::-1]), 0.9 * total) + 1) / count
            print(
                f"{name:60} {utilization:.4f} {gini:.4f} {coverage:.4f} {np.exp(-(q * np.log(q)).sum()):.1f}"
            )


class Run(NamedTuple):
    """What a command took."""

    cpu: float
    wall: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("--model")
    _ = parser.add_argument("--small", type=int, default=36_000)
    _ = parser.add_argument("--weights", type=float, default=2e9)
    _ = parser.add_argument(
        "--directory", default=None, help="where to write; the system's for temporary files"
    )
    _ = parser.add_argument("--runs", type=int, default=3)
    _ = parser.add_argument("--plain", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.plain:
        plain(chosen.plain)
        return
    # Here and not above: it imports JAX, which the comparison does not.
    import timing

    print(timing.machine())
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        _model(chosen.model or _minilm(Path(directory)), chosen.runs)
        if chosen.small:
            _small(Path(directory), chosen.small, chosen.runs)
        if chosen.weights:
            _large(Path(directory), int(chosen.weights), chosen.runs)


def _model(path: str | os.PathLike, runs: int) -> None:
    commands = [[sys.executable, __file__, "--plain", str(path)], [*JAXEFF, "analyze", str(path)]]
    numpy, own = _medians(commands, runs)
    print(f"{os.path.getsize(path) / 1e6:.0f} MB, whole command: jaxeff {_said(own)}; NumPy {_said(numpy)}")
    print(f"  ratio of the CPU seconds {own.cpu / numpy.cpu:.2f}, budget 1.0")


def _small(directory: Path, count: int, runs: int) -> None:
    rows, columns = 32, 64
    names = [f"model.layers.{at // 768}.mlp.experts.{at % 768 // 3}.{at % 3}.weight" for at in range(count)]
    many, more, few = (directory / f"{name}.safetensors" for name in ("many", "more", "few"))
    for path, seed in ((many, 0), (more, 1)):
        _write(path, dict.fromkeys(names, (rows, columns)), "BF16", seed)
    _write(few, {f"{at}.weight": (count * rows // 8, columns) for at in range(8)}, "BF16")
    for verb, paths, others in (("analyze", [many], [few]), ("compare", [many, more], [few, few])):
        own, bytes_ = _medians([[*JAXEFF, verb, *map(str, each)] for each in (paths, others)], runs)
        print(f"{count:,} tensors of {rows}x{columns}, {verb}: {_said(own)}")
        print(f"  the same bytes in 8 tensors: {_said(bytes_)}")
        each = (own.cpu - bytes_.cpu) / (count * len(paths)) * 1e3
        print(f"  {each:.3f} CPU ms a tensor that is read, budget 0.3")


def _large(directory: Path, weights: int, runs: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (min(weights // 8, 1 << 28) // 4096, 4096)}
    while sum(map(np.prod, shapes.values())) < weights:
        shapes[f"{len(shapes)}.weight"] = ((4096, 4096), (11008, 4096), (4096, 11008))[len(shapes) % 3]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(np.prod, shards[-1].values())) + np.prod(shape) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    folder = directory / "large"
    folder.mkdir()
    for at, shard in enumerate(shards):
        _write(folder / f"{at}.safetensors", shard, "BF16")
    index = {name: f"{at}.safetensors" for at, shard in enumerate(shards) for name in shard}
    _ = (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    total = int(sum(map(np.prod, shapes.values())))
    (own,) = _medians([[*JAXEFF, "analyze", str(folder)]], runs)
    print(f"{total:,} weights in {len(shards)} files, bfloat16, analyze: {_said(own)}")
    print(f"  {own.cpu / total * 1e9:.2f} CPU ns a weight")


def _medians(commands: list[list[str]], runs: int) -> list[Run]:
    """Of each command; they take turns."""
    found = [[_run(command) for command in commands] for _ in range(runs)]
    return [
        Run(*(statistics.median(numbers) for numbers in zip(*each, strict=True)))
        for each in zip(*found, strict=True)
    ]


def _run(command: list[str]) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(used.ru_utime + used.ru_stime, time.perf_counter() - start, peak)


def _said(run: Run) -> str:
    return f"{run.cpu:.2f} CPU s, {run.wall:.2f} s, {run.peak / 2**20:.0f} MiB"


def _minilm(directory: Path) -> Path:
    shapes = {"words": (30522, 384), "positions": (512, 384), "types": (2, 384)}
    for layer in range(6):
        shapes |= {f"{layer}.{name}": (384, 384) for name in ("query", "key", "value", "output")}
        shapes |= {f"{layer}.up": (1536, 384), f"{layer}.down": (384, 1536)}
    path = directory / "minilm.safetensors"
    _write(path, shapes, "F32")
    return path


def _write(path: Path, shapes: Shapes, kind: str, seed: int = 0) -> None:
    """Normal weights, the same ones again after the first BLOCK."""
    itemsize = {"F32": 4, "BF16": 2}[kind]
    bits = np.random.default_rng(seed).standard_normal(BLOCK).astype(np.float32).view(np.uint32)
    data = (bits if kind == "F32" else (bits >> 16).astype(np.uint16)).view(np.uint8)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = itemsize * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        _ = file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, data.nbytes):
            _ = file.write(data[: min(data.nbytes, end - start)])


if __name__ == "__main__":
    main()
