"""Sphinx extension of this book: no outside requests, its style, pictures with alt text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOGGER = logging.getLogger(__name__)

# Jupyter Book loads these two always; both point at scripts of other servers.
UNWANTED = ("sphinx_thebe", "sphinx_comments")


def drop_listeners(app: Any) -> None:
    """Disconnect the extensions that add scripts from elsewhere to every page."""
    for listeners in app.events.listeners.values():
        listeners[:] = [x for x in listeners if not x.handler.__module__.startswith(UNWANTED)]


def configure(app: Any, config: Any) -> None:
    """Point Sphinx at files beside this one, wherever the sources were staged."""
    extra = ROOT / "_build" / "extra"
    if not (extra / "vendor" / "require.js").exists():
        LOGGER.warning("%s has no scripts; run `make vendor` first", extra)
    config.html_extra_path = [str(extra)]
    config.html_static_path = [*config.html_static_path, str(HERE / "static")]
    config.html_favicon = str(HERE / "static" / "favicon.svg")
    config.html_logo = str(HERE / "static" / "logo.svg")


def check_pictures(app: Any, doctree: nodes.document, docname: str) -> None:
    """Warn (so fail) about a picture that a screen reader cannot describe."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt", "").strip():
            LOGGER.warning("image %s has no alt text", image["uri"], location=image)
    for raw in doctree.findall(nodes.raw):
        for tag in re.findall(r"<img\b[^>]*>", raw.astext()):
            if not re.search(r'\balt="[^"]+"', tag):
                LOGGER.warning("an <img> in the output of a cell has no alt text", location=raw)


def drop_thebe_scripts(
    app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Remove what was registered before this extension could prevent it."""
    if "script_files" in context:
        kept = [s for s in context["script_files"] if "thebe" not in str(getattr(s, "filename", s))]
        context["script_files"] = kept


def setup(app: Any) -> dict[str, Any]:
    """Register the extension."""
    drop_listeners(app)
    app.connect("config-inited", configure)
    app.connect("doctree-resolved", check_pictures)
    app.connect("html-page-context", drop_thebe_scripts, priority=900)
    app.add_css_file("ch15.css", priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
