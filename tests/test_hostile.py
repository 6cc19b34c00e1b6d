"""Damaged and malicious files raise jaxeff's own error, in little time and memory; a write is whole or nothing."""

import concurrent.futures
import itertools
import os
import signal
import subprocess
import sys

import hostile
import pytest

from jaxeff import checkpoints
from jaxeff.output import files

INPUTS = {"safetensors": 600, "msgpack": 600, "orbax": 150, "index": 150, "report": 200, "plan": 200}


@pytest.fixture(scope="module")
def targets():
    return hostile.targets()


@pytest.mark.parametrize("name", INPUTS)
def test_the_good_file_is_read(targets, name, tmp_path):
    assert hostile.problem(targets[name], targets[name].good, tmp_path) is None
    assert targets[name].read(targets[name].good, tmp_path)


@pytest.mark.parametrize("name", INPUTS)
def test_a_mutated_file_is_read_or_refused(targets, name, tmp_path):
    for data in itertools.islice(hostile.mutations(targets[name], seed=1), INPUTS[name]):
        assert hostile.problem(targets[name], data, tmp_path) is None, data


@pytest.mark.parametrize("name", INPUTS)
def test_reading_a_mutated_file_takes_little_memory(targets, name, tmp_path):
    for data in itertools.islice(hostile.mutations(targets[name], seed=2), 20):
        assert hostile.peak_bytes(targets[name], data, tmp_path) < hostile.BYTES, data


WRITER = """
import sys
from jaxeff.output import files
print("ready", flush=True)
while True:
    files.write(sys.argv[1], "new" * 100_000)
"""


def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path):
    target = tmp_path / "report.json"
    for i in range(8):
        files.write(target, old := "old" * 100_000)
        with subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                _ = process.wait(0.002 * i)
            os.kill(process.pid, signal.SIGKILL)
        assert target.read_text() in (old, "new" * 100_000)


READER = """
import sys
from jaxeff import checkpoints
print(checkpoints.analyze_checkpoint(sys.argv[1]).to_json())
"""


def test_threads_and_processes_read_one_file_at_once(targets, tmp_path):
    path = tmp_path / "m.safetensors"
    _ = path.write_bytes(targets["safetensors"].good)
    expected = checkpoints.analyze_checkpoint(path).to_json()
    command = [sys.executable, "-c", READER, path]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        processes = [pool.submit(subprocess.check_output, command, text=True) for _ in range(2)]
        threads = [pool.submit(checkpoints.analyze_checkpoint, path) for _ in range(4)]
        assert {found.result().to_json() for found in threads} == {expected}
        assert {found.result().strip() for found in processes} == {expected}


def test_threads_and_processes_write_one_file_at_once(tmp_path):
    target, texts = tmp_path / "report.json", [str(i) * 100_000 for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        _ = [*pool.map(lambda text: files.write(target, text), texts)]
    assert target.read_text() in texts and [*tmp_path.iterdir()] == [target]
