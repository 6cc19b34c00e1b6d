"""Checkpoints: every format gives the report of the arrays themselves, and damage is told in one line."""

import contextlib
import errno
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxeff
from jaxeff import cli
from jaxeff.checkpoints import (
    CheckpointError,
    analyze_checkpoint,
    compare_checkpoints,
    open_checkpoint,
    write_checkpoint,
)
from jaxeff.checkpoints import _comparing as comparing
from jaxeff.checkpoints import _measuring as measuring
from jaxeff.checkpoints import _reading as reading
from jaxeff.checkpoints import _safetensors as safetensors
from jaxeff.checkpoints import _stored as stored
from jaxeff.output import files

KINDS = {jnp.dtype(name): kind for kind, name in safetensors._DTYPES.items()}


def header_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    header, end = {}, 0
    for name, array in arrays.items():
        offsets = [end, end + array.nbytes]
        header[name] = {"dtype": KINDS[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        end += array.nbytes
    return header


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    _ = path.write_bytes(with_header(header_of(arrays), data))
    return path


def save_shards(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> Path:
    directory.mkdir()
    for shard, arrays in shards.items():
        _ = save(directory / shard, arrays)
    weight_map = {name: shard for shard, arrays in shards.items() for name in arrays}
    _ = (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def flax_arrays() -> dict[str, np.ndarray]:
    """Small and large, with pieces that end inside rows, in several dtypes; and what is no weight."""
    return {
        "a/bias": normal(40),
        "a/kernel": normal(30, 40),
        "b/kernel": normal(700, 1100, dtype=jnp.bfloat16),
        "c/kernel": normal(3, 3, 60, 130, seed=1) ** 3,
        "d/embedding": normal(9, 70_001, seed=2),
        "e/scale": normal(7),
        "f/table": np.arange(6, dtype=np.int32).reshape(2, 3),
        "g/kernel": np.zeros((4, 5), np.float32),
        "h/vector": normal(7, dtype=np.float16),
        "i/kernel": np.where(normal(5, 6) > 1, np.nan, 1).astype(np.float32),
    }


def tree_of(arrays: dict[str, np.ndarray]) -> Any:
    return flax.traverse_util.unflatten_dict({tuple(name.split("/")): x for name, x in arrays.items()})


def differences(found: jaxeff.Report, wanted: jaxeff.Report) -> list[str]:
    """Numbers that are more than 1e-5 apart, and everything that is not a number and differs."""
    pairs = [(found.model, wanted.model, "model")]
    for kind in ("rows", "others"):
        ones, twos = ({row.path: row for row in getattr(report, kind)} for report in (found, wanted))
        assert set(ones) == set(twos)
        pairs += [(ones[path], twos[path], path) for path in ones]
    apart = []
    for one, two, path in pairs:
        assert jax.tree.structure(one) == jax.tree.structure(two)
        leaves = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True)
        for (keys, x), y in leaves:
            if not np.allclose(np.float64(x), np.float64(y), rtol=1e-5, atol=1e-5, equal_nan=True):
                apart.append(f"{path}{jax.tree_util.keystr(keys)}: {x} and {y}")
    return apart


@pytest.fixture(scope="module")
def wanted() -> jaxeff.Report:
    return jaxeff.analyze(tree_of(flax_arrays())).single()


def saved_safetensors(path: Path) -> Path:
    return save(path / "model.safetensors", flax_arrays())


def saved_shards(path: Path) -> Path:
    arrays = list(flax_arrays().items())
    return save_shards(
        path / "shards", {"1.safetensors": dict(arrays[:4]), "2.safetensors": dict(arrays[4:])}
    )


def saved_directory(path: Path) -> Path:
    (path / "one").mkdir()
    return save(path / "one" / "model.safetensors", flax_arrays()).parent


def saved_msgpack(path: Path) -> Path:
    file = path / "model.msgpack"
    _ = file.write_bytes(flax.serialization.to_bytes({"params": tree_of(flax_arrays())}))
    return file


def save_msgpack_shards(directory: Path, shards: dict[str, Any]) -> Path:
    """As `FlaxPreTrainedModel.save_pretrained` writes them: names in the index are keys, joined by '/'."""
    directory.mkdir()
    weight_map = {}
    for shard, tree in shards.items():
        _ = (directory / shard).write_bytes(flax.serialization.to_bytes(tree))
        weight_map |= dict.fromkeys(flax.traverse_util.flatten_dict(tree, sep="/"), shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    _ = (directory / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    return directory


def saved_msgpack_shards(path: Path) -> Path:
    arrays = {f"params/{name}": array for name, array in flax_arrays().items()}
    names = sorted(arrays)
    # Neighbors are in different shards.
    parts = [{name: arrays[name] for name in names[first::2]} for first in range(2)]
    files = [f"flax_model-0000{number}-of-00002.msgpack" for number in (1, 2)]
    return save_msgpack_shards(path / "shards", dict(zip(files, map(tree_of, parts), strict=True)))


def saved_index(path: Path) -> Path:
    return saved_msgpack_shards(path) / "flax_model.msgpack.index.json"


def saved_orbax(path: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "orbax", tree_of(flax_arrays()))
    return path / "orbax"


def saved_zarr3(path: Path) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        checkpointer.save(path / "zarr3", {"params": tree_of(flax_arrays()), "step": 3})
    return path / "zarr3"


def saved_files(path: Path) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path / "files", tree_of(flax_arrays()))
    return path / "files"


def saved_step(path: Path) -> Path:
    with ocp.CheckpointManager(path / "run") as manager:
        _ = manager.save(7, args=ocp.args.StandardSave(tree_of(flax_arrays())))
        manager.wait_until_finished()
    return path / "run" / "7"


def saved_item(path: Path) -> Path:
    with ocp.CheckpointManager(path / "run") as manager:
        params = ocp.args.StandardSave(tree_of(flax_arrays()))
        extra = ocp.args.StandardSave({"momentum": np.ones(3, np.float32)})
        _ = manager.save(7, args=ocp.args.Composite(params=params, opt_state=extra))
        manager.wait_until_finished()
    return path / "run" / "7"


@pytest.mark.parametrize(
    "saved",
    [
        *(saved_safetensors, saved_shards, saved_directory, saved_msgpack),
        *(saved_msgpack_shards, saved_index),
        *(saved_orbax, saved_zarr3, saved_files, saved_step, saved_item),
    ],
)
def test_every_format_gives_the_report_of_the_arrays(
    saved: Callable[[Path], Path], wanted: jaxeff.Report, tmp_path: Path
) -> None:
    report = analyze_checkpoint(saved(tmp_path))
    assert differences(report, wanted) == []
    assert report.structure == wanted.structure
    again = jaxeff.Report.from_json(report.to_json())
    assert differences(again, wanted) == []


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _ = saved_orbax(tmp_path), saved_msgpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in ("orbax", "model.msgpack"):
        assert "a/kernel" in open_checkpoint(path).arrays


def test_units_of_pytorch_come_first(tmp_path: Path) -> None:
    # (out, in), (out, in, h, w)
    arrays = {"lin.weight": normal(70, 900), "conv.weight": normal(48, 30, 3, 3), "lin.bias": normal(70)}
    report = analyze_checkpoint(save(tmp_path / "torch.safetensors", arrays))
    assert [other.role for other in report.others] == ["bias"]
    for row in report.rows:
        units = np.abs(arrays[row.path]).reshape(row.shape[0], -1).sum(axis=1, dtype=np.float64)
        assert row.unit_axes == (0,)
        np.testing.assert_allclose(row.units, units, rtol=1e-6)
        assert float(row.effective_units) == pytest.approx(
            reference.metrics(units)["effective_params"], rel=1e-5
        )


def test_names_of_flax_in_safetensors_have_units_last(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.safetensors", {"params.Dense_0.kernel": normal(3, 4), "batch_stats.m": normal(4)}
    )
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.arrays) == ["Dense_0.kernel"]
    assert checkpoint.unit_axis(checkpoint.arrays["Dense_0.kernel"]) == 1
    assert list(checkpoint.left_out) == ["batch_stats"]


def test_pieces_end_anywhere() -> None:
    for shape in ((7, 11), (3, 50), (50, 3), (4, 5, 6), (1, 77), (77, 1)):
        x = np.abs(normal(*shape))
        for axis in (0, len(shape) - 1):
            for step in (1, 2, 5, 13, 100):
                sums = measuring.UnitSums(shape, axis)
                for at in range(0, x.size, step):
                    sums.add(at, x.reshape(-1)[at : at + step])
                others = tuple(other for other in range(len(shape)) if other != axis)
                np.testing.assert_allclose(sums.sums, x.sum(axis=others, dtype=np.float64), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_an_array_of_many_pieces(dtype: Any, tmp_path: Path) -> None:
    # Several pieces and a rest, none of which ends with a row.
    array = (normal(1001, 4500) ** 5).astype(dtype)
    report = analyze_checkpoint(save(tmp_path / "m.safetensors", {"w/kernel": array}))
    (row,), magnitudes = report.rows, np.abs(array.astype(np.float64))
    for name, value in reference.metrics(magnitudes).items():
        assert float(getattr(row.metrics, name)) == pytest.approx(value, rel=1e-5, abs=1e-5), name
    np.testing.assert_allclose(row.units, magnitudes.sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize("kind", sorted(KINDS.values()))
def test_every_dtype_is_read(kind: str, tmp_path: Path) -> None:
    dtype = jnp.dtype(safetensors._DTYPES[kind])
    array = np.asarray([[1, 2, 4], [1, 1, 0.5]]).astype(dtype)
    report = analyze_checkpoint(save(tmp_path / "m.safetensors", {"w": array}))
    if jnp.issubdtype(dtype, jnp.floating):
        magnitudes = array.astype(np.float32)
        assert float(report["w"].metrics.mean) == pytest.approx(magnitudes.mean())
        np.testing.assert_allclose(report["w"].units, magnitudes.sum(axis=1))
    else:
        (other,) = report.others
        assert other.role == f"{dtype} array"
        mean = np.abs(array.astype(np.complex64)).mean()
        assert (
            np.isnan(other.mean_absolute)
            if kind == "BOOL"
            else float(other.mean_absolute) == pytest.approx(mean)
        )


def hard_arrays() -> dict[str, np.ndarray]:
    """What bins, sums of squares or thresholds may get wrong."""
    x = normal(200, 300)
    single = np.zeros((200, 300), np.float32)
    single[17, 5] = -3
    return {
        "heavy tails": np.exp(4 * x),
        "nearly equal": 1 + 1e-5 * x,
        "equal": np.full((200, 300), 0.37, np.float32),
        "two values": np.where(x > 0, 0.5, -2).astype(np.float32),
        "half zeros": np.where(x > 0, x, 0),
        "single": single,
        "all zeros": np.zeros((200, 300), np.float32),
        "at thresholds": np.resize(np.float32([0.01, 0.001, 1, 0.0099999, 0.00099999]), (200, 300)),
        "large": x * np.float32(1e37),
        "small": x * np.float32(1e-36),
    }


@pytest.mark.parametrize("name", hard_arrays())
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16, jnp.float8_e4m3fn])
def test_counted_weights_have_the_numbers_of_float64(name: str, dtype: Any, tmp_path: Path) -> None:
    with np.errstate(over="ignore"):
        array = hard_arrays()[name].astype(dtype)
    assert array.size > measuring.SORTED
    found = analyze_checkpoint(save(tmp_path / "m.safetensors", {"w": array}))["w"].metrics
    magnitudes = np.abs(array.astype(np.float64))
    if not np.isfinite(magnitudes).all():
        assert np.isnan(found.gini) and int(found.nonfinite) == np.sum(~np.isfinite(magnitudes))
        return
    for metric, value in reference.metrics(magnitudes).items():
        # Nearly all weights of one kind are in one bin.
        absolute = (
            5e-4 if "coverage" in metric or metric == "gini" else 2e-5 if "relative" in metric else 2e-6
        )
        if metric == "std":
            absolute = 2e-6 * float(magnitudes.mean())
        near = pytest.approx(value, rel=5e-6, abs=absolute if metric != "max" else 0, nan_ok=True)
        assert float(getattr(found, metric)) == near, metric


def test_weights_of_one_shape_are_measured_as_each_alone(tmp_path: Path) -> None:
    arrays = {f"{number}.weight": normal(30, 50, seed=number) ** number for number in range(1, 30)}
    arrays["4.weight"][3, 4] = np.inf
    arrays["5.weight"][:] = 0
    together = analyze_checkpoint(save(tmp_path / "all.safetensors", arrays), curves=True)
    for name, array in arrays.items():
        alone = analyze_checkpoint(save(tmp_path / "one.safetensors", {name: array}), curves=True)
        leaves = zip(jax.tree.leaves(together[name]), jax.tree.leaves(alone[name]), strict=True)
        assert all(np.array_equal(one, two, equal_nan=True) for one, two in leaves), name
    assert (
        np.isnan(together["4.weight"].metrics.gini)
        and np.isnan(together["4.weight"].distribution.weights).all()
    )


def test_float64_beyond_float32_is_infinite(tmp_path: Path) -> None:
    report = analyze_checkpoint(save(tmp_path / "m.safetensors", {"w": np.array([[1e300, 1.0]])}))
    assert int(report["w"].nonfinite_weights) == 1
    assert np.isnan(report["w"].metrics.gini)


def test_large_weights_have_units_beyond_float32(tmp_path: Path) -> None:
    array = np.full((10, 4), 8e37, np.float32)
    report = analyze_checkpoint(save(tmp_path / "m.safetensors", {"w/kernel": array}))
    assert np.isinf(report["w/kernel"].units).all()
    assert float(report["w/kernel"].metrics.utilization) == pytest.approx(1)
    assert float(report["w/kernel"].effective_units) == pytest.approx(4)


def test_what_is_unknown_or_empty_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
        "known": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "strange": {"dtype": "F4", "shape": [4, 4], "data_offsets": [16, 24]},
    }
    path = tmp_path / "m.safetensors"
    _ = path.write_bytes(with_header(header, normal(6).tobytes()))
    report = analyze_checkpoint(path)
    assert {other.path: other.role for other in report.others} == {
        "empty": "empty",
        "strange": "F4 (not read)",
    }
    assert report.model.total_params == 20
    assert cli.main(["analyze", str(path)]) == 0
    assert "F4 (not read)" in capsys.readouterr().out


def test_chunks_of_msgpack_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    arrays = {"w/kernel": normal(30, 40), "b/kernel": normal(20, 70, dtype=jnp.bfloat16)}
    file = tmp_path / "model"
    _ = file.write_bytes(flax.serialization.msgpack_serialize(tree_of(arrays)))
    assert b"__msgpack_chunked_array__" in file.read_bytes()
    whole = save(tmp_path / "m.safetensors", arrays)
    assert differences(analyze_checkpoint(file), analyze_checkpoint(whole)) == []


def test_msgpack_of_every_kind_of_leaf(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree = {
        "params": {"w": {"kernel": normal(3, 4), "count": 3, "rate": -0.5, "name": "x", "none": None}},
        "step": np.int32(7),
        "opt_state": {"0": {"mu": normal(3, 4)}, "1": {}},
        "more": [1, -100, 2**40, -(2**40), 1.5, True, 2 + 3j, "long" * 100, b"bytes", list(range(20))],
    }
    file = tmp_path / "state.msgpack"
    _ = file.write_bytes(flax.serialization.msgpack_serialize(tree))
    report = analyze_checkpoint(file)
    roles = {other.path: other.role for other in report.others}
    assert roles == {"w/count": "int64 array", "w/rate": "vector", "w/name": "str (not read)"}
    assert list(open_checkpoint(file).left_out) == ["more", "opt_state", "step"]
    assert cli.main(["analyze", str(file)]) == 0
    assert "opt_state (1 arrays, 12 elements)" in capsys.readouterr().out


def test_a_boxed_parameter_has_no_key_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "boxed.msgpack"
    _ = file.write_bytes(flax.serialization.to_bytes({"w": {"kernel": {"value": normal(3, 4)}}}))
    assert list(analyze_checkpoint(file).layers) == ["w/kernel"]


def test_an_array_called_value_keeps_its_name_where_it_has_siblings(tmp_path: Path) -> None:
    file = tmp_path / "attention.msgpack"
    attention = {name: normal(3, 4) for name in ("query", "key", "value")}
    tree = {"attn": attention, "gate": {"value": normal(3, 4), "inner": {"kernel": normal(3, 4)}}}
    _ = file.write_bytes(flax.serialization.to_bytes({**tree, "value": normal(3, 4)}))
    assert sorted(analyze_checkpoint(file).layers) == [
        *("attn/key", "attn/query", "attn/value"),
        *("gate/inner/kernel", "gate/value", "value"),
    ]


# Memory and what is read.


def sparse(path: Path, kind: str, shape: list[int]) -> Path:
    """A checkpoint of one array of zeros that take no place on the disk."""
    size = math.prod(shape) * jnp.dtype(safetensors._DTYPES[kind]).itemsize
    text = json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}).encode()
    with open(path, "wb") as file:
        _ = file.write(struct.pack("<Q", len(text)) + text)
        _ = file.truncate(8 + len(text) + size)
    return path


def test_listing_reads_no_array(tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.safetensors", "BF16", [1 << 20, 1 << 20])
    array = open_checkpoint(path).arrays["w"]
    with array.open() as read:
        assert read(array.size - 3, array.size).tolist() == [0, 0, 0]


def test_an_array_is_read_in_pieces(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", {"w": np.zeros((3, 2_000_000), jnp.bfloat16)})
    found = [
        (piece.start, piece.elements.size) for piece in reading.pieces(open_checkpoint(path).arrays["w"])
    ]
    assert max(size for _, size in found) == reading.PIECE
    assert sum(size for _, size in found) == 6_000_000
    assert found == sorted(found)


def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    # 300 MB, in less than 100.
    path = sparse(tmp_path / "m.safetensors", "BF16", [30_000, 5_000])
    tracemalloc.start()
    try:
        report = analyze_checkpoint(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert int(report["w"].metrics.zeros) == 150_000_000
    assert peak < 100_000_000


# Hostile files.

GOOD = {"a": normal(2, 3), "b": normal(4)}
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def damaged(**changes: Any) -> bytes:
    return with_header({"a": {**ENTRY, **changes}}, b"\0" * 24)


HEADERS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": struct.pack("<Q", 0),
    "long header": struct.pack("<Q", 2**63) + b"{}",
    "header beyond the file": struct.pack("<Q", 100) + b"{}",
    "not json": with_header(b"{'a'", b""),
    "not utf-8": with_header(b'{"\xff": 1}', b""),
    "deep": with_header(b"[" * 100_000, b""),
    "a number of many digits": with_header(b"1" * 10_000, b""),
    "a list": with_header([], b""),
    "no arrays": with_header({}, b""),
    "an entry that is no object": with_header({"a": 3}, b""),
    "no dtype": with_header({"a": {"shape": [0], "data_offsets": [0, 0]}}, b""),
    "a dtype that is no text": damaged(dtype=3),
    "cut off": with_header(header_of(GOOD), b"\0" * 30),
    "more than the header tells": with_header(header_of(GOOD), b"\0" * 50),
    "negative offsets": damaged(data_offsets=[-1, 23]),
    "offsets backwards": damaged(data_offsets=[24, 0]),
    "offsets beyond the file": damaged(data_offsets=[0, 2**62]),
    "offsets beyond 2^63": damaged(data_offsets=[0, 2**70]),
    "one offset": damaged(data_offsets=[0]),
    "offsets in floats": damaged(data_offsets=[0.0, 24.0]),
    "negative shape": damaged(shape=[-2, -3]),
    "shape of text": damaged(shape="23"),
    "shape of truth": damaged(shape=[True, 6]),
    "shape of 1000 axes": damaged(shape=[1] * 1000),
    "huge shape": damaged(shape=[2**62, 2**62]),
    "huge shape of what is unknown": damaged(dtype="F4", shape=[2**62, 2**62]),
    "no shape": damaged(shape=None),
    "wrong bytes for the shape": damaged(shape=[2, 4]),
    "wrong bytes for the dtype": damaged(dtype="F16"),
    "overlap": with_header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 36]}}, b"\0" * 36),
    "gap": with_header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [28, 52]}}, b"\0" * 52),
    "one name twice": with_header(
        f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode(), b"\0" * 24
    ),
    "names that are one when printed": with_header(
        {"\x1b": ENTRY, "\\x1b": {**ENTRY, "data_offsets": [24, 48]}}, b"\0" * 48
    ),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What a command says that fails: one line."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("jaxeff: ") and printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert len(printed.err) < 700 and printed.err[:-1].isprintable()
    return printed.err


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_safetensors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "m.safetensors"
    _ = path.write_bytes(HEADERS[name])
    assert "m.safetensors" in refused(["analyze", str(path), "--json", str(tmp_path / "out.json")], capsys)
    assert [child.name for child in tmp_path.iterdir()] == ["m.safetensors"]


