"""What is imported can be installed: dependencies, extras and pins agree with the code."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import sapo_jax
from sapo_jax.cli.process import EXTRAS

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def names(requirements):
    """Distributions, as they are compared."""
    found = (re.match(r"[\w.-]+", line)[0] for line in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def modules_of(requirements):
    """What can be imported of the distributions."""
    by_module = importlib.metadata.packages_distributions()
    wanted = names(requirements)
    return {module for module, owners in by_module.items() if names(owners) & wanted}


def imported():
    """Modules of others that the package imports anywhere."""
    for path in (ROOT / "sapo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                yield node.module.partition(".")[0]
            elif isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)


def test_every_import_has_a_dependency_or_an_extra():
    optional = [line for extra in EXTRAS for line in OPTIONAL[extra]]
    known = modules_of([*PROJECT["dependencies"], *optional])
    ours = set(sys.stdlib_module_names) | {"sapo_jax", "jaxlib"}
    assert not set(imported()) - known - ours


def test_the_hints_on_extras_are_right():
    """``pip install "sapo_jax[plots]"`` must bring what the message says."""
    for extra, modules in EXTRAS.items():
        assert set(modules) <= modules_of(OPTIONAL[extra]), extra
        assert not set(modules) & modules_of(PROJECT["dependencies"])


def test_what_is_tested_is_pinned():
    pinned = names(
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] != "#"
    )
    declared = [*PROJECT["dependencies"], *OPTIONAL["dev"]]
    declared += [line for extra in EXTRAS for line in OPTIONAL[extra]]
    assert names(declared) - {"sapo-jax"} <= pinned


def test_one_version():
    """The newest release of the changelog and of the citation, or the work after it."""
    assert PROJECT["dynamic"] == ["version"]
    released = re.search(r"^## \[(\d\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert f"\nversion: {released}\n" in (ROOT / "CITATION.cff").read_text()
    assert sapo_jax.__version__ == released or re.search(r"\.dev\d+$", sapo_jax.__version__)
