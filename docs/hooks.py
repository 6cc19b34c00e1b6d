"""What the site takes from elsewhere in the repository, so that each fact stands once."""

import importlib
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changes.md"}


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
