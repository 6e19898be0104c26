"""What the site has besides docs/: the README in front, the tutorial, and what pages link to.

A link to a file of the repository leads to a page that shows it, so that the site is whole.
"""

from __future__ import annotations

import json
import os
import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r"(\[[^\]]*\]\()([^)\s#]+)")
SHOWN = {".py": "python", ".sh": "bash", ".yml": "yaml", ".toml": "toml"}
origins = {"index.md": "README.md", "tutorial.md": "docs/tutorial.ipynb"}  # of pages, by their uri


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in origins.values():
        return next(uri for uri, origin in origins.items() if origin == path)
    if path.endswith((".md", ".png", ".svg")):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def targets(text: str, origin: str) -> dict[str, str]:
    """The links of a page to files of the repository, with the path of each."""
    found = {}
    for _, link in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
        path += "/README.md" if (ROOT / path / "README.md").is_file() else ""
        if (ROOT / path).is_file() and not path.startswith(".."):
            found[link] = path
    return found


def _cell(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    printed = "".join(line for each in cell["outputs"] for line in each.get("text", []))
    return f"```python\n{source}\n```" + (f"\n\n```text\n{printed.rstrip()}\n```" * bool(printed))


def read(path: str) -> str:
    """A file of the repository as Markdown."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return "\n\n".join(map(_cell, json.loads(text)["cells"]))
    return f"# {path}\n\n````{SHOWN.get(pathlib.Path(path).suffix, 'text')}\n{text}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to, from page to page."""
    files.remove(files.src_uris["tutorial.ipynb"])
    origins.update({f.src_uri: f"docs/{f.src_uri}" for f in files.documentation_pages()})
    todo = list(dict.fromkeys(["README.md", *origins.values()]))
    for origin in todo:
        uri = place(origin)
        if origin.endswith((".png", ".svg")):
            if uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=os.fspath(ROOT / origin)))
            continue
        origins[uri] = origin
        text = read(origin)
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, content=text))
        linked = targets(text, origin) if origin.endswith((".md", ".ipynb")) else {}
        todo.extend(path for path in linked.values() if path not in todo)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links of the site."""
    del config, files
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    found = targets(markdown, origins[here])

    def moved(match: re.Match) -> str:
        if match[2] not in found:
            return match[0]
        return match[1] + posixpath.relpath(place(found[match[2]]), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)
