"""The Python of every page of the docs runs as printed, page by page, in an empty folder."""

import re
from pathlib import Path

import jax
import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
_PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_in_order_in_one_namespace(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}
    # As a user has it, and not as the tests do.
    with jax.numpy_rank_promotion("allow"):
        for block in _PYTHON_BLOCK.finditer(text):
            # Blank lines above, so that a traceback points into the page.
            above = text.count("\n", 0, block.start(1))
            exec(compile("\n" * above + block[1], page.name, "exec"), namespace)
