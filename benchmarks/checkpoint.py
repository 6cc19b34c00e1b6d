"""Rate and peak memory of `jaxeff.checkpoints.analyze_checkpoint` on a synthetic bfloat16 checkpoint.

    python benchmarks/checkpoint.py [--weights 2e9] [--directory DIR]

Each measurement is a process of its own: the sketch of an array in memory before and after the checkpoint, so
that drift shows, and the checkpoint's own, whose peak memory the system tells. The files are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing

from jaxeff import sketch
from jaxeff.checkpoints import analyze_checkpoint

WIDTH, HIDDEN = 4096, 11008
LARGEST = 1 << 28  # weights of one tensor: 512 MiB
SHARD = 1 << 29  # weights
BLOCK = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _ = parser.add_argument("--weights", type=float, default=2e9)
    _ = parser.add_argument(
        "--directory", default=None, help="where to write; the system's for temporary files"
    )
    _ = parser.add_argument("--only", choices=("sketch", "checkpoint"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        print({"sketch": _sketch, "checkpoint": _checkpoint}[chosen.only](chosen.directory))
        return
    print(timing.machine())
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        _report(Path(directory), int(chosen.weights))


def _report(directory: Path, weights: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < 2 * weights + (2 << 30):
        sys.exit(f"{directory} has {free:,} bytes free, and {2 * weights:,} and 2 GiB to spare are needed")
    weights = write(directory, weights)
    print(f"{weights:,} weights, {2 * weights:,} bytes in {len(list(directory.glob('*.safetensors')))} files")
    before, _ = _measured("sketch", directory)
    seconds, peak = _measured("checkpoint", directory)
    after, _ = _measured("sketch", directory)
    start = time.perf_counter()
    command = [sys.executable, "-m", "jaxeff", "analyze", str(directory)]
    _ = subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    own = (before + after) / 2
    print(
        f"sketch of an array in memory: {_rate(own)}, {before * 1e9:.2f} before and {after * 1e9:.2f} after"
    )
    print(f"checkpoint, programs compiled: {_rate(seconds / weights)}")
    print(f"ratio of the times: {seconds / weights / own:.2f}; peak memory: {peak / 2**20:.0f} MiB")
    print(f"the command, with its start and compiling: {whole:.1f} s, {weights / whole:.3g} weights/s")


def _rate(seconds: float) -> str:
    return f"{1 / seconds:.3g} weights/s ({seconds * 1e9:.2f} ns each)"


def _measured(only: str, directory: Path) -> tuple[float, int]:
    """What a process of its own printed, and its peak memory in bytes."""
    command = [sys.executable, __file__, "--only", only, "--directory", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return float(printed), used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _sketch(directory: str) -> float:
    """Seconds a weight, the median of 20."""
    x = jnp.abs(jax.random.normal(jax.random.key(0), (4 * BLOCK,), jnp.bfloat16))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        _ = jax.block_until_ready(sketch.sketch(x))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) / x.size


def _checkpoint(directory: str) -> float:
    """Seconds, after a small checkpoint for which the programs were compiled."""
    with tempfile.TemporaryDirectory(dir=directory) as small:
        _ = write(Path(small), 3 * WIDTH * HIDDEN // 2)
        _ = analyze_checkpoint(small, progress=False)
    start = time.perf_counter()
    _ = analyze_checkpoint(directory, progress=False)
    return time.perf_counter() - start


def write(directory: Path, weights: int) -> int:
    """Writes a checkpoint of about so many weights; returns how many."""
    shapes = list(_shapes(weights))
    shards: list[list[tuple[str, tuple[int, int]]]] = [[]]
    for number, shape in enumerate(shapes):
        if sum(rows * columns for _, (rows, columns) in shards[-1]) + shape[0] * shape[1] > SHARD:
            shards.append([])
        shards[-1].append((f"layers.{number}.weight", shape))
    block = np.asarray(jax.random.normal(jax.random.key(1), (BLOCK,), jnp.bfloat16) * 0.02)
    index = {}
    for number, shard in enumerate(shards):
        name = f"model-{number}.safetensors"
        _write_shard(directory / name, shard, block)
        index.update({tensor: name for tensor, _ in shard})
    _ = (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(rows * columns for rows, columns in shapes)


def _shapes(weights: int) -> Iterator[tuple[int, int]]:
    """An embedding of up to an eighth, then the kernels of a transformer."""
    rows = min(weights // 8, LARGEST) // WIDTH
    yield rows, WIDTH
    left = weights - rows * WIDTH
    while left > 0:
        for shape in ((WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)):
            if left > 0:
                yield shape
                left -= shape[0] * shape[1]


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, int]]], block: np.ndarray) -> None:
    header, end = {}, 0
    for name, (rows, columns) in shard:
        size = 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    data = block.view(np.uint8)
    with open(path, "wb") as file:
        _ = file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, data.nbytes):
            _ = file.write(data[: min(data.nbytes, end - start)])


if __name__ == "__main__":
    main()
