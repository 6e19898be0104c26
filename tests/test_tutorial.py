"""The tutorial runs from top to bottom, without Jupyter."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    """Cell after cell in one process, started where Jupyter would start it."""
    cells = json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not [c for c in cells if c.get("outputs")], "clear the outputs before committing"
    script = tmp_path / "tutorial.py"
    script.write_text("import matplotlib\nmatplotlib.use('Agg')\n" + "\n\n".join(sources))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=ROOT / "docs", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cosines with sapo" in done.stdout
