"""Damaged and malicious files, and what reading them may do: succeed, or raise jaxeff's own error.

    python tests/hostile.py [--inputs 1000000] [--seed 0]

Every input is a good file with a few mutations: of its bytes, and of the values in its JSON. `tests/test_hostile.py`
replays the first of each kind.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

import jaxeff
from jaxeff import prune
from jaxeff.checkpoints import CheckpointError, analyze_checkpoint

SECONDS, BYTES = 5.0, 64 << 20
"""What reading one file of a few kilobytes may take."""


class Target(NamedTuple):
    """Something that reads a file.

    Attributes:
        good: a file that it reads.
        text: where the JSON in it begins; None if there is none.
        read: reads the bytes, with a folder for what has to be on disk.
        own: the error that it may raise.
        seal: makes a checksum in the JSON true again.
    """

    good: bytes
    text: int | None
    read: Callable[[bytes, Path], Any]
    own: type[Exception]
    seal: Callable[[Any], Any] = lambda tree: tree


def targets() -> dict[str, Target]:
    model, x = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(2)]), jnp.ones((4, 3))
    variables = model.init(jax.random.key(0), x)
    report = jaxeff.analyze(variables, model.apply, x)
    groups = prune.groups(variables, model.apply, x)
    plan = prune.plan(groups, prune.scored(variables["params"]), sparsity=0.5)
    arrays = {f"layers.{i}.weight": np.ones((3, 4), np.float32) for i in range(3)}
    return {
        "safetensors": Target(_safetensors(arrays), 8, _checkpoint("m.safetensors"), CheckpointError),
        "msgpack": Target(
            flax.serialization.to_bytes(variables), None, _checkpoint("m.msgpack"), CheckpointError
        ),
        "orbax": Target(_orbax_tree(arrays), 0, _orbax(arrays), CheckpointError),
        "index": Target(_index(arrays), 0, _sharded(arrays), CheckpointError),
        "report": Target(report.to_json().encode(), 0, _report, ValueError),
        "plan": Target(plan.to_json().encode(), 0, _plan, ValueError, _signed),
    }


def _safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [at, at := at + array.nbytes],
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values())


def _checkpoint(name: str) -> Callable[[bytes, Path], Any]:
    def read(data: bytes, folder: Path) -> str:
        _ = (folder / name).write_bytes(data)
        return str(analyze_checkpoint(folder / name))

    return read


def _index(arrays: dict[str, np.ndarray]) -> bytes:
    weight_map = {name: "a.safetensors" for name in arrays}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def _sharded(arrays: dict[str, np.ndarray]) -> Callable[[bytes, Path], Any]:
    def read(data: bytes, folder: Path) -> str:
        _ = (folder / "a.safetensors").write_bytes(_safetensors(arrays))
        _ = (folder / "model.safetensors.index.json").write_bytes(data)
        return str(analyze_checkpoint(folder / "model.safetensors.index.json"))

    return read


def _orbax_tree(arrays: dict[str, np.ndarray]) -> bytes:
    def entry(name: str) -> dict[str, Any]:
        keys = [{"key": name, "key_type": 2}]
        return {
            "key_metadata": keys,
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }

    tree = {str((name,)): entry(name) for name in arrays}
    return json.dumps({"tree_metadata": tree, "use_zarr3": False}).encode()


def _orbax(arrays: dict[str, np.ndarray]) -> Callable[[bytes, Path], Any]:
    def read(data: bytes, folder: Path) -> str:
        for name, array in arrays.items():
            (folder / name).mkdir(exist_ok=True)
            layout = {
                "zarr_format": 2, "shape": array.shape, "chunks": array.shape, "dtype": "<f4", "order": "C",
                "compressor": None, "fill_value": None, "filters": None, "dimension_separator": ".",
            }  # fmt: skip
            _ = (folder / name / ".zarray").write_text(json.dumps(layout))
            _ = (folder / name / "0.0").write_bytes(array.tobytes())
        _ = (folder / "_METADATA").write_bytes(data)
        return str(analyze_checkpoint(folder))

    return read


def _report(data: bytes, folder: Path) -> str:
    report = jaxeff.Report.from_json(data.decode("utf-8", "surrogateescape"))
    return str(report) + report.to_json()


def _plan(data: bytes, folder: Path) -> str:
    return str(prune.Plan.from_json(data.decode("utf-8", "surrogateescape")))


def _signed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    model = {name: tree.get(name) for name in ("params", "state", "groups")}
    return {**tree, "signature": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()}


def mutations(target: Target, seed: int) -> Iterator[bytes]:
    """Return damaged copies of a target's file without end."""
    rng = random.Random(seed)
    while True:
        data = target.good
        if target.text is not None and rng.random() < 0.7:
            data = _of_values(target, rng)
        if data is target.good or rng.random() < 0.3:
            data = _of_bytes(data, rng)
        yield data


