"""The command line: arguments in, text on standard output and an exit status out.

Exit statuses: 0 for success; 2 for wrong arguments, or a file that could not be read or written, with a one-line
message; 130 if interrupted; 141 if the reader of the output has left.
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
  jaxeff demo                         train on the digits, analyze, print the report
  jaxeff demo --seed 3 --epochs 10    another network, half the training
  jaxeff demo > report.txt            the report alone: progress goes to standard error
"""
_ANALYZE = """\
  jaxeff analyze model.safetensors    the weights of a checkpoint, by magnitude
  jaxeff analyze checkpoint --sort gini --top 20 --json report.json
  jaxeff analyze model.safetensors --filter '*attention*' --by block
  jaxeff analyze model.safetensors --html report.html
  jaxeff analyze model.safetensors --json - | jq .model.utilization
"""
_COMPARE = """\
  jaxeff compare before after         what changed between two checkpoints
  jaxeff compare before after --sort path --top 10
  jaxeff compare before after --filter '*mlp*' --by block
"""
_PRUNE = """\
  jaxeff prune model --sparsity 0.5 --output pruned
  jaxeff prune model.safetensors --sparsity 0.5 --output pruned.safetensors --exclude 'layers.0.*'
"""
_PATH = (
    "a .safetensors file, a directory of shards and their index, an Orbax checkpoint or a Flax .msgpack file"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` is `sys.argv[1:]` by default."""
    collects = gc.isenabled()
    # Nothing here leaves reference cycles, and importing JAX takes an eighth less time.
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
    """End the process at once on Ctrl-C.

    An exception would crash the process if it were raised while JAX's extensions are initialized.
    """

    def exit_at_once(*arguments: object) -> NoReturn:
        _ = os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{_INTERRUPTED}\n".encode())
        os._exit(130)

    in_main = threading.current_thread() is threading.main_thread()
    # Keep the caller's own handler; a shell ignores interrupts of background jobs.
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, exit_at_once)
    try:
        yield
    finally:
        _ = signal.signal(signal.SIGINT, before)


def _told(error: OSError) -> str:
    """Return the system's message, with the name of the file."""
    said = (error.strerror or str(error)).split("\n", 1)[0]
    return said if error.filename is None else f"{os.fspath(error.filename)!r}: {said}"


def _leave_output() -> None:
    # The interpreter flushes standard output once more when it exits, and would complain.
    _ = os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> None:
    try:
        with _exit_when_interrupted():
            arguments = _parser().parse_args(argv)
            # Imported here, so that --help and mistyped arguments need not wait for JAX.
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
        lambda: _table(output.render, report, checkpoint, arguments=arguments),
    )


def _table(render: Callable[..., str], *shown: Any, arguments: argparse.Namespace) -> str:
    try:
        return render(
            *shown,
            arguments.sort,
            arguments.top,
            _width(),
            pattern=arguments.filter,
            blocks=arguments.by == "block",
        )
    except ValueError as error:
        print(f"jaxeff: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
        lambda: _table(comparing.render, comparison, arguments=arguments),
    )


def _prune(arguments: argparse.Namespace) -> None:
    from jaxeff.checkpoints import _writing as writing

    exclude = writing.EXCLUDED if arguments.exclude is None else tuple(arguments.exclude)
    with _refused():
        print(
            writing.prune_checkpoint(
                arguments.path, arguments.output, sparsity=arguments.sparsity, exclude=exclude
            )
        )


def _width() -> int:
    """Return COLUMNS if set, else the terminal's width, else that of any table."""
    from jaxeff.output.text import WIDTH

    return max(shutil.get_terminal_size((WIDTH, 24)).columns, 20)


_STANDARD_OUTPUT = "-"


def _check_writable(*paths: str | None) -> None:
    from jaxeff.output import files

    for path in paths:
        if path is not None and path != _STANDARD_OUTPUT:
            files.check_writable(path)


def _print(json_path: str | None, to_json: Callable[[], str], to_table: Callable[[], str]) -> None:
    """Print the table and write JSON to a file if requested, or print only the JSON."""
    from jaxeff.output import files

    if json_path == _STANDARD_OUTPUT:
        print(to_json())
        return
    if json_path is not None:
        files.write(json_path, to_json())
    print(to_table())


@contextmanager
def _refused() -> Iterator[None]:
    """End the command if a checkpoint cannot be read, as for a wrong argument."""
    from jaxeff.checkpoints import CheckpointError

    try:
        yield
    except CheckpointError as error:
        print(f"jaxeff: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks the version up only when it is requested."""

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
        description="Find out which weights of a JAX network earn their keep, and what can be removed.",
        **_examples(_DEMO + _ANALYZE + _COMPARE + _PRUNE),
    )
    _ = parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    help_ = "train a small network on scanned digits, analyze and prune it"
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
        help="analyze the weights of a checkpoint by magnitude, without its model",
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
    help_ = "show what changed from one checkpoint to another"
    compare = commands.add_parser("compare", help=help_, **_examples(_COMPARE))
    _ = compare.add_argument("a", metavar="A", help=_PATH)
    _ = compare.add_argument("b", metavar="B", help="another checkpoint, in any of these formats")
    _ = compare.add_argument(
        "--json", metavar="FILE", help="also write the changes; - prints them instead of the table"
    )
    help_ = "change (the default) or size, the largest first; or path"
    _ = compare.add_argument("--sort", metavar="ORDER", default="change", type=_order(_changes), help=help_)
    for command, run in ((analyze, _analyze), (compare, _compare)):
        help_ = "show only layers whose names match, such as '*attention*'; ? stands for one character"
        _ = command.add_argument("--filter", metavar="PATTERN", default="*", help=help_)
        help_ = "a row for each block, or (default) for each stack of at least three in a table of more than 20 rows"
        _ = command.add_argument("--by", choices=("stack", "block"), default="stack", help=help_)
        help_ = "show only the first N rows, and the first N items of each list after them"
        _ = command.add_argument("--top", metavar="N", type=_integer(0, 10**9), help=help_)
        command.set_defaults(command=run, module="jaxeff.checkpoints")

    help_ = "copy a safetensors checkpoint with the smallest weights of each array set to 0"
    prune = commands.add_parser("prune", help=help_, **_examples(_PRUNE))
    help_ = "a .safetensors file, or a directory with one, or with shards and their index"
    _ = prune.add_argument("path", metavar="PATH", help=help_)
    help_ = "fraction of each weight to remove, in [0, 1)"
    _ = prune.add_argument("--sparsity", metavar="FRACTION", type=_fraction, required=True, help=help_)
    help_ = "the new file or directory, which must not exist"
    _ = prune.add_argument("--output", metavar="PATH", required=True, help=help_)
    help_ = (
        "leave arrays of this name whole, such as 'layers.0.*', instead of embeddings and heads; repeatable"
    )
    _ = prune.add_argument("--exclude", metavar="PATTERN", action="append", help=help_)
    prune.set_defaults(command=_prune, module="jaxeff.checkpoints")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction in [0, 1)")
    return value


def _file(text: str) -> str:
    if text == "-":
        raise argparse.ArgumentTypeError("a page goes into a file: pass its path, not -")
    return text


def _order(known: Callable[[], Sequence[str]]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known():
            raise argparse.ArgumentTypeError(f"{text!r} is not an order: pass one of {', '.join(known())}")
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
