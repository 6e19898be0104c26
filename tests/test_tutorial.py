"""The tutorial runs from top to bottom, without Jupyter, and what it stores is what it teaches."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CODE = [
    cell
    for cell in json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]


def check(text):
    """The policy learns with the gate of docs/my.py, and every number is one."""
    before, after = map(float, re.search(r"Pass@1 (\S+) → (\S+)", text).groups())
    assert 0.2 < before < 0.6
    assert after > before + 0.3
    assert not re.search(r"\bnan\b|\binf\b", text)
    cosines = dict(re.findall(r"^  (\w+) +([-\d.]+)$", text, re.MULTILINE))
    assert list(cosines) == ["sapo", "my_objective", "grpo", "gspo", "cispo", "reinforce"]


def test_the_stored_outputs_show_a_policy_that_learns():
    """Otherwise: python -m docs.tutorial."""
    assert "my_objective" in "".join(line for cell in CODE for line in cell["source"])
    outputs = [each for cell in CODE for each in cell["outputs"]]
    assert {each["output_type"] for each in outputs} == {"stream", "display_data"}
    assert {each.get("name", "stdout") for each in outputs} == {"stdout"}
    check("".join(line for each in outputs for line in each.get("text", [])))
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 2


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    """Cell after cell in one process, started where Jupyter would start it."""
    script = tmp_path / "tutorial.py"
    sources = ["".join(cell["source"]) for cell in CODE]
    script.write_text("import matplotlib\nmatplotlib.use('Agg')\n" + "\n\n".join(sources))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=ROOT / "docs", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check(done.stdout)
