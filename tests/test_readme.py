"""README.md is true: its Python runs as printed, and what it repeats from pyproject.toml agrees."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

_PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FLOOR = re.compile(r"\b(python|jax|jaxlib|flax|optax|numpy|rich)\s*(?:>=|≥)\s*([\d.]*\d)", re.IGNORECASE)


def _floors(text: str) -> dict[str, str]:
    return {name.lower(): version for name, version in _FLOOR.findall(text)}


def test_python_blocks_run_in_order_in_one_namespace():
    namespace: dict[str, object] = {"__name__": "readme"}
    blocks = list(_PYTHON_BLOCK.finditer(README))
    assert blocks
    for block in blocks:
        # Blank lines above, so that a traceback points into README.md.
        above = README.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], "README.md", "exec"), namespace)


def test_it_is_a_page_to_land_on():
    assert README.count("\n") <= 150
    assert all(block[1].count("\n") <= 25 for block in _PYTHON_BLOCK.finditer(README))


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_nothing_is_installed_under_a_name_that_nobody_owns(document):
    assert not re.search(r"pip install[^`\n]* '?jaxeff", document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_no_heading_stands_twice_on_a_page(page):
    headings = re.findall(r"^#+ .*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(set(headings)) == len(headings)


def test_floors_are_those_of_pyproject():
    declared = _floors("\n".join([f"python {PROJECT['requires-python']}", *PROJECT["dependencies"]]))
    stated = _floors(README)
    assert {"python", "jax"} <= stated.keys()
    assert stated.items() <= declared.items()
