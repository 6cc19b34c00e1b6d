"""The house: imports go one way, without circles; few files at the top; no file too long to read."""

import ast
from pathlib import Path

import pytest

import jaxeff

ROOT = Path(jaxeff.__file__).parent
# From the foundation up: each may import from the lines above its own, and within its own folder.
ORDER = """
numerics
output
graph
metrics
model sketch
statistics
importance cost
report
layers
_saving
_collect
_calibrate _analyze
_compare_criteria
checkpoints prune
advice quantization spectral
monitoring
_pathways _advise _monitor
demo
plot
cli
__main__
""".split("\n")
FLOORS = {room: floor for floor, line in enumerate(ORDER) for room in line.split()}
MOST_FILES, MOST_LINES = 12, 450


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted(ROOT.rglob("*.py"))}


def _imports(module: str) -> set[str]:
    """What a file imports of jaxeff, anywhere in it: for types alone and inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively, which this test does not read"
            names = [f"{node.module}.{name.name}" for name in node.names]
            found.update(name if name in FILES else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return {name for name in found if name in FILES} - {module}


IMPORTS = {module: _imports(module) for module in FILES}


def _room(module: str) -> str:
    """The folder or file at the top in which a module stands."""
    return module.split(".")[1]


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn; empty where there are none."""
    done: set[str] = set()

    def search(module: str, above: list[str]) -> list[str]:
        if module in above:
            return [*above[above.index(module) :], module]
        if module in done:
            return []
        found = next(filter(None, (search(other, [*above, module]) for other in sorted(graph[module]))), [])
        done.add(module)
        return found

    return next(filter(None, (search(module, []) for module in graph)), [])


def test_no_file_imports_itself_by_way_of_others():
    assert _circle(IMPORTS) == []


def test_a_circle_is_found():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_room_has_a_floor():
    rooms = {_room(module) for module in FILES if module != "jaxeff"}
    assert rooms == FLOORS.keys()


@pytest.mark.parametrize("module", [module for module in FILES if module != "jaxeff"])
def test_imports_go_up_only(module):
    # The entry point hands out what all others make: the command line alone asks it, for its version.
    room, known = _room(module), IMPORTS[module] - ({"jaxeff"} if _room(module) == "cli" else set())
    assert "jaxeff" not in known
    above = {other for other in known if _room(other) != room and FLOORS[_room(other)] >= FLOORS[room]}
    assert above == set()


def test_few_files_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= MOST_FILES


def test_no_file_is_too_long_to_read():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: count for module, count in lines.items() if count > MOST_LINES} == {}


def test_the_entry_point_shows_the_public_names_alone():
    assert all(not name.startswith("_") for name in set(dir(jaxeff)) - {"__version__"})
    for name in dir(jaxeff):
        assert getattr(jaxeff, name) is not None
