"""Sharded arrays give what one device gives, whether the axes of their mesh are explicit or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import meshes
import pytest


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str | None]]:
    """By row and cell what went wrong, of one process with four devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = Path(__file__).with_name("meshes.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("row", meshes.ROWS)
def test_sharded_arrays_give_what_one_device_gives(row: str, table: dict[str, dict[str, str | None]]) -> None:
    expected = {", ".join(cell) for cell in meshes.cells() if row in meshes.rows_of(cell[0])}
    assert table[row].keys() == expected
    assert not {cell: failure for cell, failure in table[row].items() if failure is not None}