_PIECES = (
    b"",
    b"[",
    b"{",
    b"}",
    b"]",
    b'"',
    b",",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"\xff",
    b"\x00",
    b"/../",
)


def _of_bytes(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice((0, 1, 1, 2, 8, 64))
        match rng.randrange(5):
            case 0:
                put = rng.choice(_PIECES)
            case 1:
                put = rng.randbytes(rng.randint(0, 9))
            case 2:
                put = data[at : at + length] * 2
            case 3:
                put = rng.choice((b"[", b'{"a":')) * rng.choice((10, 10_000))
            case _:
                data = data[:at]  # cut off
                continue
        data = data[:at] + put + data[at + length :]
    return data


def _of_values(target: Target, rng: random.Random) -> bytes:
    """Change values in the JSON, which stays well formed; a length before it stays true."""
    assert target.text is not None
    end = len(target.good)
    if target.text:
        end = 8 + int.from_bytes(target.good[:8], "little")
    tree = json.loads(target.good[target.text : end])
    for _ in range(rng.randint(1, 3)):
        tree = _changed(tree, rng)
    if rng.random() < 0.9:
        tree = target.seal(tree)
    text = json.dumps(tree).encode()
    head = len(text).to_bytes(8, "little") if target.text else b""
    return head + text + target.good[end:]


def _changed(node: Any, rng: random.Random) -> Any:
    """Change one value somewhere in a tree."""
    if isinstance(node, (dict, list)) and node and rng.random() < 0.85:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(keys)
        node = node.copy()
        match rng.randrange(8):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice(_NAMES)] = node.pop(key)
            case 1:
                node.append(node[key])
            case _:
                node[key] = _changed(node[key], rng)
        return node
    return rng.choice(_VALUES)


_NAMES = (
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "\x00",
    "\n\x1b[31m",
    "x" * 5000,
    "__proto__",
    "1",
)
_VALUES = (
    None, True, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf"), *_NAMES, [], {}, [[]],
    [0] * 3000, [1, "a", None], {"a": [{}]}, "F32", "float32", [2**40, 2**40], [-1], ["1"],
)  # fmt: skip


def problem(target: Target, data: bytes, folder: Path) -> str | None:
    """Read an input; return what went wrong, or None."""
    start, error = time.perf_counter(), None
    try:
        _ = target.read(data, folder)
    except target.own as found:
        message = str(found)
        # jaxeff's own error, and not one of Python's that is a kind of it.
        if type(found) is not target.own or not message or len(message) > 1000:
            error = f"{type(found).__name__}: {message[:200]}"
    except Exception as found:
        error = f"{type(found).__name__}: {str(found)[:200]}"
    taken = time.perf_counter() - start
    return error or (f"took {taken:.1f} s" if taken > SECONDS else None)


def peak_bytes(target: Target, data: bytes, folder: Path) -> int:
    """The most memory that reading an input takes at once."""
    tracemalloc.start()
    _ = problem(target, data, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--inputs", type=int, default=1_000_000)
    _ = parser.add_argument("--seed", type=int, default=0)
    _ = parser.add_argument("--targets", nargs="+")
    chosen = parser.parse_args()
    known = targets()
    names = chosen.targets or [*known]
    streams = {name: mutations(known[name], chosen.seed) for name in names}
    found: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent:
        for count in range(chosen.inputs):
            name = names[count % len(names)]
            folder = Path(parent) / name
            folder.mkdir(exist_ok=True)
            data = next(streams[name])
            if (wrong := problem(known[name], data, folder)) is not None:
                key = f"{name}: {wrong}"
                found[key] += 1
                if found[key] == 1:
                    print(key, "\n   ", data[:2000], flush=True)
            if count % 1000 == 999:
                # What a mutated name wrote stays in its folder.
                shutil.rmtree(folder)
    seconds = time.perf_counter() - start
    print(
        f"{chosen.inputs:,} inputs in {seconds:,.0f} s: {sum(found.values())} errors of others, {len(found)} kinds"
    )


if __name__ == "__main__":
    main()
