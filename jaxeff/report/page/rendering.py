"""The HTML text of a report's page.

The page's content security policy allows only its own style and script, by their hashes. Jinja escapes every
name; the script reads JSON that contains no `<`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jaxeff.report import _table as table
from jaxeff.report._recommendations import grouped, recommend
from jaxeff.report._records import Snapshot
from jaxeff.report.page import details, figures

_TEMPLATES = "templates"


def check_available() -> None:
    """Check that Jinja is installed.

    Raises:
        ImportError: Jinja is not installed.
    """
    _ = _jinja()


def _jinja() -> Any:
    try:
        return importlib.import_module("jinja2")
    except ImportError as error:
        raise ImportError("an HTML page needs Jinja: pip install jinja2") from error


def render(report: Snapshot, title: str = "jaxeff report") -> str:
    """Return the page, as text that can be stored in any encoding of Unicode.

    Raises:
        ImportError: Jinja is not installed.
    """
    jinja = _jinja()
    layers = report.rows
    environment = jinja.Environment(
        loader=jinja.PackageLoader("jaxeff.report.page", _TEMPLATES),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _text("page.css"), _text("page.js")
    page = environment.get_template("page.html").render(
        title=title,
        version=version("jaxeff"),
        style=jinja.utils.markupsafe.Markup(style),
        script=jinja.utils.markupsafe.Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=jinja.utils.htmlsafe_json_dumps(details.of(layers), separators=(",", ":")),
        summary=figures.summary(report),
        layers=len(layers),
        rows=figures.rows(layers),
        ran=table.ran(report),
        utilization=figures.utilization(layers),
        cost=figures.cost(layers),
        cost_unit="multiply-accumulates" if figures.has_macs(layers) else "weights",
        ranking=figures.ranking(layers),
        advice=grouped(recommend(report), report),
        anchors=figures.anchors(report),
        no_weights=table.no_weights(report),
        notes=table.notes(report),
        attentions=table.attentions(report),
        others=figures.others(report),
    )
    # A name may hold half a surrogate pair, which a file cannot.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _text(name: str) -> str:
    return (files("jaxeff.report.page") / _TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
