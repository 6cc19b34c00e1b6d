"""The demo and the command line, as someone meets them first."""

import os
import signal
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxeff import cli, demo

pytestmark = pytest.mark.slow

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
JAXEFF = [sys.executable, "-m", "jaxeff"]


@pytest.fixture(scope="module")
def trained():
    return demo.train(seed=0)


def test_digits_are_the_1797_of_uci():
    images, labels = demo.digits()
    assert (images.shape, images.dtype) == ((1797, 8, 8, 1), np.float32)
    assert (labels.shape, labels.dtype) == ((1797,), np.int32)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_come_small_and_with_their_credit():
    data = files("jaxeff.demo") / "data"
    assert len((data / "digits.npz").read_bytes()) < 100_000
    credit = (data / "README.md").read_text(encoding="utf-8")
    for part in ("Alpaydin", "Kaynak", "UCI Machine Learning Repository", "10.24432/C50P49", "CC BY 4.0"):
        assert part in credit


def test_split_uses_every_digit_once():
    images, labels = demo.digits()
    training, test = demo.split(demo.digits())
    assert (len(training.labels), len(test.labels)) == (1437, 360)
    rejoined = np.concatenate([training.images, test.images]).reshape(1797, -1)
    assert sorted(map(bytes, rejoined)) == sorted(map(bytes, np.asarray(images).reshape(1797, -1)))
    assert len(set(test.labels.tolist())) == 10


def test_training_passes_95_percent_on_held_out_digits(trained):
    state, history = trained
    _, test = demo.split(demo.digits())
    assert float(demo.accuracy(state, test)) > 0.95
    assert [epoch.number for epoch in history] == list(range(1, demo.EPOCHS + 1))
    assert history[-1].loss < 0.1 * history[0].loss


def test_a_tenth_of_the_weights_does_as_well(trained):
    state, _ = trained
    pruned, _ = demo.train_pruned(state, seed=0)
    _, test = demo.split(demo.digits())
    assert float(demo.accuracy(pruned, test)) > float(demo.accuracy(state, test)) - 0.01
    kept = jax.tree.leaves(pruned.opt_state.masks)
    assert sum(int(mask.sum()) for mask in kept if mask.ndim) == round(
        0.1 * sum(mask.size for mask in kept if mask.ndim)
    )
    assert all(
        jax.tree.leaves(
            jax.tree.map(
                lambda w, m: bool((w[~m] == 0).all()) if m.ndim else True,
                pruned.params,
                pruned.opt_state.masks,
            )
        )
    )


def test_equal_seeds_give_equal_networks_and_others_do_not():
    (first, _), (again, _), (other, _) = (demo.train(seed, epochs=1) for seed in (1, 1, 2))
    same = jax.tree.map(np.array_equal, first.params, again.params)
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(first.params["Dense_0"]["kernel"], other.params["Dense_0"]["kernel"])


def test_progress_is_called_after_each_epoch():
    seen = []
    _, history = demo.train(seed=0, epochs=2, progress=seen.append)
    assert tuple(seen) == history


def test_demo_prints_accuracy_and_report_and_keeps_progress_apart():
    done = subprocess.run([*JAXEFF, "demo", "--seed", "1", "--epochs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Test accuracy: ")
    assert "Dense_0/kernel" in done.stdout
    shown = [line.split("  ")[0] for line in done.stderr.splitlines()]
    tasks = ("Training", "Pruning", "Without pruning")
    assert shown == [f"{task} {step}" for task in tasks for step in ("1/2", "2/2")]
    _, _, after = done.stdout.partition("more epochs, with")
    compared, _, advice = after.partition("Without training")
    assert "of the weights" in advice and "Dense_0/kernel" in advice
    rows = {line[:19].strip(): line[19:].split() for line in compared.splitlines()}
    before, pruned, whole = (int(number.replace(",", "")) for number in rows["nonzero parameters"])
    weights, biases = 3 * 3 * 16 + 3 * 3 * 16 * 32 + 512 * 512 + 512 * 10, 16 + 32 + 512 + 10
    assert weights <= before <= weights + biases and weights <= whole <= weights + biases
    assert round(0.1 * weights) <= pruned <= round(0.1 * weights) + biases
    assert rows["test accuracy"][1::2] == ["%"] * 3
    sizes = [int(number.replace(",", "")) for number in rows["bytes, packed"]]
    assert sizes[0] == sizes[2] == 4 * (weights + biases) and sizes[1] < 0.15 * sizes[0]


def test_the_network_that_is_not_pruned_has_the_same_steps(trained):
    state, _ = trained
    (pruned, _), (whole, _) = demo.train_pruned(state, 0, 1), demo.train_further(state, 0, 1)
    assert int(pruned.step) == int(whole.step) and "masks" not in dir(whole.opt_state)
    assert float(whole.params["Dense_0"]["kernel"].astype(bool).mean()) > 0.999


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_interrupt_ends_with_one_line_and_status_130():
    command = [*JAXEFF, "demo", "--epochs", "10000"]
    # A job in the background ignores interrupts, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _ = signal.signal(signal.SIGINT, before)
    with running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("Training 1/10000")
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read().splitlines()
    assert running.returncode == 130
    assert [line for line in rest if not line.startswith("Training ")] == ["jaxeff: interrupted"]


INTERRUPTED_WHILE_JAXLIB_INITIALIZES = """
import signal, sys
from jaxeff import cli

class Loading:
    def find_spec(name, *_):
        if name == "jaxlib._jax":
            sys.setprofile(interrupt)

def interrupt(frame, event, _):
    # What the extension calls in Python while it makes its enumerations.
    if event == "call" and frame.f_code.co_filename.endswith("enum.py"):
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Loading)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize(
    "arguments", [["demo"], ["analyze", "m.safetensors"], ["analyze", "m", "--sort", "gini"]]
)
def test_interrupt_while_jax_is_imported_ends_with_one_line_and_status_130(arguments):
    command = [sys.executable, "-c", INTERRUPTED_WHILE_JAXLIB_INITIALIZES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "jaxeff: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
@pytest.mark.parametrize("arguments", [["demo", "--epochs", "1"], ["--help"]])
def test_a_closed_pipe_ends_without_a_traceback(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*JAXEFF, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    # argparse prints its help whether or not anyone reads it.
    assert done.returncode == 141 or (done.returncode == 0 and "--help" in arguments)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["demo"], ["analyze"], ["compare"]])
def test_help_exits_0_and_has_examples(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--help"])
    assert exit_.value.code == 0
    assert f"examples:\n  jaxeff {(arguments or ['demo'])[0]} " in capsys.readouterr().out


def test_version_is_that_of_pyproject(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    version = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
    assert capsys.readouterr().out == f"jaxeff {version}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dmeo"],
        ["demo", "--epochs", "0"],
        ["demo", "--epochs", "ten"],
        ["demo", "--epochs", "2.5"],
        ["demo", "--seed", "-1"],
        ["demo", "--seed", str(2**32)],
        ["demo", "digits"],
        ["--seed"],
    ],
)
def test_bad_arguments_exit_2_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("jaxeff") and printed.err.count("\n") == 1
