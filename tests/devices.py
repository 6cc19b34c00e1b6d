"""Runs a script on several devices, in a process of its own: how many there are is settled at import."""

import os
import subprocess
import sys
from pathlib import Path


def run(script: str | Path, devices: int, *arguments: str) -> str:
    """Return what a script, a file or the text of one, prints on a processor that is split into devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        # XLA starts as many threads as there are cores, where this does not say otherwise. Each device's
        # part of a collective holds one while it waits for the others': with few, independent collectives
        # wait for each other until XLA ends the process.
        "NPROC": str(4 * devices),
    }
    command = [sys.executable, script] if isinstance(script, Path) else [sys.executable, "-c", script]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
