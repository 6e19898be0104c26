"""The layering of the package: a module imports only what stands above it or left of it."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
ROWS = """
types masked axes checks hlo costs chips
gates ratios aggregations presets objectives advantages corrections sharding collectives
distributed tokenizer
hf_tokenizer datasets
model.rope model.splash model.config model.params model.attention model.vocab model.moe model.head
model.transformer
model.hf_config model.hf model.from_gguf model
tasks.base tasks.forks tasks.jsonl tasks.answers tasks.agreement tasks.jail tasks.sandbox
tasks.chain_sum tasks.countdown tasks.math_answer tasks.reasoning tasks.programs
tasks.prepared tasks.mixture tasks
streams data rewards learnable
diagnostics routing sampling handover decoding assembly plans sampler state learner checkpoint
rundir progress preflight_tables
stacked population gradlab_fidelity gradlab_pull gradlab gradlab_tokens
evaluate report_words report_page report_plots report gradlab_words gradlab_plots gradlab_report
sweep_stats sweep_words sweep_plots sweep_report
inputs settings experience startup programs preflight_checks preflight cohorts joint
train cohort_run sweep_run
main sweep export
"""
ORDER = {name: i for i, name in enumerate(ROWS.split())}
CORE = {"jax", "flax", "optax", "orbax", "chex", "ml_collections", "absl", "numpy", "etils"}
ANYWHERE = {
    "report",
    "report_page",
    "report_plots",
    "evaluate",
    "gradlab_plots",
    "gradlab_report",
    "sweep_plots",
    "sweep_report",
}  # not part of a training step


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


def inner(name):
    """The module of this package that a dotted name refers to, or None."""
    parts = name.split(".")[1:] if name.startswith("sapo_jax") else []
    candidates = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((c for c in candidates if c in ORDER), None)


def test_every_module_has_its_place():
    missing = [name for name, _ in modules() if name not in ORDER]
    assert not missing, f"add to ROWS: {missing}"


def test_imports_go_one_way():
    wrong = [
        f"{name} imports {inner(used)}"
        for name, tree in modules()
        for used in imported(tree, top_level=False)
        if inner(used) and ORDER[inner(used)] >= ORDER[name]
    ]
    assert not wrong, wrong


def test_the_core_imports_only_the_core():
    """A bare TPU or GPU image runs a training step: the rest is imported where it is used."""
    allowed = CORE | set(sys.stdlib_module_names) | {"sapo_jax"}
    wrong = [
        f"{name} imports {used}"
        for name, tree in modules()
        if name not in ANYWHERE
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
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path}: {node.name} has {lines} lines"
