"""MkDocs: a link to a file outside of docs/ becomes its path; a broken one ends the build.

Anchors keep the letters of every script, as GitHub's and Gitee's do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify_unicode

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]*)(#[^)]*)?\)")
_DOCS = Path(__file__).parent


def on_config(config: Any) -> None:
    """Gives headings in Chinese their anchors: the extension's default drops such letters."""
    config.mdx_configs["toc"]["slugify"] = slugify_unicode


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces such links: the site has the pages only, a reader of the source has the files."""

    def path(match: re.Match[str]) -> str:
        text, target = match[1], (_DOCS / match[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"link to {match[2]}, which does not exist")
        shown = f"`{target.relative_to(_DOCS.parent)}`"
        return shown if text.strip("`") in shown else f"{text} ({shown})"

    return _OUTSIDE.sub(path, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name what they speak of in Sphinx's way, of which the site keeps the name."""
    return re.sub(
        r":(?:attr|class|data|func|meth|mod):<code>~?([^<]*)</code>", r"<code>\1</code>", html
    )