def index_of(directory: Path, weight_map: Any) -> Path:
    directory.mkdir(exist_ok=True)
    _ = (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    "shard", ["missing.safetensors", "../m.safetensors", "/etc/passwd", "", "..", "a/b", "a\\b", "nul\0"]
)
def test_shards_that_are_not_there(shard: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _ = save(tmp_path / "m.safetensors", GOOD)
    path = index_of(tmp_path / "shards", {"a": shard, "b": shard})
    assert "names the shard" in refused(["analyze", str(path)], capsys)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "1.safetensors", "c": "2.safetensors"}, "in two shards"),
        ({"a": "1.safetensors", "d": "1.safetensors"}, "not there"),
        ({"a": 3}, "no weight_map"),
        (None, "no weight_map"),
        ({}, "no arrays"),
    ],
)
def test_an_index_that_is_not_right(
    weight_map: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = save_shards(
        tmp_path / "shards", {"1.safetensors": GOOD, "2.safetensors": {"c": normal(2), **GOOD}}
    )
    assert said in refused(["analyze", str(index_of(path, weight_map))], capsys)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "1.msgpack", "b/c": "2.msgpack"}, "'a' is in two shards"),
        ({"a": "1.msgpack", "b": "1.msgpack"}, "'b' should be in '1.msgpack', and is not there"),
        ({"a": "missing.msgpack"}, "which is missing"),
        ({"a": "../1.msgpack"}, "which is not beside it"),
        ({"a": "cut.msgpack"}, "cut off"),
        ({"a": ["1.msgpack"]}, "no weight_map"),
    ],
)
def test_an_index_of_msgpacks_that_is_not_right(
    weight_map: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tree = {"a": normal(3, 4), "b": {"c": normal(2)}}
    path = save_msgpack_shards(tmp_path / "shards", {"1.msgpack": tree, "2.msgpack": tree})
    _ = (path / "cut.msgpack").write_bytes((path / "1.msgpack").read_bytes()[:-1])
    index = path / "flax_model.msgpack.index.json"
    _ = index.write_text(json.dumps({"weight_map": weight_map}))
    assert said in refused(["analyze", str(path)], capsys)


def test_a_chunked_and_a_boxed_array_may_lie_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    large = normal(30, 40)
    attention = {name: {"value": normal(3, 4)} for name in ("query", "value")}
    shards = {"1.msgpack": {"large": large}, "2.msgpack": {"attn": attention}}
    path = save_msgpack_shards(tmp_path / "shards", shards)
    assert len((path / "1.msgpack").read_bytes()) > large.nbytes
    report = analyze_checkpoint(path)
    assert list(report.layers) == ["attn/query", "attn/value", "large"]
    units = np.abs(large).sum(axis=0, dtype=np.float64)
    np.testing.assert_allclose(report["large"].units, units, rtol=1e-6)


def test_a_whole_file_of_one_format_goes_before_shards_of_the_next(tmp_path: Path) -> None:
    path = save_msgpack_shards(tmp_path / "both", {"1.msgpack": {"flax": normal(3, 4)}})
    assert list(open_checkpoint(path).arrays) == ["flax"]
    _ = save(path / "model.safetensors", {"torch.weight": normal(4, 3)})
    assert list(open_checkpoint(path).arrays) == ["torch.weight"]


def test_two_indices(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save_shards(tmp_path / "shards", {"1.safetensors": GOOD})
    _ = (path / "other.safetensors.index.json").write_text("{}")
    assert "2 indices" in refused(["analyze", str(path)], capsys)
    assert cli.main(["analyze", str(path / "model.safetensors.index.json")]) == 0


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "m.pkl", "last.ckpt"])
def test_no_pickle_is_loaded(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / name
    # It would say that it was loaded.
    _ = path.write_bytes(b"cos\nsystem\n(S'echo loaded'\ntR.")
    said = refused(["analyze", str(path)], capsys)
    assert "pickle" in said and "safetensors" in said
    assert "pickle" in refused(["analyze", str(tmp_path)], capsys)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04"])
def test_a_pickle_of_another_name(start: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "model.msgpack"
    _ = path.write_bytes(start + b"\0" * 20)
    assert "pickle" in refused(["analyze", str(path)], capsys)


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    _ = (tmp_path / "text").write_text("hello")
    _ = (tmp_path / "nothing").write_bytes(b"")
    assert "'text'" not in refused(["analyze", str(tmp_path / "text")], capsys).split("jaxeff reads")[1]
    for name in ("empty", "nothing"):
        assert "checkpoint that jaxeff reads" in refused(["analyze", str(tmp_path / name)], capsys)
    assert "No such file" in refused(["analyze", str(tmp_path / "none.safetensors")], capsys)
    assert "No such file" in refused(["compare", str(tmp_path / "none"), str(tmp_path)], capsys)
    for name in ("a.safetensors", "b.safetensors"):
        _ = save(tmp_path / "empty" / name, GOOD)
    assert "pass one" in refused(["analyze", str(tmp_path / "empty")], capsys)


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    assert "neither" in refused(["analyze", str(tmp_path / "m.safetensors")], capsys)


def test_what_orbax_misses_is_not_read_as_zeros(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved_files(tmp_path)
    (path / "b.kernel" / "0.0").unlink()
    assert "'b/kernel' is damaged" in refused(["analyze", str(path)], capsys)


def test_a_text_in_orbax_is_accounted_for(tmp_path: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "x", {"w": {"kernel": normal(3, 4)}, "name": "a", "none": None, "n": 3})
    report = analyze_checkpoint(tmp_path / "x")
    assert {other.path: other.role for other in report.others} == {
        "n": "int64 array",
        "name": "string (not read)",
    }


def test_rows_that_orbax_stores_apart(tmp_path: Path) -> None:
    array, path = normal(50, 70), tmp_path / "x"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeSave({"w": array}, {"w": ocp.SaveArgs(chunk_byte_size=2000)})
        checkpointer.save(path, args=args)
    stored_array = open_checkpoint(path).arrays["w"]
    with stored_array.open() as read:
        np.testing.assert_array_equal(read(100, 3000), array.reshape(-1)[100:3000])
        np.testing.assert_array_equal(read(0, array.size), array.reshape(-1))


def test_a_run_of_several_steps_is_asked_for_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved_step(tmp_path)
    said = refused(["analyze", str(path.parent)], capsys)
    assert "checkpoints 7" in said and str(path) in said


def test_damaged_orbax(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", tree_of(GOOD))
    tree = (tmp_path / "x" / "_METADATA").read_text()
    names = [tree.replace('"key": "a"', f'"key": "{name}"') for name in ("nope", "\\ud800")]
    for text in ("{", "[]", "{}", *names, tree[:100]):
        _ = (tmp_path / "x" / "_METADATA").write_text(text)
        _ = refused(["analyze", str(tmp_path / "x")], capsys)
    _ = (tmp_path / "x" / "_METADATA").write_text(tree)
    for child in (tmp_path / "x").rglob("d/*"):
        _ = child.write_bytes(child.read_bytes()[:-7])
    assert "damaged" in refused(["analyze", str(tmp_path / "x")], capsys)


def test_orbax_names_an_array_outside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree = tree_of(GOOD)
    for name in ("inside", "outside"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(tmp_path / name, tree)
    text = (tmp_path / "inside" / "_METADATA").read_text()
    text = text.replace('"key": "a"', '"key": "../outside/a"').replace("('a',)", "('../outside/a',)")
    _ = (tmp_path / "inside" / "_METADATA").write_text(text)
    assert "not in it" in refused(["analyze", str(tmp_path / "inside")], capsys)


MSGPACKS = {
    "cut off": flax.serialization.to_bytes(tree_of(GOOD))[:-3],
    "more at the end": flax.serialization.to_bytes(tree_of(GOOD)) + b"\0",
    "a map that is too long": b"\xdf\xff\xff\xff\xff",
    "a list that is too long": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "bytes that are too long": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "an array that is too long": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "a byte that begins nothing": b"\x81\xa1a\xc1",
    "deep": b"\x81\xa1a" * 1000 + b"\x01",
    "one key twice": b"\x82\xa1a\x01\xa1a\x01",
    "a key that is no text": b"\x81\xc0\x01",
    "an array that is none": b"\x81\xa1a\xd4\x01\x01",
    "wrong bytes for the shape": b"\x81\xa1a\xc7\x0d\x01\x93\x91\x03\xa7float32\xc4\x00",
    "negative shape": b"\x81\xa1a\xc7\x0d\x01\x93\x91\xff\xa7float32\xc4\x00",
    "chunks that are missing": b"\x81\xa1a\x81\xb9__msgpack_chunked_array__\xc3",
    "a list": b"\x91\x01",
    "nothing": b"\xde\x00\x00",
}


@pytest.mark.parametrize("name", MSGPACKS)
def test_damaged_msgpack(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "m.msgpack"
    _ = path.write_bytes(MSGPACKS[name])
    assert "m.msgpack" in refused(["analyze", str(path)], capsys)


@pytest.mark.parametrize("dtype", ["object", "U4", "float128", "V8", "M8[s]", "f4,f4", "str", "no", ",(f4"])
def test_a_dtype_that_msgpack_should_not_have(dtype: str, tmp_path: Path) -> None:
    import msgpack

    array = msgpack.ExtType(1, msgpack.packb(([2, 2], dtype, b"\0" * 32)))
    path = tmp_path / "m.msgpack"
    _ = path.write_bytes(msgpack.packb({"a": array}))
    (other,) = analyze_checkpoint(path).others
    assert other.role == f"{dtype} (not read)"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(tmp_path / "m.safetensors", GOOD)
    path.chmod(0)
    assert "Permission denied" in refused(["analyze", str(path)], capsys)


def test_permission_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Any, *arguments: Any, **named: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = save(tmp_path / "m.safetensors", GOOD)
    monkeypatch.setattr(safetensors, "open", denied, raising=False)
    assert "m.safetensors': Permission denied" in refused(["analyze", str(path)], capsys)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", {"w": normal(40, 50)})
    array = open_checkpoint(path).arrays["w"]
    with open(path, "r+b") as file:
        _ = file.truncate(1000)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        _ = list(reading.pieces(array))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        _ = safetensors.parse(data, 8 + len(data), "m.safetensors")
    except CheckpointError as error:
        assert "\n" not in str(error)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_any_mutation_is_read_or_refused(data: st.DataObject) -> None:
    good = json.dumps(header_of({"a": normal(2, 3), "b.kernel": normal(4, dtype=jnp.bfloat16)})).encode()
    at = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(0, 8))
    put = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"[", b"{", b"1e9", b"-1", b"null", b'"a"']))
    )
    mutated = good[:at] + put + good[at + length :]
    try:
        arrays = safetensors.parse(mutated, 8 + len(mutated) + 32, "m.safetensors")
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert sum(array.nbytes for array in arrays if array.dtype is not None) <= 32


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F4", "I8"]), JSON),
                "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), JSON),
                "data_offsets": st.one_of(st.lists(st.integers(0, 32), min_size=2, max_size=2), JSON),
            }
        ),
        max_size=3,
    )
)
def test_any_entries_are_read_or_refused(header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    try:
        _ = safetensors.parse(text, 8 + len(text) + 32, "m.safetensors")
    except CheckpointError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_mutation_of_msgpack_is_read_or_refused(data: st.DataObject) -> None:
    good = bytearray(flax.serialization.to_bytes(tree_of({"a/kernel": normal(2, 3), "b": normal(4)})))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"jaxeff-fuzz-{os.getpid()}.msgpack"
    _ = path.write_bytes(bytes(good))
    try:
        _ = open_checkpoint(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        path.unlink()


# The command line.


def test_json_is_the_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, target = save(tmp_path / "m.safetensors", GOOD), tmp_path / "out.json"
    _ = target.write_text("old")
    assert cli.main(["analyze", str(path), "--json", str(target)]) == 0
    assert differences(jaxeff.Report.from_json(target.read_text()), analyze_checkpoint(path)) == []
    assert capsys.readouterr().out == f"{analyze_checkpoint(path)}\n"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["m.safetensors", "out.json"]


def test_rows_are_sorted_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arrays = {
        "layers.10.weight": normal(4, 4),
        "layers.2.weight": normal(30, 3),
        "layers.3.weight": np.ones((3, 3), np.float32),
        "nan": np.full((2, 2), np.nan, np.float32),
    }
    path = str(save(tmp_path / "m.safetensors", arrays))

    def rows(*arguments: str) -> list[str]:
        assert cli.main(["analyze", path, *arguments]) == 0
        return [
            line.split()[0].rstrip("*") for line in capsys.readouterr().out.split("\n\n")[0].split("\n")[2:]
        ]

    natural = ["layers.2.weight", "layers.3.weight", "layers.10.weight", "nan"]
    assert rows() == natural
    assert rows("--sort", "size")[0] == "layers.2.weight"
    assert rows("--sort", "gini")[2:] == ["layers.3.weight", "nan"]
    assert rows("--sort", "utilization")[2:] == ["layers.3.weight", "nan"]
    for heading, name in (("layer", "path"), ("weights", "size")):
        assert rows("--sort", heading) == rows("--sort", name)
    largest_first = ["layers.2.weight", "layers.10.weight", "layers.3.weight", "nan"]
    assert rows("--sort", "bytes") == rows("--sort", "shape") == largest_first
    assert rows("--sort", "units")[2:] == ["layers.3.weight", "nan"]
    # Of rows of 3, 3 and 4 weights.
    assert rows("--sort", "fan-in") == natural
    assert rows("--top", "2") == [*natural[:2], "..."]
    assert cli.main(["analyze", path, "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 of 4 layers left out" in printed and "1 of 4 layers is not finite" in printed


def test_blocks_share_a_row_unless_each_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [f"layers.{index}.{name}.weight" for index in range(12) for name in ("attn.q", "mlp.up")]
    path = str(save(tmp_path / "m.safetensors", {name: normal(5, 4) for name in names}))

    def rows(*arguments: str) -> list[str]:
        assert cli.main(["analyze", path, *arguments]) == 0
        lines = capsys.readouterr().out.split("\n\n")[0].split("\n")[2:]
        return [line.split()[0] for line in lines if line.startswith("layers.")]

    assert rows() == rows("--by", "stack") == ["layers.0–11.attn.q.weight", "layers.0–11.mlp.up.weight"]
    assert rows("--by", "block") == names
    assert rows("--filter", "*attn*") == rows("--filter", "*attn*", "--by", "block") == names[::2]
    assert rows("--top", "1") == ["layers.0–11.attn.q.weight"]
    with pytest.raises(SystemExit) as exited:
        _ = cli.main(["analyze", path, "--filter", "attn"])
    printed = capsys.readouterr()
    assert (
        exited.value.code == 2 and printed.err.count("\n") == 1 and "no layer matches 'attn'" in printed.err
    )


def test_top_shortens_the_recommendations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(tmp_path / "m.safetensors", {"a": normal(30, 3) ** 9, "b": normal(30, 3) ** 9})
    advice = analyze_checkpoint(path).recommendations()
    for top in (0, 1):
        assert cli.main(["analyze", str(path), "--top", str(top)]) == 0
        printed = capsys.readouterr().out
        assert re.findall(r"\n- \[(.*)\]", printed) == [each.rule for each in advice[:top]]
        count = len(advice) - top
        assert count > 0 and printed.endswith(f"\n... {count} of {len(advice)} recommendations left out.\n")


@pytest.mark.parametrize(
    "arguments",
    [["--sort", "nope"], ["--sort", "MACs"], ["--top", "-1"], ["--top", "x"], ["--json", "nowhere/out.json"]],
)
def test_wrong_arguments(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(tmp_path / "m.safetensors", GOOD)
    with pytest.raises(SystemExit) if arguments[0] != "--json" else pytest.MonkeyPatch.context():
        assert cli.main(["analyze", str(path), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    if arguments[0] == "--sort":
        assert all(
            f" {order}," in printed.err for order in ("weights", "fan-in", "utilization", "redundancy")
        )


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, target = save(tmp_path / "m.safetensors", GOOD), tmp_path / "out.json"
    _ = target.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    said = refused(["analyze", str(path), "--json", str(target)], capsys)
    assert "out.json" in said and "No space left" in said
    assert target.read_text() == "old"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["m.safetensors", "out.json"]


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(tmp_path / "m.safetensors", GOOD)
    assert "No space left" in refused(["analyze", str(path), "--json", "/dev/full"], capsys)
    assert Path("/dev/full").is_char_device()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    files.write(link, "text")
    assert link.is_symlink() and (tmp_path / "real.json").read_text() == "text"


def test_a_dash_prints_json_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(tmp_path / "m.safetensors", GOOD)
    assert cli.main(["analyze", str(path), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == analyze_checkpoint(path).to_dict()
    assert cli.main(["compare", str(path), str(path), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(compare_checkpoints(path, path).to_json())
    assert [child.name for child in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_page_without_jinja_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SystemExit, match="2"):
        _ = cli.main(["analyze", "nowhere", "--html", str(tmp_path / "page.html")])
    assert "pip install jinja2" in capsys.readouterr().err


def test_a_page_has_the_curves_of_every_weight(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(tmp_path / "<b>m.safetensors", {"large": normal(300, 300), "small": normal(8, 8)})
    assert cli.main(["analyze", str(path), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<title>jaxeff: &lt;b&gt;m.safetensors</title>" in text and "<b>m.safe" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    for shown in data["layers"]:
        assert math.isclose(sum(shown["weights"]), 1, abs_tol=1e-3)
    # Of normal weights the half nearest 0 holds what is below the median, 0.674 deviations.
    at = [edge < 0.6745 / math.sqrt(2 / math.pi) for edge in data["edges"]].index(False)
    assert math.isclose(sum(data["layers"][0]["weights"][: at + 1]), 0.5, abs_tol=0.06)


@pytest.mark.parametrize("argument", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_one_line(
    argument: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = save(tmp_path / "m.safetensors", GOOD)
    for target in ("nowhere/out", str(tmp_path), "/proc/out"):
        _ = refused(["analyze", str(path), argument, target], capsys)
    assert [child.name for child in tmp_path.iterdir()] == ["m.safetensors"]


def wait_until_open(process: int, path: Path) -> None:
    descriptors = Path(f"/proc/{process}/fd")
    for _ in range(1000):
        with contextlib.suppress(FileNotFoundError):
            if path in {descriptor.resolve() for descriptor in descriptors.iterdir()}:
                return
        time.sleep(0.05)
    raise TimeoutError(f"{path} was not opened")


def run_command(*arguments: str, before: str = ":") -> subprocess.Popen:
    shell = ["sh", "-c", f'{before}; exec "$@"', "sh", sys.executable, "-m", "jaxeff", *arguments]
    return subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    path, target = save(tmp_path / "m.safetensors", GOOD), tmp_path / "out.json"
    process = run_command("analyze", str(path), "--json", str(target), before="ulimit -f 1")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("jaxeff: ") and [child.name for child in tmp_path.iterdir()] == ["m.safetensors"]


def test_interruption_has_its_status(tmp_path: Path) -> None:
    # Larger than can be read in the time.
    path = sparse(tmp_path / "m.safetensors", "BF16", [1 << 20, 1 << 20])
    process = run_command("analyze", str(path), "--html", str(tmp_path / "page.html"))
    try:
        wait_until_open(process.pid, path)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "jaxeff: interrupted\n")
    assert [child.name for child in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", GOOD)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxeff", "analyze", str(path), "--json", "-"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_table_fits_the_terminal(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", {"encoder/" * 8 + "kernel": normal(64, 64)})
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 40))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "jaxeff", "analyze", str(path)]
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, env=environment, timeout=100)
    os.close(terminal)
    printed = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert done.returncode == 0 and "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 40 and "left out for want of width" in printed


@pytest.mark.parametrize("columns", [60, 160])
@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_columns_is_honored_where_the_output_is_no_terminal(tmp_path, monkeypatch, capsys, command, columns):
    path = str(save(tmp_path / "m.safetensors", {"encoder/" * 12 + "kernel": normal(64, 64)}))
    arguments = [command, path] if command == "analyze" else [command, path, path]

    def longest() -> int:
        assert cli.main(arguments) == 0
        return max(map(len, capsys.readouterr().out.splitlines()))

    monkeypatch.setenv("COLUMNS", str(columns))
    assert 0.8 * columns < longest() <= columns
    monkeypatch.delenv("COLUMNS")
    assert 80 < longest() <= 100


def test_a_checkpoints_report_speaks_of_no_model(tmp_path, capsys):
    path = str(
        save(tmp_path / "m.safetensors", {"a.weight": normal(64, 64), "b.weight": normal(64, 64) ** 5})
    )
    page = tmp_path / "report.html"
    assert cli.main(["analyze", path, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    for text in (printed, re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text(), flags=re.S)):
        assert not re.search("activation|forward|emits|MACs|dead", text), text


def test_the_commands_import_and_compile_nothing_that_they_do_not_need(tmp_path: Path) -> None:
    arrays = {"small": normal(30, 40), "half": normal(300, 400, dtype=jnp.bfloat16), "wide": normal(300, 500)}
    path = str(save(tmp_path / "m.safetensors", arrays))
    code = f"""
import sys
from jaxeff import cli
import jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
assert cli.main(["analyze", {path!r}, "--json", {path!r} + ".json"]) == 0
assert cli.main(["compare", {path!r}, {path!r}]) == 0
assert not compiled, compiled
assert not {{"flax", "optax", "orbax", "rich", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# Comparison.


def test_what_changed_between_two(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = {
        "gone": normal(2),
        "kept": normal(3, 4),
        "moved": normal(300, 300),
        "shaped": normal(2, 3),
        "bias": normal(4),
    }
    b = {
        **a,
        "moved": a["moved"] * np.float32(1.5),
        "shaped": normal(3, 2),
        "bias": a["bias"] * 2,
        "new": normal(2),
    }
    del b["gone"]
    paths = [save(tmp_path / name, arrays) for name, arrays in (("a.safetensors", a), ("b.safetensors", b))]
    found = compare_checkpoints(*paths)
    assert {weight.path: weight.change for weight in found.weights} == {
        "kept": 0.0,
        "moved": pytest.approx(0.5),
    }
    assert found.weights[0].gini[0] == found.weights[0].gini[1]
    assert [(other.path, other.change) for other in found.others] == [("bias", pytest.approx(1.0))]
    assert (found.only_a, found.only_b) == (("gone",), ("new",))
    assert found.reshaped == (("shaped", (2, 3), (3, 2)),)
    assert cli.main(["compare", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    for part in ("5.00e-01", "Only in A:\n- gone", "Only in B:\n- new", "shaped [2, 3] -> [3, 2]", "(bias)"):
        assert part in printed
    narrow = comparing.render(found, width=40)
    assert max(map(len, narrow.splitlines())) <= 40
    # Whole words: what a line ends with goes on after a space.
    _, said = printed.split("\n\n")[:2]
    assert narrow.split("\n\n")[1].split() == said.split()
    assert comparing.render(found, top=0).startswith("... 2 of 2 weights left out.\n\nSorted by change")
    assert printed.index("moved") < printed.index("kept")
    assert cli.main(["compare", *map(str, paths), "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert "moved" in printed and "kept" not in printed and "1 of 2 weights left out" in printed
    for order, said in (("path", "In the order of A."), ("size", "Sorted by size, the largest first.")):
        assert cli.main(["compare", *map(str, paths), "--sort", order]) == 0
        printed = capsys.readouterr().out
        assert (printed.index("kept") < printed.index("moved")) == (order == "path") and said in printed
    file = tmp_path / "changes.json"
    assert cli.main(["compare", *map(str, paths), "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written == json.loads(found.to_json())
    assert written["weights"][0]["change"] == found.weights[0].change and written["only_a"] == ["gone"]


def llama(blocks: int, scales: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Return arrays under Llama's names on the hub; `scales` are factors of a weight's blocks."""
    names = {"self_attn.q_proj": (8, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16)}
    arrays = {"model.embed_tokens.weight": normal(32, 8, seed=1), "model.norm.weight": normal(8)}
    for index in range(blocks):
        for name, shape in names.items():
            factor = np.float32(scales[name][index] if name in scales else 1)
            arrays[f"model.layers.{index}.{name}.weight"] = normal(*shape, seed=index) * factor
        arrays[f"model.layers.{index}.input_layernorm.weight"] = normal(8, seed=index)
    return arrays


def test_names_in_one_checkpoint_are_listed_by_stack_and_by_block(tmp_path: Path) -> None:
    a, b = llama(12, {}), llama(3, {})
    for index in range(12):
        a[f"side.{index}.weight"], b[f"side.{index}.weight"] = normal(2, 3), normal(3, 2)
        b[f"tail.{index}.weight"] = normal(2, 2)
    # Of another shape in A alone, so that it shares no entry.
    a["side.5.weight"] = normal(2, 4)
    found = compare_checkpoints(
        *(save(tmp_path / name, arrays) for name, arrays in (("a.safetensors", a), ("b.safetensors", b)))
    )
    printed, layers = str(found), "model.layers.3–11"
    only_a, rest = printed.split("Only in A:\n")[1].split("\n\nOnly in B:\n")
    assert sorted(only_a.splitlines()) == sorted(
        f"- {layers}.{name}.weight"
        for name in ("input_layernorm", "mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
    )
    only_b, reshaped = rest.split("\n\nOf another shape:\n")
    assert only_b.splitlines() == [f"- tail.{index}.weight" for index in range(12)]
    assert "- side.5.weight [2, 4] -> [3, 2]" in reshaped.splitlines()
    assert comparing.render(found, blocks=True).count("- model.layers.") == 9 * 4
    assert "... 27 of 36 names left out." in comparing.render(found, top=1)
    assert len(found.only_a) == len(json.loads(found.to_json())["only_a"]) == 36


def test_fine_tunes_are_compared_by_stack_and_by_block(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    before, blocks = llama(12, {}), range(12)
    scales = {"mlp.up_proj": [1 + index / 100 for index in blocks], "mlp.down_proj": [0.75] * 12}
    after = list(llama(12, scales).items())
    write_checkpoint(tmp_path / "before", before, config={"num_hidden_layers": 12})
    shards = {"1.safetensors": dict(after[:20]), "2.safetensors": dict(after[20:])}
    paths = [str(tmp_path / "before"), str(save_shards(tmp_path / "after", shards))]

    def rows(*arguments: str) -> list[list[str]]:
        assert cli.main(["compare", *paths, *arguments]) == 0
        lines = capsys.readouterr().out.split("\n\n")[0].split("\n")
        return [line.split() for line in lines[2:] if line.startswith("model.")]

    def names(*arguments: str) -> list[str]:
        return [row[0] for row in rows(*arguments)]

    # A weight times s changed by |s - 1|; a stack stands where its most changed block would.
    stacked = [
        f"model.layers.0–11.{name}.weight" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
    ]
    found = {row[0]: row for row in rows()}
    assert list(found) == [*stacked[:2], "model.embed_tokens.weight", stacked[2]]
    assert found[stacked[0]][-2:] == ["2.50e-01", "▄" * 8]
    assert found[stacked[1]][-2:] == ["0–1.10e-01", "▁▂▃▄▅▆▇█"]
    assert found["model.embed_tokens.weight"][-2:] == ["0", "–"]
    up = [f"model.layers.{index}.mlp.up_proj.weight" for index in blocks]
    assert rows("--by", "block", "--filter", "*up_proj*")[0][-1] == "1.10e-01"
    assert names("--by", "block", "--filter", "*up_proj*") == up[::-1]
    assert names("--by", "block", "--filter", "*up_proj*", "--sort", "path") == up
    assert len(names("--by", "block")) == len(names("--by", "block", "--sort", "size")) == 37
    assert names("--top", "1") == stacked[:1] and names("--sort", "path")[0] == "model.embed_tokens.weight"

    monkeypatch.delenv("COLUMNS")
    comparison = compare_checkpoints(*paths)
    assert cli.main(["compare", *paths, "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert "25 of 37 weights left out" in printed and "1 row holds 12 layers" in printed
    assert cli.main(["compare", *paths, "--by", "block", "--filter", "*up_proj*"]) == 0
    assert capsys.readouterr().out == comparison.table("*up_proj*", blocks=True) + "\n"
    with pytest.raises(ValueError, match="no layer matches 'up'"):
        _ = comparison.table("up")
    with pytest.raises(SystemExit) as exited:
        _ = cli.main(["compare", *paths, "--filter", "up"])
    assert exited.value.code == 2 and "no layer matches 'up'" in capsys.readouterr().err


def test_a_stack_hides_no_unknown_change(tmp_path: Path) -> None:
    before, after = llama(12, {}), llama(12, {"mlp.up_proj": [2.0] * 12})
    broken = "model.layers.4.mlp.up_proj.weight"
    before[broken] = np.full_like(before[broken], np.nan)
    # From 0 to something else: an infinite change, which has no height in the line over depth.
    before["model.layers.0.mlp.up_proj.weight"] *= 0
    paths = [save(tmp_path / f"{i}.safetensors", arrays) for i, arrays in enumerate((before, after))]
    lines = comparing.render(compare_checkpoints(*paths), width=140).splitlines()
    assert lines[2].split()[0] == broken and lines[2].split()[-2:] == ["?", "–"]
    assert lines[3].split()[0] == "model.layers.0–3,5–11.mlp.up_proj.weight"
    assert lines[3].split()[-2:] == ["1.00e+00–inf", "·" + "▄" * 7]


def test_formats_compare_with_each_other(tmp_path: Path) -> None:
    found = compare_checkpoints(saved_safetensors(tmp_path), saved_msgpack(tmp_path))
    assert found.only_a == found.only_b == found.reshaped == ()
    changes = {weight.path: weight.change for weight in found.weights}
    assert np.isnan(changes.pop("i/kernel"))
    assert set(changes.values()) == {0.0}


def test_change_from_nothing_is_infinite(tmp_path: Path) -> None:
    zeros, ones = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    paths = [save(tmp_path / f"{i}.safetensors", {"w": x}) for i, x in enumerate((zeros, ones))]
    assert compare_checkpoints(*paths).weights[0].change == np.inf
    assert compare_checkpoints(paths[0], paths[0]).weights[0].change == 0


def test_dtypes_may_differ(tmp_path: Path) -> None:
    x = normal(300, 300)
    paths = [save(tmp_path / f"{i}.safetensors", {"w": y}) for i, y in enumerate((x, x.astype(jnp.bfloat16)))]
    assert 1e-4 < compare_checkpoints(*paths).weights[0].change < 1e-2


def test_names_are_printed_without_escapes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save(
        tmp_path / "m.safetensors", {"\x1b[31mred\n": normal(2, 2), "\u202eright to left": normal(3, 3)}
    )
    assert cli.main(["analyze", str(path)]) == 0
    printed = capsys.readouterr().out
    for name in (b"\x1b]0;", "\u202e".encode()):
        header = {"w": {"dtype": name.decode(), "shape": [1], "data_offsets": [0, 1]}}
        _ = path.write_bytes(with_header(header, b"\0"))
        assert cli.main(["analyze", str(path)]) == 0
        printed += capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed and "\\x1b[31mred\\n" in printed
    assert stored.printable("é") == "é"
