"""What the site takes from elsewhere in the repository, so that each fact stands once."""

import importlib
import re
from pathlib import Path

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changes.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Doctests())
    return config


class Doctests(Extension):
    """Shows the examples of docstrings as code: in Markdown, '>>>' begins three quotations."""

    def extendMarkdown(self, md: Markdown) -> None:
        # Before fences are read.
        md.preprocessors.register(_Fences(md), "doctests", 100)


class _Fences(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        found, inside = [], False
        for line in [*lines, ""]:
            if line.startswith(">>> ") and not inside:
                found += ["", "```pycon"]
                inside = True
            elif inside and not line.strip():
                found.append("```")
                inside = False
            found.append(line)
        return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links in the repository become links within the site, and `names of MODULE` its public names."""
    markdown = re.sub(r"^names of (\S+)$", _names, markdown, flags=re.MULTILINE)
    for source, target in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown.replace("](../docs/", "](") if page.file.src_uri in ELSEWHERE.values() else markdown


def _names(match: re.Match[str]) -> str:
    module = importlib.import_module(match[1])
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own = [name for name, value in public.items() if getattr(value, "__module__", "").startswith("jaxeff")]
    return "\n".join(f"::: {match[1]}.{name}" for name in own)
