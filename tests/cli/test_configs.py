"""Config files are found by name or path from anywhere, and may import the shipped ones."""

import os
import pathlib
import subprocess
import sys

import pytest

from sapo_jax import cli

ROOT = pathlib.Path(__file__).parents[2]


def test_shipped_configs_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "pod/qwen3_8b_v6e", "sweeps/temperature"):
        wanted = cli.from_config(name).to_dict()
        assert cli.from_config(f"configs/{name}.py").to_dict() == wanted  # as the documents say
        assert cli.from_config(str(ROOT / "configs" / f"{name}.py")).to_dict() == wanted
    with pytest.raises(ValueError, match="nearest is sweeps/temperature"):
        cli.from_config("temperatures")


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("def get_config():\n    return 3\n")
    assert cli.from_config("quickstart") == 3


def test_an_argument_of_the_function(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("def get_config(text):\n    return text\n")
    assert cli.from_config(f"{path}:a:b") == "a:b"


def test_configs_elsewhere_import_the_shipped_ones(tmp_path):
    """And those of a folder of the same name; without devices, or jax at all."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "common.py").write_text("N = 7\n")
    (tmp_path / "mine.py").write_text(
        "from configs import common, quickstart\n\n\ndef get_config():\n"
        "    c = quickstart.get_config()\n    c.iterations = common.N\n    return c\n"
    )
    code = (
        "import sys; from sapo_jax import cli; c = cli.from_config('mine.py'); "
        "print(c.iterations, c.task.options.terms, 'jax' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["7", "4", "False"]


@pytest.mark.parametrize("text", ["true", "null", '{"a": true}', "[1, null]", "{'a': b}", "(1"])
def test_what_is_no_python_literal_is_refused(text):
    """As a string it would be accepted, and mean something else."""
    with pytest.raises(ValueError, match="True, False, None"):
        cli.literal(text)


def test_literals():
    texts = ["3", "3.5", "True", "None", '{"a": [1, 2]}', "'3'", "gcd", "a=b.jsonl", "trues"]
    values = [3, 3.5, True, None, {"a": [1, 2]}, "3", "gcd", "a=b.jsonl", "trues"]
    assert [cli.literal(text) for text in texts] == values
