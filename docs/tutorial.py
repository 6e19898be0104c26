"""Run docs/tutorial.ipynb, and store what it prints and draws: python -m docs.tutorial."""

from __future__ import annotations

import pathlib

import nbformat
from nbclient import NotebookClient

PATH = pathlib.Path(__file__).with_name("tutorial.ipynb")


def main() -> None:
    """Execute it where it lies; progress bars are not kept."""
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": PATH.parent}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
