"""What `make docs` adds to MkDocs: the pages of the whole tree under their own paths, and the API's page.

README.md is the front page, and pages link to each other as they do on a forge. A link to a source file becomes its
path: the site has no sources.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

TREE = Path(__file__).resolve().parent.parent
SHOWN = (
    "*.md",
    "docs/**/*.md",
    "docs/*.svg",
    "docs/*.png",
    "docker/README.md",
    "lab/README.md",
    "benchmarks/README.md",
)
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(((?!\w+:)[^)#\s]+)(#[^)\s]*)?\)")

API = """# Python API

What `import taxiway` gives a producer, from its docstrings.
The [interfaces page](producers.md) explains service terms and results, the [errors page](errors.md) what to do about
each error.
"""
TOPICS = {
    "taxiway.client": "Clients and jobs",
    "taxiway.contract": "States and results",
    "taxiway.run": "Runs of a callable",
    "taxiway.errors": "Errors",
}


def api() -> str:
    """The page of all that `taxiway` exports, which mkdocstrings fills."""
    parts, shown = [API], ""
    for node in ast.walk(ast.parse((TREE / "taxiway" / "__init__.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("taxiway."):
            topic = next(title for name, title in TOPICS.items() if node.module.startswith(name))
            parts += [f"\n## {topic}\n"] if topic != shown else []
            parts += [f"\n::: {node.module}.{name.name}\n" for name in node.names]
            shown = topic
    return "".join(parts)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The tree's pages in place of those of docs/ alone, beside the theme's own files."""
    from mkdocs.structure.files import File, Files

    shown = {path.relative_to(TREE).as_posix() for pattern in SHOWN for path in TREE.glob(pattern)}
    ours = [File(path, str(TREE), config.site_dir, config.use_directory_urls) for path in sorted(shown)]
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *ours, File.generated(config, "docs/api.md", content=api())])


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page, its links to sources replaced by their paths."""

    def shown(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
        if files.get_file_from_path(target) or not (TREE / target).is_file():  # strict mode names what leads nowhere
            return link[0]
        return link[1] if link[1].strip("`") == target else f"{link[1]} (`{target}`)"

    return LINK.sub(shown, markdown)
