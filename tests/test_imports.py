"""The layering of the package, and the sizes of its files."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
ORDER = """
types axes cli masked diagnostics tasks parallel data datasets objectives advantages model rewards
corrections sampler learner training gradlab report evaluate export train preflight main sweep
"""
WINGS = ORDER.split()
CORE = {"jax", "flax", "optax", "orbax", "chex", "ml_collections", "absl", "numpy", "etils"}
PAGES = ("report", "evaluate")  # not part of a training step


def modules():
    for path in sorted((ROOT / "sapo_jax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "sapo_jax").with_suffix("").parts)
        name = name.removesuffix(".__init__").removesuffix("__init__")
        if name:
            yield name, ast.parse(path.read_text())


def imported(tree, *, top_level):
    """Dotted names of what a module imports; at top level only, or anywhere."""
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def wing(name):
    """The wing, or the file on the doorstep, that a dotted name is in; None outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "sapo_jax" and len(parts) > 1 else None


def test_imports_go_one_way():
    """A wing imports only itself and what stands before it in ORDER."""
    wrong = [
        f"{name} imports {used}"
        for name, tree in modules()
        for used in imported(tree, top_level=False)
        if (of := wing(used)) and WINGS.index(of) > WINGS.index(name.split(".")[0])
    ]
    assert not wrong, wrong


def test_the_core_imports_only_the_core():
    """A bare TPU or GPU image runs a training step: the rest is imported where it is used."""
    allowed = CORE | set(sys.stdlib_module_names) | {"sapo_jax"}
    wrong = [
        f"{name} imports {used}"
        for name, tree in modules()
        if not name.startswith(PAGES)
        for used in imported(tree, top_level=True)
        if used.split(".")[0] not in allowed
    ]
    assert not wrong, wrong


def test_configs_import_only_configs():
    for path in (ROOT / "configs").rglob("*.py"):
        for used in imported(ast.parse(path.read_text()), top_level=False):
            assert used.split(".")[0] in ("configs", "ml_collections") or used.startswith(
                "sapo_jax.axes"
            ), f"{path.name} imports {used}"


def test_files_and_functions_stay_small():
    for path in [*(ROOT / "sapo_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        text = path.read_text()
        assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            document = path.match("configs/base.py")  # one list of all fields
            if isinstance(node, ast.FunctionDef) and not document:
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path}: {node.name} has {lines} lines"
