"""The command line: arguments in, text on standard output and an exit status out.

0: done. 2: the arguments were wrong, said in one line. 130: interrupted. 141: whoever read the
output has left.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jaxeff

_EXAMPLES = """\
examples:
  jaxeff demo                         train on the digits, analyse, print the report
  jaxeff demo --seed 3 --epochs 10    another network, half the training
  jaxeff demo > report.txt            the report alone: progress goes to standard error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; `argv` is `sys.argv[1:]` unless given."""
    try:
        _run(argv)
    except KeyboardInterrupt:
        print("jaxeff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it exits, and would complain.
        _ = os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _run(argv: Sequence[str] | None) -> None:
    try:
        arguments = _parser().parse_args(argv)
        arguments.command(arguments)
    finally:
        _ = sys.stdout.flush()


def _demo(arguments: argparse.Namespace) -> None:
    # Here and not above: --help and mistyped arguments need not wait for Flax and Optax.
    from jaxeff import demo

    demo.run(
        seed=demo.SEED if arguments.seed is None else arguments.seed,
        epochs=demo.EPOCHS if arguments.epochs is None else arguments.epochs,
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxeff",
        description="Which weights of a JAX network earn their keep, and what can be removed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _ = parser.add_argument("--version", action="version", version=f"jaxeff {jaxeff.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="train a small network on scanned digits and analyse it")
    seed, epochs = _integer(0, 2**32 - 1), _integer(1, 10_000)
    _ = demo.add_argument("--seed", type=seed, metavar="N", help="initial weights and order of batches")
    _ = demo.add_argument("--epochs", type=epochs, metavar="N", help="passes over the training digits")
    demo.set_defaults(command=_demo)
    return parser


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse
