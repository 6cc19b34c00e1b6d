"""The command line: arguments in, text on standard output and an exit status out.

0: done. 2: the arguments were wrong, or a file could not be read or written, said in one line. 130:
interrupted. 141: whoever read the output has left.
"""

import argparse
import gc
import importlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import jaxeff

_DEMO = """\
  jaxeff demo                         train on the digits, analyse, print the report
  jaxeff demo --seed 3 --epochs 10    another network, half the training
  jaxeff demo > report.txt            the report alone: progress goes to standard error
"""
_ANALYZE = """\
  jaxeff analyze model.safetensors    the weights of a checkpoint, by magnitude
  jaxeff analyze checkpoint --sort gini --top 20 --json report.json
  jaxeff analyze model.safetensors --html report.html
  jaxeff analyze model.safetensors --json - | jq .model.utilization
"""
_COMPARE = """\
  jaxeff compare before after         what changed between two checkpoints
  jaxeff compare before after --sort change --top 10
"""
_PATH = (
    "a .safetensors file, a directory of shards and their index, an Orbax checkpoint or a Flax .msgpack file"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; `argv` is `sys.argv[1:]` unless given."""
    collects = gc.isenabled()
    # Nothing here leaves cycles behind, and importing JAX takes an eighth less.
    gc.disable()
    try:
        _run(argv)
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return 130
    except BrokenPipeError:
        _leave_output()
        return 141
    except OSError as error:
        print(f"jaxeff: {_told(error)}", file=sys.stderr)
        return 2
    finally:
        if collects:
            gc.enable()
    return 0


_INTERRUPTED = "jaxeff: interrupted"


@contextmanager
def _exit_when_interrupted() -> Iterator[None]:
    """Ctrl-C ends the process on the spot.

    Not by an exception: raised while JAX's extensions are initialized, it would crash the process.
    """

    def exit_at_once(*arguments: object) -> NoReturn:
        _ = os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{_INTERRUPTED}\n".encode())
        os._exit(130)

    in_main = threading.current_thread() is threading.main_thread()
    # The caller's own handler stays; a shell ignores interrupts of jobs in the background.
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, exit_at_once)
    try:
        yield
    finally:
        _ = signal.signal(signal.SIGINT, before)


def _told(error: OSError) -> str:
    """What the system said, and of which file."""
    said = (error.strerror or str(error)).split("\n", 1)[0]
    return said if error.filename is None else f"{os.fspath(error.filename)!r}: {said}"


def _leave_output() -> None:
    # The interpreter flushes standard output once more when it exits, and would complain.
    _ = os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> None:
    try:
        with _exit_when_interrupted():
            arguments = _parser().parse_args(argv)
            # Not at the top: --help and mistyped arguments need not wait for JAX.
            _ = importlib.import_module(arguments.module)
        arguments.command(arguments)
    finally:
        _flush()


def _flush() -> None:
    try:
        _ = sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave_output()
        raise OSError(error.errno, error.strerror, "standard output") from None


def _demo(arguments: argparse.Namespace) -> None:
    from jaxeff import demo

    gc.enable()
    demo.run(
        seed=demo.SEED if arguments.seed is None else arguments.seed,
        epochs=demo.EPOCHS if arguments.epochs is None else arguments.epochs,
    )


def _analyze(arguments: argparse.Namespace) -> None:
    from jaxeff.checkpoints import _analysis as analysis
    from jaxeff.checkpoints import _opening as opening
    from jaxeff.checkpoints import _output as output

    if arguments.html is not None:
        from jaxeff.report import page

        try:
            page.check_available()
        except ImportError as error:
            print(f"jaxeff: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    with _refused():
        _check_writable(arguments.json, arguments.html)
        checkpoint = opening.open_checkpoint(arguments.path)
        report = analysis.analyze(checkpoint, curves=arguments.html is not None)
    if arguments.html is not None:
        report.to_html(arguments.html, title=f"jaxeff: {os.path.basename(os.path.abspath(arguments.path))}")
    _print(
        arguments.json,
        lambda: report.to_json(indent=1),
        lambda: output.render(report, checkpoint, arguments.sort, arguments.top, _width()),
    )


def _compare(arguments: argparse.Namespace) -> None:
    from jaxeff.checkpoints import _comparing as comparing
    from jaxeff.checkpoints import _opening as opening

    with _refused():
        _check_writable(arguments.json)
        a, b = opening.open_checkpoint(arguments.a), opening.open_checkpoint(arguments.b)
        comparison = comparing.compare(a, b)
    _print(
        arguments.json,
        lambda: comparison.to_json(indent=1),
        lambda: comparing.render(comparison, arguments.sort, arguments.top, _width()),
    )


def _width() -> int:
    """COLUMNS if set, else the terminal's width, else that of a table anywhere."""
    from jaxeff.output.text import WIDTH

    return max(shutil.get_terminal_size((WIDTH, 24)).columns, 20)


_STANDARD_OUTPUT = "-"


def _check_writable(*paths: str | None) -> None:
    from jaxeff.output import files

    for path in paths:
        if path is not None and path != _STANDARD_OUTPUT:
            files.check_writable(path)


def _print(json_path: str | None, to_json: Callable[[], str], to_table: Callable[[], str]) -> None:
    """The table, and a file of JSON where one is asked for; or the JSON alone."""
    from jaxeff.output import files

    if json_path == _STANDARD_OUTPUT:
        print(to_json())
        return
    if json_path is not None:
        files.write(json_path, to_json())
    print(to_table())


@contextmanager
def _refused() -> Iterator[None]:
    """A checkpoint that cannot be read ends the command, like a wrong argument."""
    from jaxeff.checkpoints import CheckpointError

    try:
        yield
    except CheckpointError as error:
        print(f"jaxeff: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks it up where it is asked for, and not before."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"jaxeff {jaxeff.__version__}")
        parser.exit()


def _examples(text: str) -> dict[str, Any]:
    return {
        "epilog": f"examples:\n{text}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxeff",
        description="Which weights of a JAX network earn their keep, and what can be removed.",
        **_examples(_DEMO + _ANALYZE + _COMPARE),
    )
    _ = parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    help_ = "train a small network on scanned digits, analyse and prune it"
    demo = commands.add_parser("demo", help=help_, **_examples(_DEMO))
    seed, epochs = _integer(0, 2**32 - 1), _integer(1, 10_000)
    _ = demo.add_argument("--seed", type=seed, metavar="N", help="initial weights and order of batches")
    _ = demo.add_argument("--epochs", type=epochs, metavar="N", help="passes over the training digits")
    demo.set_defaults(command=_demo, module="jaxeff.demo")
    _add_checkpoints(commands)
    return parser


def _add_checkpoints(commands: Any) -> None:
    analyze = commands.add_parser(
        "analyze",
        help="the weights of a checkpoint, by magnitude, without its model",
        **_examples(_ANALYZE),
    )
    _ = analyze.add_argument("path", metavar="PATH", help=_PATH)
    _ = analyze.add_argument(
        "--json",
        metavar="FILE",
        help="also write the report, for jaxeff.Report.from_json; - prints it instead of the table",
    )
    _ = analyze.add_argument(
        "--html", metavar="FILE", type=_file, help="also write the report as a page for a browser"
    )
    help_ = (
        "a heading of the table (layer, weights, gini, ...) or a metric (redundancy, entropy, ...): "
        "those with most to spare first"
    )
    _ = analyze.add_argument("--sort", metavar="ORDER", default="path", type=_order(_metrics), help=help_)
    help_ = "what changed from one checkpoint to another"
    compare = commands.add_parser("compare", help=help_, **_examples(_COMPARE))
    _ = compare.add_argument("a", metavar="A", help=_PATH)
    _ = compare.add_argument("b", metavar="B", help="likewise, of any of the formats")
    _ = compare.add_argument("--json", metavar="FILE", help="also write what changed; likewise")
    help_ = "path, change or size: the largest first"
    _ = compare.add_argument("--sort", metavar="ORDER", default="path", type=_order(_changes), help=help_)
    for command, run in ((analyze, _analyze), (compare, _compare)):
        help_ = "show the first N of each list: of rows, and of what follows them"
        _ = command.add_argument("--top", metavar="N", type=_integer(0, 10**9), help=help_)
        command.set_defaults(command=run, module="jaxeff.checkpoints")


def _file(text: str) -> str:
    if text == "-":
        raise argparse.ArgumentTypeError("a page goes into a file: pass its path, not -")
    return text


def _order(known: Callable[[], Sequence[str]]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known():
            raise argparse.ArgumentTypeError(f"{text!r} is no order: pass one of {', '.join(known())}")
        return text

    return parse


def _metrics() -> Sequence[str]:
    from jaxeff.checkpoints import _output as output

    return output.ORDERS


def _changes() -> Sequence[str]:
    from jaxeff.checkpoints import _comparing as comparing

    return comparing.ORDERS


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
